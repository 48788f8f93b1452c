"""Scores fused pictures against the CLEAN sources, also where degraded ones were fused."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.base import FusionEngine
from engines.evaluation.cases import Case, Pair
from engines.evaluation.metrics import METRICS, Sources

Image = NDArray[np.uint8]
Fuse = Callable[[Image, Image], Image]  # infrared (H, W), visible RGB (H, W, 3) -> fused, RGB or grey
Method = Callable[[Case], Image]
Row = dict[str, Any]

SCORES = (*METRICS, "CbCr")
WORKERS = 2  # threads that score while the next picture is fused


def fusing_with(engine: FusionEngine | Fuse) -> Method:
    """An engine (priors are estimated anew for every pair), or any function of infrared and visible, as a method."""

    def method(case: Case) -> Image:
        if callable(engine):
            return engine(case.infrared, case.visible)
        return engine.fuse(case.infrared, case.visible, engine.estimate_priors(case.infrared, case.visible))

    return method


def ready_picture(case: Case) -> Image:
    """The picture that comes with the case."""
    if case.ready is None:
        raise ValueError(f"there is no ready-made picture of {case.pair.name}")
    return case.ready


def score_cases(
    method: Method,
    cases: Iterable[Case],
    on_done: Callable[[Case, Image, Row], None] | None = None,
) -> list[Row]:
    """Fuses and scores every case, in their order. Cases of one pair in a row share what depends on it alone.

    Args:
        on_done: told of every case with its picture and its row, in order.

    Returns:
        Rows of `name`, `degradation`, `mode` where the case has one, and the scores by the names in `SCORES`.

    Raises:
        ValueError: if there is no case, or pictures do not fit each other.
    """
    rows: list[Row] = []
    for case, fused, row in _scored(method, cases):
        rows.append(row)
        if on_done is not None:
            on_done(case, fused, row)
    if not rows:
        raise ValueError("there is no pair to evaluate")
    return rows


def _scored(method: Method, cases: Iterable[Case]) -> Iterator[tuple[Case, Image, Row]]:
    waiting: deque[tuple[Case, Image, Future[Row]]] = deque()
    sources: tuple[Pair, Sources] | None = None
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="score") as pool:
        for case in cases:
            if sources is None or sources[0] is not case.pair:
                sources = case.pair, _sources_of(case.pair)
            fused = method(case)
            waiting.append((case, fused, pool.submit(_row, case, fused, sources[1])))
            while len(waiting) > WORKERS:
                yield _finished(waiting.popleft())
        while waiting:
            yield _finished(waiting.popleft())


def _sources_of(pair: Pair) -> Sources:
    try:
        return Sources(pair.infrared, pair.visible)
    except ValueError as error:
        raise ValueError(f"{pair.name}: {error}") from None


def _finished(entry: tuple[Case, Image, Future[Row]]) -> tuple[Case, Image, Row]:
    case, fused, row = entry
    return case, fused, row.result()


def _row(case: Case, fused: Image, sources: Sources) -> Row:
    scores = sources.score(fused)
    mode = {"mode": case.mode} if case.mode else {}
    return {
        "name": case.pair.name,
        "degradation": case.condition,
        **mode,
        **scores,
        "CbCr": sources.colour_error(fused),
    }


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """`rows`, their `mean` by score name, `mean_by_degradation`, and `mean_degraded` over all but the clean ones."""
    groups = grouped(rows, "degradation")
    means = {condition: mean_scores(group) for condition, group in groups.items()}
    result: dict[str, Any] = {
        "rows": list(rows),
        "mean": mean_scores(rows),
        "mean_by_degradation": means,
    }
    # The mean over the conditions and not over the rows: each counts alike, however many pictures it has.
    spoiled = [mean for condition, mean in means.items() if condition != "clean"]
    if spoiled:
        result["mean_degraded"] = mean_scores(spoiled)
    return result


def mean_scores(rows: Sequence[Row], names: Sequence[str] = SCORES) -> dict[str, float]:
    """The plain mean of every score over the rows."""
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


def grouped(rows: Iterable[Row], key: str) -> dict[str, list[Row]]:
    """The rows by the value of one key, in the order in which the values come first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row[key]), []).append(row)
    return groups
