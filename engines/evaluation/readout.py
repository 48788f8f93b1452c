"""Is the degradation named rightly? Held-back pictures, degraded with every kind at a known strength."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.base import INFRARED_DEGRADATIONS, VISIBLE_DEGRADATIONS, FusionEngine, Priors
from engines.degrade import degrade_infrared, degrade_visible
from engines.evaluation.cases import Case, Pair
from engines.evaluation.tables import Table

Image = NDArray[np.uint8]

KINDS = {"infrared": INFRARED_DEGRADATIONS, "visible": VISIBLE_DEGRADATIONS}
STRENGTHS = (0.15, 0.4, 0.65, 0.9)  # taken in turn
# The published degraded pictures name their kinds so.
PUBLISHED_KINDS = {
    "ir_LC": "low_contrast",
    "ir_RN": "noise",
    "ir_SN": "stripes",
    "vi_LL": "low_light",
    "vi_OE": "over_exposure",
    "vi_RN": "noise",
    "vi_Rain": "rain",
    "vi_Blur": "blur",
    "vi_haze": "haze",
}
FIXED_KINDS = {
    "vis_lowlight": "low_light",
    "vis_blur": "blur",
    "ir_lowcon": "low_contrast",
    "ir_stripe": "stripes",
    "vis_haze": "haze",
    "vis_rain": "rain",
}


@dataclass(frozen=True)
class Answer:
    """One picture of one camera: what was done to it, and what the network says."""

    camera: str  # "infrared" or "visible"
    source: str  # where the picture is from
    truth: str
    named: str
    strength: float | None = None
    rated: float | None = None


def degraded_answers(
    engine: FusionEngine, pairs: Iterable[Pair], on_done: Callable[[], None] = lambda: None
) -> list[Answer]:
    """Every kind of both cameras on every pair, seeds fixed. The pictures themselves count as "none".

    The infrared kinds are turned on by one from pair to pair, so that all combinations with the visible ones come up.
    """
    answers: list[Answer] = []
    for index, pair in enumerate(pairs):
        infrared, visible = _unit(pair.infrared), _unit(pair.visible)
        rounds = max(len(INFRARED_DEGRADATIONS), len(VISIBLE_DEGRADATIONS))
        for turn in range(rounds):
            thermal = INFRARED_DEGRADATIONS[(turn + index) % len(INFRARED_DEGRADATIONS)]
            optical = VISIBLE_DEGRADATIONS[turn % len(VISIBLE_DEGRADATIONS)]
            strength = STRENGTHS[(turn + index) % len(STRENGTHS)]
            seed = index * rounds + turn
            priors = engine.estimate_priors(
                _bytes(degrade_infrared(infrared, thermal, seed, strength)),
                _bytes(degrade_visible(visible, optical, seed, strength)),
            )
            answers += _answers(priors, "held-back", {"infrared": thermal, "visible": optical}, strength)
            on_done()
    return answers


def case_answers(
    engine: FusionEngine, cases: Iterable[Case], kinds: dict[str, str], source: str, on_done: Callable[[], None]
) -> list[Answer]:
    """The degraded camera of every case whose condition `kinds` gives a name; clean cases count as "none"."""
    answers: list[Answer] = []
    for case in cases:
        if case.condition != "clean" and case.condition not in kinds:
            continue
        priors = engine.estimate_priors(case.infrared, case.visible)
        if case.condition == "clean":
            truths = {"infrared": "none", "visible": "none"}
        else:
            truths = {"infrared" if case.condition.startswith("ir_") else "visible": kinds[case.condition]}
        answers += _answers(priors, source, truths, None)
        on_done()
    return answers


def figures(answers: Iterable[Answer]) -> dict[str, Any]:
    """By source and camera: `kinds`, `accuracy`, `confusion` (a row for each true kind), and how well strength is told.

    `strength` is the mean absolute error and the correlation over the pictures that are degraded, where the network
    rates them; None where it does not, or the strength is not known.
    """
    answers = list(answers)
    found: dict[str, Any] = {}
    for source in dict.fromkeys(answer.source for answer in answers):
        for camera, kinds in KINDS.items():
            own = [answer for answer in answers if (answer.source, answer.camera) == (source, camera)]
            if not own:
                continue
            confusion = np.zeros((len(kinds), len(kinds)), int)
            for answer in own:
                confusion[kinds.index(answer.truth), kinds.index(answer.named)] += 1
            found.setdefault(source, {})[camera] = {
                "kinds": list(kinds),
                "pictures": len(own),
                "accuracy": float(np.trace(confusion) / confusion.sum()),
                "confusion": confusion.tolist(),
                "strength": _strength_figures(own),
            }
    return found


def tables(found: dict[str, Any]) -> Iterator[Table]:
    """The confusion matrices."""
    for source, cameras in found.items():
        for camera, figure in cameras.items():
            rows = tuple(
                (kind, *line, line[index] / sum(line) if sum(line) else None)
                for index, (kind, line) in enumerate(zip(figure["kinds"], figure["confusion"], strict=True))
                if sum(line)
            )
            strength = figure["strength"]
            note = f"accuracy {figure['accuracy']:.3f} of {figure['pictures']}"
            if strength:
                note += f"; strength: error {strength['error']:.3f}, correlation {strength['correlation']:.3f}"
            yield Table(
                f"Degradation readout, {camera}, {source} pictures (rows: truth, columns: named)",
                (camera, *figure["kinds"], "right"),
                rows,
                note,
            )


def _answers(priors: Priors, source: str, truths: dict[str, str], strength: float | None) -> Iterator[Answer]:
    for camera, truth in truths.items():
        named = KINDS[camera][int(np.argmax(getattr(priors, f"{camera}_probabilities")))]
        rated = getattr(priors, f"{camera}_strength", None)
        known = None if strength is None else (0.0 if truth == "none" else strength)
        yield Answer(camera, source, truth, named, known, None if rated is None else float(rated))


def _strength_figures(answers: list[Answer]) -> dict[str, float] | None:
    told = [
        (a.strength, a.rated) for a in answers if a.truth != "none" and a.strength is not None and a.rated is not None
    ]
    if len(told) < 2:
        return None
    truth, rated = np.array(told, float).T
    flat = np.std(truth) == 0 or np.std(rated) == 0
    return {
        "error": float(np.mean(np.abs(truth - rated))),
        "correlation": 0.0 if flat else float(np.corrcoef(truth, rated)[0, 1]),
    }


def _unit(image: Image) -> NDArray[np.float32]:
    return np.divide(image, 255, dtype=np.float32)


def _bytes(picture: NDArray[np.float32]) -> Image:
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
