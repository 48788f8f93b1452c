"""Draws calibration boards as the two cameras of a rig would see them: lens, pose, blur, noise, heat and polarity.

Every pixel is the mean of 3x3 rays through the true lens onto the board's plane, so nothing of the detectors' own
models (a homography, a centroid) is built in.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from calibration.rig import CameraModel, Lens, Rig
from calibration.solve import map_of, map_points
from calibration.targets import Board
from pipeline.config import SyntheticSource
from pipeline.sources.synthetic import true_rig

OVERSAMPLING = 3
MARGIN_SQUARES = 1.0  # plain board around the outermost corners' squares


def synthetic_rig(width: int = 640, height: int = 480, plane_distance_m: float = 20.0) -> Rig:
    """The simulated rig of the demo, as it really is."""
    source = SyntheticSource(width=width, height=height)
    return true_rig(source, source, plane_distance_m)


@dataclass(frozen=True)
class Look:
    """How one camera renders what it sees."""

    blur_px: float = 0.8
    noise: float = 2.0  # sigma, of 255 levels
    contrast: float = 120.0  # between the two colours of the board, of 255 levels
    inverted: bool = False  # dark squares light, as on a heated board
    heat: float = 0.0  # levels by which the board's middle is warmer than its edge
    bits: int = 8  # 8, or 16 for 14-bit counts
    smear_px: tuple[float, float] = (0.0, 0.0)  # motion during the exposure


VISIBLE = Look(blur_px=0.7, noise=2.0, contrast=150.0)
INFRARED = Look(blur_px=1.3, noise=2.5, contrast=60.0, inverted=True, heat=40.0, bits=16)


@dataclass(frozen=True)
class Scene:
    """Board poses, in visible coordinates, and how they are seen."""

    board: Board
    poses: Sequence[np.ndarray]  # (4, 4), board -> visible camera, metres
    visible: Look = VISIBLE
    infrared: Look = INFRARED
    seed: int = 1
    mirrored: tuple[str, ...] = field(default=())  # cameras that deliver mirrored pictures


def random_poses(
    board: Board,
    count: int,
    rig: Rig,
    seed: int = 3,
    distance_m: tuple[float, float] = (0.0, 0.0),
    tilt_deg: float = 40.0,
) -> list[np.ndarray]:
    """Poses as a careful person would hold the board: everywhere, tilted, fully seen by both cameras.

    Without a range of distances, the board fills between 20 and 65 % of the picture's width.
    """
    random = np.random.default_rng(seed)
    points = board.points()
    middle = (points.max(axis=0) + points.min(axis=0)) / 2
    width_m = np.ptp(points[:, 0]) + 2 * spacing_of(board)
    focal = rig.visible.matrix[0, 0] / rig.visible.width
    near, far = distance_m if distance_m[1] else (width_m * focal / 0.65, width_m * focal / 0.2)
    poses: list[np.ndarray] = []
    while len(poses) < count:
        z = 1 / random.uniform(1 / far, 1 / near)
        aim = random.uniform(0.02, 0.98, 2) * rig.visible.size
        x, y, _ = rig.visible.rays(aim[:1], aim[1:])
        tilt = random.uniform(-tilt_deg, tilt_deg, 2)
        roll = random.uniform(-25, 25)
        rotation = cv2.Rodrigues(np.radians([tilt[0], tilt[1], 0.0]))[0] @ cv2.Rodrigues(np.radians([0, 0, roll]))[0]
        pose = np.eye(4)
        pose[:3, :3] = rotation
        pose[:3, 3] = np.array([x[0] * z, y[0] * z, z]) - rotation @ middle
        if all(fully_seen(model, placed, board) for model, placed in seen_from(rig, pose)):
            poses.append(pose)
    return poses


def seen_from(rig: Rig, pose: np.ndarray) -> list[tuple[CameraModel, np.ndarray]]:
    return [(rig.visible, pose), (rig.infrared, rig.infrared_from_visible @ pose)]


def spacing_of(board: Board) -> float:
    assert board.spacing_m is not None
    return board.spacing_m


def fully_seen(model: CameraModel, pose: np.ndarray, board: Board) -> bool:
    """Whether the board with its outer squares lies within the picture."""
    points = board.points()
    low, high = points.min(axis=0) - spacing_of(board), points.max(axis=0) + spacing_of(board)
    corners = np.array([[low[0], low[1], 0], [high[0], low[1], 0], [high[0], high[1], 0], [low[0], high[1], 0]])
    pixels = true_points(model, pose, corners)
    return bool(np.all(pixels > 4) and np.all(pixels < np.array(model.size) - 5))


def true_points(model: CameraModel, pose: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Pixels (N, 2) of board points (N, 3)."""
    inside = points @ pose[:3, :3].T + pose[:3, 3]
    return np.stack(model.project(inside[:, 0] / inside[:, 2], inside[:, 1] / inside[:, 2]), axis=1)


