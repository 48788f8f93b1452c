"""`dspfusion evaluate`: the one command of judging. Tables, JSON and contact sheets of stills, videos, the readout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.options import engine_section
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from engines.base import EngineDescription, FusionEngine, Priors
    from engines.evaluation.parts import Part, Scope, Watch
    from engines.evaluation.tables import Table
    from pipeline.frame import FusedFrame

SCORED_EVERY_FRAMES = 5  # of a clip: neighbours score alike
ENGINE, VARIANT = "pytorch", "nano"  # by default


def evaluate(
    data: Annotated[
        Path | None,
        typer.Argument(help="Data folder with eval/index.csv. By default its twelve public pairs are judged."),
    ] = None,
    infrared: Annotated[Path | None, typer.Option(help="Judge a folder of your own: clean infrared pictures.")] = None,
    visible: Annotated[Path | None, typer.Option(help="The clean visible pictures, with equal names.")] = None,
    fused: Annotated[
        Path | None, typer.Option(help="Score these ready-made pictures instead of fusing; equal names again.")
    ] = None,
    degraded_infrared: Annotated[
        Path | None, typer.Option(help="Fuse these infrared pictures, and score against the clean ones.")
    ] = None,
    degraded_visible: Annotated[
        Path | None, typer.Option(help="Fuse these visible pictures, and score against the clean ones.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="The twelve public pairs, besides what else is asked for.")
    ] = False,
    by_set: Annotated[bool, typer.Option("--by-set", help="Every evaluation set by itself.")] = False,
    real: Annotated[bool, typer.Option("--real", help="The published degraded scenes with clean twins.")] = False,
    published: Annotated[bool, typer.Option("--published", help="Beside the published fused pictures.")] = False,
    video: Annotated[
        bool, typer.Option("--video", help="Flicker and warped error of the clips, with and without smoothing.")
    ] = False,
    people: Annotated[bool, typer.Option("--people", help="Contrast of warm people in labelled night pairs.")] = False,
    missing: Annotated[bool, typer.Option("--missing", help="One camera black.")] = False,
    ablation: Annotated[bool, typer.Option("--ablation", help="The priors replaced, one at a time.")] = False,
    diffusion_steps: Annotated[
        str | None, typer.Option(help="Compare these numbers of diffusion steps, such as 10,4,2,1.")
    ] = None,
    readout: Annotated[bool, typer.Option("--readout", help="Is the degradation named rightly?")] = False,
    everything: Annotated[bool, typer.Option("--all", help="All of these parts.")] = False,
    condition: Annotated[
        list[str] | None,
        typer.Option(
            help="clean, vis_lowlight, vis_blur, ir_lowcon, ir_stripe, vis_haze, vis_rain; repeat. "
            "Where clean pictures are degraded here: not with --real, --published or --video."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many pairs of each set.")] = None,
    variant: Annotated[str, typer.Option(help="Size of the network.")] = VARIANT,
    engine: Annotated[str, typer.Option("--engine", help="pytorch is the reference; or auto, openvino, ...")] = ENGINE,
    weights: Annotated[Path | None, typer.Option(help="A safetensors file; without it, the shipped weights.")] = None,
    threads: Annotated[int, typer.Option(min=0, max=256, help="For the network; 0 lets the engine choose.")] = 0,
    sheets: Annotated[
        Path | None, typer.Option(help="Draw contact sheets of full-size tiles into this folder.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables in Markdown to this file.")] = None,
    as_json: Annotated[
        str | None, typer.Option("--json", help="Write the result as JSON to this file; - is the terminal.")
    ] = None,
) -> None:
    """Score fused pictures against the CLEAN sources, also where degraded ones were fused."""
    from pipeline.telemetry import check_targets, write_report

    chosen = [
        name
        for name, asked in {
            "public": public,
            "by_set": by_set,
            "real": real,
            "published": published,
            "video": video,
            "people": people,
            "missing": missing,
            "ablation": ablation,
            "steps": diffusion_steps is not None,
            "readout": readout,
        }.items()
        if asked or everything
    ]
    folders = Folders(infrared, visible, fused, degraded_infrared, degraded_visible)
    request = Request(
        data=data,
        folders=folders,
        parts=tuple(chosen or (["folders"] if folders.given else ["public"])),
        steps=steps_of(diffusion_steps or "10,4,2,1"),
        conditions=conditions_of(condition),
        limit=limit,
        engine=engine,
        variant=variant,
        weights=weights,
        threads=threads,
        sheets=sheets,
    )
    read = (*vars(folders).values(), data and data / "eval", weights)
    check_targets(as_json, markdown, sheets and sheets / "sheet.png", inputs=read)
    with users_mistakes():
        request.check()
        result, tables = judge(request)
    if markdown is not None:
        write_tables(tables, markdown)
    if as_json != "-":
        from engines.evaluation.tables import as_text

        print(as_text(tables), end="")
    if as_json is not None:
        write_report(result, as_json)


@dataclass(frozen=True)
class Folders:
    """The user's own pictures."""

    infrared: Path | None
    visible: Path | None
    fused: Path | None
    degraded_infrared: Path | None
    degraded_visible: Path | None

    @property
    def given(self) -> bool:
        return any(folder is not None for folder in vars(self).values())


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be judged, and with what."""

    data: Path | None
    folders: Folders
    parts: tuple[str, ...]
    steps: tuple[int, ...]
    conditions: tuple[str, ...]  # empty: all of them
    limit: int | None
    engine: str
    variant: str
    weights: Path | None
    threads: int
    sheets: Path | None

    @property
    def scope(self) -> Scope:
        """The same for the parts of a data folder."""
        from engines.evaluation.cases import CONDITIONS
        from engines.evaluation.parts import Scope

        assert self.data is not None
        conditions = self.conditions or CONDITIONS
        return Scope(data_dir=self.data, conditions=conditions, limit=self.limit, sheets_dir=self.sheets)

    def check(self) -> None:
        """Refuses what does not go together and looks for every file of every part, before anything is loaded.

        Raises:
            ConfigError: says which option is missing or too many.
            FileNotFoundError, ValueError: files are missing, or there is nothing to judge.
        """
        from engines.evaluation import parts

        if self.parts == ("folders",):
            self._check_folders()
            return
        if self.folders.given:
            raise ConfigError("folders of your own are judged by themselves: leave out the other parts")
        if self.data is None:
            raise ConfigError("name the data folder (with eval/index.csv), or --infrared and --visible")
        if not self.data.is_dir():
            raise ConfigError(f"{self.data} is not a folder: name the one that holds eval/index.csv")
        for name, option in ("real", "--real"), ("published", "--published"), ("video", "--video"):
            if self.conditions and name in self.parts:
                raise ConfigError(f"{option} has degraded pictures of its own: leave out --condition, or {option}")
        for name, option in ("ablation", "--ablation"), ("steps", "--diffusion-steps"):
            if "clean" in self.conditions and name in self.parts:
                raise ConfigError(f"{option} compares on degraded pictures: leave out --condition clean, or {option}")
        for name in self.parts:
            if name == "video":
                list_clips(self.data, self.limit)
            else:
                parts.check(name, self.scope)

    def _check_folders(self) -> None:
        from engines.evaluation.cases import one_file, stems

        folders = self.folders
        if self.data is not None:
            raise ConfigError("give a data folder or --infrared and --visible, not both")
        if folders.infrared is None or folders.visible is None:
            raise ConfigError("--infrared and --visible belong together: name both folders of clean pictures")
        twins = folders.degraded_infrared or folders.degraded_visible
        if folders.fused is not None:
            if twins:
                raise ConfigError(
                    "--fused scores ready-made pictures: leave out --degraded-infrared and --degraded-visible"
                )
            if (self.engine, self.variant, self.weights, self.threads) != (ENGINE, VARIANT, None, 0):
                raise ConfigError(
                    "--fused scores ready-made pictures: leave out --engine, --variant, --weights and --threads"
                )
        if self.conditions and (folders.fused or twins):
            raise ConfigError("--condition degrades clean pictures: leave it out beside --fused or degraded ones")
        listed = (folders.infrared, folders.visible) if folders.fused is None else (folders.fused,)
        for name in stems(*listed)[: self.limit]:
            for folder in vars(folders).values():
                if folder is not None:
                    one_file(folder, name)


def steps_of(text: str) -> tuple[int, ...]:
    """Numbers of diffusion steps from a text such as 10,4,2,1."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or not all(1 <= count <= 10 for count in counts):
        raise ConfigError(f"--diffusion-steps {text}: give numbers from 1 to 10, such as 10,4,2,1")
    return counts


