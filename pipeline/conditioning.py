"""Repairs what the thermal detector adds of its own: pixels that are dead, and columns or rows that are off by a bit.

Both are learnt from the pictures while they pass, every few frames, and applied to each: a dead pixel is one that
sticks out alone and sharply, again and again, while a real point of heat is blurred by the lens and moves. A stripe is
what is left of the differences between neighbouring columns when the middle one of many rows is taken, so that what is
in the scene has no vote unless it fills half of the picture's height.

The pictures given are never changed. State depends on the pictures alone: two runs are bit-identical.
"""

from __future__ import annotations

import cv2
import numpy as np

EVERY_FRAMES = 5  # learns from every fifth picture, and from each of the first ones
FIRST_FRAMES = 12
OUTLIER_SIGMAS = 10.0  # a dead pixel is farther from its neighbours' median than this
SHARPNESS = 0.3  # the lens spreads a real point: its second-hottest neighbour has more than this share of it
HIT, MISS, DEAD_AT, MOST_HITS = 2, 1, 6, 12  # three hits make a dead pixel; it is believed for a dozen misses at most
MOST_DEAD_SHARE = 0.01  # more than this is no detector, but rain or noise of another kind
STRIPE_ROWS = 8  # every eighth row votes, others each time
STRIPE_WIDTH = 10.0  # columns (one sigma); what is broader is scene
STRIPE_OUTLIER_SIGMAS = 4.5  # a step between two columns beyond this is an edge in the scene
STRIPE_RATE = 0.08  # share of the newest picture, in the long run
LEAST_STRIPES = 4  # pictures, before anything is taken off
WORTH_SIGMAS = 0.3  # stripes fainter than this share of the noise stay
MOVED_SIGMAS = 1.5  # of a thumbnail's noise: only a scene that has moved tells anything new about stripes


class DeadPixels:
    """Finds and fills the dead pixels of one camera."""

    def __init__(self) -> None:
        self._hits = np.zeros((0, 0), np.int8)
        self._frames = 0
        self._dead = np.zeros(0, np.intp)  # places in the flat picture
        self._neighbours = np.zeros((0, 8), np.intp)
        self._alive = np.zeros((0, 8), np.float32)  # 1 where the neighbour is none of the dead

    @property
    def count(self) -> int:
        return len(self._dead)

    def __call__(self, image: np.ndarray, learn: bool = True) -> np.ndarray:
        """The picture, uint8 or uint16 (H, W), with dead pixels filled; the very same one where there are none."""
        if self._hits.shape != image.shape:
            self.__init__()  # type: ignore[misc]
            self._hits = np.zeros(image.shape, np.int8)
        if learn:
            if self._frames < FIRST_FRAMES or self._frames % EVERY_FRAMES == 0:
                self._learn(image)
            self._frames += 1
        return self._fill(image) if len(self._dead) else image

    def _learn(self, image: np.ndarray) -> None:
        found = _sharp_outliers(image)
        if len(found) > MOST_DEAD_SHARE * image.size:
            return
        hits = self._hits.reshape(-1)
        known = np.flatnonzero(hits)
        hits[known] -= MISS
        hits[found] = np.minimum(hits[found] + HIT + MISS * np.isin(found, known), MOST_HITS)
        was_dead = np.zeros(image.size, bool)
        was_dead[self._dead] = True
        dead = np.flatnonzero((hits >= DEAD_AT) | (was_dead & (hits > 0)))
        if not np.array_equal(dead, self._dead):
            self._remember(dead, image.shape)

    def _remember(self, dead: np.ndarray, shape: tuple[int, ...]) -> None:
        height, width = shape
        rows, columns = np.divmod(dead, width)
        around = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
        y = np.stack([rows + dy for dy, _ in around], axis=1)
        x = np.stack([columns + dx for _, dx in around], axis=1)
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        places = np.clip(y, 0, height - 1) * width + np.clip(x, 0, width - 1)
        is_dead = np.zeros(height * width, bool)
        is_dead[dead] = True
        self._dead, self._neighbours = dead, places
        self._alive = (inside & ~is_dead[places]).astype(np.float32)

    def _fill(self, image: np.ndarray) -> np.ndarray:
        total = self._alive.sum(axis=1)
        values = image.reshape(-1)[self._neighbours] * self._alive
        result = image.copy()
        fillable = total > 0  # the middle of a dead block of 3 x 3 stays
        result.reshape(-1)[self._dead[fillable]] = np.rint(values.sum(axis=1)[fillable] / total[fillable])
        return result