def map_error_px(rig: Rig, truth: Rig, distance_m: float) -> float:
    pixels, there = map_points(truth, distance_m)
    return math.sqrt(float(((map_of(rig, pixels, distance_m) - there) ** 2).sum(axis=1).mean()))


def draw_pair(rig: Rig, scene: Scene, index: int) -> tuple[np.ndarray, np.ndarray]:
    """(infrared, visible) picture of one pose: uint8 or uint16 (H, W), uint8 RGB (H, W, 3)."""
    random = np.random.default_rng([scene.seed, index])
    (visible_model, visible_pose), (infrared_model, infrared_pose) = seen_from(rig, scene.poses[index])
    infrared = draw(infrared_model, infrared_pose, scene.board, scene.infrared, random)
    visible = draw(visible_model, visible_pose, scene.board, scene.visible, random)
    if "infrared" in scene.mirrored:
        infrared = infrared[:, ::-1].copy()
    if "visible" in scene.mirrored:
        visible = visible[:, ::-1].copy()
    return infrared, np.repeat(visible[..., None], 3, axis=2)


def draw(model: CameraModel, pose: np.ndarray, board: Board, look: Look, random: np.random.Generator) -> np.ndarray:
    """One grey picture of the board before a soft background."""
    picture = _background(model)
    window = _window(model, pose, board)
    if window is not None:
        left, top, right, bottom = window
        part = picture[top:bottom, left:right]
        levels, cover = _board_in(model, pose, board, look, window)
        part += cover * (levels - part)
    picture = cv2.GaussianBlur(picture, (0, 0), look.blur_px) if look.blur_px > 0 else picture
    picture = _smeared(picture, look.smear_px)
    picture = picture + look.noise * random.standard_normal(picture.shape, dtype=np.float32)
    if look.bits == 8:
        return np.clip(picture + 0.5, 0, 255).astype(np.uint8)
    return np.clip(7000 + 12 * picture + 0.5, 0, 16383).astype(np.uint16)


def _window(model: CameraModel, pose: np.ndarray, board: Board) -> tuple[int, int, int, int] | None:
    """The part of the picture that the board is in."""
    far, margin = np.array(board.extent()), (MARGIN_SQUARES + 1)
    sides = np.linspace(0, 1, 9)[:, None]
    low, high = np.full(2, -margin), far + margin
    corners = np.array([low, [high[0], low[1]], high, [low[0], high[1]]])
    edge = np.concatenate([a + sides * (b - a) for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True)])
    points = np.column_stack([edge * spacing_of(board), np.zeros(len(edge))])
    pixels = true_points(model, pose, points)
    left, top = np.clip(np.floor(pixels.min(axis=0)).astype(int) - 2, 0, model.size)
    right, bottom = np.clip(np.ceil(pixels.max(axis=0)).astype(int) + 3, 0, model.size)
    return (left, top, right, bottom) if right > left and bottom > top else None