def conditions_of(names: list[str] | None) -> tuple[str, ...]:
    """The conditions asked for, each once."""
    from engines.evaluation.cases import CONDITIONS

    for name in names or ():
        if name not in CONDITIONS:
            raise ConfigError(f"--condition {name}: choose from {', '.join(CONDITIONS)}")
    return tuple(dict.fromkeys(names or ()))


@contextmanager
def users_mistakes() -> Iterator[None]:
    """Missing and unfit pictures are the user's to mend: one line instead of a traceback."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError) as error:
        raise ConfigError(f"cannot judge this: {error}") from None


def judge(request: Request) -> tuple[dict[str, Any], list[Table]]:
    """Runs every part that is asked for.

    Returns:
        The result as it goes into JSON, and the tables. `rows` hold one entry for each picture, with its `part`; `mean`
        is over those rows of the first part that are of the network as it runs, on pictures that it was not trained on,
        and `parts` holds what each part says about all of its pictures together.
    """
    serving = None if request.folders.fused is not None else engine_of(request)
    try:
        found = {name: run_part(name, request, serving) for name in request.parts}
        description = None if serving is None else serving.description
    finally:
        if serving is not None:
            serving.close()
    first = found[request.parts[0]]
    result: dict[str, Any] = {
        "engine": None if description is None else described(description, request),
        "rows": [{"part": name, **row} for name, part in found.items() for row in part.rows],
        "mean": numeric_means(first.rows if first.main is None else first.main),
        **{key: first.figures[key] for key in ("mean_by_degradation", "mean_degraded") if key in first.figures},
        "parts": {name: part.figures for name, part in found.items()},
    }
    return dict(finite(result)), [table for part in found.values() for table in part.tables]


def run_part(name: str, request: Request, serving: FusionEngine | None) -> Part:
    """Runs one part under a progress bar."""
    from pipeline.terminal import progress

    with progress(name.replace("_", " ")) as watch:
        if name == "folders":
            return own_folders(request, serving, watch)
        assert serving is not None
        assert request.data is not None
        if name == "video":
            return video_part(request.data, serving, request.limit, watch)
        return data_part(name, request, serving, watch)


def data_part(name: str, request: Request, serving: FusionEngine, watch: Watch) -> Part:
    """One of the parts of the data folder's still pictures."""
    from engines.evaluation import parts
    from engines.evaluation.ablation import Ablation

    scope = request.scope
    if name in ("ablation", "steps"):
        ablation = Ablation(serving, request.variant, request.weights, diffusion_steps())
        if name == "steps":
            return parts.steps(ablation, scope, request.steps, watch)
        return parts.priors(ablation, scope, watch)
    run: dict[str, Callable[..., Part]] = {
        "public": parts.public,
        "by_set": parts.by_set,
        "real": parts.real,
        "published": parts.published,
        "people": parts.people,
        "missing": parts.missing,
        "readout": parts.naming,
    }
    return run[name](serving, scope, watch)


