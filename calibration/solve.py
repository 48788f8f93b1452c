"""From views of a board to the rig, with what is known about its error.

The steps: the lens of each camera on its own, with the lens model that explains views best that it was not fitted to;
which way round each camera numbered the board; the pose between the cameras with the lenses fixed; views that do not
fit left out; then all of it adjusted together where that predicts left-out views better. Residuals say little (they are
as small with 8 views as with 60, measured), so the result carries two other numbers: how far off the infrared points of
left-out views are when predicted from the visible ones, and how much the map moves when the views are drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np

from calibration import bundle
from calibration.bundle import Adjusted, Problem, State, View, is_equidistant
from calibration.rig import CalibrationError, CameraModel, Lens, Rig
from calibration.targets import Board, Detection, Refusal
from calibration.views import BoardView, Detections, choose, coverage

CAMERAS = bundle.CAMERAS
LEAST_PAIRS = 4  # fewer say nothing about the error of what they give
ADVISED_PAIRS = 30
FOLDS = 5
RESAMPLINGS = 200
DISTANCES_M = (2.0, 5.0, 20.0, math.inf)
PARALLAX_M = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, math.inf)
OUTLIER_FACTOR = 3.0  # times the median rms of the views
OUTLIER_FLOOR_PX = 0.35
MAX_OUTLIER_SHARE = 0.3
UNSTEADY_FACTOR, UNSTEADY_PX = 4.0, 2.0  # error of the pair against that of each camera alone
AGREE_DEG = 4.0  # poses between the cameras, from one view each
MAX_FOCAL_SIGMA = 0.05  # relative; beyond, the views do not determine the lens
MAX_MAP_SIGMA_PX = 8.0
WIDE_DEG = 50.0  # from the axis to a corner: what `calibrate solve` fits may not follow the lens...
WIDE_HELDOUT_PX = 0.8  # ...and does not where left-out views are off by so much
FISHEYE_VIEWS_DEG = (40, 60, 80, 100, 120, 145, 175, 210)  # from the left to the right edge, to begin with
BLIND_SHARE = 0.02  # of a picture, without a ray
OTHER_LENSES = (
    "give --lens equidistant, or calibrate with Kalibr (--models pinhole-equi) and give run and replay that file"
)
UNEVEN_CELLS = 0.6  # share of the picture's cells that views should reach

Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Solution:
    """The rig, and what is known about its error."""

    rig: Rig
    board: Board
    views: tuple[BoardView, ...]  # used, infrared points in the visible camera's order
    residuals: tuple[dict[str, np.ndarray], ...]  # of `views`: (N, 2) pixels by camera, measured minus predicted
    outliers: tuple[tuple[str, str], ...]  # view, reason
    lenses: dict[str, str]  # lens model by camera
    rms_px: dict[str, float]  # by camera; of one point
    sigma: dict[str, dict[str, float]]  # by camera: of fx, fy, cx, cy
    heldout_px: dict[str, float]  # infrared points of left-out views, from the visible ones: median, rms, p95
    map_sigma_px: dict[str, float]  # predicted rms error of the map, infrared pixels, by distance
    method: str  # "joint" or "fixed lenses"
    warnings: tuple[str, ...] = field(default=())

    def quality(self) -> dict[str, Any]:
        """For the calibration file."""
        return {
            "views": sum(view.paired for view in self.views),
            "views_left_out": len(self.outliers),
            "heldout_px": _rounded(self.heldout_px),
            "map_sigma_px": _rounded(self.map_sigma_px),
            "rms_px": _rounded(self.rms_px),
            "sigma": {camera: _rounded(values) for camera, values in self.sigma.items()},
            "lens_model": dict(self.lenses),
            "method": self.method,
            "warnings": list(self.warnings),
        }


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(float(value), 4) for key, value in values.items()}


def solve(
    detections: Detections,
    spacing_m: float | None = None,
    plane_distance_m: float = 30.0,
    max_views: int = 60,
    seed: int = 1,
    progress: Progress | None = None,
    lenses: dict[str, Lens] | None = None,
) -> Solution:
    """Calibrates both cameras and the pose between them.

    Args:
        detections: views of one board.
        spacing_m: of the board, where the detections do not say.
        plane_distance_m: at which the fused pictures shall coincide.
        max_views: the most different ones are used.
        seed: of the bootstrap.
        progress: told what is being done.
        lenses: by camera; plumb bob where not given.

    Raises:
        CalibrationError: the views cannot give a rig that could be trusted; says why and what to do.
    """
    tell = progress or (lambda _: None)
    board = _measured_board(detections.board, spacing_m)
    tell("views")
    views = choose(detections, max_views)
    _refuse_too_few(views, detections)
    kinds: dict[str, Lens] = {"visible": "plumb_bob", "infrared": "plumb_bob", **(lenses or {})}
    problem = _problem(views, detections, board, kinds)
    tell("lenses")
    fitted, models, alone_px = {}, {}, {}
    for camera in CAMERAS:
        models[camera], fitted[camera], alone_px[camera] = _lens_of(camera, problem, kinds[camera])
    tell("pose")
    ordered, pose, outliers = _ordered(problem, fitted, board, detections)
    problem = replace(ordered, lenses=models)
    tell("outliers")
    problem, result, more = _without_outliers(problem, fitted, pose)
    outliers += more
    _refuse_moving(result, alone_px)
    tell("held-out views")
    result, heldout, method = _best_of_both(problem, result)
    tell("bootstrap")
    rig = bundle.rig_of(result.state.shared, problem.sizes, plane_distance_m)
    rms = {camera: _rms(result.residuals, camera) for camera in CAMERAS}
    sigma = _lens_sigma(result, problem)
    used = tuple(_as_board_view(view, detections) for view in problem.views)
    map_sigma = map_sigma_px(result, problem.sizes, np.random.default_rng(seed))
    _refuse_undetermined(result, map_sigma, problem)
    _refuse_fisheye(rig, heldout)
    return Solution(
        rig=rig,
        board=board,
        views=used,
        residuals=tuple(result.residuals),
        outliers=tuple(outliers),
        lenses=models,
        rms_px=rms,
        sigma=sigma,
        heldout_px=heldout,
        map_sigma_px=map_sigma,
        method=method,
        warnings=tuple(_warnings(used, detections, map_sigma, heldout, outliers, rig)),
    )


def _measured_board(board: Board, spacing_m: float | None) -> Board:
    spacing_m = spacing_m or board.spacing_m
    if spacing_m is None:
        raise CalibrationError(
            "the board's spacing is not known, and with it no distance: measure it (squares: side; circles: distance "
            "of neighbouring rows) and give --spacing in metres"
        )
    return replace(board, spacing_m=spacing_m)


def _refuse_too_few(views: list[BoardView], detections: Detections) -> None:
    pairs = sum(view.paired for view in views)
    if pairs >= LEAST_PAIRS:
        return
    seen = {camera: detections.found(camera) for camera in CAMERAS}
    moving = sum(view.paired and not view.still for view in detections.views)
    why = f" ({moving} more were moving)" if moving else ""
    raise CalibrationError(
        f"both cameras see the board in {pairs} of {len(detections.views)} views{why} (infrared in {seen['infrared']}, "
        f"visible in {seen['visible']}), {LEAST_PAIRS} are the least and {ADVISED_PAIRS} are advised: take more views, "
        "or give --homography for a map without lenses"
    )


def _problem(views: list[BoardView], detections: Detections, board: Board, kinds: dict[str, Lens]) -> Problem:
    items = []
    for view in views:
        points = {camera: view.points(camera) for camera in CAMERAS}
        items.append(View(view.name, {camera: value for camera, value in points.items() if value is not None}))
    stiff = {camera: bundle.models_of(kinds[camera])[0] for camera in CAMERAS}
    return Problem(board.points(), tuple(items), detections.sizes, stiff)


# --- one lens ---


def _lens_of(camera: str, problem: Problem, kind: Lens) -> tuple[str, tuple[np.ndarray, np.ndarray], float]:
    """(lens model, (matrix, distortion), median rms of its views): the model that is best on left-out views.

    A model too stiff costs the map more than it shows here (0.2 px far away for 1 % in this error, measured), so even
    a small gain decides.
    """
    alone = _only(camera, problem)
    if len(alone.views) < 3:
        raise CalibrationError(f"the {camera} camera sees the board in {len(alone.views)} views: 3 are the least")
    start = _first_fisheye(camera, alone) if kind == "equidistant" else _first_lens(camera, alone)
    names = bundle.models_of(kind)
    best: tuple[float, str] | None = None
    for model in names:
        if model != names[0] and model == names[-1] and len(alone.views) < 10:
            continue  # many coefficients from a handful of views bend the corners
        error = _heldout_alone(camera, replace(alone, lenses={camera: model}), start)
        if best is None or error < best[0]:
            best = error, model
    assert best is not None
    result = bundle.adjust(replace(alone, lenses={camera: best[1]}), start)
    matrix, distortion = bundle.lens_of(result.state.shared, camera)
    _refuse_odd_lens(camera, matrix, problem.sizes[camera], kind)
    return best[1], (matrix, distortion), float(np.median(_view_rms(result.residuals, camera)))


def _only(camera: str, problem: Problem) -> Problem:
    views = [View(view.name, {camera: view.points[camera]}) for view in problem.views if camera in view.points]
    return replace(problem, views=tuple(views))


def _first_lens(camera: str, alone: Problem) -> State:
    """OpenCV's calibration with the stiffest model, and the views' poses."""
    objects, pixels = _opencv_points(alone, camera)
    flags = cv2.CALIB_FIX_ASPECT_RATIO | cv2.CALIB_FIX_K2 | cv2.CALIB_FIX_K3 | cv2.CALIB_ZERO_TANGENT_DIST
    size = alone.sizes[camera]
    guess = np.array([[max(size), 0, (size[0] - 1) / 2], [0, max(size), (size[1] - 1) / 2], [0, 0, 1.0]])
    try:
        guess = cv2.initCameraMatrix2D(objects, pixels, size, 1.0)
        if not (np.isfinite(guess).all() and 0.2 * max(size) < guess[0, 0] < 20 * max(size)):
            guess = np.array([[max(size), 0, (size[0] - 1) / 2], [0, max(size), (size[1] - 1) / 2], [0, 0, 1.0]])
        _, matrix, distortion, rotations, translations = cv2.calibrateCamera(
            objects, pixels, size, guess, np.zeros(5), flags=flags | cv2.CALIB_USE_INTRINSIC_GUESS
        )
    except cv2.error:
        raise CalibrationError(f"the {camera} camera: {bundle.UNDETERMINED}") from None
    poses = np.array([np.concatenate([r.ravel(), t.ravel()]) for r, t in zip(rotations, translations, strict=True)])
    if not (np.isfinite(poses).all() and np.isfinite(matrix).all()):
        raise CalibrationError(f"the {camera} camera: {bundle.UNDETERMINED}")
    return State(bundle.shared_of({camera: (matrix, distortion)}, np.eye(4)), poses)


def _first_fisheye(camera: str, alone: Problem) -> State:
    """Of a few focal lengths, the one under which an undistorted equidistant lens explains the views best."""
    width, height = alone.sizes[camera]
    best: tuple[float, State] | None = None
    for view_deg in FISHEYE_VIEWS_DEG:
        focal = width / math.radians(view_deg)
        matrix = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1.0]])
        lens = matrix, np.zeros(4)
        poses = np.array([bundle.pose_of(alone.board, view.points[camera], *lens) for view in alone.views])
        errors = [_after_pose(alone.board, view.points[camera], *lens) for view in alone.views]
        error = float(np.median(np.linalg.norm(np.concatenate(errors), axis=1)))
        if best is None or error < best[0]:
            best = error, State(bundle.shared_of({camera: lens}, np.eye(4)), poses)
    assert best is not None
    return best[1]


def _opencv_points(alone: Problem, camera: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    objects, pixels = [], []
    for view in alone.views:
        points = view.points[camera]
        known = np.isfinite(points).all(axis=1)
        objects.append(alone.board[known].astype(np.float32))
        pixels.append(points[known].astype(np.float32))
    return objects, pixels


def _folds(count: int, folds: int = FOLDS) -> list[np.ndarray]:
    """(V,) bool for each fold: the views left out. Neighbours in a recording are alike, so folds are interleaved."""
    folds = min(folds, count)
    return [np.arange(count) % folds == fold for fold in range(folds)]


def _heldout_alone(camera: str, alone: Problem, start: State) -> float:
    """Error of left-out views whose pose alone is fitted; infinite where the model cannot be fitted.

    Root of the mean square, each point's counted up to that of three times the median, so that a bad view does not
    choose the lens.
    """
    squares: list[np.ndarray] = []
    for out in _folds(len(alone.views), min(FOLDS, len(alone.views))):
        if (~out).sum() < 2:
            return math.inf
        try:
            fitted = bundle.adjust(bundle.subset(alone, ~out), State(start.shared, start.poses[~out]), max_steps=15)
        except CalibrationError:
            return math.inf
        matrix, distortion = bundle.lens_of(fitted.state.shared, camera)
        for view in bundle.subset(alone, out).views:
            squares.append((_after_pose(alone.board, view.points[camera], matrix, distortion) ** 2).sum(axis=1))
    together = np.concatenate(squares)
    return math.sqrt(float(np.minimum(together, 9 * np.median(together)).mean()))


def _after_pose(board: np.ndarray, points: np.ndarray, matrix: np.ndarray, distortion: np.ndarray) -> np.ndarray:
    """(N, 2) residuals of the known points after fitting the board's pose."""
    pose = bundle.pose_of(board, points, matrix, distortion)
    known = np.isfinite(points).all(axis=1)
    return points[known] - bundle.projected(board[known], pose[:3], pose[3:], matrix, distortion)[0]


