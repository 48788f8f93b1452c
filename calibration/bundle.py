"""Both lenses, the pose between them and the board's pose in every view, adjusted together to what was measured.

Gauss-Newton with the views' poses eliminated (Schur complement), so its cost grows with the views, not with their
square. What each view says about the lenses and the rig (its reduced normal equations) is kept: with these, leaving
views out or drawing them again for a bootstrap is a sum and one small solve.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import cv2
import numpy as np

from calibration.rig import COEFFICIENTS, CalibrationError, CameraModel, Lens, Rig

CAMERAS = ("visible", "infrared")
PER_CAMERA = 13  # fx fy cx cy; eight entries for the lens, as COEFFICIENTS names them; last, 1 for an equidistant lens
LENS, EQUIDISTANT = slice(4, 12), 12
POSE = slice(26, 32)  # of the rig: rotation vector, translation (metres)
SHARED = 32
HUBER_SIGMAS = 3.5  # a point farther off counts less
MAX_STEPS = 30


@dataclass(frozen=True)
class LensModel:
    """What is free of a lens."""

    lens: Lens
    free: str  # coefficients; the focal lengths and the centre always are
    square: bool  # pixels: fx and fy move together

    @property
    def columns(self) -> list[int]:
        """Entries of the camera that are free; the second one follows the first where pixels are square."""
        names = COEFFICIENTS[self.lens]
        return [*range(4), *(LENS.start + names.index(name) for name in self.free.split())]


# From stiff to free.
LENS_MODELS: dict[str, LensModel] = {
    "square pixels, k1": LensModel("plumb_bob", "k1", True),
    "square pixels, k1 k2": LensModel("plumb_bob", "k1 k2", True),
    "square pixels, k1 k2 p1 p2": LensModel("plumb_bob", "k1 k2 p1 p2", True),
    "k1 k2 p1 p2": LensModel("plumb_bob", "k1 k2 p1 p2", False),
    "k1 k2 p1 p2 k3": LensModel("plumb_bob", "k1 k2 p1 p2 k3", False),
    "rational, square pixels": LensModel("rational_polynomial", "k1 k2 p1 p2 k3 k4 k5 k6", True),
    "rational": LensModel("rational_polynomial", "k1 k2 p1 p2 k3 k4 k5 k6", False),
    "equidistant, square pixels, k1": LensModel("equidistant", "k1", True),
    "equidistant, square pixels, k1 k2": LensModel("equidistant", "k1 k2", True),
    "equidistant, square pixels, k1 k2 k3 k4": LensModel("equidistant", "k1 k2 k3 k4", True),
    "equidistant, k1 k2 k3 k4": LensModel("equidistant", "k1 k2 k3 k4", False),
}


def models_of(lens: Lens) -> list[str]:
    """The lens models to choose from, from stiff to free."""
    return [name for name, model in LENS_MODELS.items() if model.lens == lens]


@dataclass(frozen=True, eq=False)
class View:
    """One look at the board, by one camera or both. Points (N, 2) in the board's order; NaN where not measured."""

    name: str
    points: dict[str, np.ndarray]  # by camera


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be adjusted."""

    board: np.ndarray  # (N, 3)
    views: tuple[View, ...]
    sizes: dict[str, tuple[int, int]]
    lenses: dict[str, str]  # name of the lens model, by camera
    sigma_px: dict[str, float] = field(default_factory=lambda: {"visible": 0.3, "infrared": 0.3})  # of a coordinate
    fixed_lenses: bool = False  # only the rig's pose and the views' are free


@dataclass(frozen=True, eq=False)
class State:
    """Where the adjustment stands."""

    shared: np.ndarray  # (32,)
    poses: np.ndarray  # (V, 6): board -> visible camera; -> infrared camera where only that saw the board


@dataclass(frozen=True, eq=False)
class Adjusted:
    """The best fit."""

    state: State
    residuals: list[dict[str, np.ndarray]]  # (N, 2) pixels, measured minus predicted, by view and camera
    basis: np.ndarray  # (32, P): free parameters -> shared ones
    reduced: np.ndarray  # (V, P, P): what each view says about the free parameters
    gradient: np.ndarray  # (V, P)
    prior: tuple[np.ndarray, np.ndarray]  # (P, P) and (P,): the same of what was known before


def adjust(problem: Problem, start: State, max_steps: int = MAX_STEPS) -> Adjusted:
    """Adjusts everything that is free.

    Raises:
        CalibrationError: the views do not determine the lenses.
    """
    basis = _basis(problem)
    state, damping = start, 1e-4
    blocks = _Blocks(problem, state, basis)
    for _ in range(max_steps):
        try:
            moved = blocks.step(state, basis, damping)
        except np.linalg.LinAlgError:
            raise CalibrationError(UNDETERMINED) from None
        tried = _Blocks(problem, moved, basis)
        if not tried.cost < blocks.cost:
            damping *= 10
            if damping > 1e8:
                break
            continue
        gained = (blocks.cost - tried.cost) / max(blocks.cost, 1e-12)
        state, blocks, damping = moved, tried, max(damping / 10, 1e-9)
        if gained < 1e-7:
            break
    reduced, gradient = blocks.reduced()
    return Adjusted(state, blocks.residuals, basis, reduced, gradient, blocks.prior)


# What is known of lenses before any view: standard deviations of the centre (share of the picture's width, about its
# middle) and of a lens's coefficients (about 0). Weak: with views enough to calibrate from they change nothing.
PRIOR_CENTRE = 0.025
PRIOR_COEFFICIENT, PRIOR_TANGENTIAL, PRIOR_EQUIDISTANT = 0.5, 0.003, 0.03

UNDETERMINED = "the views do not determine the lenses: show the board tilted, near and far, and in all corners"


def resampled(result: Adjusted, weights: np.ndarray) -> np.ndarray:
    """The shared parameters (32,) if the views counted `weights` (V,) times each: one step from the best fit."""
    matrix = np.einsum("v,vij->ij", weights, result.reduced) + result.prior[0]
    vector = weights @ result.gradient + result.prior[1]
    scale = np.sqrt(np.maximum(np.diag(matrix), 1e-30))
    solved = np.linalg.lstsq(matrix / np.outer(scale, scale), vector / scale, rcond=1e-12)[0] / scale
    return result.state.shared + result.basis @ solved


def covariance(result: Adjusted) -> np.ndarray:
    """(32, 32) of the shared parameters, for residuals as large as they are."""
    matrix = result.reduced.sum(axis=0) + result.prior[0]
    scale = np.sqrt(np.maximum(np.diag(matrix), 1e-30))
    inverse = np.linalg.pinv(matrix / np.outer(scale, scale), rcond=1e-12) / np.outer(scale, scale)
    return result.basis @ inverse @ result.basis.T


def camera_of(shared: np.ndarray, camera: str, size: tuple[int, int]) -> CameraModel:
    matrix, distortion = lens_of(shared, camera)
    lens: Lens = "plumb_bob" if not distortion[5:].any() else "rational_polynomial"
    if is_equidistant(distortion):
        lens = "equidistant"
    return CameraModel(*size, matrix, distortion[: len(COEFFICIENTS[lens])], lens)


def rig_of(shared: np.ndarray, sizes: dict[str, tuple[int, int]], plane_distance_m: float) -> Rig:
    pose = np.eye(4)
    pose[:3, :3] = cv2.Rodrigues(shared[POSE][:3])[0]
    pose[:3, 3] = shared[POSE][3:]
    visible, infrared = (camera_of(shared, camera, sizes[camera]) for camera in CAMERAS)
    return Rig(visible, infrared, pose, plane_distance_m)


def shared_of(lenses: dict[str, tuple[np.ndarray, np.ndarray]], pose: np.ndarray) -> np.ndarray:
    """(32,) from (matrix, distortion) by camera and the pose (4, 4) of the rig."""
    shared = np.zeros(SHARED)
    for camera, (matrix, distortion) in lenses.items():
        at = CAMERAS.index(camera) * PER_CAMERA
        shared[at : at + 4] = matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]
        shared[at + LENS.start : at + LENS.start + distortion.size] = np.ravel(distortion)
        shared[at + EQUIDISTANT] = is_equidistant(distortion)
    shared[POSE] = np.concatenate([cv2.Rodrigues(pose[:3, :3])[0].ravel(), pose[:3, 3]])
    return shared


def subset(problem: Problem, keep: np.ndarray) -> Problem:
    """The same with some of the views (bool or index array)."""
    chosen = np.arange(len(problem.views))[keep]
    return replace(problem, views=tuple(problem.views[index] for index in chosen))


def lens_of(shared: np.ndarray, camera: str) -> tuple[np.ndarray, np.ndarray]:
    """(matrix, distortion): four coefficients of an equidistant lens, or eight of a plumb bob or rational one."""
    of = shared[CAMERAS.index(camera) * PER_CAMERA :][:PER_CAMERA]
    fx, fy, cx, cy = of[:4]
    matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
    return matrix, of[LENS][:4] if of[EQUIDISTANT] > 0.5 else of[LENS]


def is_equidistant(distortion: np.ndarray) -> bool:
    return bool(distortion.size == len(COEFFICIENTS["equidistant"]))


def _basis(problem: Problem) -> np.ndarray:
    columns = []
    for index, camera in enumerate(CAMERAS):
        if problem.fixed_lenses or not any(camera in view.points for view in problem.views):
            continue
        model = LENS_MODELS[problem.lenses[camera]]
        for entry in model.columns:
            if entry == 1 and model.square:
                continue
            column = np.zeros(SHARED)
            column[index * PER_CAMERA + entry] = 1
            if entry == 0 and model.square:
                column[index * PER_CAMERA + 1] = 1
            columns.append(column)
    if any(len(view.points) == 2 for view in problem.views):
        columns += list(np.eye(SHARED)[POSE])
    return np.stack(columns, axis=1)


def _before(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """(32,) what is expected of the shared parameters, and (32,) how firmly: one over the variance."""
    mean, information = np.zeros(SHARED), np.zeros(SHARED)
    for index, camera in enumerate(CAMERAS):
        if camera not in problem.lenses:
            continue
        width, height = problem.sizes[camera]
        at = index * PER_CAMERA
        mean[at + 2 : at + 4] = (width - 1) / 2, (height - 1) / 2
        information[at + 2 : at + 4] = 1 / (PRIOR_CENTRE * width) ** 2
        lens = LENS_MODELS[problem.lenses[camera]].lens
        radial = PRIOR_EQUIDISTANT if lens == "equidistant" else PRIOR_COEFFICIENT
        for number, name in enumerate(COEFFICIENTS[lens], at + LENS.start):
            information[number] = 1 / (PRIOR_TANGENTIAL if name.startswith("p") else radial) ** 2
    return mean, information


class _Blocks:
    """The normal equations at one state."""

    def __init__(self, problem: Problem, state: State, basis: np.ndarray) -> None:
        count, free = len(problem.views), basis.shape[1]
        self.shared_shared = np.zeros((count, free, free))
        self.shared_pose = np.zeros((count, free, 6))
        self.pose_pose = np.zeros((count, 6, 6))
        self.shared_right = np.zeros((count, free))
        self.pose_right = np.zeros((count, 6))
        self.cost = 0.0
        self.residuals: list[dict[str, np.ndarray]] = []
        mean, information = _before(problem)
        self.prior = basis.T @ (information[:, None] * basis), basis.T @ (information * (mean - state.shared))
        self.cost += float((information * (mean - state.shared) ** 2).sum())
        for index, view in enumerate(problem.views):
            self.residuals.append({})
            for camera, points in view.points.items():
                self._add(index, camera, points, problem, state, basis, alone=len(view.points) == 1)

    def _add(
        self,
        index: int,
        camera: str,
        points: np.ndarray,
        problem: Problem,
        state: State,
        basis: np.ndarray,
        alone: bool,
    ) -> None:
        predicted, by_shared, by_pose = _predict(problem.board, state.shared, state.poses[index], camera, alone)
        residual = points - predicted
        self.residuals[index][camera] = residual
        known = np.isfinite(residual).all(axis=1) & np.isfinite(predicted).all(axis=1)
        if not known.any() or not np.isfinite(by_shared).all():
            self.cost = np.inf
            return
        sigma = problem.sigma_px[camera]
        distance = np.linalg.norm(residual[known], axis=1) / sigma
        weight = np.minimum(1.0, HUBER_SIGMAS / np.maximum(distance, 1e-12))
        self.cost += float(
            np.where(distance <= HUBER_SIGMAS, distance**2, 2 * HUBER_SIGMAS * distance - HUBER_SIGMAS**2).sum()
        )
        row = np.repeat(np.sqrt(weight) / sigma, 2)
        used = np.repeat(known, 2)
        shared = (by_shared[used] @ basis) * row[:, None]
        pose = by_pose[used] * row[:, None]
        right = residual[known].ravel() * row
        self.shared_shared[index] += shared.T @ shared
        self.shared_pose[index] += shared.T @ pose
        self.pose_pose[index] += pose.T @ pose
        self.shared_right[index] += shared.T @ right
        self.pose_right[index] += pose.T @ right

    def reduced(self, damping: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """(V, P, P) and (V, P): each view's equations with its pose eliminated."""
        gain = np.swapaxes(np.linalg.solve(self._damped(damping), np.swapaxes(self.shared_pose, 1, 2)), 1, 2)
        matrix = self.shared_shared - gain @ np.swapaxes(self.shared_pose, 1, 2)
        right = self.shared_right - np.einsum("vij,vj->vi", gain, self.pose_right)
        return matrix, right

    def _damped(self, damping: float) -> np.ndarray:
        diagonal = np.einsum("vii->vi", self.pose_pose)
        return self.pose_pose + np.einsum("vi,ij->vij", diagonal * damping + 1e-12, np.eye(6))

    def step(self, state: State, basis: np.ndarray, damping: float) -> State:
        matrices, rights = self.reduced(damping)
        matrix = matrices.sum(axis=0) + self.prior[0]
        matrix = matrix + np.diag(np.diag(self.shared_shared.sum(axis=0)) * damping)
        scale = np.sqrt(np.maximum(np.diag(matrix), 1e-30))
        moved = np.linalg.solve(matrix / np.outer(scale, scale), (rights.sum(axis=0) + self.prior[1]) / scale) / scale
        pose_right = self.pose_right - np.einsum("vji,j->vi", self.shared_pose, moved)
        poses = np.linalg.solve(self._damped(damping), pose_right[..., None])[..., 0]
        return State(state.shared + basis @ moved, state.poses + poses)