def own_folders(request: Request, serving: FusionEngine | None, watch: Watch) -> Part:
    """The user's own pictures: fused here, degraded or not, or ready-made."""
    from itertools import islice

    from engines.evaluation import cases, parts
    from engines.evaluation.evaluate import fusing_with, ready_picture

    folders = request.folders
    assert folders.infrared is not None
    assert folders.visible is not None
    pairs = islice(cases.folder_pairs(folders.infrared, folders.visible), request.limit)
    judged: Iterable[cases.Case]
    if folders.fused is not None:
        judged = islice(cases.fused_cases(folders.fused, folders.infrared, folders.visible), request.limit)
    elif folders.degraded_infrared or folders.degraded_visible:
        judged = cases.twin_cases(pairs, folders.degraded_infrared, folders.degraded_visible)
    else:
        judged = cases.degraded_cases(pairs, request.conditions or cases.CONDITIONS)
    method = ready_picture if serving is None else fusing_with(serving)
    title = "Ready-made pictures" if serving is None else "Own pictures"
    return parts.of_cases(title, method, judged, request.sheets, "own", watch)


# --- video ---

REPLAY = "replay"  # of the ways to fuse a clip, the product's


@dataclass(frozen=True)
class Clip:
    """Two recordings of one scene, and the clean ones that they are judged by."""

    name: str
    inputs: str  # "clean" or "degraded"
    infrared: Path
    visible: Path
    clean_infrared: Path
    clean_visible: Path