def _refuse_odd_lens(camera: str, matrix: np.ndarray, size: tuple[int, int], kind: Lens) -> None:
    focal, (cx, cy) = matrix[0, 0], matrix[:2, 2]
    half = size[0] / 2 / focal if focal > 0 else 0.0
    fov_deg, widest_deg = 2 * math.degrees(math.atan(half)), 140
    if kind == "equidistant":
        fov_deg, widest_deg = 2 * math.degrees(half), 220
    off = max(abs(cx / size[0] - 0.5), abs(cy / size[1] - 0.5))
    if not 2 < fov_deg < widest_deg or off > 0.3:
        raise CalibrationError(
            f"the {camera} lens comes out with a view of {fov_deg:.0f} degrees and its centre {100 * off:.0f} % off "
            f"the middle, which no lens has: {bundle.UNDETERMINED}"
        )


# --- the pose between the cameras ---


def _ordered(
    problem: Problem, lenses: dict[str, tuple[np.ndarray, np.ndarray]], board: Board, detections: Detections
) -> tuple[Problem, np.ndarray, list[tuple[str, str]]]:
    """The views with infrared points in the visible camera's order, the rig's pose, and views that fit no order.

    Raises:
        CalibrationError: mirrored pictures, or views that do not belong together.
    """
    pairs = [view for view in problem.views if len(view.points) == 2]
    choice = _agreeing(pairs, problem.board, lenses, board)
    if choice.share < 0.6:
        mirrored = _mirrored(pairs, problem, lenses, board)
        if mirrored.share > max(0.6, 1.5 * choice.share):
            raise CalibrationError(
                "one camera's pictures are mirrored (left and right are exchanged against the other's): switch off "
                "mirroring in that camera, and record again"
            )
        raise CalibrationError(
            f"the two cameras agree on their pose in only {round(choice.share * len(pairs))} of {len(pairs)} views: "
            "are pictures of one moment paired, is the board still in each, and are both cameras fixed to each other?"
        )
    kept, outliers = [], []
    orders = dict(zip((view.name for view in pairs), choice.orders, strict=True))
    for view in problem.views:
        if len(view.points) == 1:
            kept.append(view)
        elif orders[view.name] is None:
            outliers.append((view.name, "the cameras disagree on where the board is"))
        else:
            kept.append(View(view.name, view.points | {"infrared": view.points["infrared"][orders[view.name]]}))
    return replace(problem, views=tuple(kept)), choice.pose, outliers


