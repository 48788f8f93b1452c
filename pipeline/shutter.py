"""Recognises a thermal camera whose shutter is closed: it repeats its last picture, bit by bit.

A real detector is noisy, so two pictures of the world never agree in every pixel. While the shutter closes to
recalibrate the core (0.5 to 3 s), equal pictures in a row are normal: the camera does not hang, but what it sends is
old.
"""

from __future__ import annotations

import numpy as np

FROZEN_REPEATS = 2  # two repeats of a picture, three equal ones in a row, are a closed shutter
_ROW_STEP = 8  # every eighth row tells pictures apart in less than 0.01 ms


class Repeats:
    """Counts how often the newest picture has been seen before in a row."""

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
