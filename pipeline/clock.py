"""The path of one camera's view, frame by frame: what both clocks are compared by."""

from __future__ import annotations

import numpy as np

from calibration.ego_motion import EgoMotion
from calibration.time_offset import MotionSignal
from pipeline.frame import Frame
from pipeline.shutter import Repeats


class MotionLog:
    """The path of one camera's view, frame by frame."""

    def __init__(self) -> None:
        self._ego = EgoMotion()
        self._repeats = Repeats()
        self._samples: list[tuple[float, float, float, bool]] = []
        self._broken = False
        self.frames = 0

    def add(self, frame: Frame) -> None:
        """Measures one frame. A picture that a closed shutter repeats shows an old moment, and says nothing."""
        self.frames += 1
        if frame.camera == "infrared" and self._repeats.add(frame.image):
            return
        motion = self._ego.add(frame.image)
        time_s = frame.captured_ns / 1e9
        if not self._samples or time_s > self._samples[-1][0]:
            self._samples.append((time_s, motion.x_px, motion.y_px, motion.broken or self._broken))
            self._broken = False
        else:
            self._broken |= motion.broken

    def signal(self) -> MotionSignal:
        samples = np.array([sample[:3] for sample in self._samples], np.float64).reshape(-1, 3)
        return MotionSignal(samples[:, 0], samples[:, 1:], np.array([sample[3] for sample in self._samples], bool))