@dataclass(frozen=True, eq=False)
class _Agreement:
    share: float
    pose: np.ndarray
    orders: list[np.ndarray | None]


def _agreeing(
    pairs: list[View], board: np.ndarray, lenses: dict[str, tuple[np.ndarray, np.ndarray]], target: Board
) -> _Agreement:
    """The pose between the cameras on which most views agree, each with one of the orders that the board allows."""
    candidates = []  # by view, by order: (rotation (3, 3), translation (3,), rms)
    for view in pairs:
        seen = bundle.transform(bundle.pose_of(board, view.points["visible"], *lenses["visible"]))
        row = []
        for order in target.orders():
            felt = bundle.transform(bundle.pose_of(board, view.points["infrared"][order], *lenses["infrared"]))
            row.append(felt @ np.linalg.inv(seen))
        candidates.append(row)
    depth = float(
        np.median(
            [bundle.transform(bundle.pose_of(board, v.points["visible"], *lenses["visible"]))[2, 3] for v in pairs]
        )
    )
    best: tuple[float, np.ndarray, list[np.ndarray | None]] | None = None
    for row in candidates:
        for pose in row:
            orders, agreeing, spread = _vote(pose, candidates, depth)
            turn = _angle_deg(pose[:3, :3])
            # Among equals the one in which both cameras stand upright, and which agrees best.
            score = agreeing - spread / AGREE_DEG * 0.2 - turn / 180 * 0.4
            if best is None or score > best[0]:
                best = score, pose, [None if o is None else target.orders()[o] for o in orders]
    assert best is not None
    members = [
        row[index]
        for row, order in zip(candidates, best[2], strict=True)
        for index, candidate in enumerate(target.orders())
        if order is not None and np.array_equal(candidate, order)
    ]
    share = sum(order is not None for order in best[2]) / len(pairs)
    return _Agreement(share, _mean_pose(members or [best[1]]), best[2])


