"""Steady: noise is averaged over time where nothing moves, so that a fused video does not flicker.

A restored frame still holds what its own noise left behind, and that changes from frame to frame. Where the local mean
of the luminance stays within the noise, a pixel moves only a share of the way to its new value; where it leaves the
noise, it takes the new value at once. The local mean keeps its sign, so noise cancels in it and motion does not.
"""

from __future__ import annotations

import cv2
import numpy as np

from pipeline.config import SteadyConfig

WINDOW_PX = 5  # a moving thing of 2 x 2 pixels and 15 grey levels still shows in the mean of this window
NOISE_SAMPLING = 4  # every so many rows and columns are enough to know the noise
STILL_LEVELS = 1.0  # grey levels that count as still, even in a picture without noise
NOISE_FACTOR = 1.5  # ... and so many times the median of the picture beyond them
NOISE_MOST_LEVELS = 3.0  # a median above this is no noise: most of the picture moves, or another scene began


class Steady:
    """One fused picture in, the steady one out. Keeps the last one as its only state."""

    def __init__(self, config: SteadyConfig) -> None:
        self._config = config
        self._last: np.ndarray | None = None  # float32 (H, W, 3): a share of a grey level per frame must not be lost
        self._presence: tuple[bool, bool] | None = None

    def __call__(self, image: np.ndarray, presence: tuple[bool, bool]) -> np.ndarray:
        """The picture with less noise where it is still.

        Args:
            image: uint8 RGB (H, W, 3).
            presence: which cameras it shows (infrared, visible); a change starts anew.

        Returns:
            uint8 RGB (H, W, 3), a new array.
        """
        if not self._config.enabled:
            return image
        newest = image.astype(np.float32)
        if self._last is None or self._last.shape != newest.shape or presence != self._presence:
            self._last, self._presence = newest, presence
            return image
        change = cv2.subtract(newest, self._last)
        moved = np.abs(cv2.blur(cv2.cvtColor(change, cv2.COLOR_RGB2GRAY), (WINDOW_PX, WINDOW_PX)))
        noise = float(np.median(moved[::NOISE_SAMPLING, ::NOISE_SAMPLING]))
        if noise > NOISE_MOST_LEVELS:
            self._last = newest
            return image
        threshold = STILL_LEVELS + NOISE_FACTOR * noise
        # From the least share at the threshold to all of it at twice the threshold.
        least = self._config.share
        share = np.clip(moved * ((1 - least) / threshold) + (2 * least - 1), least, 1)
        self._last = cv2.blendLinear(newest, self._last, share, 1 - share)
        return cv2.convertScaleAbs(self._last)
