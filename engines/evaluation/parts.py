"""The parts of an evaluation, each one table or more: which pictures, fused how, and what is said about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import FusionEngine
from engines.evaluation import readout
from engines.evaluation.ablation import BOTH_PRIORS, ERRORS, MODES, STEPS_MODE, Ablation, compare
from engines.evaluation.cases import (
    CONDITIONS,
    PUBLIC_PAIRS,
    Case,
    Pair,
    RealScene,
    degraded_cases,
    eval_folder,
    pair_files,
    public_pairs,
    published_cases,
    published_files,
    real_cases,
    real_scenes,
    set_names,
    spared_clean,
)
from engines.evaluation.evaluate import (
    SCORES,
    Image,
    Method,
    Row,
    fusing_with,
    grouped,
    mean_scores,
    ready_picture,
    score_cases,
    summary,
)
from engines.evaluation.metrics import Sources
from engines.evaluation.people import read_boxes, warm_people
from engines.evaluation.sheets import Sheets
from engines.evaluation.tables import Table, table_of

SHORT = ("VIF", "Qabf", "SSIM", "CbCr")
Watch = tuple[Callable[[int], None], Callable[[], None]]  # told how much there is to do, and of every piece done
UNWATCHED: Watch = (lambda _: None, lambda: None)


@dataclass(frozen=True)
class Part:
    """What one part found."""

    rows: list[Row]  # one for each picture
    figures: dict[str, Any]  # of all of them together
    tables: list[Table] = field(default_factory=list)
    main: list[Row] | None = None  # rows of the network as it runs, on pictures it has not seen; None: all of them


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Which data, how much of it, and where contact sheets go."""

    data_dir: Path
    conditions: Sequence[str] = CONDITIONS
    limit: int | None = None  # pairs of each set
    sheets_dir: Path | None = None

    def first(self, names: Sequence[str]) -> list[str]:
        """As many of the names as the limit allows."""
        return list(names[: self.limit])


def check(name: str, scope: Scope) -> None:
    """Looks for the files of a part, by its name on the command line, without reading any picture.

    Raises:
        FileNotFoundError: if one is not there.
        ValueError: if an index lacks columns, or nothing is left to judge.
    """
    if name == "real":
        _judged_scenes(scope)
    elif name == "published":
        list(islice(published_files(scope.data_dir), scope.limit))
    elif name == "people":
        pair_files(scope.data_dir, list(_labels(scope)))
    elif name in ("by_set", "readout"):
        for pairs in set_names(scope.data_dir).values():
            pair_files(scope.data_dir, scope.first(pairs))
        if name == "readout":
            _unseen_scenes(scope)
    else:
        pair_files(scope.data_dir, scope.first(PUBLIC_PAIRS))


def public(engine: FusionEngine, scope: Scope, watch: Watch = UNWATCHED) -> Part:
    """The twelve public pairs, clean and with the six fixed degradations."""
    names = scope.first(PUBLIC_PAIRS)
    watch[0](len(names) * len(scope.conditions))
    cases = degraded_cases(public_pairs(scope.data_dir, names), scope.conditions)
    return of_cases("Public pairs", fusing_with(engine), cases, scope.sheets_dir, "public", watch)


def of_cases(
    title: str, method: Method, cases: Iterable[Case], sheets_dir: Path | None, prefix: str, watch: Watch = UNWATCHED
) -> Part:
    """Any cases: scores by condition."""
    found = summary(_drawn(method, cases, sheets_dir, prefix, watch))
    rows = found.pop("rows")
    lines = dict(found["mean_by_degradation"])
    if "mean_degraded" in found:
        lines["mean degraded"] = found["mean_degraded"]
    return Part(rows, found, [table_of(title, "condition", SCORES, lines, f"{len(rows)} pictures")])


def by_set(engine: FusionEngine, scope: Scope, watch: Watch = UNWATCHED) -> Part:
    """Every evaluation set by itself: does it generalise?"""
    names = {name: scope.first(pairs) for name, pairs in set_names(scope.data_dir).items()}
    watch[0](sum(map(len, names.values())) * len(scope.conditions))
    rows: list[Row] = []
    for data_set, pairs in names.items():
        cases = degraded_cases(public_pairs(scope.data_dir, pairs), scope.conditions)
        found = _drawn(fusing_with(engine), cases, scope.sheets_dir, "set", watch)
        rows += [{"set": data_set, **row} for row in found]
    figures = {}
    for data_set, own in grouped(rows, "set").items():
        figures[data_set] = summary(own)
        figures[data_set].pop("rows")
    cells = []
    for data_set, figure in figures.items():
        clean = figure["mean_by_degradation"].get("clean", {})
        spoiled = figure.get("mean_degraded", {})
        cells.append(
            (
                data_set,
                len(names[data_set]),
                *(clean.get(score) for score in SHORT),
                *(spoiled.get(score) for score in SHORT),
            )
        )
    columns = ("set", "pairs", *(f"{name} clean" for name in SHORT), *(f"{name} degraded" for name in SHORT))
    return Part(rows, {"sets": figures}, [Table("Evaluation sets", columns, tuple(cells))])


