"""Views of a board: their file, and which of them to calibrate from."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.rig import CalibrationError
from calibration.targets import Board, Detection, Refusal, detect
from calibration.whole_file import write_text

FORMAT = "dspfusion-detections/1"
MAX_BYTES = 64 << 20
CELLS = (5, 4)  # of the coverage, columns and rows
STILL_PX = 0.5  # motion of the board since the last picture of a recording, within which it counts as still
CAMERAS = ("infrared", "visible")


@dataclass(frozen=True)
class BoardView:
    """The board in one picture of each camera."""

    name: str
    results: dict[str, Detection | Refusal]  # by camera
    motion_px: float | None = None  # largest since the view before; None: not a recording

    @property
    def still(self) -> bool:
        return self.motion_px is None or self.motion_px <= STILL_PX

    def points(self, camera: str) -> np.ndarray | None:
        result = self.results.get(camera)
        return result.points if isinstance(result, Detection) else None

    @property
    def paired(self) -> bool:
        return all(self.points(camera) is not None for camera in CAMERAS)


@dataclass(frozen=True)
class Detections:
    """All views of one board by one rig."""

    board: Board
    sizes: dict[str, tuple[int, int]]  # (width, height) by camera
    bits: dict[str, int]
    views: tuple[BoardView, ...]

    def found(self, camera: str) -> int:
        return sum(view.points(camera) is not None for view in self.views)


def detect_view(name: str, images: dict[str, np.ndarray], board: Board, before: BoardView | None = None) -> BoardView:
    """Looks for the board in the pictures of one moment.

    Args:
        name: of the view, for messages.
        images: by camera, see `targets.detect`.
        board: what to look for.
        before: the view just before in a recording; the board's motion since then is measured.
    """
    results = {camera: detect(image, board) for camera, image in images.items()}
    view = BoardView(name, results)
    return view if before is None else BoardView(name, results, _motion_px(view, before, board))


def _motion_px(view: BoardView, before: BoardView, board: Board) -> float | None:
    """How far the board has moved; infinity where it was not seen before."""
    moved = []
    for camera in CAMERAS:
        now, then = view.points(camera), before.points(camera)
        if now is None:
            continue
        if then is None:
            return math.inf
        steps = [np.nanmedian(np.linalg.norm(now - then[order], axis=1)) for order in board.orders()]
        moved.append(float(min(steps)))
    return max(moved) if moved else None


def refuse_wrong_count(detections: Detections) -> None:
    """Raises CalibrationError where the pictures agree that the board has another size than was said."""
    seen = Counter(
        tuple(sorted(result.found, reverse=True))
        for view in detections.views
        for result in view.results.values()
        if isinstance(result, Refusal) and result.reason == "count" and result.found is not None
    )
    found = sum(detections.found(camera) for camera in CAMERAS)
    if seen and seen.most_common(1)[0][1] > max(1, found):
        (columns, rows), times = seen.most_common(1)[0]
        raise CalibrationError(
            f"the board in {times} pictures has {columns}x{rows} "
            f"{'inner corners' if detections.board.kind == 'chessboard' else 'circles'}, not {detections.board.label}: "
            f"give --size {columns}x{rows} (inner corners are one fewer than squares)"
        )


def summary(detections: Detections) -> dict[str, Any]:
    """Counts and reasons by camera, and the share of views that both cameras found the board in."""
    result: dict[str, Any] = {"views": len(detections.views)}
    for camera in CAMERAS:
        found = [view.results[camera] for view in detections.views if isinstance(view.results.get(camera), Detection)]
        reasons = Counter(
            view.results[camera].reason  # type: ignore[union-attr]
            for view in detections.views
            if isinstance(view.results.get(camera), Refusal)
        )
        result[camera] = {
            "found": len(found),
            "share": round(len(found) / max(len(detections.views), 1), 4),
            "refused": dict(reasons),
            "misfit_px": _median([item.misfit_px for item in found]),  # type: ignore[union-attr]
            "spacing_px": _median([item.spacing_px for item in found]),  # type: ignore[union-attr]
            "blur_px": _median([item.blur_px for item in found]),  # type: ignore[union-attr]
        }
    result["paired"] = sum(view.paired for view in detections.views)
    result["moving"] = sum(not view.still for view in detections.views)
    return result


def _median(values: list[float]) -> float | None:
    return round(float(np.median(values)), 4) if values else None


# --- choosing ---


def choose(detections: Detections, limit: int = 60) -> list[BoardView]:
    """The views to calibrate from: still ones, and of these the most different in place, size and tilt.

    Farthest-first: each view taken is the one least like those taken before, in the camera in which it differs most.
    Views that both cameras saw come first; views of one camera fill up, since they still teach its lens.
    """
    still = [view for view in detections.views if view.still]
    paired = [view for view in still if view.paired]
    single = [view for view in still if not view.paired and any(view.points(camera) is not None for camera in CAMERAS)]
    chosen = _most_different(paired, detections, limit)
    return chosen + _most_different(single, detections, max(0, min(limit - len(chosen), limit // 3)))


def _most_different(views: list[BoardView], detections: Detections, limit: int) -> list[BoardView]:
    if len(views) <= limit:
        return views
    features = np.stack([_features(view, detections) for view in views])  # (V, camera, feature)
    taken = [int(np.nanargmax(np.nansum(np.abs(features - np.nanmedian(features, axis=0)), axis=(1, 2))))]
    distance = np.full(len(views), np.inf)
    while len(taken) < limit:
        to_last = np.sqrt(np.nansum((features - features[taken[-1]]) ** 2, axis=2)).max(axis=1)
        distance = np.minimum(distance, to_last)
        distance[taken] = -1
        taken.append(int(np.argmax(distance)))
    return [views[index] for index in sorted(taken)]


def _features(view: BoardView, detections: Detections) -> np.ndarray:
    """(camera, 5): place x y, size, and foreshortening along and down; about one for the whole range of each."""
    rows = []
    for camera in CAMERAS:
        points = view.points(camera)
        if points is None:
            rows.append(np.full(5, np.nan))
            continue
        width, height = detections.sizes[camera]
        centre = np.nanmean(points, axis=0) / (width, height)
        size = math.log(max(np.nanmax(points[:, 0]) - np.nanmin(points[:, 0]), 1.0) / width) / 1.5
        rows.append(np.array([*centre, size, *_tilt(points, detections.board)]))
    return np.stack(rows)


def _tilt(points: np.ndarray, board: Board) -> tuple[float, float]:
    """How much nearer one side is than the other, along and down the picture: 0 when the board is square on."""
    homography = _plane_of(points, board)
    return float(np.clip(homography[2, 0], -1, 1)), float(np.clip(homography[2, 1], -1, 1))


def _plane_of(points: np.ndarray, board: Board) -> np.ndarray:
    import cv2

    lattice = board.lattice()
    known = np.isfinite(points).all(axis=1)
    middle, reach = lattice.mean(axis=0), np.ptp(lattice, axis=0) / 2
    homography, _ = cv2.findHomography((lattice[known] - middle) / reach, points[known])
    return np.eye(3) if homography is None else homography / homography[2, 2]


def coverage(views: list[BoardView] | tuple[BoardView, ...], camera: str, size: tuple[int, int]) -> np.ndarray:
    """(rows, columns) of CELLS: how many points fell into each part of the picture."""
    counts = np.zeros(CELLS[::-1], int)
    for view in views:
        points = view.points(camera)
        if points is None:
            continue
        known = points[np.isfinite(points).all(axis=1)]
        cell = np.clip((known / size * CELLS).astype(int), 0, np.array(CELLS) - 1)
        np.add.at(counts, (cell[:, 1], cell[:, 0]), 1)
    return counts


# --- the file ---


def save_detections(detections: Detections, path: str | Path) -> None:
    """Writes the views as JSON. Raises CalibrationError if that cannot be done."""
    board = detections.board
    document = {
        "format": FORMAT,
        "board": {"kind": board.kind, "columns": board.columns, "rows": board.rows, "spacing_m": board.spacing_m},
        "cameras": {
            camera: {"resolution": list(detections.sizes[camera]), "bits": detections.bits[camera]}
            for camera in CAMERAS
        },
        "views": [_view_document(view) for view in detections.views],
    }
    path = Path(path)
    try:
        write_text(path, json.dumps(document, indent=1))
    except OSError as error:
        raise CalibrationError(f"cannot write the detections {path}: {error.strerror}: choose another place") from None


def _view_document(view: BoardView) -> dict[str, Any]:
    moved = view.motion_px
    document: dict[str, Any] = {"name": view.name}
    if moved is not None:
        document["motion_px"] = round(moved, 3) if math.isfinite(moved) else "unknown"
    for camera, result in view.results.items():
        if isinstance(result, Refusal):
            document[camera] = {"refused": result.reason, "text": result.text, "found": result.found}
            continue
        document[camera] = {
            "points": [
                [round(float(x), 4), round(float(y), 4)] if math.isfinite(x) else None for x, y in result.points
            ],
            "misfit_px": round(result.misfit_px, 4),
            "spacing_px": round(result.spacing_px, 3),
            "blur_px": round(result.blur_px, 3),
            "contrast": round(result.contrast, 2),
            "inverted": result.inverted,
        }
    return document


def load_detections(path: str | Path) -> Detections:
    """Reads what `save_detections` wrote.

    Raises:
        CalibrationError: one line that says what is wrong and what to do.
    """
    path = Path(path)
    try:
        content = path.read_bytes() if path.stat().st_size <= MAX_BYTES else None
    except OSError as error:
        raise CalibrationError(f"cannot read the detections {path}: {error.strerror}: check the path") from None
    if content is None:
        raise CalibrationError(f"{path} is larger than {MAX_BYTES >> 20} MiB: give what `calibrate detect` wrote")
    try:
        document = json.loads(content)
        if document["format"] != FORMAT:
            raise CalibrationError(f"{path}: the format is not '{FORMAT}': run `calibrate detect` again")
        return _detections(document)
    except CalibrationError as error:
        raise CalibrationError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        raise CalibrationError(f"{path} is not what `calibrate detect` wrote: run it again") from None


def _detections(document: dict[str, Any]) -> Detections:
    board = Board(**document["board"])
    cameras = document["cameras"]
    sizes = {
        camera: (int(cameras[camera]["resolution"][0]), int(cameras[camera]["resolution"][1])) for camera in CAMERAS
    }
    if min(min(size) for size in sizes.values()) < 1:
        raise CalibrationError("a camera's resolution is positive: run `calibrate detect` again")
    bits = {camera: int(cameras[camera]["bits"]) for camera in CAMERAS}
    views = tuple(_view(item, board) for item in document["views"])
    return Detections(board, sizes, bits, views)


def _view(item: dict[str, Any], board: Board) -> BoardView:
    results: dict[str, Detection | Refusal] = {}
    for camera in CAMERAS:
        section = item.get(camera)
        if section is None:
            continue
        if "refused" in section:
            found = tuple(section["found"]) if section.get("found") else None
            results[camera] = Refusal(section["refused"], str(section["text"]), found)  # type: ignore[arg-type]
            continue
        points = np.array([[math.nan] * 2 if point is None else point for point in section["points"]], float)
        if points.shape != (board.count, 2) or np.isinf(points).any():
            raise CalibrationError(f"view {item['name']!r} does not have the board's {board.count} points")
        misfit, spacing, blur, contrast = (
            float(section[key]) for key in ("misfit_px", "spacing_px", "blur_px", "contrast")
        )
        results[camera] = Detection(points, misfit, spacing, blur, contrast, bool(section["inverted"]))
    motion = item.get("motion_px")
    return BoardView(str(item["name"]), results, math.inf if motion == "unknown" else motion)