def _vote(pose: np.ndarray, candidates: list[list[np.ndarray]], depth: float) -> tuple[list[int | None], int, float]:
    orders: list[int | None] = []
    spread = 0.0
    for row in candidates:
        angles = [_angle_deg(pose[:3, :3].T @ other[:3, :3]) for other in row]
        nearest = int(np.argmin(angles))
        apart = float(np.linalg.norm(row[nearest][:3, 3] - pose[:3, 3]))
        fits = angles[nearest] < AGREE_DEG and apart < 0.15 * depth
        orders.append(nearest if fits else None)
        spread += angles[nearest] if fits else 0.0
    agreeing = sum(order is not None for order in orders)
    return orders, agreeing, spread / max(agreeing, 1)


def _mirrored(
    pairs: list[View], problem: Problem, lenses: dict[str, tuple[np.ndarray, np.ndarray]], target: Board
) -> _Agreement:
    """The same with the infrared pictures turned left to right."""
    width = problem.sizes["infrared"][0]
    index = np.arange(target.count).reshape(target.rows, target.columns)
    # The detector numbers every picture as if it were not mirrored.
    order = (index[::-1] if target.kind == "circles" else index[:, ::-1]).ravel()
    turned = []
    for view in pairs:
        points = view.points["infrared"][order] * (-1, 1) + (width - 1, 0)
        turned.append(View(view.name, view.points | {"infrared": points}))
    matrix, distortion = lenses["infrared"]
    flipped = matrix.copy()
    flipped[0, 2] = width - 1 - matrix[0, 2]
    bent = np.array(distortion, float)
    if not is_equidistant(bent):
        bent[3] = -bent[3]
    return _agreeing(turned, problem.board, lenses | {"infrared": (flipped, bent)}, target)


