"""Keeps the cameras aligned while they run: keyframes in, corrected maps out.

The frames never wait for it. Live, one thread compares the cameras on keyframes (about 10 ms each), and makes the next
maps; the flow takes whatever maps are newest. In replay the same happens in step, so that a run can be repeated bit by
bit. A correction is slewed: the picture moves by a fraction of a pixel a frame and never jumps.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibration.refine import Bounds, Refiner
from calibration.residual import (
    NEW_SCENE_LEVELS,
    displacement_px,
    scene_difference,
    similarity,
    survey,
    thumbnail_of,
)
from calibration.warp import Maps, Warp
from pipeline.background import give_way
from pipeline.config import RegistrationConfig
from pipeline.frame import AlignedPair
from pipeline.handover import HandoverClosed, Latest

log = logging.getLogger("dspfusion.registration")

SAME_SCENE_FACTOR = 10.0  # a scene that stays is looked at again after so many of the shortest intervals
CALM_KEYFRAMES = 10  # in a row that moved nothing: then the cameras are compared...
CALM_FACTOR = 3.0  # ...so much less often, until one of them disagrees
SETTLED_PX = 0.05  # closer to the correction than this, the maps stay
IDLE_S = 0.5


@dataclass(frozen=True, eq=False)
class _Keyframe:
    infrared: np.ndarray
    visible: np.ndarray
    maps: Maps


class Refinement:
    """Follows the residual transform of one rig, and holds the maps that correct it.

    Args:
        warp: makes the maps.
        size: (width, height) of the visible picture.
        config: intervals and bounds.
        calibrated: without a calibration, larger corrections are allowed.
        background: in a thread of its own (live); otherwise within `offer` (replay).
    """

    def __init__(
        self, warp: Warp, size: tuple[int, int], config: RegistrationConfig, calibrated: bool, background: bool
    ) -> None:
        bounds = Bounds(shift_px=config.max_shift_px)
        self._warp = warp
        self._size = size
        self._config = config
        self._refiner = Refiner(size, bounds if calibrated else bounds.widened())
        self._maps = warp.offline
        self._target = self._maps.parameters  # the correction to go to...
        self._behind = False  # ...and whether the maps are on their way there
        self._thumbnail: np.ndarray | None = None
        self._last_ns = 0
        self._calm = 0  # keyframes in a row that moved nothing
        self._keyframe_ms: list[float] = []
        self.failures = 0
        self._slot: Latest[_Keyframe | None] | None = None
        if background:
            self._slot = Latest()
            self._thread = threading.Thread(target=self._work, name="registration", daemon=True)
            self._thread.start()

    @property
    def maps(self) -> Maps:
        """The newest maps; one reference, swapped as a whole."""
        return self._maps

    @property
    def matrix(self) -> np.ndarray:
        """The correction that the newest maps apply: 3x3, in pixels of the visible picture."""
        return similarity(self._maps.parameters, self._size)

    def offer(self, aligned: AlignedPair, maps: Maps) -> None:
        """Shows a pair that was warped by `maps`. Live, this takes less than a tenth of a millisecond.

        Where the engine registers, a keyframe is warped here: once each `refine_every_s`.
        """
        keyframe = None
        if self._is_due(aligned):
            infrared = aligned.registered()
            assert infrared is not None
            assert aligned.visible is not None
            keyframe = _Keyframe(infrared, aligned.visible, maps)
        if self._slot is None:
            self._step(keyframe)
        elif keyframe is not None or self._behind:
            self._put(keyframe)

    def _put(self, keyframe: _Keyframe | None) -> None:
        """Wakes the thread; the tick of a frame (None) does not push out a keyframe that still waits."""
        assert self._slot is not None
        if keyframe is not None or not len(self._slot):
            try:
                self._slot.put(keyframe)
            except HandoverClosed:
                return

    def close(self) -> None:
        """Ends the thread; the maps stay as they are."""
        if self._slot is not None:
            self._slot.close()
            self._thread.join(timeout=2)

    def report(self) -> dict[str, Any]:
        """What the registration did: for the report and the health stream."""
        maps, refiner = self._maps, self._refiner
        health_state, health = refiner.verdict(maps.parameters)
        x, y, roll, log_scale = (float(value) for value in maps.parameters)
        return {
            "health_state": health_state,
            "health": round(health, 3),
            "correction": {
                "shift_px": [round(x, 3), round(y, 3)],
                "roll_deg": round(float(np.degrees(roll)), 4),
                "scale": round(float(np.exp(log_scale)), 5),
            },
            "sigma_px": round(refiner.sigma_px, 3),
            "keyframes": {"total": refiner.keyframes, **refiner.counts},
            "keyframe_ms": round(float(np.median(self._keyframe_ms)), 2) if self._keyframe_ms else None,
            "failures": self.failures,
        }

    def _is_due(self, aligned: AlignedPair) -> bool:
        """Whether a pair is a keyframe: both cameras are live and show something new, or enough time has passed."""
        pair = aligned.pair
        if pair.mode != "fused" or pair.infrared is None or pair.visible is None or aligned.visible is None:
            return False
        # In step there is no thread to overload: every new scene counts.
        calm_factor = CALM_FACTOR if self._calm >= CALM_KEYFRAMES else 1.0
        shortest_s = 0.0 if self._slot is None else self._config.refine_every_s * calm_factor
        passed_s = (pair.captured_ns - self._last_ns) / 1e9
        first = self._thumbnail is None
        if not first and passed_s < shortest_s:
            return False
        if pair.infrared.suspect or pair.visible.suspect:
            return False
        thumbnail = thumbnail_of(aligned.visible)
        new = self._thumbnail is None or scene_difference(thumbnail, self._thumbnail) > NEW_SCENE_LEVELS
        if not first and not new and passed_s < self._config.refine_every_s * SAME_SCENE_FACTOR:
            return False
        self._thumbnail, self._last_ns = thumbnail, pair.captured_ns
        return True

    def _work(self) -> None:
        assert self._slot is not None
        give_way()
        while True:
            try:
                keyframe = self._slot.take(timeout_s=IDLE_S)
            except TimeoutError:
                continue
            except HandoverClosed:
                return
            try:
                self._step(keyframe)
            except Exception as error:
                # The frames go on with the maps there are; said once, counted in the report.
                if not self.failures:
                    log.warning("the registration cannot be refined (%s): the last maps stay", error)
                self.failures += 1

    def _step(self, keyframe: _Keyframe | None) -> None:
        if keyframe is not None:
            started = time.thread_time()
            maps = keyframe.maps
            outcome = self._refiner.add(survey(keyframe.infrared, keyframe.visible, maps.weight), maps.parameters)
            self._target = self._refiner.correction
            # Differences that nobody sees are not worth new maps.
            self._behind = _apart_px(self._target, self._maps.parameters, self._size) >= SETTLED_PX
            calm = outcome in ("used", "no_information") and not self._behind
            self._calm = self._calm + 1 if calm else 0
            self._keyframe_ms = [*self._keyframe_ms[-99:], (time.thread_time() - started) * 1e3]
        if self._behind:
            self._maps = self._warp.corrected(self._slewed(self._maps.parameters, self._target))
            self._behind = not np.array_equal(self._maps.parameters, self._target)

    def _slewed(self, shown: np.ndarray, target: np.ndarray) -> np.ndarray:
        apart_px = _apart_px(target, shown, self._size)
        return (
            target if apart_px <= self._config.slew_px else shown + (target - shown) * self._config.slew_px / apart_px
        )


def _apart_px(one: np.ndarray, other: np.ndarray, size: tuple[int, int]) -> float:
    """How far two corrections move the same pixel apart, on average."""
    return displacement_px(similarity(one - other, size), size)
