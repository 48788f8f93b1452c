"""Steady: noise is averaged over time where nothing moves, so that a fused video does not flicker.

A restored frame still holds what its own noise left behind, and that changes from frame to frame. Where the luminance
changes no more than noise does, a pixel moves only a share of the way to its new value; where it changes more, it takes
the new value at once. Two means of a small window tell: the signed one, in which noise cancels and a thing that comes
or goes does not, and that of the size, which shows fine texture that moves. How much noise there is, flat parts of the
picture tell, because motion changes nothing there.
"""

from __future__ import annotations

import cv2
import numpy as np

from pipeline.config import SteadyConfig

WINDOW_PX = 5  # a moving thing of 2 x 2 pixels and 15 grey levels still shows in the mean of this window
SAMPLING = 4  # every so many rows and columns are enough to know the noise
FLAT_SHARE = 0.3  # of the samples, those with the least slope
# Grey levels and multiples of the noise that count as still, for the signed mean and for the mean of the size. They
# were chosen on real clips: with larger ones, fine texture of a scene that moves was averaged away.
STILL_SIGNED = (1.0, 1.5)
STILL_SIZE = (0.5, 1.5)
NOISE_MOST_LEVELS = (3.0, 6.0)  # more than this, of either mean in flat parts, is no noise: another scene began


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
            uint8 RGB (H, W, 3).
        """
        if not self._config.enabled:
            return image
        newest = image.astype(np.float32)
        if self._last is None or self._last.shape != newest.shape or presence != self._presence:
            self._last, self._presence = newest, presence
            return image
        change = cv2.cvtColor(cv2.subtract(newest, self._last), cv2.COLOR_RGB2GRAY)
        signed = np.abs(cv2.blur(change, (WINDOW_PX, WINDOW_PX)))
        size = cv2.blur(np.abs(change), (WINDOW_PX, WINDOW_PX))
        flat = _flat(self._last)
        signed_noise, size_noise = (float(np.median(_samples(mean)[flat])) for mean in (signed, size))
        if signed_noise > NOISE_MOST_LEVELS[0] or size_noise > NOISE_MOST_LEVELS[1]:
            self._last = newest
            return image
        signed = signed * (1 / (STILL_SIGNED[0] + STILL_SIGNED[1] * signed_noise))
        size = size * (1 / (STILL_SIZE[0] + STILL_SIZE[1] * size_noise))
        # From the least share where a mean reaches its limit, to all of the new value at twice the limit.
        least = self._config.share
        share = np.clip(np.maximum(signed, size) * (1 - least) + (2 * least - 1), least, 1)
        self._last = cv2.blendLinear(newest, self._last, share, 1 - share)
        return cv2.convertScaleAbs(self._last)


def _samples(picture: np.ndarray) -> np.ndarray:
    return picture[::SAMPLING, ::SAMPLING]


def _flat(picture: np.ndarray) -> np.ndarray:
    """Which samples of the picture lie where its green changes least over a few pixels, noise left aside."""
    smooth = _samples(cv2.blur(picture[..., 1], (WINDOW_PX, WINDOW_PX)))
    slope = np.abs(np.diff(smooth, axis=0, append=smooth[-1:])) + np.abs(np.diff(smooth, axis=1, append=smooth[:, -1:]))
    return np.asarray(slope <= np.quantile(slope, FLAT_SHARE))