def _angle_deg(rotation: np.ndarray) -> float:
    return math.degrees(math.acos(float(np.clip((np.trace(rotation) - 1) / 2, -1, 1))))


def _mean_pose(poses: list[np.ndarray]) -> np.ndarray:
    """Chordal mean of rotations, median of translations."""
    u, _, vt = np.linalg.svd(np.mean([pose[:3, :3] for pose in poses], axis=0))
    mean = np.eye(4)
    mean[:3, :3] = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
    mean[:3, 3] = np.median([pose[:3, 3] for pose in poses], axis=0)
    return mean


# --- together ---


def _start(problem: Problem, shared: np.ndarray) -> State:
    poses = []
    for view in problem.views:
        camera = "visible" if "visible" in view.points else "infrared"
        poses.append(bundle.pose_of(problem.board, view.points[camera], *bundle.lens_of(shared, camera)))
    return State(shared, np.array(poses))


def _without_outliers(
    problem: Problem, lenses: dict[str, tuple[np.ndarray, np.ndarray]], pose: np.ndarray
) -> tuple[Problem, Adjusted, list[tuple[str, str]]]:
    """Pose with fixed lenses, then views that fit much worse than most are taken out, a few at a time."""
    shared = bundle.shared_of(lenses, pose)
    problem = replace(problem, fixed_lenses=True)
    outliers: list[tuple[str, str]] = []
    allowed = int(MAX_OUTLIER_SHARE * len(problem.views))
    while True:
        result = bundle.adjust(problem, _start(problem, shared))
        problem = replace(problem, sigma_px=_sigma_px(result))
        rms = {camera: _view_rms(result.residuals, camera) for camera in CAMERAS}
        excess = np.zeros(len(problem.views))
        for values in rms.values():
            limit = max(OUTLIER_FACTOR * float(np.nanmedian(values)), OUTLIER_FLOOR_PX)
            excess = np.fmax(excess, np.nan_to_num(values / limit))
        worst = int(np.argmax(excess))
        pairs = sum(len(view.points) == 2 for view in problem.views)
        if excess[worst] <= 1 or len(outliers) >= allowed or pairs <= LEAST_PAIRS:
            return problem, result, outliers
        size = max(float(np.nan_to_num(values[worst])) for values in rms.values())
        outliers.append((problem.views[worst].name, f"its points are {size:.2f} px off where the others say"))
        keep = np.arange(len(problem.views)) != worst
        problem, shared = bundle.subset(problem, keep), result.state.shared


