"""What a calibration, from wherever, is worth on views of a board that it was not made from; and the homography-only
fallback."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np

from calibration import bundle
from calibration.bundle import CAMERAS
from calibration.rig import CalibrationError, CameraModel, Rig
from calibration.targets import Board, through
from calibration.views import BoardView, Detections

MAX_FORESHORTENING = 1.5  # of one homography, over the infrared picture
EXCHANGED_PX, EXCHANGED_FACTOR = 3.0, 3.0  # off by more, and by so many times less the other way round


@dataclass(frozen=True, eq=False)
class Judgement:
    """Residuals of a given calibration."""

    views: tuple[BoardView, ...]
    residuals: tuple[dict[str, np.ndarray], ...]  # (N, 2) pixels by camera: measured minus predicted
    transfer_px: dict[str, float]  # infrared points from the visible ones: median, rms, p95

    def worst(self) -> float:
        return self.transfer_px["rms"]


def judge(rig: Rig, detections: Detections, spacing_m: float | None = None) -> Judgement:
    """How far the infrared points of each view are from where the calibration puts them, given the visible ones.

    Raises:
        CalibrationError: made for another picture size, or no view shows the board to both cameras.
    """
    for camera, model in (("visible", rig.visible), ("infrared", rig.infrared)):
        if detections.sizes[camera] != model.size:
            raise CalibrationError(_wrong_size(camera, model.size, detections.sizes))
    board = detections.board
    spacing_m = spacing_m or board.spacing_m
    if rig.homography is None and spacing_m is None:
        raise CalibrationError("the board's spacing is not known: measure it and give --spacing in metres")
    points = Board(board.kind, board.columns, board.rows, spacing_m).points()
    views, residuals = [], []
    for view in detections.views:
        seen, felt = view.points("visible"), view.points("infrared")
        if seen is None or felt is None:
            continue
        views.append(view)
        residuals.append(_residual(rig, points, seen, felt, board))
    if not views:
        raise CalibrationError("no view shows the board to both cameras: run `calibrate detect` on other pictures")
    transfer_px = spread_of([item["infrared"] for item in residuals])
    _refuse_exchanged(rig, transfer_px["median"], points, views, board)
    return Judgement(tuple(views), tuple(residuals), transfer_px)


def _refuse_exchanged(rig: Rig, median_px: float, points: np.ndarray, views: list[BoardView], board: Board) -> None:
    """Raises CalibrationError where the views fit a calibration whose cameras have changed places far better."""
    if rig.homography is not None or median_px < EXCHANGED_PX or rig.visible.size != rig.infrared.size:
        return
    back = np.linalg.inv(rig.infrared_from_visible)
    for pose in (rig.infrared_from_visible, back):
        other = replace(rig, visible=rig.infrared, infrared=rig.visible, infrared_from_visible=pose)
        errors = []
        for view in views:
            seen, felt = view.points("visible"), view.points("infrared")
            assert seen is not None
            assert felt is not None
            errors.append(_residual(other, points, seen, felt, board)["infrared"])
        exchanged_px = spread_of(errors)["median"]
        if exchanged_px < median_px / EXCHANGED_FACTOR:
            raise CalibrationError(
                f"infrared and visible look swapped: the views are {median_px:.1f} px off this calibration, and "
                f"{exchanged_px:.1f} px with its cameras exchanged: exchange them there, or the folders at `calibrate "
                "detect`"
            )


def _wrong_size(camera: str, size: tuple[int, int], sizes: dict[str, tuple[int, int]]) -> str:
    seen = sizes[camera]
    other = sizes["visible" if camera == "infrared" else "infrared"]
    swapped = " (the other camera's pictures have that size: are they swapped?)" if other == size != seen else ""
    return (
        f"the calibration is for {camera} pictures of {size[0]}x{size[1]}, these have {seen[0]}x{seen[1]}{swapped}: "
        "take them as they were at calibration, or calibrate again"
    )


def _residual(rig: Rig, board: np.ndarray, seen: np.ndarray, felt: np.ndarray, target: Board) -> dict[str, np.ndarray]:
    if rig.homography is not None:
        predicted = through(np.linalg.inv(rig.homography), seen)
        visible = np.where(np.isfinite(seen), 0.0, np.nan)
    else:
        model = rig.visible
        pose = bundle.pose_seen(board, seen, model)
        visible = seen - bundle.project(board, pose, model)
        moved = bundle.composed(pose, rig.infrared_from_visible)
        predicted = bundle.project(board, moved, rig.infrared)
    errors = [felt[order] - predicted for order in target.orders()]
    best = min(errors, key=lambda error: float(np.nanmean((error**2).sum(axis=1))))
    return {"visible": visible, "infrared": best}


def spread_of(errors: list[np.ndarray]) -> dict[str, float]:
    """Median, rms and 95th percentile of the lengths of errors (N, 2); NaN ones are left out."""
    lengths = np.linalg.norm(np.concatenate(errors), axis=1)
    lengths = lengths[np.isfinite(lengths)]
    return {
        "median": float(np.median(lengths)),
        "rms": math.sqrt(float((lengths**2).mean())),
        "p95": float(np.percentile(lengths, 95)),
    }


@dataclass(frozen=True, eq=False)
class PlaneSolution:
    """One homography for both pictures, and what it leaves."""

    rig: Rig
    views: int
    heldout_px: dict[str, float]  # infrared pixels; of views that were left out, else of the fit itself
    heldout: bool
    warnings: tuple[str, ...] = field(default=())

    def quality(self) -> dict[str, Any]:
        return {
            "views": self.views,
            "heldout_px" if self.heldout else "fit_px": {key: round(v, 4) for key, v in self.heldout_px.items()},
            "method": "homography",
            "warnings": list(self.warnings),
        }


def solve_plane(detections: Detections) -> PlaneSolution:
    """The fallback where views are too few for lenses: one homography, right on the board's plane alone.

    Raises:
        CalibrationError: no view shows the board to both cameras, or they have no plane in common.
    """
    pairs = []
    for view in detections.views:
        seen, felt = view.points("visible"), view.points("infrared")
        if seen is not None and felt is not None and view.still:
            pairs.append((felt[_upright(seen, felt, detections.board)], seen))
    if not pairs:
        raise CalibrationError(
            "no view shows the board, still, to both cameras: record it again, fully in both pictures"
        )
    homography = _fit(pairs)
    errors = []
    for index in range(len(pairs)):
        rest = [pair for other, pair in enumerate(pairs) if other != index]
        felt, seen = pairs[index]
        errors.append(felt - through(np.linalg.inv(_fit(rest) if rest else homography), seen))
    spread = spread_of(errors)
    width, height = detections.sizes["infrared"]
    if spread["rms"] > 0.05 * max(width, height):
        raise CalibrationError(
            f"one homography leaves {spread['rms']:.0f} px: the board was at different distances, or the pictures do "
            "not belong together: hold it at the distance that matters, or take more views and solve for the lenses"
        )
    _refuse_foreshortened(homography, width, height)
    warnings = ["a homography is right at the board's distance only, and takes no lens distortion into account"]
    if len(pairs) == 1:
        warnings.append("one view: the error is that of the fit, not of anything left out")
    return PlaneSolution(_flat_rig(homography, detections.sizes), len(pairs), spread, len(pairs) > 1, tuple(warnings))


def _refuse_foreshortened(homography: np.ndarray, width: int, height: int) -> None:
    """Raises CalibrationError for a homography that no two cameras side by side have.

    A mirrored board is a board again, tilted the other way: one view of it has a homography as good as any.
    """
    corners = np.array([[0, 0, 1], [width, 0, 1], [0, height, 1], [width, height, 1]])
    depths = corners @ homography[2]
    if depths.min() <= 0 or depths.max() > MAX_FORESHORTENING * depths.min():
        raise CalibrationError(
            "the cameras would have to see the board from quite different sides: one camera's pictures are mirrored "
            "(switch that off, and record again), or the two are not of one moment"
        )


def _fit(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    felt, seen = (np.concatenate(points) for points in zip(*pairs, strict=True))
    known = np.isfinite(felt).all(axis=1) & np.isfinite(seen).all(axis=1)
    homography, _ = cv2.findHomography(felt[known], seen[known], 0)
    if homography is None:
        raise CalibrationError("the points of both cameras have no homography: are all of them on one line?")
    return homography / homography[2, 2]


def _upright(seen: np.ndarray, felt: np.ndarray, board: Board) -> np.ndarray:
    """The order of the infrared points in which the board lies in both pictures the same way round."""

    def along(points: np.ndarray) -> np.ndarray:
        grid = points.reshape(board.rows, board.columns, 2)
        return np.nanmean(grid[:, -1], axis=0) - np.nanmean(grid[:, 0], axis=0)

    return max(board.orders(), key=lambda order: float(along(seen) @ along(felt[order])))


def _flat_rig(homography: np.ndarray, sizes: dict[str, tuple[int, int]]) -> Rig:
    visible, infrared = (pinhole(sizes[camera]) for camera in CAMERAS)
    return Rig(visible, infrared, np.eye(4), homography=homography)


def pinhole(size: tuple[int, int]) -> CameraModel:
    """A lens for where none is known; a focal length of one picture's width is as good as any."""
    width, height = size
    return CameraModel(
        width, height, np.array([[width, 0, (width - 1) / 2], [0, width, (height - 1) / 2], [0, 0, 1.0]])
    )
