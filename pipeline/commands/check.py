"""`dspfusion calibrate check`: is the calibration still right? Measured on what the cameras saw, without a board."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np

    from calibration.far import Pair
    from calibration.residual import Verdict
    from pipeline.commands.overlay import Overlays
    from pipeline.frame import FramePair
    from pipeline.register import Register

MOST_PAIRS = 32  # of a recording, evenly spread over it
FAR_PAIRS = 8  # of these, where one has to look far
FAR_PX = 12.0  # for a picture 640 pixels wide: a mount that creeps does not go so far
EXIT_STATUS = {"ok": 0, "degraded": 1, "lost": 1, "no_information": 3}  # 2 is a user's mistake, as everywhere


def check(
    infrared: Annotated[Path, typer.Argument(metavar="IR", help="Infrared image, image folder or video file.")],
    visible: Annotated[Path, typer.Argument(metavar="VIS", help="Visible image, image folder or video file.")],
    calibration: Annotated[
        str | None, typer.Option(help="A dspfusion-calibration/1 file; without it, infrared is only resized.")
    ] = None,
    each: Annotated[
        bool, typer.Option("--each", help="Stills that are not of one rig: judge every pair by itself.")
    ] = False,
    displacement: Annotated[
        Path | None,
        typer.Option(
            help="With --each: a folder of NAME.npz, whose array disp (h, w, 2) is known: the infrared pixel (x, y) "
            "belongs to the visible one at (x, y) + disp, in pixels of the picture. Prints the error before and after."
        ),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(help="Write pictures to this folder: infrared edges over visible, before and after."),
    ] = None,
    as_json: Annotated[
        str | None, typer.Option("--json", help="Write the result as JSON to this file; - is the terminal.")
    ] = None,
) -> None:
    """Measure how far infrared, as it would be fused, is off the visible picture.

    `matrix` maps a pixel of the infrared picture, as it would be fused, to the visible pixel that it belongs to.

    Exit status: 0 ok, 1 degraded or lost, 3 no information (the pictures have nothing in common), 2 an error. With
    --each it is that of the worst pair.
    """
    from pipeline.commands.overlay import Overlays
    from pipeline.errors import ConfigError
    from pipeline.recording import IMAGE_SUFFIXES
    from pipeline.telemetry import check_targets, write_report

    sheet = pictures and pictures / "sheet.png"
    check_targets(as_json, inputs=(infrared, visible, calibration, displacement), others=(sheet,))
    # A drawn picture has the name of the one that it shows: it would replace it in its own folder.
    stills = [path for path in (infrared, visible) if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES]
    check_targets(sheet, inputs=[path if path.is_dir() else path.parent for path in stills])
    if displacement is not None and not each:
        raise ConfigError("--displacement is of single pairs: add --each")
    with nullcontext() if pictures is None else Overlays(pictures) as drawn:
        if each:
            result = check_each(infrared, visible, calibration, displacement, drawn)
            text, states = describe_each(result), [pair["state"] for pair in result["pairs"]]
        else:
            result = check_alignment(infrared, visible, calibration, drawn)
            text, states = describe(result), [result["state"]]
    if as_json != "-":
        print(text)
    if as_json:
        write_report(result, as_json)
    raise typer.Exit(max(EXIT_STATUS[state] for state in states))


def check_alignment(
    infrared: Path, visible: Path, calibration: str | None = None, drawn: Overlays | None = None
) -> dict[str, Any]:
    """The residual transform of one rig's stills, folders or clips, with state and health.

    Raises:
        DspfusionError, CalibrationError: the input cannot be read, compared, or does not fit the calibration.
    """

    def moments() -> Iterator[_Moment]:
        return _aligned(infrared, visible, calibration)

    verdict, frames = _verdict_on(moments)
    if drawn is not None:
        for moment in moments():
            drawn.add(moment.name, moment.pair.infrared, moment.pair.visible, verdict.matrix)
    return {
        **_as_json(verdict),
        "frames": frames,
        "informative_frames": verdict.informative,
        "size": list(verdict.size),
        "calibrated": calibration is not None,
    }


def check_each(
    infrared: Path,
    visible: Path,
    calibration: str | None = None,
    displacement: Path | None = None,
    drawn: Overlays | None = None,
) -> dict[str, Any]:
    """The residual transform of every pair of two folders by itself, and its error where the truth is known.

    Raises:
        DspfusionError, CalibrationError: as `check_alignment`; or a displacement is missing or does not fit.
    """
    import numpy as np

    rows = []
    for moment in _aligned(infrared, visible, calibration, each=True):
        verdict, _ = _verdict_on(lambda moment=moment: iter([moment]))  # type: ignore[misc]
        row = {"name": moment.name, **_as_json(verdict)}
        if displacement is not None:
            truth = _truth(displacement, moment)
            row["before_px"] = round(_error_px(np.eye(3), truth), 3)
            row["after_px"] = round(_error_px(verdict.matrix, truth), 3)
        rows.append(row)
        if drawn is not None:
            found = f"{row['before_px']:.1f} -> {row['after_px']:.1f} px" if displacement else str(row["state"])
            drawn.add(moment.name, moment.pair.infrared, moment.pair.visible, verdict.matrix, f"after: {found}")
    told = [row for row in rows if row["state"] != "no_information"]
    result: dict[str, Any] = {"pairs": rows, "frames": len(rows), "informative_frames": len(told)}
    if displacement is not None:
        for name, of in (("median", np.median), ("mean", np.mean)):
            result[name] = {key: round(float(of([row[key] for row in rows])), 3) for key in ("before_px", "after_px")}
    return result


def describe(result: dict[str, Any]) -> str:
    """One line for people."""
    if result["state"] == "no_information":
        wrong = "; if they have them, the calibration is of another rig" if result["calibrated"] else ""
        return f"no information: nothing was found that both cameras see; record a scene with edges in both{wrong}"
    (x, y), sigma = result["shift_px"], result["sigma_px"]
    return (
        f"{result['state']} (health {result['health']:.2f}): infrared belongs {result['displacement_px']:.1f} px off "
        f"(+-{sigma:.1f}): x {x:+.1f} px, y {y:+.1f} px, roll {result['roll_deg']:+.2f} deg, "
        f"scale {result['scale']:.4f}; {result['informative_frames']} of {result['frames']} frames told"
    )


def describe_each(result: dict[str, Any]) -> str:
    """A table for people, one line for each pair."""
    from engines.evaluation.tables import Table, as_text

    known = "median" in result
    columns = (
        "state",
        "displacement_px",
        "sigma_px",
        "roll_deg",
        "scale",
        *(("before_px", "after_px") if known else ()),
    )
    rows = [(row["name"], *(row[column] for column in columns)) for row in result["pairs"]]
    if known:
        rows += [(name, *(result[name].get(column) for column in columns)) for name in ("median", "mean")]
    title = f"{result['informative_frames']} of {result['frames']} pairs told how they lie to each other"
    note = "before and after: mean distance from where infrared belongs, over the picture" if known else ""
    return as_text([Table(title, ("pair", *columns), tuple(rows), note)]).rstrip()


@dataclass(frozen=True)
class _Moment:
    """One pair, as the pipeline would hand it to the fusion."""

    name: str
    pair: Pair


def _verdict_on(moments: Callable[[], Iterator[_Moment]]) -> tuple[Verdict, int]:
    """What the pairs say together, and how many they are. They are asked for again where one has to look far."""
    from calibration.far import look_far
    from calibration.residual import NATURAL_WIDTH_PX, displacement_px, settle, survey

    surveyed = [survey(one.pair.infrared, one.pair.visible, one.pair.weight) for one in moments()]
    verdict = settle(surveyed)
    natural_px = displacement_px(verdict.matrix, verdict.size) * NATURAL_WIDTH_PX / verdict.size[0]
    if verdict.state == "no_information" or natural_px > FAR_PX:
        step = -(-len(surveyed) // FAR_PAIRS)
        far = look_far([one.pair for one in islice(moments(), 0, None, step)])
        verdict = far if far.state != "no_information" else verdict
    return verdict, len(surveyed)


def _as_json(verdict: Verdict) -> dict[str, Any]:
    import numpy as np

    from calibration.residual import displacement_px, parameters_of

    x, y, roll, log_scale = (float(value) for value in parameters_of(verdict.matrix, verdict.size))
    return {
        "matrix": [[float(value) for value in row] for row in verdict.matrix],
        "state": verdict.state,
        "health": round(verdict.health, 3),
        "displacement_px": round(displacement_px(verdict.matrix, verdict.size), 3),
        "sigma_px": None if verdict.sigma_px is None else round(verdict.sigma_px, 3),
        "shift_px": [round(x, 3), round(y, 3)],
        "roll_deg": round(float(np.degrees(roll)), 4),
        "scale": round(float(np.exp(log_scale)), 5),
    }


def _truth(folder: Path, moment: _Moment) -> np.ndarray:
    """(h, w, 2): the visible pixel (x, y) that each infrared pixel belongs to; NaN where it is outside the picture."""
    from zipfile import BadZipFile
    from zlib import error as BadCompression

    import cv2
    import numpy as np

    from pipeline.errors import SourceError

    file, height, width = folder / f"{moment.name}.npz", *moment.pair.visible.shape[:2]
    try:
        moved = np.load(file)["disp"].astype(np.float32)
    except (OSError, EOFError, BadZipFile, BadCompression, LookupError, ValueError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else "holds no array named disp"
        raise SourceError(f"{file} {reason}: give the folder with the displacement of every pair") from None
    if moved.ndim != 3 or moved.shape[2] != 2 or moved.size == 0 or not np.isfinite(moved).all():
        raise SourceError(f"{file}: disp has the shape {moved.shape}: it needs (h, w, 2), finite pixels as (dx, dy)")
    column, row = np.meshgrid(np.arange(width), np.arange(height))
    truth = np.stack([column, row], axis=2) + cv2.resize(moved, (width, height))
    truth[((truth < 0) | (truth > (width - 1, height - 1))).any(axis=2)] = np.nan
    return truth


def _error_px(matrix: np.ndarray, truth: np.ndarray) -> float:
    """Mean distance between where a transform takes the infrared pixels and where they belong."""
    import cv2
    import numpy as np

    height, width = truth.shape[:2]
    column, row = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    moved = cv2.perspectiveTransform(np.stack([column, row], axis=2), matrix)
    return float(np.nanmean(np.linalg.norm(moved - truth, axis=2)))


def _aligned(infrared: Path, visible: Path, calibration: str | None, each: bool = False) -> Iterator[_Moment]:
    """Up to MOST_PAIRS pairs, or `each` pair of stills."""
    from calibration.far import Pair
    from pipeline.config import GainConfig, RegistrationConfig
    from pipeline.errors import SourceError
    from pipeline.gain import InfraredGain
    from pipeline.register import Register

    register = Register(RegistrationConfig(calibration=calibration, refine=False), InfraredGain(GainConfig()))
    any_pair = False
    for name, pair in _stills_of(infrared, visible) if each else _pairs(infrared, visible, register):
        any_pair = True
        aligned = register(pair)
        assert aligned.infrared is not None
        assert aligned.visible is not None
        yield _Moment(name, Pair(aligned.infrared, aligned.visible, aligned.weight))
    if not any_pair:
        raise SourceError("no infrared picture is near a visible one in time: give recordings of the same moment")


def _stills_of(infrared: Path, visible: Path, most: int | None = None) -> Iterator[tuple[str, FramePair]]:
    """Still pairs by name; visible pictures without a partner are left out."""
    from pipeline.board_views import refuse_swapped_pictures
    from pipeline.errors import SourceError
    from pipeline.sources.folder import image_files
    from pipeline.still import list_pairs, read_pair

    if infrared.is_dir() and visible.is_dir():
        files = {file.stem: file for file in image_files(visible)}
        named = [(file, files.get(file.stem)) for file in image_files(infrared)]
        alone = [file.stem for file, partner in named if partner is None]
        if alone:
            raise SourceError(
                f"{len(alone)} infrared pictures have no visible one of the same name (first: {alone[0]}): give the "
                "pictures of one moment equal names"
            )
        pairs = [(file, partner) for file, partner in named if partner is not None]
    else:
        pairs = [(thermal, colour) for thermal, colour, _ in list_pairs(infrared, visible, Path("."))]
    refuse_swapped_pictures([thermal for thermal, _ in pairs], [colour for _, colour in pairs])
    for thermal, colour in pairs[:: 1 if most is None else -(-len(pairs) // most)]:
        yield colour.stem, read_pair(thermal, colour)


def _pairs(infrared: Path, visible: Path, register: Register) -> Iterator[tuple[str, FramePair]]:
    return (
        _stills_of(infrared, visible, MOST_PAIRS)
        if _stills(infrared, visible)
        else _in_time(infrared, visible, register)
    )


def _stills(infrared: Path, visible: Path) -> bool:
    """Whether still pairs were given: two images, or two folders with equal names."""
    from pipeline.errors import SourceError
    from pipeline.recording import IMAGE_SUFFIXES
    from pipeline.sources.folder import image_files

    if infrared.is_dir() and visible.is_dir():
        names = [sorted(file.stem for file in image_files(folder, none_allowed=True)) for folder in (infrared, visible)]
        return bool(names[0]) and names[0] == names[1]
    pictures = [path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES for path in (infrared, visible)]
    if any(pictures) and not all(pictures) and infrared.exists() and visible.exists():
        raise SourceError("one input is a single picture and the other is none: give two pictures, or two recordings")
    return all(pictures)


def _in_time(infrared: Path, visible: Path, register: Register) -> Iterator[tuple[str, FramePair]]:
    """Pairs of two recordings as replay would form them."""
    from pipeline.config import SyncConfig
    from pipeline.live import with_rig_offset
    from pipeline.recording import probe, refuse_unlikely
    from pipeline.replay import DEFAULT_RATE_HZ, frames_of
    from pipeline.sync import Account, pair_recordings

    infos = probe(infrared), probe(visible)
    refuse_unlikely(*infos)
    rate_hz = infos[1].rate_hz or infos[0].rate_hz or DEFAULT_RATE_HZ
    frames = frames_of(str(infrared), "infrared", rate_hz), frames_of(str(visible), "visible", rate_hz)
    step = max(1, min(info.frames for info in infos) // MOST_PAIRS)
    fused = (
        pair
        for pair in pair_recordings(*frames, with_rig_offset(SyncConfig(), register), Account())
        if pair.mode == "fused"
    )
    for pair in islice(islice(fused, 0, None, step), MOST_PAIRS):
        yield f"{pair.captured_ns / 1e9:.2f}s", pair