def _refuse_moving(result: Adjusted, alone_px: dict[str, float]) -> None:
    """Refuses where each camera is sure of where the board is, but not both of the same place."""
    together = {camera: _rms(result.residuals, camera) for camera in CAMERAS}
    if max(together[camera] - max(UNSTEADY_FACTOR * alone_px[camera], UNSTEADY_PX) for camera in CAMERAS) > 0:
        raise CalibrationError(
            f"each camera on its own fits the views (visible {alone_px['visible']:.2f}, infrared "
            f"{alone_px['infrared']:.2f} px), but one pose between them leaves {max(together.values()):.1f} px: the "
            "pictures are not of one moment, or the cameras move against each other: hold the board still for both, "
            "and fix the cameras; --homography gives a coarse map"
        )


def _sigma_px(result: Adjusted) -> dict[str, float]:
    """Of one coordinate, by camera."""
    return {camera: max(_rms(result.residuals, camera) / math.sqrt(2), 0.01) for camera in CAMERAS}


def _best_of_both(problem: Problem, fixed: Adjusted) -> tuple[Adjusted, dict[str, float], str]:
    """Lenses as they are or adjusted with the rest: what predicts left-out views better; their error; the method."""
    free = replace(problem, fixed_lenses=False)
    joint = bundle.adjust(free, fixed.state)
    scores = {"fixed lenses": _transfer(problem, fixed), "joint": _transfer(free, joint)}
    rms = {method: float(np.sqrt((error**2).sum(axis=1).mean())) for method, error in scores.items()}
    # The joint one uses more of what was measured: fixed lenses have to be clearly better to be preferred.
    method = "fixed lenses" if rms["fixed lenses"] < 0.95 * rms["joint"] else "joint"
    distance = np.linalg.norm(scores[method], axis=1)
    heldout = {
        "median": float(np.median(distance)),
        "rms": rms[method],
        "p95": float(np.percentile(distance, 95)),
    }
    if method == "joint":
        return joint, heldout, method
    # The error of fixed lenses is in the result too: the free problem's equations at this state carry it.
    frozen = bundle.adjust(free, fixed.state, max_steps=0)
    return replace(frozen, gradient=frozen.gradient * 0 + _centred(frozen.gradient)), heldout, method


def _centred(gradient: np.ndarray) -> np.ndarray:
    """Takes off what would move the best fit itself: the bootstrap then spreads around the state that is kept."""
    return gradient - gradient.mean(axis=0)


def _transfer(problem: Problem, result: Adjusted) -> np.ndarray:
    """(M, 2) errors of infrared points predicted from the visible ones of views that were left out."""
    errors = []
    for out in _folds(len(problem.views)):
        fitted = bundle.adjust(
            bundle.subset(problem, ~out), State(result.state.shared, result.state.poses[~out]), max_steps=6
        )
        for view in bundle.subset(problem, out).views:
            if len(view.points) == 2:
                errors.append(transfer_error(problem.board, view.points, fitted.state.shared))
    return np.concatenate(errors)


def transfer_error(board: np.ndarray, points: dict[str, np.ndarray], shared: np.ndarray) -> np.ndarray:
    """(M, 2) pixels: infrared points as measured minus as predicted from the visible ones."""
    pose = bundle.pose_of(board, points["visible"], *bundle.lens_of(shared, "visible"))
    error = points["infrared"] - bundle.predicted_points(board, shared, pose, "infrared")
    return error[np.isfinite(error).all(axis=1)]


def _view_rms(residuals: list[dict[str, np.ndarray]], camera: str) -> np.ndarray:
    """(V,) root mean square distance of the points; NaN where the camera did not see the board."""
    return np.array(
        [
            math.sqrt(float(np.nanmean((item[camera] ** 2).sum(axis=1)))) if camera in item else math.nan
            for item in residuals
        ]
    )


def _rms(residuals: list[dict[str, np.ndarray]], camera: str) -> float:
    all_points = np.concatenate([item[camera] for item in residuals if camera in item])
    return math.sqrt(float(np.nanmean((all_points**2).sum(axis=1))))


# --- error of the result ---


