"""Recognises a thermal camera whose shutter is closed: it repeats its last picture.

A real detector is noisy, so two pictures of the world never agree in every pixel. While the shutter closes to
recalibrate the core (0.5 to 3 s), equal pictures in a row are normal: the camera does not hang, but what it sends is
old.

A lossy codec makes each repeat a little different: it spends the bits that nothing moves for on detail, and with every
key picture the noise of the coding changes. Such a repeat is told by how little the picture changes, against what this
camera's pictures changed by just before. Means over small blocks are compared, in which coding noise cancels. A scene
that comes to rest changes little as well, but everywhere, by the sensor's noise; that is told after a few pictures.
What a codec has smoothed so far that a live, resting scene repeats exactly cannot be told from a closed shutter.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

import cv2
import numpy as np

FROZEN_REPEATS = 2  # two repeats of a picture, three equal ones in a row, are a closed shutter
_ROW_STEP = 8  # every eighth row tells pictures apart in less than 0.01 ms

BLOCK_PX = 8  # side of the blocks whose means are compared
LIVE_PICTURES = 25  # whose changes are remembered...
FEWEST_PICTURES = 3  # ...once there are so many, and their lower quartile is what a live picture changes by
SUDDEN = 0.3  # share of it that a repeat stays below...
CODING_LEVELS = 0.4  # ...and the most that coding anew changes the blocks of a picture by
FEWEST_BLOCKS = 64  # a smaller picture is no camera's
MOVED_PICTURES = 2  # above it in a row: the shutter is open again; one alone is a key picture
RUN_PICTURES = 4  # since the shutter closed that are remembered
REST_PICTURES = 10  # after so many, noise is told from refined detail...
REST_SHARE = 0.7  # ...by the share of the blocks that change: noise is everywhere
LONGEST_PICTURES = 90  # 3.6 s at 25 Hz: no shutter is closed for longer...
LEAST_NOISE = 0.02  # ...and a picture that changes by more grey levels than this is live


class Repeats:
    """Counts how often the newest picture has been seen before in a row, bit by bit."""

    def __init__(self) -> None:
        self._rows: np.ndarray | None = None
        self.count = 0

    def add(self, image: np.ndarray) -> int:
        """Returns 0 for a new picture, n for its n-th repeat."""
        rows = image[::_ROW_STEP]
        if self._rows is not None and rows.dtype == self._rows.dtype and np.array_equal(rows, self._rows):
            self.count += 1
        else:
            self._rows = rows.copy()  # a source may fill the same buffer again
            self.count = 0
        return self.count

    @property
    def frozen(self) -> bool:
        return self.count >= FROZEN_REPEATS


@dataclass(frozen=True, slots=True)
class _Change:
    """How two pictures differ in the means of their blocks."""

    levels: float  # grey levels, on average
    share: float  # of the blocks that differ at all


class Shutter:
    """Counts repeats as `Repeats` does, and those of 8-bit pictures behind a lossy codec as well."""

    def __init__(self) -> None:
        self._exact = Repeats()
        self._blocks: np.ndarray | None = None
        self._live: deque[float] = deque(maxlen=LIVE_PICTURES)  # changes, in grey levels
        self._run: deque[_Change] = deque(maxlen=RUN_PICTURES)  # since the shutter closed
        self._moved = 0  # pictures in a row
        self._lossy = False
        self.count = 0

    def add(self, image: np.ndarray) -> int:
        """Returns 0 for a new picture, n for its n-th repeat."""
        exact = self._exact.add(image)
        if image.dtype != np.uint8:
            self.count = exact
        elif exact:
            self.count += 1
            self._run.append(_Change(0.0, 0.0))
        else:
            self._judge(self._change_of(image))
        return self.count

    @property
    def frozen(self) -> bool:
        return self.count >= FROZEN_REPEATS

    def _judge(self, change: _Change | None) -> None:
        if change is None:
            self._open()
            self._live.clear()
        elif len(self._live) < FEWEST_PICTURES or (self.count and not self._lossy and self._stands_out(change)):
            self._open(change)
        elif self._stands_out(change):
            self._moved += 1
            if not self.count or self._moved >= MOVED_PICTURES:
                self._open(change)
            else:
                self.count += 1
        else:
            self._moved = 0
            self._lossy = True
            self._run.append(change)
            self.count += 1
            if self._at_rest():
                self._live.clear()
                self._open(change)

    def _stands_out(self, change: _Change) -> bool:
        return change.levels >= min(SUDDEN * self._usual_change, CODING_LEVELS)

    @property
    def _usual_change(self) -> float:
        return sorted(self._live)[len(self._live) // 4]

    def _open(self, change: _Change | None = None) -> None:
        self.count = self._moved = 0
        self._run.clear()
        if change is not None:
            self._live.append(change.levels)

    def _at_rest(self) -> bool:
        """Whether what looked like a closed shutter is a scene that stands still."""
        if self.count < REST_PICTURES:
            return False
        noisy = median(change.share for change in self._run) > REST_SHARE
        return noisy or (self.count >= LONGEST_PICTURES and median(change.levels for change in self._run) > LEAST_NOISE)

    def _change_of(self, image: np.ndarray) -> _Change | None:
        """From the picture before; None: there is none of this size."""
        height, width = image.shape
        size = (width // BLOCK_PX, height // BLOCK_PX)
        if size[0] * size[1] < FEWEST_BLOCKS:
            return None
        before = self._blocks
        self._blocks = cv2.resize(image[::2].astype(np.float32), size, interpolation=cv2.INTER_AREA)
        if before is None or before.shape != self._blocks.shape:
            return None
        difference = cv2.absdiff(before, self._blocks)
        return _Change(cv2.mean(difference)[0], cv2.countNonZero(difference) / difference.size)