def real(engine: FusionEngine, scope: Scope, watch: Watch = UNWATCHED) -> Part:
    """The published degraded pictures with a clean twin. Scenes whose source was trained on are marked `trained_on`."""
    scenes = _judged_scenes(scope)
    watch[0](sum(1 + len(scene.degraded) for scene in scenes))
    rows = _drawn(fusing_with(engine), real_cases(scenes), scope.sheets_dir, "real", watch)
    trained_on = {scene.clean[0] for scene in scenes if scene.trained_on}
    for row in rows:
        row["trained_on"] = row["name"] in trained_on
    unseen = [row for row in rows if not row["trained_on"]]
    figures = summary(unseen)
    figures.pop("rows")
    lines = dict(figures["mean_by_degradation"])
    if "mean_degraded" in figures:
        lines["mean degraded"] = figures["mean_degraded"]
    note = f"{len(unseen)} pictures; {len(rows) - len(unseen)} of scenes that were trained on are left out"
    return Part(rows, figures, [table_of("Published degraded scenes", "condition", SCORES, lines, note)], unseen)


def published(engine: FusionEngine, scope: Scope, watch: Watch = UNWATCHED) -> Part:
    """The scenes of the published fused pictures: the same scores for these and for ours, and the ratio."""
    cases = list(islice(published_cases(scope.data_dir), scope.limit))
    with_clean = [spared_clean(case) for case in cases]
    others = [given for given, case in zip(with_clean, cases, strict=True) if given is not case]
    watch[0](2 * len(cases) + len(others))
    with _sheets(scope.sheets_dir, "published") as sheets:

        def done(case: Case, fused: Image, row: Row) -> None:
            if sheets is not None and case.ready is not None:
                sheets.add(case, {"fused": fused, "published": case.ready})
            watch[1]()

        ours = score_cases(fusing_with(engine), cases, done)
    row_of = {id(case): row for case, row in zip(cases, ours, strict=True)}
    if others:
        rows = score_cases(fusing_with(engine), others, lambda *_: watch[1]())
        row_of |= {id(case): row for case, row in zip(others, rows, strict=True)}
    spared = [row_of[id(given)] for given in with_clean]
    theirs = score_cases(ready_picture, cases, lambda *_: watch[1]())
    scores = {"": mean_scores(ours), ", spared camera clean": mean_scores(spared)}
    means = {"published": mean_scores(theirs)}
    for inputs, reached in scores.items():
        means[f"ours{inputs}"] = reached
        means[f"ratio{inputs}"] = {name: reached[name] / means["published"][name] for name in SCORES}
    rows = [
        {**own, **{f"published {name}": other[name] for name in SCORES}}
        for own, other in zip(ours, theirs, strict=True)
    ]
    columns = [f"{who}{name}" for name in SHORT for who in ("", "published ")]
    lines = {f"{row['name']} {row['degradation']}": row for row in rows}
    tables = [
        table_of("Beside the published pictures", "method", SCORES, means, f"{len(cases)} scenes"),
        table_of("Beside the published pictures, by scene", "scene", columns, lines),
    ]
    return Part(rows, means, tables)


def priors(ablation: Ablation, scope: Scope, watch: Watch = UNWATCHED) -> Part:
    """Each prior replaced: what does it add?"""
    names, conditions = scope.first(PUBLIC_PAIRS), _degraded(scope)
    watch[0](len(names) * len(conditions) * (1 + len(MODES)))
    ablation.learn_neutral(degraded_cases(public_pairs(scope.data_dir, names), conditions), watch[1])
    note = "; ".join(f"{mode}: {what}" for mode, what in MODES.items())
    part = _in_modes("Ablation of the priors", "priors", ablation, scope, list(MODES), note, watch)
    for score in ("VIF", "Qabf", "SSIM", *ERRORS):
        lines = {
            mode: {name: mean[score] for name, mean in figure["mean_by_degradation"].items()}
            for mode, figure in part.figures["modes"].items()
        }
        part.tables.append(table_of(f"Ablation of the priors, {score}", "priors", conditions, lines))
    return replace(part, main=[row for row in part.rows if row["mode"] == BOTH_PRIORS])