def map_points(rig: Rig, distance_m: float) -> tuple[np.ndarray, np.ndarray]:
    """Visible pixels (N, 2) on a 9x7 grid that infrared sees at a distance, and their infrared pixels (N, 2)."""
    column, row = np.meshgrid(
        np.linspace(0.03, 0.97, 9) * (rig.visible.width - 1), np.linspace(0.03, 0.97, 7) * (rig.visible.height - 1)
    )
    pixels = np.stack([column.ravel(), row.ravel()], axis=1)
    there = map_of(rig, pixels, distance_m)
    inside = np.all((there >= 0) & (there <= np.array(rig.infrared.size) - 1), axis=1)
    return pixels[inside], there[inside]


def map_of(rig: Rig, pixels: np.ndarray, distance_m: float) -> np.ndarray:
    """Infrared pixels (N, 2) of visible ones on the plane at a distance; NaN where there are none."""
    x, y, valid = rig.visible.rays(pixels[:, 0], pixels[:, 1])
    rays = np.stack([x, y, np.ones_like(x)], axis=1)
    with np.errstate(all="ignore"):  # where there is no ray
        moved = rays @ rig.infrared_from_visible[:3, :3].T + rig.infrared_from_visible[:3, 3] / distance_m
        ideal = moved[:, :2] / moved[:, 2:]
        inside = valid & (moved[:, 2] > 0) & ((ideal**2).sum(axis=1) < rig.infrared.widest_radius**2)
        there = np.stack(rig.infrared.project(ideal[:, 0], ideal[:, 1]), axis=1)
    return np.where(inside[:, None], there, np.nan)


def map_sigma_px(
    result: Adjusted, sizes: dict[str, tuple[int, int]], random: np.random.Generator, draws: int = RESAMPLINGS
) -> dict[str, float]:
    """How far the map moves (rms over the picture, infrared pixels) by distance, as "2 m" to "inf".

    The larger of two: views drawn again (sees that views differ), and the spread that the residuals imply (does not
    shrink by accident where views are few).
    """
    count = len(result.reduced)
    best = result.state.shared
    drawn = [bundle.resampled(result, random.multinomial(count, np.full(count, 1 / count))) for _ in range(draws)]
    spread = bundle.covariance(result)
    implied = list(random.multivariate_normal(best, (spread + spread.T) / 2, draws, check_valid="ignore", method="svd"))
    rig = bundle.rig_of(best, sizes, 30.0)
    sigma = {}
    for distance_m in DISTANCES_M:
        pixels, there = map_points(rig, distance_m)
        sigma[distance_name(distance_m)] = (
            max(_moved(samples, sizes, pixels, there, distance_m) for samples in (drawn, implied))
            if len(pixels)
            else math.inf
        )
    return sigma


def _moved(
    samples: list[np.ndarray],
    sizes: dict[str, tuple[int, int]],
    pixels: np.ndarray,
    there: np.ndarray,
    distance_m: float,
) -> float:
    squares = []
    for shared in samples:
        try:
            moved = map_of(bundle.rig_of(shared, sizes, 30.0), pixels, distance_m)
        except CalibrationError:
            squares.append(math.inf)
            continue
        squares.append(float(np.nanmean(((moved - there) ** 2).sum(axis=1))) if np.isfinite(moved).any() else math.inf)
    # The middle of the draws: the mean would be that of the few draws that lack whole corners.
    return math.sqrt(float(np.median(squares)))


def distance_name(distance_m: float) -> str:
    return "inf" if math.isinf(distance_m) else f"{distance_m:g} m"


def parallax(rig: Rig, plane_distances_m: tuple[float, ...]) -> list[tuple[float, dict[str, float]]]:
    """For each plane at which the pictures coincide: by how many visible pixels things at other distances are off.

    Measured with the map itself, at the middle of the picture, not by the formula focal * baseline * |1/Z - 1/Z0|.
    """
    middle = np.array([[(rig.visible.width - 1) / 2, (rig.visible.height - 1) / 2]])
    scale = float(rig.visible.matrix[0, 0] / rig.infrared.matrix[0, 0])
    table = []
    for plane_m in plane_distances_m:
        on_plane = map_of(rig, middle, plane_m)
        row = {
            distance_name(distance): float(np.linalg.norm(map_of(rig, middle, distance) - on_plane)) * scale
            for distance in PARALLAX_M
        }
        table.append((plane_m, row))
    return table


def _lens_sigma(result: Adjusted, problem: Problem) -> dict[str, dict[str, float]]:
    spread = np.sqrt(np.maximum(np.diag(bundle.covariance(result)), 0))
    sigma = {}
    for index, camera in enumerate(CAMERAS):
        at = index * bundle.PER_CAMERA
        sigma[camera] = dict(zip(("fx", "fy", "cx", "cy"), (float(v) for v in spread[at : at + 4]), strict=True))
    return sigma


