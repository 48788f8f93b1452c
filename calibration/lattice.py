"""Whether a picture shows anything like a board: corners or circles on a lattice, found in hundredths of a second.

OpenCV's search for a board takes seconds where there is none. What it would find has to look like this: marks
(saddles of the brightness for a chessboard, its hills or hollows for circles), each midway between two pairs of
others of the right kind, neighbours of one another in turn. Streets, faces and leaves have plenty of marks, and
hardly ever a handful of them in such a lattice.
"""

from __future__ import annotations

import cv2
import numpy as np

MOST_MARKS = 400  # of a picture, the strongest
NEIGHBOURS = 10  # of a mark that are looked at
LARGEST_SIDE_PX, SMALLEST_SIDE_PX = 1600, 60  # of the sizes that a picture is looked at in, each half the one before
NEIGHBOURHOOD_PX = 12.0  # sigma: what the strength of a mark is compared with
STRENGTH_RATIO = 2.5  # of two marks of one board that are neighbours, at most
ALIKE = 0.6  # cosine between the kinds of neighbours; perspective and lenses turn them a little
OFF_MIDDLE, OFF_MIDDLE_PX, MOST_OFF_MIDDLE = 0.2, 0.7, 0.4  # of the step: a mark lies so near the middle of its pair
LENGTH_RATIO = 2.2  # of the steps along the two axes
LEAST_SINE = 0.5  # of the angle between them


def largest_lattice(grey: np.ndarray, saddles: bool, enough: int) -> int:
    """How many marks of a picture are crossings of one lattice; stops counting where there are enough.

    Args:
        grey: float32 (H, W).
        saddles: of alternating sign, as the corners of a chessboard are; otherwise circles of one sign.
        enough: crossings.
    """
    largest, scale = 0, min(1.0, LARGEST_SIDE_PX / max(grey.shape))
    while largest < enough and min(grey.shape) * scale >= SMALLEST_SIDE_PX:
        picture = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else grey
        largest = max(largest, _largest_component(_crossings(*_marks(_levelled(picture), saddles), saddles)))
        scale /= 2
    return largest


def noise_of(grey: np.ndarray) -> float:
    """Sigma of the pixel noise: median of a high-pass that sees neither slopes nor most edges."""
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    return float(np.median(np.abs(cv2.filter2D(grey, cv2.CV_32F, kernel))) / 0.6745 / 6) + 1e-6


def blurred(grey: np.ndarray, sigma_px: float) -> np.ndarray:
    """A wide Gaussian, by way of a smaller picture: ten times as fast."""
    step = max(1, int(sigma_px / 4))
    if step == 1:
        return cv2.GaussianBlur(grey, (0, 0), sigma_px)
    small = cv2.resize(grey, None, fx=1 / step, fy=1 / step, interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), sigma_px / step)
    return cv2.resize(small, grey.shape[::-1], interpolation=cv2.INTER_LINEAR)


def _levelled(grey: np.ndarray) -> np.ndarray:
    """Faint patterns as strong as clear ones, and both stronger than noise."""
    smooth = cv2.GaussianBlur(grey, (0, 0), 1.2)
    detail = smooth - blurred(smooth, NEIGHBOURHOOD_PX)
    return detail / (np.sqrt(blurred(detail * detail, NEIGHBOURHOOD_PX)) + noise_of(grey))


def _marks(level: np.ndarray, saddles: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places (n, 2), strengths (n,) and kinds (n, 2) of the strongest marks.

    The kind is a unit vector: of a saddle its direction, angle doubled, so that the neighbours in a chessboard point
    the opposite way; of a circle its sign.
    """
    xx, yy, xy = (cv2.Sobel(level, cv2.CV_32F, *order, ksize=3, scale=0.25) for order in ((2, 0), (0, 2), (1, 1)))
    strength = xy * xy - xx * yy if saddles else xx * yy - xy * xy
    peak = (strength >= cv2.dilate(strength, np.ones((5, 5), np.uint8))) & (strength > 1e-4)
    peak[:3], peak[-3:], peak[:, :3], peak[:, -3:] = False, False, False, False
    y, x = np.nonzero(peak)
    strongest = np.argsort(-strength[y, x])[:MOST_MARKS]
    y, x = y[strongest], x[strongest]
    kind = np.stack([xx[y, x] - yy[y, x], 2 * xy[y, x]] if saddles else [xx[y, x] + yy[y, x], 0 * x], axis=1)
    kind = kind / (np.linalg.norm(kind, axis=1, keepdims=True) + 1e-9)
    return np.stack([x, y], axis=1).astype(np.float32), np.sqrt(strength[y, x]), kind.astype(np.float32)


def _crossings(places: np.ndarray, strength: np.ndarray, kind: np.ndarray, saddles: bool) -> np.ndarray:
    """(n, 4) indices of the two pairs that each mark is midway between, the nearest ones; -1 where there are none."""
    count, near = len(places), min(NEIGHBOURS, len(places) - 1)
    if near < 4:
        return np.full((count, 4), -1)
    alike = (kind @ kind.T) * (-1 if saddles else 1)
    ratio = strength[:, None] / strength[None]
    fits = (alike > ALIKE) & (ratio < STRENGTH_RATIO) & (ratio > 1 / STRENGTH_RATIO)
    np.fill_diagonal(fits, False)
    x, y = places.T
    squared = np.where(fits, (x[:, None] - x) ** 2 + (y[:, None] - y) ** 2, np.inf)
    index = np.argpartition(squared, near - 1, axis=1)[:, :near]
    length = np.sqrt(np.take_along_axis(squared, index, axis=1))
    step = np.where(np.isfinite(length)[..., None], places[index] - places[:, None], np.nan)
    one, other = length[:, :, None], length[:, None]  # of every two neighbours
    with np.errstate(invalid="ignore"):
        off = np.hypot(*np.moveaxis(step[:, :, None] + step[:, None], 3, 0)) / ((one + other) / 2)
        paired = (off < OFF_MIDDLE + 2 * OFF_MIDDLE_PX / (one + other)) & (off < MOST_OFF_MIDDLE)
        opposite, has_opposite = np.where(paired, off, np.inf).argmin(axis=2), paired.any(axis=2)
        sine = np.abs(step[:, :, None, 0] * step[:, None, :, 1] - step[:, :, None, 1] * step[:, None, :, 0])
        across = (sine > LEAST_SINE * one * other) & (one < LENGTH_RATIO * other) & (other < LENGTH_RATIO * one)
        across &= has_opposite[:, :, None] & has_opposite[:, None]
        reach = np.where(across, one + other, np.inf).reshape(count, -1)
    first, second = np.divmod(reach.argmin(axis=1), near)
    each = np.arange(count)
    chosen = [first, opposite[each, first], second, opposite[each, second]]
    four = np.stack([index[each, neighbour] for neighbour in chosen], axis=1)
    return np.where(np.isfinite(reach.min(axis=1))[:, None], four, -1)


def _largest_component(four: np.ndarray) -> int:
    """Of the crossings that are among each other's four."""
    link = np.zeros((len(four), len(four) + 1), bool)
    np.put_along_axis(link, four % (len(four) + 1), True, axis=1)  # the column more takes those without any
    link = link[:, :-1] & link[:, :-1].T
    one, other = np.nonzero(link)
    label = np.arange(len(four))
    while len(one):
        lowest = label.copy()
        np.minimum.at(lowest, one, label[other])
        if np.array_equal(lowest, label):
            return int(np.bincount(label).max())
        label = lowest
    return 0