def _predict(
    board: np.ndarray, shared: np.ndarray, pose: np.ndarray, camera: str, alone: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pixels (N, 2), their derivatives by the shared parameters (2N, 32) and by the view's pose (2N, 6))."""
    matrix, distortion = lens_of(shared, camera)
    rotation, translation = pose[:3], pose[3:]
    by_rig = None
    if camera == "infrared" and not alone:
        composed = cv2.composeRT(rotation, translation, shared[POSE][:3], shared[POSE][3:])
        rotation, translation = composed[0].ravel(), composed[1].ravel()
        first = np.block([[composed[2], composed[3]], [composed[6], composed[7]]])
        by_rig = np.block([[composed[4], composed[5]], [composed[8], composed[9]]])
    pixels, by_pose, by_lens = projected(board, rotation, translation, matrix, distortion)
    by_shared = np.zeros((2 * len(board), SHARED))
    at = CAMERAS.index(camera) * PER_CAMERA
    by_shared[:, at : at + by_lens.shape[1]] = by_lens
    if by_rig is not None:
        by_shared[:, POSE] = by_pose @ by_rig
        by_pose = by_pose @ first
    return pixels, by_shared, by_pose


def projected(
    board: np.ndarray, rotation: np.ndarray, translation: np.ndarray, matrix: np.ndarray, distortion: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pixels (N, 2), their derivatives by the pose (2N, 6), and by fx fy cx cy and the coefficients)."""
    if is_equidistant(distortion):
        seen, jacobian = cv2.fisheye.projectPoints(board[:, None], rotation, translation, matrix, distortion)
        return seen.reshape(-1, 2), jacobian[:, 8:14], jacobian[:, :8]
    seen, jacobian = cv2.projectPoints(board, rotation, translation, matrix, distortion)
    return seen.reshape(-1, 2), jacobian[:, :6], jacobian[:, 6:]


def predicted_points(
    board: np.ndarray, shared: np.ndarray, pose: np.ndarray, camera: str, alone: bool = False
) -> np.ndarray:
    """Pixels (N, 2) at which a camera should see the board; `pose` (6,) as in State."""
    return _predict(board, shared, pose, camera, alone)[0]


def pose_of(board: np.ndarray, points: np.ndarray, matrix: np.ndarray, distortion: np.ndarray) -> np.ndarray:
    """(6,) board -> camera: rotation vector and translation that fit the points (N, 2) best; NaN ones are left out."""
    if is_equidistant(distortion):
        size = (round(2 * matrix[0, 2]) + 1, round(2 * matrix[1, 2]) + 1)  # says nothing here
        return pose_seen(board, points, CameraModel(*size, matrix, distortion, "equidistant"))
    known = np.isfinite(points).all(axis=1)
    if known.sum() < 4:
        return np.array([0, 0, 0, 0, 0, 1.0])
    object_points, pixels = board[known], np.ascontiguousarray(points[known])
    found, rotation, translation = cv2.solvePnP(object_points, pixels, matrix, distortion, flags=cv2.SOLVEPNP_IPPE)
    if not found or not np.isfinite(translation).all():
        return np.array([0, 0, 0, 0, 0, 1.0])
    rotation, translation = cv2.solvePnPRefineLM(object_points, pixels, matrix, distortion, rotation, translation)
    return np.concatenate([rotation.ravel(), translation.ravel()])


def project(board: np.ndarray, pose: np.ndarray, model: CameraModel) -> np.ndarray:
    """Pixels (N, 2) of board points (N, 3) under a pose (6,)."""
    points = board @ cv2.Rodrigues(pose[:3])[0].T + pose[3:]
    return np.stack(model.project(points[:, 0] / points[:, 2], points[:, 1] / points[:, 2]), axis=1)


def pose_seen(board: np.ndarray, points: np.ndarray, model: CameraModel) -> np.ndarray:
    """`pose_of` for any lens: what it bends is made straight first."""
    x, y, valid = model.rays(points[:, 0], points[:, 1])
    straight = np.stack([x, y], axis=1) * model.matrix[0, 0]
    straight[~valid] = np.nan
    focal = np.diag([model.matrix[0, 0], model.matrix[0, 0], 1.0])
    return pose_of(board, straight, focal, np.zeros(5))


def transform(pose: np.ndarray) -> np.ndarray:
    """(4, 4) of a pose (6,)."""
    matrix = np.eye(4)
    matrix[:3, :3] = cv2.Rodrigues(pose[:3])[0]
    matrix[:3, 3] = pose[3:]
    return matrix


def composed(pose: np.ndarray, then: np.ndarray) -> np.ndarray:
    """The pose (6,) followed by a transform (4, 4)."""
    matrix = then @ transform(pose)
    return np.concatenate([cv2.Rodrigues(matrix[:3, :3])[0].ravel(), matrix[:3, 3]])