def _refuse_undetermined(result: Adjusted, map_sigma: dict[str, float], problem: Problem) -> None:
    sigma = _lens_sigma(result, problem)
    for index, camera in enumerate(CAMERAS):
        focal = result.state.shared[index * bundle.PER_CAMERA]
        if not sigma[camera]["fx"] <= MAX_FOCAL_SIGMA * focal:
            raise CalibrationError(
                f"the focal length of the {camera} camera is known to {100 * sigma[camera]['fx'] / focal:.0f} % only: "
                f"{bundle.UNDETERMINED}"
            )
    worst = max(map_sigma.values())
    if not worst <= MAX_MAP_SIGMA_PX:
        raise CalibrationError(f"the map would be wrong by about {worst:.0f} px: {bundle.UNDETERMINED}")


def _reach(model: CameraModel) -> tuple[float, float]:
    """(degrees from the axis to the farthest corner, share of the picture that the lens model gives no ray for)."""
    row, column = np.mgrid[0 : model.height : 25j, 0 : model.width : 33j]
    x, y, valid = model.rays(column, row)
    widest = float(np.hypot(x, y)[valid].max()) if valid.any() else 0.0
    return math.degrees(math.atan(widest)), 1.0 - float(valid.mean())


def _refuse_fisheye(rig: Rig, heldout: dict[str, float]) -> None:
    for camera, model in (("visible", rig.visible), ("infrared", rig.infrared)):
        angle_deg, _ = _reach(model)
        if model.lens != "equidistant" and angle_deg > WIDE_DEG and heldout["rms"] > WIDE_HELDOUT_PX:
            raise CalibrationError(
                f"the {camera} camera sees {2 * angle_deg:.0f} degrees from corner to corner, and left-out views are "
                f"off by {heldout['rms']:.1f} px: a fisheye lens is not followed by what is fitted here: {OTHER_LENSES}"
            )


def _warnings(
    views: tuple[BoardView, ...],
    detections: Detections,
    map_sigma: dict[str, float],
    heldout: dict[str, float],
    outliers: list[tuple[str, str]],
    rig: Rig,
) -> list[str]:
    lines = []
    pairs = sum(view.paired for view in views)
    if pairs < ADVISED_PAIRS:
        lines.append(f"{pairs} views of both cameras are few: with {ADVISED_PAIRS} or more the map is more certain")
    for camera in CAMERAS:
        cells = coverage(views, camera, detections.sizes[camera])
        reached = float((cells > 0).mean())
        if reached < UNEVEN_CELLS:
            lines.append(
                f"views reach only {100 * reached:.0f} % of the {camera} picture: hold the board into its corners too"
            )
        angle_deg, blind = _reach(rig.visible if camera == "visible" else rig.infrared)
        if blind > BLIND_SHARE:
            lines.append(
                f"the {camera} lens is so wide ({2 * angle_deg:.0f} degrees) that {100 * blind:.0f} % of its picture, "
                f"in the corners, are left out: for all of it {OTHER_LENSES}"
            )
    if map_sigma["inf"] > 1.0:
        lines.append(
            f"the map far away may be off by {map_sigma['inf']:.1f} px: take more views, tilted and at the edges"
        )
    if heldout["rms"] > 1.0:
        lines.append(
            f"left-out views are off by {heldout['rms']:.1f} px: is the board flat, still, and sharp in both cameras?"
        )
    if len(outliers) > 0.15 * (len(views) + len(outliers)):
        lines.append(f"{len(outliers)} views were left out because they do not fit: was the board or the rig moving?")
    if rig.infrared.width * rig.infrared.height > 1.5 * rig.visible.width * rig.visible.height:
        lines.append("the infrared picture is larger than the visible one: are the cameras swapped?")
    if rig.baseline_m > 1.0:
        lines.append(f"the cameras are {rig.baseline_m:.1f} m apart by this: is the board's spacing right?")
    return lines


def _as_board_view(view: View, detections: Detections) -> BoardView:
    """The view as detected, with points in the common order."""
    original = next(item for item in detections.views if item.name == view.name)
    results: dict[str, Detection | Refusal] = {}
    for camera, points in view.points.items():
        detection = original.results[camera]
        assert isinstance(detection, Detection)
        results[camera] = replace(detection, points=points)
    return BoardView(view.name, results, original.motion_px)
