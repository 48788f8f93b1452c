"""Pictures that lie far apart: by a tenth of their width, turned by ten degrees, stretched and sheared a little.

Near things are compared as they are; here the infrared picture is turned by each of a few rolls first and compared
coarsely, and what explains the blocks best is taken off and measured again, finer and finer. It takes a tenth of a
second a pair, so it is for checking recordings and stills, not for running cameras.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from calibration.residual import (
    NATURAL_WIDTH_PX,
    Fields,
    Residual,
    Verdict,
    correlate,
    displacement_px,
    fields_of,
    fit,
    grid_sigma_px,
    halved,
    judge,
    similarity,
    with_agreement,
)

ROLLS = tuple(np.radians(degrees) for degrees in (0, -2.5, 2.5, -5, 5, -7.5, 7.5, -10, 10))
COARSE_SIGMA = (30.0, 30.0, 0.03, 0.04, 0.03, 0.03)  # as residual.COLD_SIGMA; and stretch, shear
FINE_SIGMA = (8.0, 8.0, 0.012, 0.012, 0.012, 0.012)  # that the step before may have left
FINE_STEPS = (True, False, False)  # at half the working size?
SCENE_SIGMA_PX = 2.5  # over the picture, that one pair is off by: a lens bends, and depth adds to it (measured)
FEWEST_BLOCKS = 13  # of a pair that support the answer: of 230 pairs of strangers none had more than 12


@dataclass(frozen=True, eq=False)
class Pair:
    """One moment: infrared uint8 (H, W) on the visible pixels, visible uint8, weight as in `fields_of`."""

    infrared: np.ndarray
    visible: np.ndarray
    weight: np.ndarray | None = None


def look_far(pairs: Sequence[Pair]) -> Verdict:
    """The transform of a rig from one or more pairs, with how far to trust it; "no_information" if there is none."""
    height, width = pairs[0].visible.shape[:2]
    size = (width, height)
    starts = [similarity(np.array([0, 0, roll, 0]), size) for roll in ROLLS]
    tried = [(_measure(pairs, start, True, COARSE_SIGMA), start) for start in starts]
    found, matrix = max(tried, key=lambda one: one[0].evidence)
    matrix = found.matrix @ matrix
    for coarse in FINE_STEPS:
        found = _measure(pairs, matrix, coarse, FINE_SIGMA)
        matrix = found.matrix @ matrix
    if not found.informative or found.blocks < FEWEST_BLOCKS:
        return Verdict("no_information", 0.0, np.eye(3), None, 0, size)
    sigma_px = float(np.hypot(grid_sigma_px(found.covariance, size), SCENE_SIGMA_PX * width / NATURAL_WIDTH_PX))
    state, health = judge(displacement_px(matrix, size), size)
    return Verdict(state, health, matrix, sigma_px, len(pairs), size)


def _measure(pairs: Sequence[Pair], matrix: np.ndarray, coarse: bool, sigma: Sequence[float]) -> Residual:
    """What is left after a transform, of all pairs together."""
    fields = [_moved(pair, matrix) for pair in pairs]
    if coarse:
        fields = [halved(one) for one in fields]
    found = fit([correlate(one) for one in fields], sigma)
    return replace(found, agreement=float(np.mean([with_agreement(found, one).agreement for one in fields])))


def _moved(pair: Pair, matrix: np.ndarray) -> Fields:
    size = (pair.visible.shape[1], pair.visible.shape[0])
    weight = np.ones(pair.visible.shape[:2], np.float32) if pair.weight is None else pair.weight
    infrared = cv2.warpAffine(pair.infrared, matrix[:2], size, borderMode=cv2.BORDER_REPLICATE)
    return fields_of(infrared, pair.visible, cv2.warpAffine(weight, matrix[:2], size))
