"""The true geometry of the simulated rig: two lenses, a baseline, and the sway of the pole that carries them.

Three frames, all in metres with x right, y down, z forward:

    world     fixed to the street, y = 0 on the road
    visible   the visible camera; leans down a little and sways with the pole
    infrared  the infrared camera, bolted to the visible one (`Rig.infrared_from_visible`)
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from calibration.rig import CameraModel, Rig
from pipeline.config import SyntheticSource
from pipeline.frame import Camera

VISIBLE_FOV_DEG = 55.0  # horizontal, before distortion
INFRARED_FOV_DEG = 60.0
INFRARED_POSITION_M = (0.080, -0.012, 0.005)  # of the infrared lens, in visible coordinates
INFRARED_ROTATION_DEG = (0.35, -0.55, 0.30)  # rotation vector, infrared from visible
CAMERA_HEIGHT_M = 2.1
CAMERA_PITCH_DEG = 3.0  # looks down
SWAY_YAW_DEG = 0.22
SWAY_PITCH_DEG = 0.08


def true_rig(infrared: SyntheticSource, visible: SyntheticSource, plane_distance_m: float = 20.0) -> Rig:
    """The rig as it really is. Lenses do not depend on seed or scene, only on the pictures' sizes."""
    return Rig(
        visible=camera_model("visible", visible.width, visible.height),
        infrared=camera_model("infrared", infrared.width, infrared.height),
        infrared_from_visible=infrared_from_visible(),
        plane_distance_m=plane_distance_m,
        time_offset_ms=infrared.time_offset_ms - visible.time_offset_ms,
    )


def camera_model(camera: Camera, width: int, height: int) -> CameraModel:
    """The lens of one camera at one picture size."""
    fov_deg = VISIBLE_FOV_DEG if camera == "visible" else INFRARED_FOV_DEG
    focal_px = width / 2 / math.tan(math.radians(fov_deg / 2))
    # Real lenses sit a little off the sensor's middle.
    off_x, off_y = (0.006, -0.008) if camera == "visible" else (-0.009, 0.011)
    centre_x, centre_y = (width - 1) / 2 + off_x * width, (height - 1) / 2 + off_y * width
    matrix = np.array([[focal_px, 0, centre_x], [0, focal_px, centre_y], [0, 0, 1]])
    coefficients = (-0.11, 0.03, 0.0006, -0.0004, 0.0) if camera == "visible" else (-0.19, 0.05, -0.0005, 0.0007, 0.0)
    return CameraModel(width, height, matrix, np.array(coefficients))


def infrared_from_visible() -> np.ndarray:
    """(4, 4): visible coordinates -> infrared coordinates."""
    rotation = rotation_matrix(INFRARED_ROTATION_DEG)
    transform = np.eye(4)
    transform[:3, :3] = rotation
    transform[:3, 3] = -rotation @ np.array(INFRARED_POSITION_M)
    return transform


def rotation_matrix(vector_deg: tuple[float, float, float]) -> np.ndarray:
    """(3, 3) from a rotation vector in degrees."""
    return np.asarray(cv2.Rodrigues(np.radians(np.array(vector_deg, np.float64)))[0])


def sway_deg(world_s: float) -> tuple[float, float]:
    """(pitch, yaw) of the pole in the wind: two incommensurate waves, so that it never repeats."""
    yaw = SWAY_YAW_DEG * (0.7 * math.sin(2 * math.pi * 0.31 * world_s) + 0.3 * math.sin(2 * math.pi * 0.83 * world_s))
    pitch = SWAY_PITCH_DEG * math.sin(2 * math.pi * 0.57 * world_s + 0.7)
    return pitch, yaw


def sway_rotation(world_s: float) -> np.ndarray:
    """(3, 3): coordinates of the still visible camera -> coordinates of the swaying one."""
    pitch_deg, yaw_deg = sway_deg(world_s)
    return rotation_matrix((pitch_deg, yaw_deg, 0.0))


def still_visible_from_world() -> np.ndarray:
    """(4, 4): world -> visible coordinates, without sway."""
    transform = np.eye(4)
    transform[:3, :3] = rotation_matrix((CAMERA_PITCH_DEG, 0.0, 0.0))
    transform[:3, 3] = -transform[:3, :3] @ np.array([0.0, -CAMERA_HEIGHT_M, 0.0])
    return transform


def visible_from_world(world_s: float) -> np.ndarray:
    """(4, 4): world -> visible coordinates at one moment."""
    sway = np.eye(4)
    sway[:3, :3] = sway_rotation(world_s)
    return sway @ still_visible_from_world()


def transform_points(transform: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Moves points (N, 3) by a (4, 4) transform."""
    return np.asarray(points, np.float64) @ transform[:3, :3].T + transform[:3, 3]


def project(rig: Rig, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where both cameras see points.

    Args:
        points: (N, 3) in visible coordinates, metres, in front of both cameras.

    Returns:
        (infrared pixels, visible pixels), each (N, 2); pixel centres are whole numbers.
    """
    points = np.atleast_2d(np.asarray(points, np.float64))
    infrared = transform_points(rig.infrared_from_visible, points)
    return project_camera(rig.infrared, infrared), project_camera(rig.visible, points)


def project_camera(model: CameraModel, points: np.ndarray) -> np.ndarray:
    """Pixels (N, 2) of points (N, 3) in the camera's own coordinates."""
    rays = points[:, :2] / points[:, 2:3]
    distorted = distort(rays, model.distortion)
    return distorted * [model.matrix[0, 0], model.matrix[1, 1]] + model.matrix[:2, 2]


def distort(rays: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """Plumb-bob distortion of rays (..., 2) on the plane z = 1."""
    k1, k2, p1, p2, k3 = coefficients
    x, y = rays[..., 0], rays[..., 1]
    square = x * x + y * y
    radial = 1 + square * (k1 + square * (k2 + square * k3))
    return np.stack(
        (
            x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x),
            y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y,
        ),
        axis=-1,
    )


def pixel_rays(model: CameraModel) -> np.ndarray:
    """The undistorted ray of every pixel, float32 (H, W, 2) on the plane z = 1."""
    columns, rows = np.meshgrid(np.arange(model.width), np.arange(model.height))
    target = np.stack(
        (
            (columns - model.matrix[0, 2]) / model.matrix[0, 0],
            (rows - model.matrix[1, 2]) / model.matrix[1, 1],
        ),
        axis=-1,
    )
    # Fixed-point inversion: the distortion is mild, so each round shrinks the error about tenfold.
    rays = target.copy()
    for _ in range(12):
        rays += target - distort(rays, model.distortion)
    return rays.astype(np.float32)
