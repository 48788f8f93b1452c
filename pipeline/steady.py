"""Steady: noise is averaged over time where nothing moves, so that a fused video does not flicker.

A restored frame still holds what its own noise left behind, and that changes from frame to frame. Where the luminance
changes no more than noise does, a pixel moves only a share of the way to its new value; where it changes more, it takes
the new value at once. Two means of a small window tell: the signed one, in which noise cancels and a thing that comes
or goes does not, and that of the size, which shows fine texture that moves. How much noise there is, flat parts of the
picture tell, because motion changes little there; and change that neighbouring pixels share is motion, where there is
much of it, since what noise restoring and coding leave of noise is alike, but weak.
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
# The signed mean is 0.17 of the mean size where every pixel has noise of its own. Between these shares of it, more and
# more of what exceeds so many levels of the size is taken for motion.
ALIKE_SHARE = (0.25, 0.33)
ALIKE_MOST_LEVELS = 1.3


class Steady:
    """One fused picture in, the steady one out. Keeps the last one as its only state."""

    def __init__(self, config: SteadyConfig) -> None:
        self._config = config
        # float32 (H, W, 3): a share of a grey level per frame must not be lost. The other two are written over in
        # turns, because fresh memory for every frame took half of the time.
        self._last = self._newest = self._spare = np.empty((0, 0, 3), np.float32)
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
        if self._last.shape != image.shape or presence != self._presence:
            self._last, self._presence = image.astype(np.float32), presence
            self._newest, self._spare = np.empty_like(self._last), np.empty_like(self._last)
            return image
        share = self._share_of_newest(image)
        if share is None:
            np.copyto(self._last, image)
            return image
        np.copyto(self._newest, image)
        cv2.blendLinear(self._newest, self._last, share, 1 - share, self._spare)
        self._last, self._spare = self._spare, self._last
        return cv2.convertScaleAbs(self._last)

    def _share_of_newest(self, image: np.ndarray) -> np.ndarray | None:
        """How far every pixel goes to its new value, float32 (H, W) in [share, 1]; None where all of it is new."""
        luminance = cv2.cvtColor(self._last, cv2.COLOR_RGB2GRAY)
        change = cv2.subtract(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), luminance, dtype=cv2.CV_32F)
        signed = np.asarray(cv2.blur(change, (WINDOW_PX, WINDOW_PX)), np.float32)
        np.abs(signed, out=signed)
        size = np.asarray(cv2.blur(np.abs(change), (WINDOW_PX, WINDOW_PX)), np.float32)
        flat = _flat(luminance)
        signed_noise, size_noise = (_middle(_samples(mean)[flat]) for mean in (signed, size))
        if signed_noise > NOISE_MOST_LEVELS[0] or size_noise > NOISE_MOST_LEVELS[1]:
            return None
        noise_share = _share_that_is_noise(signed_noise, size_noise)
        # From the least share where a mean reaches its limit, to all of the new value at twice the limit.
        least = self._config.share
        signed *= (1 - least) / (STILL_SIGNED[0] + STILL_SIGNED[1] * noise_share * signed_noise)
        size *= (1 - least) / (STILL_SIZE[0] + STILL_SIZE[1] * noise_share * size_noise)
        share = np.maximum(signed, size, out=signed)
        share += 2 * least - 1
        return np.clip(share, least, 1, out=share)


def _share_that_is_noise(signed: float, size: float) -> float:
    """How much of the change in flat parts is noise, by how alike it is in neighbouring pixels; in (0, 1]."""
    if size <= ALIKE_MOST_LEVELS:
        return 1.0
    begins, ends = ALIKE_SHARE
    alike = min(1.0, max(0.0, (signed / size - begins) / (ends - begins)))
    return 1 - alike * (1 - ALIKE_MOST_LEVELS / size)


def _middle(values: np.ndarray) -> float:
    """The median, in a quarter of the time that the library's takes."""
    place = values.size // 2
    return float(np.partition(values, place)[place])


def _samples(picture: np.ndarray) -> np.ndarray:
    return picture[SAMPLING // 2 :: SAMPLING, SAMPLING // 2 :: SAMPLING]


def _flat(luminance: np.ndarray) -> np.ndarray:
    """Which samples of the picture lie where it changes least over a few pixels, noise left aside."""
    height, width = (len(range(SAMPLING // 2, side, SAMPLING)) for side in luminance.shape)
    smooth = np.asarray(cv2.resize(luminance, (width, height), interpolation=cv2.INTER_AREA))
    slope = np.abs(np.diff(smooth, axis=0, append=smooth[-1:])) + np.abs(np.diff(smooth, axis=1, append=smooth[:, -1:]))
    rank = int(FLAT_SHARE * slope.size)
    return np.asarray(slope <= np.partition(slope, rank, axis=None)[rank])
