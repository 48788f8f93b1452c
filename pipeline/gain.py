"""Infrared counts to 8 bits: percentile limits that follow the scene without flicker.

Plain percentiles of each frame make the whole background jump when something hot enters (13 grey levels, measured),
and an exponential mean alone still jumps when the hot thing is much hotter. So the limits are smoothed *and* may move
only so far in one frame that no grey level changes by more than about two. Only when a large part of the picture is
clipped, and so lost anyway, do they hurry. When the shutter has recalibrated the detector, all counts step at once:
the limits step along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from pipeline.config import GainConfig
from pipeline.frame import Frame
from pipeline.shutter import Repeats

SAMPLE_STEP = 4  # limits from every fourth pixel of every fourth row: 0.1 instead of 1.1 ms
MAX_STEP_SHARE = 0.006  # of the span, a frame: 1.5 grey levels
HURRY_CLIPPED_SHARE = 0.3  # of the picture beyond the limits
GAP_NS = 250_000_000  # some cores send nothing while the shutter is closed


@dataclass(frozen=True)
class _Limits:
    low: float
    high: float

    @property
    def span(self) -> float:
        return self.high - self.low

    def shifted(self, counts: float) -> _Limits:
        return _Limits(self.low + counts, self.high + counts)


class InfraredGain:
    """Turns the frames of one infrared camera into uint8, white is hot.

    It remembers the scene, so each camera needs its own. An 8-bit camera has its own gain control: its pictures pass
    unchanged. The same frame given twice (a held one) gives the same picture and moves nothing.
    """

    def __init__(self, config: GainConfig | None = None) -> None:
        self.config = config or GainConfig()
        self._limits: _Limits | None = None
        self._median = 0.0
        self._repeats = Repeats()
        self._was_frozen = False
        self._last_frame: Frame | None = None
        self._last_result: tuple[np.ndarray, dict[str, Any]] | None = None

    def __call__(self, frame: Frame) -> tuple[np.ndarray, dict[str, Any]]:
        """Converts one frame.

        Returns:
            The picture, uint8 (H, W), not to be written to (it may be the frame's own); and what was done: `method`
            ("camera" or "percentile"), `low` and `high` (counts that became 0 and 255), `polarity` of the camera.
        """
        if self._last_result is not None and frame is self._last_frame:
            return self._last_result
        if frame.image.dtype == np.uint8:
            picture, method, limits = frame.image, "camera", _Limits(0, 255)
        else:
            limits = self._follow(frame)
            picture, method = _stretch(frame.image, limits), "percentile"
        if self.config.polarity == "black_hot":
            picture = cv2.bitwise_not(picture)
        info = {"method": method, "low": limits.low, "high": limits.high, "polarity": self.config.polarity}
        self._last_frame, self._last_result = frame, (picture, info)
        return self._last_result

    def _follow(self, frame: Frame) -> _Limits:
        """Moves the limits towards those of this frame."""
        after_gap = (
            self._last_frame is None
            or frame.size != self._last_frame.size
            or frame.captured_ns - self._last_frame.captured_ns > GAP_NS
        )
        if self._repeats.add(frame.image) and self._limits is not None:
            self._was_frozen = self._was_frozen or self._repeats.frozen
            return self._limits
        sample = frame.image[::SAMPLE_STEP, ::SAMPLE_STEP].flatten()
        low, middle, high = self._percentiles(sample)
        target = self._widened(_Limits(low, high))
        limits = self._limits
        if limits is None or (self._last_frame is not None and frame.size != self._last_frame.size):
            limits = target
        else:
            if after_gap or self._was_frozen:
                limits = limits.shifted(middle - self._median)
            clipped = np.count_nonzero(sample < limits.low) + np.count_nonzero(sample > limits.high)
            limits = self._step(limits, target, hurry=bool(clipped > HURRY_CLIPPED_SHARE * sample.size))
        self._limits, self._median, self._was_frozen = limits, middle, False
        return limits

    def _percentiles(self, sample: np.ndarray) -> tuple[float, float, float]:
        """Low, median and high; the nearest sample of each, which takes half the time of np.percentile."""
        last = sample.size - 1
        shares = (self.config.low_percentile / 100, 0.5, self.config.high_percentile / 100)
        low, middle, high = (round(share * last) for share in shares)
        ordered = np.partition(sample, (low, middle, high))
        return float(ordered[low]), float(ordered[middle]), float(ordered[high])

    def _step(self, limits: _Limits, target: _Limits, hurry: bool) -> _Limits:
        furthest = limits.span * (1.0 if hurry else MAX_STEP_SHARE)

        def move(present: float, wanted: float) -> float:
            return present + float(np.clip(self.config.smoothing * (wanted - present), -furthest, furthest))

        return self._widened(_Limits(move(limits.low, target.low), move(limits.high, target.high)))

    def _widened(self, limits: _Limits) -> _Limits:
        """At least the minimum span, about the same middle."""
        missing = self.config.min_span_counts - limits.span
        return _Limits(limits.low - missing / 2, limits.high + missing / 2) if missing > 0 else limits


def _stretch(counts: np.ndarray, limits: _Limits) -> np.ndarray:
    """uint16 to uint8, linear between the limits. Saturates at both ends."""
    scale = 255.0 / limits.span
    if limits.low >= 0:
        # convertScaleAbs mirrors what is negative, so the floor comes off first, in saturating unsigned arithmetic.
        above = cv2.subtract(counts, round(limits.low))  # type: ignore[call-overload]
        return cv2.convertScaleAbs(above, alpha=scale)
    return cv2.convertScaleAbs(counts, alpha=scale, beta=-limits.low * scale)
