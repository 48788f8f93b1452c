"""The rig: two camera models and how one sees what the other sees."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


class CalibrationError(Exception):
    """A calibration that cannot be used: says what, why and what to do."""


@dataclass(frozen=True)
class CameraModel:
    """A pinhole camera with plumb-bob distortion (OpenCV's k1 k2 p1 p2 k3)."""

    width: int
    height: int
    matrix: np.ndarray  # (3, 3) float64, pixels
    distortion: np.ndarray = field(default_factory=lambda: np.zeros(5))  # (5,)


@dataclass(frozen=True)
class Rig:
    """Both cameras, and the plane on which their pictures are made to coincide."""

    visible: CameraModel
    infrared: CameraModel
    infrared_from_visible: np.ndarray  # (4, 4): a point in visible coordinates -> infrared coordinates, metres
    plane_distance_m: float = 30.0  # reference plane, parallel to the visible image
    time_offset_ms: float = 0.0  # infrared capture clock minus visible capture clock
