"""Infrared conditioning: dead pixels, stripes, then counts to 8 bits, without flicker.

Limits or curves of each single frame make the whole background jump when something hot enters (13 grey levels,
measured), and an exponential mean alone still jumps when the hot thing is much hotter. So what is applied is smoothed
*and* may move only so far in one frame that no grey level changes by more than about two. Only when a large part of
the picture has lost its contrast does it hurry. When the shutter has recalibrated the detector, all counts step at
once: limits and curve step along.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np

from pipeline import equalize
from pipeline.conditioning import DeadPixels, Stripes
from pipeline.config import GainConfig
from pipeline.frame import Frame

MAX_STEP_LEVELS = 1.5  # of 255, a frame
HURRY_SHARE = 0.3  # of the picture without contrast
GAP_NS = 250_000_000  # some cores send nothing while the shutter is closed


class InfraredGain:
    """Turns the frames of one infrared camera into uint8, white is hot.

    It remembers the scene and the detector, so each camera needs its own. An 8-bit camera has its own gain control:
    its pictures pass unchanged, unless the configuration asks for conditioning. The same frame given twice (a held
    one) gives the same picture and moves nothing.
    """

    def __init__(self, config: GainConfig | None = None) -> None:
        self.config = config or GainConfig()
        self._dead_pixels = DeadPixels()
        self._stripes = {"columns": Stripes(axis=1), "rows": Stripes(axis=0)}
        self._transfer: _Transfer = _transfer_of(self.config)
        self._median: float | None = None
        self._last_frame: Frame | None = None
        self._last_result: tuple[np.ndarray, dict[str, Any]] | None = None
        self._times_ms: dict[str, float] = {}

    def __call__(self, frame: Frame) -> tuple[np.ndarray, dict[str, Any]]:
        """Converts one frame.

        Returns:
            The picture, uint8 (H, W), not to be written to (it may be the frame's own); and what was done: `method`
            ("camera", "plateau" or "percentile"), `low` and `high` (counts that became black and white), `polarity`
            of the camera, `dead_pixels` (filled), `stripes` (sigma of what was taken off, counts), and `times_ms` by
            step.
        """
        if self._last_result is not None and frame is self._last_frame:
            return self._last_result
        self._times_ms = {}
        repeat = self._is_repeat(frame)
        after_shutter = not repeat and self._after_shutter(frame)
        image = self._repaired(frame, learn=not repeat, after_shutter=after_shutter)
        with self._timed("gain"):
            picture, info = self._converted(frame, image, repeat, after_shutter)
        info |= {
            "polarity": self.config.polarity,
            "dead_pixels": self._dead_pixels.count,
            "stripes": round(max(stripes.sigma for stripes in self._stripes.values()), 3),
            "times_ms": self._times_ms,
        }
        self._last_frame, self._last_result = frame, (picture, info)
        return self._last_result

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._times_ms[step] = (time.perf_counter() - started) * 1e3

    def _is_repeat(self, frame: Frame) -> bool:
        """Whether the frame repeats a picture that was given: pairing may have left out the one that was new."""
        last = self._last_frame
        return last is not None and frame.repeats > 0 and frame.index - frame.repeats <= last.index

    def _after_shutter(self, frame: Frame) -> bool:
        last = self._last_frame
        if last is None or frame.size != last.size:
            return False
        return last.frozen or frame.captured_ns - last.captured_ns > GAP_NS

    def _repaired(self, frame: Frame, learn: bool, after_shutter: bool) -> np.ndarray:
        image, raw = frame.image, frame.image.dtype == np.uint16
        if self.config.dead_pixels == "on" or (self.config.dead_pixels == "auto" and raw):
            with self._timed("dead_pixels"):
                image = self._dead_pixels(image, learn)
        wanted = self.config.stripes
        axes = {"auto": ("columns",) if raw else (), "both": ("columns", "rows"), "off": ()}.get(wanted, (wanted,))
        for axis in axes:
            with self._timed("stripes"):
                if after_shutter:
                    self._stripes[axis].relearn()
                image = self._stripes[axis](image, learn)
        return image

    def _converted(
        self, frame: Frame, image: np.ndarray, repeat: bool, after_shutter: bool
    ) -> tuple[np.ndarray, dict[str, Any]]:
        black_hot = self.config.polarity == "black_hot"
        if black_hot:
            image = cv2.bitwise_not(image)
        if image.dtype == np.uint8:
            return image, {"method": "camera", "low": 0.0, "high": 255.0}
        if not repeat or self._median is None:
            sample = np.ascontiguousarray(image[:: equalize.STEP, :: equalize.STEP])
            place = sample.size // 2
            median = float(np.partition(sample, place, axis=None)[place])
            if self._last_frame is not None and frame.size != self._last_frame.size:
                self._transfer = _transfer_of(self.config)
            elif after_shutter and self._median is not None:
                self._transfer.shift(median - self._median)
            self._transfer.follow(sample)
            self._median = median
        picture, low, high = self._transfer.apply(image)
        if black_hot:  # as the camera counts
            low, high = 65535 - low, 65535 - high
        return picture, {"method": self.config.method, "low": low, "high": high}


class _Transfer(Protocol):
    """Counts to grey levels, following the scene."""

    def follow(self, sample: np.ndarray) -> None:
        """Moves towards what a new picture asks for, of which every sixth pixel is given, uint16 (h, w)."""
        ...

    def shift(self, counts: float) -> None:
        """All counts have risen by so many."""
        ...

    def apply(self, image: np.ndarray) -> tuple[np.ndarray, float, float]:
        """(uint8 picture, the count that becomes black, the count that becomes white)."""
        ...


def _transfer_of(config: GainConfig) -> _Transfer:
    return _Plateau(config) if config.method == "plateau" else _Percentiles(config)


class _Plateau:
    def __init__(self, config: GainConfig) -> None:
        self._config = config
        self._curve: np.ndarray | None = None
        self._table: np.ndarray | None = None

    def follow(self, sample: np.ndarray) -> None:
        target = equalize.target_curve(sample, self._config.min_span_counts, self._config.plateau)
        if self._curve is None:
            self._curve = target
        else:
            step = self._config.smoothing * (target - self._curve)
            if equalize.flat_share(sample, self._curve) < HURRY_SHARE:
                step = np.clip(step, -MAX_STEP_LEVELS, MAX_STEP_LEVELS)
            self._curve = self._curve + step
        self._table = equalize.table_of(self._curve)

    def shift(self, counts: float) -> None:
        if self._curve is not None:
            self._curve = equalize.shifted(self._curve, counts)

    def apply(self, image: np.ndarray) -> tuple[np.ndarray, float, float]:
        assert self._table is not None
        assert self._curve is not None
        low = int(np.searchsorted(self._curve, self._curve[0] + 0.5)) * equalize.BIN_COUNTS
        high = int(np.searchsorted(self._curve, self._curve[-1] - 0.5)) * equalize.BIN_COUNTS
        return look_up(image, self._table), float(low), float(high)


def look_up(counts: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The table's entry, uint8, for each count, uint16. OpenCV 5 does it in 0.1 ms a 640x512 picture, NumPy in 0.25."""
    if int(cv2.__version__.split(".")[0]) >= 5:
        return np.asarray(cv2.LUT(counts, table), np.uint8).reshape(counts.shape)
    return np.asarray(np.take(table, counts))


@dataclass(frozen=True)
class _Limits:
    low: float
    high: float

    @property
    def span(self) -> float:
        return self.high - self.low


class _Percentiles:
    def __init__(self, config: GainConfig) -> None:
        self._config = config
        self._limits: _Limits | None = None

    def follow(self, sample: np.ndarray) -> None:
        target = self._target(sample)
        if self._limits is None:
            self._limits = target
            return
        clipped = np.count_nonzero(sample < self._limits.low) + np.count_nonzero(sample > self._limits.high)
        self._limits = self._step(self._limits, target, hurry=bool(clipped > HURRY_SHARE * sample.size))

    def shift(self, counts: float) -> None:
        if self._limits is not None:
            self._limits = _Limits(self._limits.low + counts, self._limits.high + counts)

    def apply(self, image: np.ndarray) -> tuple[np.ndarray, float, float]:
        assert self._limits is not None
        return _stretch(image, self._limits), self._limits.low, self._limits.high

    def _target(self, sample: np.ndarray) -> _Limits:
        """The nearest sample of each percentile, which takes half the time of np.percentile."""
        last = sample.size - 1
        places = [round(share / 100 * last) for share in (self._config.low_percentile, self._config.high_percentile)]
        ordered = np.partition(sample, places, axis=None)
        return self._widened(_Limits(float(ordered[places[0]]), float(ordered[places[1]])))

    def _step(self, limits: _Limits, target: _Limits, hurry: bool) -> _Limits:
        furthest = limits.span * (1.0 if hurry else MAX_STEP_LEVELS / 255)

        def move(present: float, wanted: float) -> float:
            return present + float(np.clip(self._config.smoothing * (wanted - present), -furthest, furthest))

        return self._widened(_Limits(move(limits.low, target.low), move(limits.high, target.high)))

    def _widened(self, limits: _Limits) -> _Limits:
        """At least the minimum span, about the same middle."""
        missing = self._config.min_span_counts - limits.span
        return _Limits(limits.low - missing / 2, limits.high + missing / 2) if missing > 0 else limits


def _stretch(counts: np.ndarray, limits: _Limits) -> np.ndarray:
    """uint16 to uint8, linear between the limits. Saturates at both ends."""
    scale = 255.0 / limits.span
    if limits.low >= 0:
        # convertScaleAbs mirrors what is negative, so the floor comes off first, in saturating unsigned arithmetic.
        above = cv2.subtract(counts, round(limits.low))  # type: ignore[call-overload]
        return cv2.convertScaleAbs(above, alpha=scale)
    return cv2.convertScaleAbs(counts, alpha=scale, beta=-limits.low * scale)