def steps(ablation: Ablation, scope: Scope, counts: Sequence[int], watch: Watch = UNWATCHED) -> Part:
    """How many diffusion steps are worth their time? As many as the network takes by itself are always among them."""
    modes = [f"{STEPS_MODE}{count}" for count in dict.fromkeys((*counts, ablation.steps))]
    watch[0](len(scope.first(PUBLIC_PAIRS)) * len(_degraded(scope)) * len(modes))
    part = _in_modes("Diffusion steps", "diffusion", ablation, scope, modes, "", watch)
    return replace(part, main=[row for row in part.rows if row["mode"] == f"{STEPS_MODE}{ablation.steps}"])


def _in_modes(
    title: str, first: str, ablation: Ablation, scope: Scope, modes: Sequence[str], note: str, watch: Watch
) -> Part:
    """The public pairs under the degraded conditions, in each mode: one line for each."""
    pairs = public_pairs(scope.data_dir, scope.first(PUBLIC_PAIRS))
    rows = compare(ablation, degraded_cases(pairs, _degraded(scope)), modes, watch[1])
    by_mode = {mode: _mode_figures(own) for mode, own in grouped(rows, "mode").items()}
    lines = {mode: figure["mean"] for mode, figure in by_mode.items()}
    table = table_of(f"{title}, mean of the degraded conditions", first, (*SHORT, *ERRORS), lines, note)
    return Part(rows, {"modes": by_mode}, [table])


def missing(engine: FusionEngine, scope: Scope, watch: Watch = UNWATCHED) -> Part:
    """One camera black: the output should be the other one, restored. Beside it, that camera's input as it came."""
    names = scope.first(PUBLIC_PAIRS)
    rows: list[Row] = []
    wanted = {
        "infrared": [name for name in scope.conditions if name == "clean" or name.startswith("vis_")],
        "visible": [name for name in scope.conditions if name == "clean" or name.startswith("ir_")],
    }
    watch[0](len(names) * sum(map(len, wanted.values())))
    with _sheets(scope.sheets_dir, "missing") as sheets:
        for index, pair in enumerate(public_pairs(scope.data_dir, names)):
            sources = Sources(pair.infrared, pair.visible)
            for camera, conditions in wanted.items():
                for case in degraded_cases([pair], conditions, index):
                    black = _without(case, camera)
                    fused = fusing_with(engine)(black)
                    rows.append(_missing_row(black, camera, fused, sources))
                    if sheets is not None:
                        sheets.add(black, {f"fused, {camera} black": fused})
                    watch[1]()
    figures: dict[str, Any] = {}
    lines: dict[str, Any] = {}
    for camera, own in grouped(rows, "missing").items():
        for condition, group in grouped(own, "degradation").items():
            mean = {name: float(np.mean([row[name] for row in group])) for name in _MISSING_SCORES}
            figures.setdefault(camera, {})[condition] = mean
            lines[f"{camera} black, {condition}"] = mean
    note = "VIF, SSIM, PSNR against the clean picture of the other camera; input: the same of its picture as it came"
    return Part(rows, figures, [table_of("One camera missing", "condition", _MISSING_SCORES, lines, note)])


def people(engine: FusionEngine, scope: Scope, watch: Watch = UNWATCHED) -> Part:
    """Warm people of the labelled night pairs against their surroundings."""
    labels = _labels(scope)
    watch[0](len(labels) * len(scope.conditions))
    rows: list[Row] = []
    for index, pair in enumerate(public_pairs(scope.data_dir, list(labels))):
        boxes = warm_people(pair.infrared, read_boxes(labels[pair.name]))
        for case in degraded_cases([pair], scope.conditions, index):
            pictures = {"infrared": pair.infrared, "visible": pair.visible}
            if boxes:
                pictures["fused"] = fusing_with(engine)(case)
            for number, person in enumerate(boxes):
                contrast = {f"{name}_contrast": person.contrast(picture) for name, picture in pictures.items()}
                rows.append({"name": pair.name, "degradation": case.condition, "person": number, **contrast})
            watch[1]()
    columns = ("fused_contrast", "infrared_contrast", "visible_contrast", "brighter")
    figures: dict[str, Any] = {}
    for condition, own in grouped(rows, "degradation").items():
        figures[condition] = {name: float(np.mean([row[name] for row in own])) for name in columns[:3]}
        figures[condition]["brighter"] = float(np.mean([row["fused_contrast"] > 0 for row in own]))
        figures[condition]["people"] = len(own)
    note = "grey levels above the surroundings, sources clean; brighter: share of the people with a positive contrast"
    return Part(rows, figures, [table_of("Warm people at night", "condition", (*columns, "people"), figures, note)])