def video_part(data: Path, serving: FusionEngine, limit: int | None, watch: Watch) -> Part:
    """Flicker where nothing moves, and warped error: through the replay path, and frame by frame without smoothing."""
    from engines.evaluation.parts import Part
    from engines.evaluation.tables import table_of

    clips = list_clips(data, limit)
    watch[0](len(clips))
    rows = []
    for clip in clips:
        rows += judge_clip(clip, serving)
        watch[1]()
    columns = ("flicker", "warped_error", "VIF", "Qabf", "SSIM")
    figures: dict[str, Any] = {}
    for inputs in ("clean", "degraded"):
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["inputs"] == inputs and row["method"] == method]
            if own:
                figures.setdefault(inputs, {})[method] = numeric_means(own)
    tables = [
        table_of(
            f"Video, {inputs} inputs", "method", columns, methods, "grey levels; static: where both clean sources are"
        )
        for inputs, methods in figures.items()
    ]
    lines = {f"{row['name']} {row['inputs']}, {row['method']}": row for row in rows}
    tables.append(table_of("Video, by clip", "clip", (*columns, "static_share"), lines))
    return Part(rows, figures, tables, [row for row in rows if row["method"] == REPLAY])


def list_clips(data: Path, limit: int | None) -> list[Clip]:
    """The clips for evaluation, each followed by its degraded twin if there is one; never those for training.

    Raises:
        FileNotFoundError: if there is no video/index.json, or a recording that it names is not there.
        ValueError: if there is no clip for evaluation in it.
    """
    root = data / "video"
    if not (root / "index.json").is_file():
        raise FileNotFoundError(f"there is no {root / 'index.json'}")
    entries = json.loads((root / "index.json").read_text())
    if not all({"name", "group", "ir", "vi"} <= entry.keys() for entry in entries):
        raise ValueError(f"{root / 'index.json'} needs name, group, ir and vi of every clip")
    clean = [entry for entry in entries if entry["group"] == "eval"][:limit]
    twins = {entry["name"].removesuffix("_degraded"): entry for entry in entries if entry["group"] == "eval_degraded"}
    clips = []
    for entry in clean:
        sources = root / entry["ir"], root / entry["vi"]
        clips.append(Clip(entry["name"], "clean", *sources, *sources))
        if (twin := twins.get(entry["name"])) is not None:
            clips.append(Clip(entry["name"], "degraded", root / twin["ir"], root / twin["vi"], *sources))
    if not clips:
        raise ValueError(f"{root / 'index.json'} lists no clip of the group eval")
    for clip in clips:
        for path in (clip.infrared, clip.visible):
            if not path.exists():
                raise FileNotFoundError(f"{root / 'index.json'} names {path}, which is not there")
    return clips


def judge_clip(clip: Clip, serving: FusionEngine) -> list[dict[str, Any]]:
    """One row for each way to fuse the clip, and for its inputs."""
    import numpy as np

    from engines.evaluation.metrics import Sources, luminance
    from engines.evaluation.video import StaticScene
    from pipeline.config import SteadyConfig

    unfused = Unfused(serving)
    clean = {
        shown.index: shown
        for shown in replayed(clip.clean_infrared, clip.clean_visible, unfused, SteadyConfig(enabled=False))
    }
    smoothed = replayed(clip.infrared, clip.visible, serving, SteadyConfig())
    unsteadied = replayed(clip.infrared, clip.visible, serving, SteadyConfig(enabled=False))
    kept = [shown for shown in smoothed if shown.index in clean]
    truth = [clean[shown.index] for shown in kept]
    if len(kept) < 2:
        raise ValueError(f"{clip.name}: fewer than two frames of the clip belong to the clean one")
    videos = {
        REPLAY: [shown.fused for shown in kept],
        "replay, steady off": [shown.fused for shown in unsteadied if shown.index in clean],
        "frame by frame": [
            serving.fuse(shown.infrared, shown.visible, serving.estimate_priors(shown.infrared, shown.visible))
            for shown in kept
        ],
        "maximum": [np.maximum(shown.infrared, luminance(shown.visible)) for shown in kept],
        "infrared input": [shown.infrared for shown in kept],
        "visible input": [shown.visible for shown in kept],
    }
    scene = StaticScene([shown.infrared for shown in truth], [shown.visible for shown in truth])
    rows: list[dict[str, Any]] = [
        {
            "name": clip.name,
            "inputs": clip.inputs,
            "method": method,
            "flicker": scene.flicker(frames),
            "warped_error": error,
            "static_share": scene.static_share,
        }
        for (method, frames), error in zip(videos.items(), scene.warped_errors(list(videos.values())), strict=True)
    ]
    scored = range(SCORED_EVERY_FRAMES - 1, len(truth), SCORED_EVERY_FRAMES)
    sources = [Sources(truth[index].infrared, truth[index].visible) for index in scored]
    for row, frames in zip(rows, videos.values(), strict=True):
        scores = [source.score(luminance(frames[index])) for source, index in zip(sources, scored, strict=True)]
        row.update(numeric_means(scores))
    return rows