def _board_in(
    model: CameraModel, pose: np.ndarray, board: Board, look: Look, window: tuple[int, int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """(levels, share of each pixel that the board covers) in a window of the picture."""
    left, top, right, bottom = (OVERSAMPLING * side for side in window)
    x, y = (rays[top:bottom, left:right] for rays in _rays(model))
    pose = pose.astype(np.float32)
    normal = pose[:3, 2]
    # The plane through the board: normal . X = normal . origin.
    depth = (normal @ pose[:3, 3]) / (normal[0] * x + normal[1] * y + normal[2])
    relative = [x * depth - pose[0, 3], y * depth - pose[1, 3], depth - pose[2, 3]]
    spacing = spacing_of(board)
    u, v = (sum(relative[axis] * pose[axis, column] for axis in range(3)) / spacing for column in (0, 1))
    pattern, on_board = _pattern(board, u, v)
    light = 1.0 - pattern if look.inverted else pattern
    far = board.extent()
    reach = 0.5 * max(far)
    warm = look.heat * np.exp(-((u - far[0] / 2) ** 2 + (v - far[1] / 2) ** 2) / reach**2)
    levels = 110.0 + look.contrast * (light - 0.5) + warm
    return _shrunk(levels), _shrunk(on_board.astype(np.float32))


def _shrunk(fine: np.ndarray) -> np.ndarray:
    height, width = (side // OVERSAMPLING for side in fine.shape)
    return fine.reshape(height, OVERSAMPLING, width, OVERSAMPLING).mean(axis=(1, 3), dtype=np.float32)


def _pattern(board: Board, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lightness in [0, 1] and whether a point (in spacings, from the first corner or circle) is on the board."""
    far = board.extent()
    margin = MARGIN_SQUARES + 1
    on_board = (u > -margin) & (v > -margin) & (u < far[0] + margin) & (v < far[1] + margin)
    if board.kind == "chessboard":
        dark = (np.floor(u).astype(int) + np.floor(v).astype(int)) % 2 == 0
        within = (u > -1) & (v > -1) & (u < far[0] + 1) & (v < far[1] + 1)
        return np.where(within & dark, 0.0, 1.0), on_board
    row = np.clip(np.rint(v), 0, board.rows - 1)
    column = np.clip(np.rint((u - row % 2) / 2), 0, board.columns - 1)
    distance = np.hypot(u - 2 * column - row % 2, v - row)
    # The nearest centre may be in the next row.
    for step in (-1, 1):
        other = np.clip(row + step, 0, board.rows - 1)
        column = np.clip(np.rint((u - other % 2) / 2), 0, board.columns - 1)
        distance = np.minimum(distance, np.hypot(u - 2 * column - other % 2, v - other))
    return np.where(distance < 0.45, 0.0, 1.0), on_board


def _background(model: CameraModel) -> np.ndarray:
    x, y = (rays[1::OVERSAMPLING, 1::OVERSAMPLING] for rays in _rays(model))
    return 75 + 25 * np.sin(9 * x + 2) * np.cos(7 * y) + 12 * np.sin(23 * x * y + 5 * y)


def _smeared(picture: np.ndarray, smear_px: tuple[float, float]) -> np.ndarray:
    length = float(np.hypot(*smear_px))
    if length < 0.5:
        return picture
    steps = np.linspace(-0.5, 0.5, 2 * int(np.ceil(length)) + 1)
    moved = [
        cv2.warpAffine(picture, np.float64([[1, 0, s * smear_px[0]], [0, 1, s * smear_px[1]]]), picture.shape[::-1],
                       flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        for s in steps
    ]  # fmt: skip
    return np.mean(moved, axis=0)


def _rays(model: CameraModel) -> tuple[np.ndarray, np.ndarray]:
    return _cached_rays(model.width, model.height, model.matrix.tobytes(), model.distortion.tobytes(), model.lens)


@functools.lru_cache(maxsize=4)
def _cached_rays(
    width: int, height: int, matrix: bytes, distortion: bytes, lens: Lens
) -> tuple[np.ndarray, np.ndarray]:
    model = CameraModel(width, height, np.frombuffer(matrix).reshape(3, 3), np.frombuffer(distortion), lens)
    offset = (np.arange(OVERSAMPLING) + 0.5) / OVERSAMPLING - 0.5
    columns = (np.arange(width)[:, None] + offset).ravel()
    rows = (np.arange(height)[:, None] + offset).ravel()
    column, row = np.meshgrid(columns, rows)
    x, y, _ = model.rays(column, row)
    return x.astype(np.float32), y.astype(np.float32)