def naming(engine: FusionEngine, scope: Scope, watch: Watch = UNWATCHED) -> Part:
    """Is the degradation named rightly, on held-back pairs, on the fixed degradations and on published pictures?"""
    sets = set_names(scope.data_dir)
    names = [name for group in sets.values() for name in scope.first(group)]
    answers = readout.degraded_answers(engine, _watched(public_pairs(scope.data_dir, names), len(names), watch))
    judged = [name for name in PUBLIC_PAIRS if name in sets.get(name.split("/")[0], ())]
    twelve = degraded_cases(public_pairs(scope.data_dir, scope.first(judged)), scope.conditions)
    answers += readout.case_answers(engine, twelve, readout.FIXED_KINDS, "fixed", lambda: None)
    unseen = real_cases(_unseen_scenes(scope))
    answers += readout.case_answers(engine, unseen, readout.PUBLISHED_KINDS, "published", lambda: None)
    found = readout.figures(answers)
    return Part([], found, list(readout.tables(found)))


_MISSING_SCORES = ("VIF", "SSIM", "PSNR", "input VIF", "input SSIM", "input PSNR")


def _without(case: Case, camera: str) -> Case:
    if camera == "infrared":
        return Case(case.pair, case.condition, np.zeros_like(case.infrared), case.visible)
    return Case(case.pair, case.condition, case.infrared, np.zeros_like(case.visible))


def _missing_row(case: Case, camera: str, fused: Image, sources: Sources) -> Row:
    other = "visible" if camera == "infrared" else "infrared"
    before = sources.likeness(case.visible if other == "visible" else case.infrared, other)
    row = {"name": case.pair.name, "degradation": case.condition, "missing": camera, **sources.likeness(fused, other)}
    return {**row, **{f"input {name}": value for name, value in before.items()}}


def _mode_figures(rows: list[Row]) -> dict[str, Any]:
    names = (*SCORES, *ERRORS)
    by_degradation = {condition: mean_scores(own, names) for condition, own in grouped(rows, "degradation").items()}
    return {"mean": mean_scores(list(by_degradation.values()), names), "mean_by_degradation": by_degradation}


def _degraded(scope: Scope) -> list[str]:
    return [name for name in scope.conditions if name != "clean"]


def _labels(scope: Scope) -> dict[str, Path]:
    """The night pairs with labelled people, and where their labels lie."""
    root = eval_folder(scope.data_dir)
    found = {}
    for names in set_names(scope.data_dir, "night").values():
        for name in names:
            data_set, stem = name.split("/")
            if (path := root / data_set / "boxes_infrared" / f"{stem}.txt").is_file():
                found[name] = path
    if not found:
        raise FileNotFoundError(f"no night pair of {root} has labelled boxes (boxes_infrared)")
    return {name: found[name] for name in scope.first(list(found))}


def _judged_scenes(scope: Scope) -> list[RealScene]:
    """The first published scenes with clean twins.

    Raises:
        ValueError: if there is none, or all of them were trained on: scores of these prove nothing.
    """
    scenes = real_scenes(scope.data_dir)[: scope.limit]
    if all(scene.trained_on for scene in scenes):
        of_them = f"the {len(scenes)} scenes of it that have clean twins were all trained on"
        raise ValueError(f"{scope.data_dir / 'degraded'} tells nothing new: {of_them}")
    return scenes


def _unseen_scenes(scope: Scope) -> list[RealScene]:
    """The first published scenes that were not trained on; none where the data have no such scenes at all."""
    if not (scope.data_dir / "degraded" / "index.csv").is_file():
        return []
    return [scene for scene in real_scenes(scope.data_dir) if not scene.trained_on][: scope.limit]


def _watched(pairs: Iterable[Pair], count: int, watch: Watch) -> Iterable[Pair]:
    watch[0](count)
    for pair in pairs:
        yield pair
        watch[1]()


def _sheets(folder: Path | None, prefix: str) -> AbstractContextManager[Sheets | None]:
    return nullcontext() if folder is None else Sheets(folder, prefix)


def _drawn(method: Method, cases: Iterable[Case], sheets_dir: Path | None, prefix: str, watch: Watch) -> list[Row]:
    """Scores the cases, and draws them if there is a folder for it."""
    with _sheets(sheets_dir, prefix) as sheets:

        def done(case: Case, fused: Image, row: Row) -> None:
            if sheets is not None:
                sheets.add(case, {"fused": fused})
            watch[1]()

        return score_cases(method, cases, done)