def _sharp_outliers(image: np.ndarray) -> np.ndarray:
    """Flat places of pixels that stick out alone."""
    image = np.ascontiguousarray(image)
    difference = cv2.absdiff(image, cv2.medianBlur(image, 3))
    limit = max(4.0, OUTLIER_SIGMAS * _noise(image))
    places = np.flatnonzero(difference.reshape(-1) > limit)
    height, width = image.shape
    rows, columns = np.divmod(places, width)
    kept = (rows > 1) & (rows < height - 2) & (columns > 1) & (columns < width - 2)
    places = places[kept]
    if len(places) == 0 or len(places) > 0.1 * image.size:
        return places
    flat = image.reshape(-1)
    near, ring = (flat[places[:, None] + _around(width, reach)].astype(np.float32) for reach in (1, 2))
    middle = np.median(ring, axis=1)
    beyond = flat[places].astype(np.float32) - middle
    # As seen from the side to which the pixel deviates; the second largest, as a neighbour may be dead as well.
    towards = np.sort((near - middle[:, None]) * np.sign(beyond)[:, None], axis=1)[:, -2]
    return places[(towards < SHARPNESS * np.abs(beyond)) & (np.abs(beyond) > limit)]


def _around(width: int, reach: int) -> np.ndarray:
    """From a flat place to those that lie `reach` pixels around it."""
    side = range(-reach, reach + 1)
    return np.array([dy * width + dx for dy in side for dx in side if max(abs(dy), abs(dx)) == reach])


def _noise(image: np.ndarray) -> float:
    """Sigma of the detector's noise in counts, from neighbours in a part of the rows."""
    rows = image[::16].astype(np.float32)
    return 1.05 * float(np.median(np.abs(np.diff(rows, axis=1))))  # 1.4826 / sqrt(2)


class Stripes:
    """Learns and removes the offsets of whole columns (axis 1) or rows (axis 0) of one camera."""

    def __init__(self, axis: int = 1) -> None:
        self._axis = axis
        self._steps: np.ndarray | None = None  # from each column to the next
        self._learnt = 0
        self._frames = 0
        self._thumbnail: np.ndarray | None = None
        self._shape: tuple[int, ...] = ()
        self._off: np.ndarray | None = None  # what is to be taken off, integers, one a column
        self._more: np.ndarray | None = None  # the same as two full pictures: what to add...
        self._less: np.ndarray | None = None  # ...and what to subtract

    @property
    def sigma(self) -> float:
        """Of the stripes that are taken off, in counts; 0: none."""
        return 0.0 if self._off is None else float(self._off.std())

    def relearn(self) -> None:
        """The shutter has closed: the detector's pattern is another one now."""
        self._learnt = min(self._learnt, 1)
        self._frames = 0
        self._thumbnail = None

    def __call__(self, image: np.ndarray, learn: bool = True) -> np.ndarray:
        """The picture, uint8 or uint16 (H, W), without stripes; the very same one where there are none."""
        if image.shape != self._shape:
            self.__init__(self._axis)  # type: ignore[misc]
            self._shape = image.shape
        if learn:
            if self._frames < FIRST_FRAMES or (self._frames % EVERY_FRAMES == 0 and self._moved(image)):
                self._learn(image)
            self._frames += 1
        if self._more is None or self._less is None:
            return image
        return cv2.subtract(cv2.add(image, self._more), self._less)

    def _moved(self, image: np.ndarray) -> bool:
        thumbnail = image[::16, ::16].astype(np.float32)
        before, limit = self._thumbnail, MOVED_SIGMAS * 1.41 * _noise(image)
        if before is not None and float(np.abs(thumbnail - before).mean()) < limit:
            return False
        self._thumbnail = thumbnail
        return True

    def _learn(self, image: np.ndarray) -> None:
        lines = image if self._axis == 1 else image.T
        votes = lines[self._frames % STRIPE_ROWS :: STRIPE_ROWS].astype(np.float32)
        steps = np.median(np.diff(votes, axis=1), axis=0)
        self._learnt += 1
        share = max(STRIPE_RATE, 1 / self._learnt)
        self._steps = steps if self._steps is None else self._steps + share * (steps - self._steps)
        if self._learnt < LEAST_STRIPES:
            return
        offsets = self._offsets(self._steps)
        off = np.rint(offsets).astype(np.int32)
        rough = offsets[1:-1] - 0.5 * (offsets[:-2] + offsets[2:])  # what is smooth is rather the scene
        if rough.std() < WORTH_SIGMAS * _noise(image) or not off.any():
            self._off = self._more = self._less = None
        elif self._off is None or not np.array_equal(off, self._off):
            self._off = off
            more, less = (np.clip(sign * off, 0, None).astype(image.dtype) for sign in (-1, 1))
            self._more, self._less = (self._full(side) for side in (more, less))

    def _full(self, line: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.broadcast_to(line if self._axis == 1 else line[:, None], self._shape))

    @staticmethod
    def _offsets(steps: np.ndarray) -> np.ndarray:
        """What each column is off by, from the steps between them; without what is broad or an edge of the scene."""
        sigma = 1.4826 * float(np.median(np.abs(steps - np.median(steps))))
        steps = np.where(np.abs(steps) > STRIPE_OUTLIER_SIGMAS * sigma, 0, steps)
        places = np.concatenate(([0.0], np.cumsum(steps))).astype(np.float32)[None]
        broad = cv2.GaussianBlur(places, (0, 0), STRIPE_WIDTH, sigmaY=0.1, borderType=cv2.BORDER_REFLECT)
        return np.asarray((places - broad)[0])
