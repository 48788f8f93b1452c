"""The rig: two camera models and how one sees what the other sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import cv2
import numpy as np

MAX_SIDE_PX = 16384
ROTATION_TOLERANCE = 1e-4  # a file written with six digits passes
MAX_DRIFT_PPM = 1000.0
EDGE_PX = 1.0  # the outermost ring of valid pixels borrows from outside when it is interpolated


class CalibrationError(Exception):
    """A calibration that cannot be used: says what, why and what to do."""


Lens = Literal["plumb_bob", "rational_polynomial", "equidistant"]  # the names of ROS
COEFFICIENTS: dict[Lens, tuple[str, ...]] = {
    "plumb_bob": ("k1", "k2", "p1", "p2", "k3"),
    "rational_polynomial": ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6"),
    "equidistant": ("k1", "k2", "k3", "k4"),
}
WIDEST_ANGLE = math.radians(89.0)  # from the axis; beyond, a picture plane in front of the camera shows nothing


@dataclass(frozen=True, eq=False)
class CameraModel:
    """A camera with one of OpenCV's lens models: plumb bob, rational, or equidistant (fisheye; pinhole-equi of Kalibr).

    Raises:
        CalibrationError: for a size, focal length or number that no camera has.
    """

    width: int
    height: int
    matrix: np.ndarray  # (3, 3) float64, pixels
    distortion: np.ndarray = field(default_factory=lambda: np.zeros(0))  # as COEFFICIENTS names them; empty: none
    lens: Lens = "plumb_bob"

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            side = getattr(self, name)
            if not isinstance(side, int | np.integer) or isinstance(side, bool) or not 1 <= side <= MAX_SIDE_PX:
                raise CalibrationError(f"a camera's {name} is 1 to {MAX_SIDE_PX} pixels, got {side!r}")
        if self.lens not in COEFFICIENTS:
            raise CalibrationError(f"a lens is one of {', '.join(COEFFICIENTS)}, got {self.lens!r}")
        matrix = _numbers(self.matrix, (3, 3), "the camera matrix")
        names = COEFFICIENTS[self.lens]
        count = len(names)
        distortion = np.ravel(np.asarray(self.distortion, dtype=np.float64))
        if not distortion.size:
            distortion = np.zeros(count)
        if self.lens == "plumb_bob" and distortion.size == 4:  # k3 left out
            distortion = np.append(distortion, 0.0)
        distortion = _numbers(distortion, (count,), f"the distortion ({', '.join(names)})")
        if matrix[0, 0] <= 0 or matrix[1, 1] <= 0:
            raise CalibrationError(f"focal lengths are positive, got fx = {matrix[0, 0]:g}, fy = {matrix[1, 1]:g}")
        if matrix[1, 0] or not np.array_equal(matrix[2], (0, 0, 1)):
            raise CalibrationError("a camera matrix is [[fx, s, cx], [0, fy, cy], [0, 0, 1]]")
        _freeze(self, width=int(self.width), height=int(self.height), matrix=matrix, distortion=distortion)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.width, self.height

    @property
    def widest_radius(self) -> float:
        """Where the lens model turns back (tangent of the angle); beyond it the model means nothing."""
        if self.lens == "equidistant":
            return math.tan(min(_first_root([9, 7, 5, 3], self.distortion[::-1]), WIDEST_ANGLE))
        k1, k2, _, _, k3 = self.distortion[:5]
        if self.lens == "plumb_bob":
            return _first_root([7, 5, 3], (k3, k2, k1))
        # r n(r^2) / d(r^2) turns where n d + 2 s (n' d - n d') = 0, s = r^2
        above, below = np.poly1d([k3, k2, k1, 1.0]), np.poly1d([*self.distortion[:4:-1], 1.0])
        bend = above * below + np.poly1d([2.0, 0.0]) * (above.deriv() * below - above * below.deriv())
        return _least_positive_root(np.concatenate([bend.roots, below.roots]))

    def project(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ideal image coordinates (X/Z, Y/Z) to distorted pixels."""
        x, y = self._distort(x, y)
        fx, skew, cx = self.matrix[0]
        _, fy, cy = self.matrix[1]
        return fx * x + skew * y + cx, fy * y + cy

    def rays(self, column: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distorted pixels to ideal image coordinates (X/Z, Y/Z), and where that worked (bool).

        By iteration, then checked by projecting back to 0.01 px: strong distortion has corners without an answer.
        """
        fx, skew, cx = self.matrix[0]
        _, fy, cy = self.matrix[1]
        y_seen = (row - cy) / fy
        x_seen = (column - cx - skew * y_seen) / fx
        with np.errstate(all="ignore"):
            undistort = self._undistort_fisheye if self.lens == "equidistant" else self._undistort
            x, y = undistort(x_seen, y_seen)
            again_column, again_row = self.project(x, y)
            close = np.hypot(again_column - column, again_row - row) < 0.01
            return x, y, close & (x * x + y * y < self.widest_radius**2)

    def _undistort(self, x_seen: np.ndarray, y_seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y = x_seen, y_seen
        for _ in range(50 if self.distortion.any() else 0):
            x_distorted, y_distorted = self._distort(x, y)
            x_error, y_error = x_distorted - x_seen, y_distorted - y_seen
            x, y = x - x_error, y - y_error
            if max(np.abs(x_error).max(), np.abs(y_error).max()) < 1e-9:
                break
        return x, y

    def _undistort_fisheye(self, x_seen: np.ndarray, y_seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Newton's steps to the angle from the axis; in the plane of the picture the tangent would run away."""
        seen = np.hypot(x_seen, y_seen)
        k1, k2, k3, k4 = self.distortion
        angle = np.minimum(seen, WIDEST_ANGLE)
        for _ in range(20):
            square = angle * angle
            value = angle * (1 + square * (k1 + square * (k2 + square * (k3 + square * k4))))
            slope = 1 + square * (3 * k1 + square * (5 * k2 + square * (7 * k3 + square * 9 * k4)))
            angle = np.clip(angle - (value - seen) / slope, 0, WIDEST_ANGLE)
        stretch = np.where(seen > 1e-12, np.tan(angle) / np.maximum(seen, 1e-12), 1.0)
        return x_seen * stretch, y_seen * stretch

    def _distort(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        square = x * x + y * y
        if self.lens == "equidistant":
            k1, k2, k3, k4 = self.distortion
            radius = np.sqrt(square)
            angle = np.arctan(radius)
            bent = angle * angle
            bent = angle * (1 + bent * (k1 + bent * (k2 + bent * (k3 + bent * k4))))
            stretch = np.where(radius > 1e-12, bent / np.maximum(radius, 1e-12), 1.0)
            return x * stretch, y * stretch
        k1, k2, p1, p2, k3 = self.distortion[:5]
        radial = 1 + square * (k1 + square * (k2 + square * k3))
        if self.lens == "rational_polynomial":
            k4, k5, k6 = self.distortion[5:]
            radial = radial / (1 + square * (k4 + square * (k5 + square * k6)))
        return (
            x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x),
            y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y,
        )


def _first_root(factors: Sequence[float], coefficients: Sequence[float] | np.ndarray) -> float:
    """Where 1 + 3 k1 r^2 + 5 k2 r^4 + ..., the slope of a radial polynomial, first becomes 0; inf: nowhere."""
    slope = [factor * coefficient for factor, coefficient in zip(factors, coefficients, strict=True)]
    return _least_positive_root(np.roots([*slope, 1.0]))


def _least_positive_root(squares: np.ndarray) -> float:
    turning = [root.real for root in squares if abs(root.imag) < 1e-9 and root.real > 0]
    return math.sqrt(min(turning)) if turning else math.inf


@dataclass(frozen=True, eq=False)
class Rig:
    """Both cameras, and the plane on which their pictures are made to coincide.

    Raises:
        CalibrationError: for a pose that is no rotation and translation, or a distance that is none.
    """

    visible: CameraModel
    infrared: CameraModel
    infrared_from_visible: np.ndarray  # (4, 4): a point in visible coordinates -> infrared coordinates, metres
    plane_distance_m: float = 30.0  # reference plane, parallel to the visible image; inf: very far
    time_offset_ms: float = 0.0  # infrared capture clock minus visible capture clock, when a recording begins
    drift_ppm: float = 0.0  # by how much the infrared clock runs fast against the visible one
    # (3, 3), infrared pixel -> visible pixel. Set where nothing else is known: then it alone decides.
    homography: np.ndarray | None = None

    def __post_init__(self) -> None:
        pose = _numbers(self.infrared_from_visible, (4, 4), "the pose infrared_from_visible")
        rotation = pose[:3, :3]
        if not np.array_equal(pose[3], (0, 0, 0, 1)):
            raise CalibrationError("the last row of the pose infrared_from_visible is [0, 0, 0, 1]")
        if np.abs(rotation @ rotation.T - np.eye(3)).max() > ROTATION_TOLERANCE:
            raise CalibrationError("the rotation in infrared_from_visible is not orthonormal: calibrate the rig again")
        if np.linalg.det(rotation) < 0:
            raise CalibrationError(
                "the rotation in infrared_from_visible mirrors (its determinant is -1): calibrate the rig again"
            )
        if math.isnan(self.plane_distance_m) or self.plane_distance_m <= 0:
            raise CalibrationError(f"the reference plane is in front of the camera, got {self.plane_distance_m} m")
        if not math.isfinite(self.time_offset_ms):
            raise CalibrationError(f"the time offset is a number of milliseconds, got {self.time_offset_ms}")
        if not abs(self.drift_ppm) <= MAX_DRIFT_PPM:
            raise CalibrationError(
                f"clocks drift by {MAX_DRIFT_PPM:g} ppm at most, got {self.drift_ppm}: measure it again with "
                "`calibrate time`"
            )
        homography = self.homography
        if homography is not None:
            homography = _numbers(homography, (3, 3), "the homography")
            if abs(np.linalg.det(homography)) < 1e-12:
                raise CalibrationError("the homography cannot be inverted: it maps the picture onto a line or a point")
        _freeze(self, infrared_from_visible=pose, homography=homography)

    @property
    def baseline_m(self) -> float:
        return float(np.linalg.norm(self.infrared_from_visible[:3, 3]))


def infrared_map(
    rig: Rig, feather_px: float = 16.0, plane_distance_m: float | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each pixel of the visible camera, lens distortion and all, is found in the infrared picture.

    Exact for things on the reference plane; nearer and farther ones are off by focal_px * baseline * |1/Z - 1/plane|.

    Args:
        rig: the calibration.
        feather_px: width of the fall-off at the edge of what infrared sees.
        plane_distance_m: instead of the rig's own.

    Returns:
        map_x, map_y: float32 (H, W) of the visible size, infrared pixels, ready for cv2.remap; outside the infrared
            picture they stay within one picture's size of it.
        weight: float32 (H, W) in [0, 1], 0 where infrared sees nothing, 1 well inside.
    """
    distance_m = rig.plane_distance_m if plane_distance_m is None else plane_distance_m
    if not distance_m > 0:
        raise CalibrationError(f"the reference plane is in front of the camera, got {distance_m} m")
    row, column = np.mgrid[0 : rig.visible.height, 0 : rig.visible.width].astype(np.float64)
    with np.errstate(all="ignore"):
        if rig.homography is not None:
            map_x, map_y, valid = _through_homography(np.linalg.inv(rig.homography), column, row)
        else:
            map_x, map_y, valid = _through_plane(rig, distance_m, column, row)
    width, height = rig.infrared.size
    valid &= (map_x >= 0) & (map_x <= width - 1) & (map_y >= 0) & (map_y <= height - 1)
    map_x = np.clip(np.nan_to_num(map_x, nan=-width, posinf=2 * width, neginf=-width), -width, 2 * width)
    map_y = np.clip(np.nan_to_num(map_y, nan=-height, posinf=2 * height, neginf=-height), -height, 2 * height)
    return map_x.astype(np.float32), map_y.astype(np.float32), feathered(valid, feather_px)


def _through_plane(
    rig: Rig, distance_m: float, column: np.ndarray, row: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y, valid = rig.visible.rays(column, row)
    rotation, translation = rig.infrared_from_visible[:3, :3], rig.infrared_from_visible[:3, 3]
    # The point (x, y, 1) * distance, divided by the distance: also right for a plane at infinity.
    inverse_m = 1.0 / distance_m
    point = [rotation[axis, 0] * x + rotation[axis, 1] * y + rotation[axis, 2] for axis in range(3)]
    point = [coordinate + shift * inverse_m for coordinate, shift in zip(point, translation, strict=True)]
    in_front = point[2] > 1e-6
    ideal_x, ideal_y = point[0] / point[2], point[1] / point[2]
    # A strongly distorted lens model folds far-away rays back into its picture.
    in_model = ideal_x * ideal_x + ideal_y * ideal_y < rig.infrared.widest_radius**2
    map_x, map_y = rig.infrared.project(ideal_x, ideal_y)
    return map_x, map_y, valid & in_front & in_model


def _through_homography(
    infrared_from_visible: np.ndarray, column: np.ndarray, row: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    centre = infrared_from_visible[2] @ (column.mean(), row.mean(), 1.0)
    x, y, scale = (line[0] * column + line[1] * row + line[2] for line in infrared_from_visible)
    return x / scale, y / scale, scale * np.sign(centre) > 1e-12  # the other side of the horizon is no picture


def feathered(valid: np.ndarray, feather_px: float) -> np.ndarray:
    """0 outside, rising to 1 over `feather_px` pixels from the edge. The edge of the visible picture itself is none."""
    if valid.all():
        return np.ones(valid.shape, np.float32)
    distance = cv2.distanceTransform(valid.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    if feather_px <= 0:
        return (distance > EDGE_PX).astype(np.float32)
    return np.clip((distance - EDGE_PX) / feather_px, 0.0, 1.0).astype(np.float32)


def _numbers(values: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    """A read-only float64 copy of the right shape, all finite."""
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise CalibrationError(f"{name} holds something that is not a number") from None
    if array.shape != shape:
        raise CalibrationError(f"{name} has the shape {shape}, got {array.shape}")
    if not np.isfinite(array).all():
        raise CalibrationError(f"{name} has values that are not finite: calibrate the rig again")
    array.flags.writeable = False
    return array


def _freeze(instance: object, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(instance, name, value)