@dataclass(frozen=True)
class Shown:
    """One frame of a replay: what went in on one pixel grid, and what came out."""

    index: int  # of the visible frame
    infrared: Any  # uint8 (H, W)
    visible: Any  # uint8 RGB (H, W, 3)
    fused: Any  # uint8 RGB (H, W, 3)


def replayed(infrared: Path, visible: Path, serving: FusionEngine, steady: Any) -> list[Shown]:
    """All fused frames of two recordings, through the same path as `dspfusion replay`."""
    from pipeline.replay import ReplayConfig, replay

    frames: list[Shown] = []

    def collect(frame: FusedFrame) -> None:
        aligned = frame.aligned
        if aligned.infrared is not None and aligned.visible is not None and aligned.pair.visible is not None:
            frames.append(Shown(aligned.pair.visible.index, aligned.infrared, aligned.visible, frame.image))

    replay(
        ReplayConfig(infrared=str(infrared), visible=str(visible), steady=steady),
        engine=serving if isinstance(serving, KeptOpen) else KeptOpen(serving),
        on_fused=collect,
    )
    return frames


class KeptOpen:
    """An engine that a replay may close without closing it for us."""

    def __init__(self, engine: FusionEngine) -> None:
        self._engine = engine
        self.description: EngineDescription = engine.description

    def estimate_priors(self, infrared: Any, visible: Any) -> Priors:
        return self._engine.estimate_priors(infrared, visible)

    def fuse(self, infrared: Any, visible: Any, priors: Priors) -> Any:
        return self._engine.fuse(infrared, visible, priors)

    def prove(self, infrared: Any, visible: Any, priors: Priors, fused: Any) -> float | None:
        return self._engine.prove(infrared, visible, priors, fused)

    def close(self) -> None:
        """Leaves the engine open."""


class Unfused(KeptOpen):
    """Reads priors once, to be handed on, and shows the visible picture: for reading the frames of a recording."""

    def fuse(self, infrared: Any, visible: Any, priors: Priors) -> Any:
        return visible

    def prove(self, infrared: Any, visible: Any, priors: Priors, fused: Any) -> None:
        """There is nothing to prove."""


# --- engine and output ---


def diffusion_steps() -> int:
    """How many steps the engine takes by default."""
    from pipeline.config import EngineConfig

    return EngineConfig().diffusion_steps


def engine_of(request: Request) -> FusionEngine:
    """The engine that is judged."""
    from pipeline.live import engine_for

    weights = None if request.weights is None else str(request.weights)
    section = engine_section(runtime=request.engine, variant=request.variant, threads=request.threads, weights=weights)
    return engine_for(section)


def described(description: EngineDescription, request: Request) -> dict[str, Any]:
    """Which network and runtime the scores are of."""
    return {
        "runtime": description.runtime,
        "precision": description.precision,
        "variant": description.variant,
        "weights": None if request.weights is None else request.weights.name,
        "weights_sha256": description.weights_sha256,
        "diffusion_steps": diffusion_steps(),
    }


def numeric_means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of every number that all rows have, by its name. Rows where it is no number (NaN) do not count."""
    means = {}
    for name in [name for name, value in rows[0].items() if isinstance(value, float)] if rows else []:
        if all(name in row for row in rows):
            values = [row[name] for row in rows if math.isfinite(row[name])]
            means[name] = sum(values) / len(values) if values else math.nan
    return means


def finite(value: Any) -> Any:
    """The same with None for what is no number, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tables(tables: Iterable[Table], path: Path) -> None:
    """Writes the tables in Markdown.

    Raises:
        ConfigError: if the file cannot be written.
    """
    from calibration.whole_file import write_text
    from engines.evaluation.tables import as_markdown

    try:
        write_text(path, as_markdown(tables))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}: choose another place") from None
