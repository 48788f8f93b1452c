"""Finds a calibration board in a visible or thermal picture, or says why it cannot be used.

Two boards work for both cameras: a chessboard whose squares differ in heat (foil on card, a heated print) and circles
on an asymmetric grid (holes before something warm or cold). OpenCV finds the first guess; on thermal pictures it needs
help, because a heated board has a slow gradient that is stronger than its pattern. Then each point is measured in the
picture itself, and the whole is checked: OpenCV sometimes returns a grid that is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np

from calibration.lattice import blurred, largest_lattice, noise_of
from calibration.rig import CalibrationError

Kind = Literal["chessboard", "circles"]
Grid = Callable[[np.ndarray], np.ndarray]  # board positions in spacings (N, 2) -> pixels (N, 2)
Reason = Literal["absent", "small", "cut", "blurred", "count", "bent"]

MIN_SPACING_PX = 8.0  # below, corners are found but off by half a pixel
SEARCH_SIDE_PX = 800  # OpenCV's search is slow on large pictures; the points are measured at full size afterwards
MAX_BLUR_SHARE = 0.6  # width of an edge, of the spacing
MAX_SMEAR, MAX_SMEAR_SHARE = 1.8, 0.45  # edges that wide, against those of the other direction: it moved
MAX_MISFIT_SHARE = 0.05  # of the spacing: points that do not lie on one smooth grid
MIN_AGREEMENT = 0.85  # share of places that have the colours of a board
# Measured on heated boards: of all treatments these two left the least misfit (0.29 px; OpenCV's own points 0.60).
SMOOTHING_SHARE = 0.03  # of the spacing, before corners are measured
BACKGROUND_SHARE = 0.4  # of the spacing: what changes more slowly is heat, not pattern
WINDOW_SHARE = 0.32  # of the spacing, to each side of a corner
# Of the lenses guessed where a board may be bent. Rendered circles through 110 degrees: middles 0.03 px off after one
# of them, 0.11 without; the misfit of lenses up to 70 degrees stays below that share of the spacing.
WIDE_VIEWS_DEG, BENT_SHARE = (100.0, 130.0), 0.013
MAX_BLOB_FACTOR = 5  # blobs in the picture, for each circle of the board
MAX_LOST_SHARE = 0.1  # of the points that may be wrong in a view that is kept
# Points with neighbours on all sides that a picture must show to be searched: a share of the board's own, so many at
# most. In pictures that OpenCV found a board in there were 7 of the board's, or 0.39 of a small one's, or more; of 186
# streets, people and woods 3 had 7 corners, and 21 had 7 circles.
LATTICE_SHARE, ENOUGH_LATTICE = 0.34, 7


@dataclass(frozen=True)
class Board:
    """A flat board.

    chessboard: `columns` x `rows` inner corners, `spacing_m` apart.
    circles: asymmetric grid, `columns` circles in each of `rows` rows, every second row moved by half a step;
        `spacing_m` is the distance of neighbouring rows, which is half the distance of neighbours in one row.
    """

    kind: Kind
    columns: int
    rows: int
    spacing_m: float | None = None  # None: not measured (yet)

    def __post_init__(self) -> None:
        if self.kind not in ("chessboard", "circles"):
            raise CalibrationError(f"a board is a chessboard or circles, got {self.kind!r}")
        least = 3 if self.kind == "chessboard" else 2
        if not (least <= self.columns <= 60 and least <= self.rows <= 60):
            what = "inner corners (one fewer than squares)" if self.kind == "chessboard" else "circles"
            raise CalibrationError(
                f"a {self.kind} has {least} to 60 {what} a side, got {self.columns}x{self.rows}: count again"
            )
        if self.spacing_m is not None and not 0.001 <= self.spacing_m <= 10:
            raise CalibrationError(f"the spacing of a board is 0.001 to 10 m, got {self.spacing_m:g}: measure it")

    @property
    def count(self) -> int:
        return self.columns * self.rows

    @property
    def name(self) -> str:
        chess = self.kind == "chessboard"
        return f"chessboard of {self.label} inner corners" if chess else f"asymmetric grid of {self.label} circles"

    @property
    def inner_count(self) -> int:
        """Of the points that have neighbours on all sides."""
        return (self.rows - 2) * (self.columns - (2 if self.kind == "chessboard" else 1))

    @property
    def label(self) -> str:
        return f"{self.columns}x{self.rows}"

    def lattice(self) -> np.ndarray:
        """(N, 2) positions in spacings, row by row."""
        row, column = np.mgrid[0 : self.rows, 0 : self.columns].astype(np.float64)
        x = column if self.kind == "chessboard" else 2 * column + row % 2
        return np.stack([x.ravel(), row.ravel()], axis=1)

    def extent(self) -> tuple[float, float]:
        """Of the lattice, in spacings."""
        return tuple(self.lattice().max(axis=0))

    def points(self) -> np.ndarray:
        """(N, 3) metres; in spacings where it is not measured."""
        flat = self.lattice() * (self.spacing_m or 1.0)
        return np.column_stack([flat, np.zeros(len(flat))])

    def orders(self) -> list[np.ndarray]:
        """Index orders (N,) under which the board looks the same to a camera that cannot tell the colours' meaning.

        One camera's white is the other's black, so for a chessboard half a turn counts as the same.
        """
        index = np.arange(self.count).reshape(self.rows, self.columns)
        if self.kind == "circles" and self.rows % 2:
            return [index.ravel()]
        turns = [index, index[::-1, ::-1]]
        if self.kind == "chessboard" and self.rows == self.columns:
            turns += [np.rot90(index), np.rot90(index, 3)]
        return [turn.ravel() for turn in turns]


@dataclass(frozen=True)
class Detection:
    """The board in one picture."""

    points: np.ndarray  # (N, 2) pixels in the board's order; NaN where a point could not be measured
    misfit_px: float  # rms distance from a smooth grid: what the measurement of one point is worth
    spacing_px: float  # mean distance of neighbours
    blur_px: float  # width of an edge
    contrast: float  # step at an edge, in noise sigmas
    inverted: bool  # circles: brighter than their ground; chessboard: the square at the first corner is bright


@dataclass(frozen=True)
class Refusal:
    """Why a picture has no usable board, and what to do."""

    reason: Reason
    text: str
    found: tuple[int, int] | None = None  # columns, rows of another board that is there


def detect(image: np.ndarray, board: Board) -> Detection | Refusal:
    """Finds the board.

    Args:
        image: uint8 or uint16; (H, W), or RGB (H, W, 3). 16-bit thermal counts as they are.
        board: what to look for.
    """
    grey = grey_of(image)
    if float(np.ptp(grey)) < 1e-6:
        return Refusal("absent", "the picture is of one colour: is the lens covered or the camera starting?")
    least = min(ENOUGH_LATTICE, round(LATTICE_SHARE * board.inner_count))
    lattice = largest_lattice(grey, board.kind == "chessboard", 2 * least)
    if lattice < least:
        return _nothing_like(board)
    result = _searched(grey, board)
    if lattice >= 2 * least and _may_be_bent(result, board):  # guessing lenses takes time: only where it may pay
        seen = [result, *(_searched_straightened(grey, board, view_deg) for view_deg in WIDE_VIEWS_DEG)]
        found = [one for one in seen if isinstance(one, Detection)]
        result = min(found, key=lambda one: one.misfit_px / one.spacing_px) if found else result
    return result or _why_not(grey, board)


def _may_be_bent(result: Detection | Refusal | None, board: Board) -> bool:
    """Whether a very wide lens may be what hides a board, or blurs its measurement."""
    if isinstance(result, Refusal):
        return result.reason in ("absent", "bent")
    # OpenCV finds chessboards however a lens bends them, and bending does not move their corners; it moves the middles
    # of circles.
    return board.kind == "circles" and (result is None or result.misfit_px > BENT_SHARE * result.spacing_px)


def _searched(grey: np.ndarray, board: Board) -> Detection | Refusal | None:
    """The board, else why the first thing that looks like it is none; None if nothing does."""
    refusal: Refusal | None = None
    for seed in _seeds(grey, board):
        result = _measured(grey, seed, board)
        if isinstance(result, Detection):
            return result
        refusal = refusal or result
        if result.reason in ("count", "cut"):  # another look at the same picture changes nothing
            break
    return refusal


def _searched_straightened(grey: np.ndarray, board: Board, view_deg: float) -> Detection | None:
    """The board where a rough guess of a very wide lens, see `_straightened`, makes its lines straight."""
    straight, back = _straightened(grey, view_deg)
    result = _searched(straight, board)
    if not isinstance(result, Detection):
        return None
    points = back(result.points)
    spacing_px = spacing_of(points, board)
    if spacing_px < MIN_SPACING_PX:
        return None
    smaller = spacing_px / result.spacing_px
    misfit_px, blur_px = result.misfit_px * smaller, result.blur_px * smaller
    return replace(result, points=points, misfit_px=misfit_px, spacing_px=spacing_px, blur_px=blur_px)


def _straightened(grey: np.ndarray, view_deg: float) -> tuple[np.ndarray, Grid]:
    """The picture as a lens without distortion would show it, of the same size in its middle, and the way back.

    Args:
        view_deg: across the picture's width, of an equidistant lens whose axis is the picture's middle.
    """
    middle = (np.array(grey.shape[::-1]) - 1) / 2
    focal_px = middle[0] / np.radians(view_deg / 2)
    reach = np.floor(focal_px * np.tan(np.minimum(middle / focal_px, np.radians(WIDE_VIEWS_DEG[-1] / 2))))

    def back(points: np.ndarray) -> np.ndarray:
        away = points - reach
        radius = np.maximum(np.linalg.norm(away, axis=-1, keepdims=True), 1e-9)
        return middle + away * (focal_px * np.arctan(radius / focal_px) / radius)

    columns, rows = np.meshgrid(*(np.arange(2 * side + 1) for side in reach))
    x, y = cv2.split(back(np.stack([columns, rows], axis=-1)).astype(np.float32))
    return cv2.remap(grey, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE), back


def grey_of(image: np.ndarray) -> np.ndarray:
    """float32 (H, W) of a picture."""
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return image.astype(np.float32)


# --- the first guess ---


def _seeds(grey: np.ndarray, board: Board) -> Iterator[np.ndarray]:
    """First guesses (N, 2), each from another treatment of the picture."""
    yield from _seeds_at(grey, board, min(1.0, SEARCH_SIDE_PX / max(grey.shape)))
    if max(grey.shape) > SEARCH_SIDE_PX:
        yield from _seeds_at(grey, board, min(1.0, 2 * SEARCH_SIDE_PX / max(grey.shape)))


def _seeds_at(grey: np.ndarray, board: Board, scale: float) -> Iterator[np.ndarray]:
    small = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else grey
    for picture in _treatments(small, inverted=board.kind == "chessboard"):
        found = _find_chessboard(picture, board) if board.kind == "chessboard" else _find_circles(picture, board)
        if found is not None:
            # Pixel centres are whole numbers at both sizes.
            yield _right_handed((found + 0.5) * [grey.shape[1] / small.shape[1], grey.shape[0] / small.shape[0]] - 0.5,
                                board)  # fmt: skip


def _treatments(grey: np.ndarray, inverted: bool) -> Iterator[np.ndarray]:
    """The picture as uint8 in several forms, the most likely to succeed first."""
    short = min(grey.shape)
    plain = _stretched(grey)
    flat = _flattened(grey, short / 24)
    yield from (plain, flat, _flattened(grey, short / 48))
    yield _flattened(cv2.GaussianBlur(grey, (0, 0), short / 240), short / 24)
    if inverted:  # the detector prefers dark squares in a light frame
        yield 255 - plain


def _stretched(grey: np.ndarray) -> np.ndarray:
    low, high = np.percentile(grey[::2, ::2], (0.5, 99.5))
    return np.clip((grey - low) * (255 / max(high - low, 1e-6)), 0, 255).astype(np.uint8)


def _flattened(grey: np.ndarray, sigma_px: float) -> np.ndarray:
    """Takes out slow gradients and evens out the contrast, so that a faint warm pattern stands out."""
    smooth = cv2.GaussianBlur(grey, (0, 0), 1.0)
    detail = smooth - blurred(smooth, sigma_px)
    spread = np.sqrt(blurred(detail * detail, sigma_px))
    floor = 0.002 * float(np.ptp(np.percentile(grey[::2, ::2], (1, 99)))) + 1e-6
    return np.clip(detail / (spread + floor) * 51 + 128, 0, 255).astype(np.uint8)


_SB_FLAGS = cv2.CALIB_CB_EXHAUSTIVE | cv2.CALIB_CB_ACCURACY | cv2.CALIB_CB_NORMALIZE_IMAGE


def _find_chessboard(picture: np.ndarray, board: Board) -> np.ndarray | None:
    found, points = cv2.findChessboardCornersSB(picture, (board.columns, board.rows), flags=_SB_FLAGS)
    return points.reshape(-1, 2).astype(np.float64) if found else None


def _find_circles(picture: np.ndarray, board: Board) -> np.ndarray | None:
    doubled = cv2.resize(picture, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    doubled = cv2.GaussianBlur(doubled, (0, 0), 2.0)
    for bright in (True, False):
        blobs = _blobs(bright, doubled.shape)
        # The search for a grid among hundreds of specks of noise takes seconds, and finds none.
        if not board.count <= len(blobs.detect(doubled)) <= MAX_BLOB_FACTOR * board.count:
            continue
        found, points = cv2.findCirclesGrid(
            doubled,
            (board.columns, board.rows),
            flags=cv2.CALIB_CB_ASYMMETRIC_GRID | cv2.CALIB_CB_CLUSTERING,
            blobDetector=blobs,
        )
        if found:
            return (points.reshape(-1, 2).astype(np.float64) + 0.5) / 2 - 0.5
    return None


def _blobs(bright: bool, shape: tuple[int, ...]) -> cv2.SimpleBlobDetector:
    params = cv2.SimpleBlobDetector.Params()
    params.minThreshold, params.maxThreshold, params.thresholdStep = 20, 240, 10
    params.filterByColor, params.blobColor = True, 255 if bright else 0
    params.filterByArea, params.minArea, params.maxArea = True, 30, shape[0] * shape[1] / 100
    params.filterByCircularity, params.minCircularity = True, 0.6
    params.filterByConvexity, params.minConvexity = True, 0.8
    params.filterByInertia, params.minInertiaRatio = True, 0.15
    params.minDistBetweenBlobs = 6
    return cv2.SimpleBlobDetector.create(params)


def _right_handed(points: np.ndarray, board: Board) -> np.ndarray:
    """Rows run downwards where columns run to the right, in every picture: two cameras then agree up to a turn."""
    grid = points.reshape(board.rows, board.columns, 2)
    along, down = grid[:, -1].mean(0) - grid[:, 0].mean(0), grid[-1].mean(0) - grid[0].mean(0)
    if along[0] * down[1] - along[1] * down[0] < 0:
        # An asymmetric grid with its rows reversed is itself; with its columns reversed it is not.
        grid = grid[::-1] if board.kind == "circles" else grid[:, ::-1]
    return grid.reshape(-1, 2)


# --- measuring and checking ---


def _measured(grey: np.ndarray, seed: np.ndarray, board: Board) -> Detection | Refusal:
    spacing_px = spacing_of(seed, board)
    if not spacing_px >= MIN_SPACING_PX:
        return _too_small(spacing_px)
    smooth_seed = _on_smooth_grid(seed, board)
    points = (_corners if board.kind == "chessboard" else _centres)(grey, smooth_seed, spacing_px)
    fitted = _on_smooth_grid(points, board)
    distance = np.linalg.norm(points - fitted, axis=1)
    limit_px = max(0.6, MAX_MISFIT_SHARE * spacing_px, 4 * float(np.nanmedian(distance)))
    lost = ~(distance <= limit_px)
    if lost.mean() > MAX_LOST_SHARE:
        return Refusal("absent", "what looks like a board does not lie on one grid: is it a board, and is it flat?")
    points = np.where(lost[:, None], np.nan, points)
    if board.kind == "circles":
        points = _unbiased(grey, points, spacing_px, board)
    fitted = _on_smooth_grid(points, board)
    misfit_px = float(np.sqrt(np.nanmean(np.sum((points - fitted) ** 2, axis=1)) * _freedom_factor(board)))
    if misfit_px > MAX_MISFIT_SHARE * spacing_px:
        return Refusal(
            "bent", f"its points are {misfit_px:.1f} px off a smooth grid: use a flat board, and hold it still"
        )
    return _checked(grey, points, fitted, misfit_px, spacing_px, board)


def _too_small(spacing_px: float) -> Refusal:
    return Refusal(
        "small", f"its pattern is {spacing_px:.1f} px apart, {MIN_SPACING_PX:.0f} are needed: hold it nearer"
    )


def spacing_of(points: np.ndarray, board: Board) -> float:
    """Mean distance of neighbours, in pixels a spacing."""
    grid = points.reshape(board.rows, board.columns, 2)
    along = np.linalg.norm(np.diff(grid, axis=1), axis=2) / (2 if board.kind == "circles" else 1)
    down = np.linalg.norm(np.diff(grid[:: 2 if board.kind == "circles" and board.rows > 2 else 1], axis=0), axis=2)
    down = down / (2 if board.kind == "circles" and board.rows > 2 else 1)
    return float(min(np.nanmedian(along), np.nanmedian(down)))


def _on_smooth_grid(points: np.ndarray, board: Board) -> np.ndarray:
    """Where the points lie if the grid is a plane seen through a smooth lens: homography, then a cubic of the rest."""
    return _smooth_model(points, board)(board.lattice())


def _smooth_model(points: np.ndarray, board: Board) -> Grid:
    lattice = board.lattice()
    known = np.isfinite(points).all(axis=1)
    homography = _plane(lattice[known], points[known])
    middle, reach = lattice.mean(axis=0), max(np.ptp(lattice, axis=0).max() / 2, 1.0)

    def powers(where: np.ndarray) -> np.ndarray:
        x, y = ((where - middle) / reach).T
        terms = [np.ones_like(x), x, y, x * x, x * y, y * y]
        if board.count >= 30 and min(board.rows, board.columns) >= 4:
            terms += [x**3, x * x * y, x * y * y, y**3]
        return np.stack(terms, axis=1)

    rest = points - through(homography, lattice)
    use = known.copy()
    for _ in range(3):
        cubic = np.linalg.lstsq(powers(lattice[use]), rest[use], rcond=None)[0]
        off = np.linalg.norm(rest - powers(lattice) @ cubic, axis=1)
        limit = max(3.5 * float(np.median(off[use])), 0.05)
        narrowed = known & (off <= limit)
        if narrowed.sum() < 0.7 * known.sum() or np.array_equal(narrowed, use):
            break
        use = narrowed
    return lambda where: through(homography, where) + powers(where) @ cubic


def _plane(lattice: np.ndarray, points: np.ndarray) -> np.ndarray:
    homography, _ = cv2.findHomography(lattice, points, cv2.LMEDS)
    return np.eye(3) if homography is None else homography


def through(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (N, 2) through a homography (3, 3)."""
    moved = np.column_stack([points, np.ones(len(points))]) @ homography.T
    return moved[:, :2] / moved[:, 2:]


def _freedom_factor(board: Board) -> float:
    """The smooth grid follows some of the noise; this undoes it on average."""
    return board.count / max(board.count - 14.0, 4.0)


def _corners(grey: np.ndarray, seed: np.ndarray, spacing_px: float) -> np.ndarray:
    """Saddle points near the seed, to a few hundredths of a pixel."""
    detail = _detail(grey, spacing_px)  # a heat gradient pulls the corner to its warm side
    window = int(np.clip(round(WINDOW_SHARE * spacing_px), 2, 24))
    points = np.ascontiguousarray(seed.reshape(-1, 1, 2), np.float32)
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_MAX_ITER, 60, 0.001)
    inside = _inside(seed, grey.shape, window + 2)
    result = np.full((len(seed), 2), np.nan)
    if inside.any():
        refined = cv2.cornerSubPix(detail, points[inside], (window, window), (-1, -1), stop).reshape(-1, 2)
        result[inside] = refined
    result[np.linalg.norm(result - seed, axis=1) > 0.3 * spacing_px] = np.nan
    return result


def _detail(grey: np.ndarray, spacing_px: float) -> np.ndarray:
    """The pattern without pixel noise and without what changes slowly."""
    smooth = cv2.GaussianBlur(grey, (0, 0), float(np.clip(SMOOTHING_SHARE * spacing_px, 0.6, 2.0)))
    return smooth - blurred(smooth, BACKGROUND_SHARE * spacing_px)


def _centres(grey: np.ndarray, seed: np.ndarray, spacing_px: float) -> np.ndarray:
    """Centroids of the circles, weighted by how much of a pixel each covers."""
    return np.array([_centroid(grey, start, spacing_px)[0] for start in seed])


def _centroid(grey: np.ndarray, start: np.ndarray, spacing_px: float) -> tuple[np.ndarray, float]:
    """(centre (2,), area in pixels) of the circle near `start`; NaN if it cannot be measured."""
    reach = 0.68 * spacing_px  # neighbours are 1.41 spacings away
    side = int(np.ceil(reach)) + 2
    steps = np.arange(-side, side + 1, dtype=np.float64)
    offset_x, offset_y = np.meshgrid(steps, steps)
    nothing = np.full(2, np.nan), float("nan")
    centre, area = start, 0.0
    for _ in range(4):
        if not _inside(centre[None], grey.shape, side)[0]:
            return nothing
        left, top = np.rint(centre).astype(int)
        patch = grey[top - side : top + side + 1, left - side : left + side + 1]
        x, y = left + offset_x - centre[0], top + offset_y - centre[1]
        distance = np.hypot(x, y)
        ring = (distance > 0.58 * spacing_px) & (distance <= reach)
        # The ground is a slope where the board is warmed: a level one would move the centre to its warm side.
        slope = np.linalg.lstsq(np.stack([np.ones(ring.sum()), x[ring], y[ring]], axis=1), patch[ring], rcond=None)[0]
        above = patch - (slope[0] + slope[1] * x + slope[2] * y)
        core = float(np.median(above[distance <= 0.25 * spacing_px]))
        if abs(core) < 1e-6:
            return nothing
        cover = np.clip(above / core, 0, 1)
        # Half the ground's noise would count as cover: it is cut off below.
        cover = np.clip((cover - 0.2) / 0.6, 0, 1) * (distance <= reach)
        area = float(cover.sum())
        shift = np.array([(cover * x).sum(), (cover * y).sum()]) / max(area, 1e-6)
        centre = centre + shift
        if np.hypot(*shift) < 0.002:
            break
    return (centre, area) if np.linalg.norm(centre - start) <= 0.35 * spacing_px else nothing


def _unbiased(grey: np.ndarray, points: np.ndarray, spacing_px: float, board: Board) -> np.ndarray:
    """Takes off the perspective: the middle of a circle's picture is not the picture of its middle."""
    model, lattice = _smooth_model(points, board), board.lattice()
    nudge = 0.05
    right, below = np.array([nudge, 0]), np.array([0, nudge])

    def stretch(where: np.ndarray) -> np.ndarray:
        """Pixels per square spacing."""
        along = (model(where + right) - model(where - right)) / (2 * nudge)
        down = (model(where + below) - model(where - below)) / (2 * nudge)
        return np.abs(along[:, 0] * down[:, 1] - along[:, 1] * down[:, 0])

    areas = np.array([_centroid(grey, point, spacing_px)[1] if np.isfinite(point[0]) else np.nan for point in points])
    radius = float(np.sqrt(np.nanmedian(areas / stretch(lattice)) / np.pi))
    angles = np.arange(12) * (np.pi / 6)
    total, weights = np.zeros((len(lattice), 2)), np.zeros(len(lattice))
    for share in np.sqrt((np.arange(4) + 0.5) / 4):  # rings of equal area
        for angle in angles:
            where = lattice + share * radius * np.array([np.cos(angle), np.sin(angle)])
            weight = stretch(where)
            total += weight[:, None] * model(where)
            weights += weight
    return points - (total / weights[:, None] - model(lattice))


def _inside(points: np.ndarray, shape: tuple[int, ...], margin: float) -> np.ndarray:
    limits = np.array([shape[1] - 1, shape[0] - 1], float)
    return np.all((points >= margin) & (points <= limits - margin), axis=1)


def _checked(
    grey: np.ndarray, points: np.ndarray, fitted: np.ndarray, misfit_px: float, spacing_px: float, board: Board
) -> Detection | Refusal:
    """Whether the pattern is really there, ends where it should, and is sharp."""
    model = _smooth_model(points, board)
    # Against the slow heat of a warmed board, which is stronger than its pattern.
    detail = _detail(grey, spacing_px)
    sign, agreement = _colours(detail, model, board)
    if agreement < MIN_AGREEMENT:
        return Refusal("absent", "a grid of points was found, but not the board's colours between them")
    larger = _beyond(detail, model, board, sign)
    if larger is not None:
        return Refusal(
            "count",
            f"the board goes on beyond {board.label}: it has about {larger[0]}x{larger[1]}: give its true size",
            larger,
        )
    blur_px, sharper_px, contrast = _edges(grey, model, board)
    smeared = blur_px > max(MAX_SMEAR * sharper_px, MAX_SMEAR_SHARE * spacing_px)
    if blur_px > MAX_BLUR_SHARE * spacing_px or smeared:
        return Refusal(
            "blurred",
            f"its edges are {blur_px:.1f} px wide at a pattern of {spacing_px:.1f} px: focus the lens, hold it still",
        )
    return Detection(points, misfit_px, spacing_px, blur_px, contrast, inverted=sign > 0)


def _sample(grey: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Bilinear values at (N, 2) pixels; NaN outside."""
    x, y = (np.ascontiguousarray(points[:, axis : axis + 1], np.float32) for axis in (0, 1))
    return cv2.remap(grey, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=float("nan"))[:, 0]


def _colours(grey: np.ndarray, model: Grid, board: Board) -> tuple[int, float]:
    """(+1 if the pattern's foreground is bright else -1, share of places that agree)."""
    steps = _steps(grey, model, board, board.lattice())
    sign = 1 if np.nanmedian(steps) > 0 else -1
    return sign, float(np.nanmean(steps * sign > 0))


def _steps(grey: np.ndarray, model: Grid, board: Board, where: np.ndarray) -> np.ndarray:
    """How strongly each place (N, 2) looks as the pattern does there; its sign is the polarity.

    chessboard: the two squares on one diagonal against the two on the other, by the place's parity.
    circles: the middle against four places between the circles.
    """
    if board.kind == "circles":
        ground = [_sample(grey, model(where + step)) for step in ((1, 0), (-1, 0), (0, 1), (0, -1))]
        return _sample(grey, model(where)) - np.mean(ground, axis=0)
    near = 0.32
    falling = [_sample(grey, model(where + step)) for step in ((-near, -near), (near, near))]
    rising = [_sample(grey, model(where + step)) for step in ((near, -near), (-near, near))]
    # Worse of the two diagonals: an edge of something else has one bright corner only.
    low = np.minimum(*falling) - np.maximum(*rising)
    high = np.maximum(*falling) - np.minimum(*rising)
    step = np.where(low > 0, low, np.where(high < 0, high, 0.0))
    step = np.where(np.isfinite(low), step, np.nan)
    return step * np.where((where.sum(axis=1) % 2) == 0, 1, -1)


def _beyond(grey: np.ndarray, model: Grid, board: Board, sign: int) -> tuple[int, int] | None:
    """The size of the board if the pattern goes on outside of what was asked for."""
    inside = float(np.nanmedian(_steps(grey, model, board, board.lattice()) * sign))
    more = [0, 0]
    for axis, sides in ((0, _sides(board, 0)), (1, _sides(board, 1))):
        for where in sides:
            steps = _steps(grey, model, board, where) * sign
            seen = np.isfinite(steps)
            if seen.sum() >= 3 and float(np.mean(steps[seen] > 0.4 * inside)) > 0.8:
                more[axis] += 1
    return (board.columns + more[0], board.rows + more[1]) if any(more) else None


def _sides(board: Board, axis: int) -> list[np.ndarray]:
    """The places next to the pattern along one axis, on its two sides."""
    lattice, far = board.lattice(), board.extent()
    if board.kind == "chessboard" or axis == 1:
        # Circles: a row more is moved the other way than the present first or last.
        first, last = lattice[lattice[:, axis] == 0].copy(), lattice[lattice[:, axis] == far[axis]].copy()
        first[:, axis] -= 1
        last[:, axis] += 1
        if board.kind == "circles":
            first[:, 0] += 1
            last[:, 0] += 1 if (board.rows - 1) % 2 == 0 else -1
        return [first, last]
    rows = np.arange(board.rows, dtype=float)
    return [np.stack([rows % 2 - 2, rows], 1), np.stack([rows % 2 + 2 * board.columns, rows], 1)]


def _edges(grey: np.ndarray, model: Grid, board: Board) -> tuple[float, float, float]:
    """(median width of an edge in pixels in the blurrier and in the sharper direction; its step in noise sigmas)."""
    widths, steps = [], []
    for direction in ((1.0, 0.0), (0.0, 1.0)):
        profiles, length_px = _profiles(grey, model, board, np.array(direction))
        rise = np.abs(np.diff(profiles, axis=1)).max(axis=1)
        step = np.abs(profiles[:, -3:].mean(axis=1) - profiles[:, :3].mean(axis=1))
        good = np.isfinite(rise) & (rise > 0)
        if not good.any():
            continue
        widths.append(float(np.median(step[good] / rise[good] * (length_px / (profiles.shape[1] - 1))[good])))
        steps.append(float(np.median(step[good])))
    if not widths:
        return 0.0, 0.0, 0.0
    return max(widths), min(widths), min(steps) / noise_of(grey)


def _profiles(grey: np.ndarray, model: Grid, board: Board, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values across edges (M, 17) and the length of each profile in pixels (M,)."""
    lattice = board.lattice()
    if board.kind == "chessboard":
        across = direction[::-1]  # the edge between two squares runs along `direction`
        middle = lattice + 0.5 * direction
        start, end = middle - 0.5 * across, middle + 0.5 * across
        keep = np.all(middle <= lattice.max(axis=0), axis=1)
        start, end = start[keep], end[keep]
    else:
        start, end = lattice, lattice + direction
    share = np.linspace(0, 1, 17)
    values = np.stack([_sample(grey, model(start + s * (end - start))) for s in share], axis=1)
    return values, np.linalg.norm(model(end) - model(start), axis=1)


# --- reasons ---


def _why_not(grey: np.ndarray, board: Board) -> Refusal:
    """The likeliest reason why no board was found."""
    if board.kind == "chessboard":
        partial = _any_chessboard(grey)
        if partial is not None:
            return _about_part(grey, partial, board)
    for scale, reason in ((2.0, "small"), (0.5, "blurred")):
        changed = cv2.resize(
            grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        )
        if max(changed.shape) > 2.5 * SEARCH_SIDE_PX:
            continue
        find = _find_chessboard if board.kind == "chessboard" else _find_circles
        found = find(_flattened(changed, min(changed.shape) / 24), board)
        if found is not None and reason == "small":
            return _too_small(spacing_of(found, board) / scale)
        if found is not None:
            return Refusal("blurred", "the board is there, but too blurred: focus the lens, hold it still")
    return _nothing_like(board)


def _nothing_like(board: Board) -> Refusal:
    return Refusal(
        "absent",
        f"no {board.name} was found: is its size right, all of it in the picture, sharp, {MIN_SPACING_PX:.0f} px or "
        "more apart, and in infrared warm or cold enough to stand out?",
    )


def _any_chessboard(grey: np.ndarray) -> tuple[np.ndarray, tuple[int, int]] | None:
    """Corners (rows, columns, 2) of whatever chessboard is there."""
    scale = min(1.0, SEARCH_SIDE_PX / max(grey.shape))
    small = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else grey
    for picture in (
        _stretched(small),
        _flattened(small, min(small.shape) / 24),
        _flattened(small, min(small.shape) / 48),
    ):
        found, points, meta = cv2.findChessboardCornersSBWithMeta(picture, (3, 3), _SB_FLAGS | cv2.CALIB_CB_LARGER)
        if found and meta is not None and meta.shape[0] >= 3 and meta.shape[1] >= 3:
            rows, columns = meta.shape[:2]
            grid = (points.reshape(rows, columns, 2) + 0.5) / scale - 0.5
            if _is_chessboard(grey, grid):
                return grid, (columns, rows)
    return None


def _is_chessboard(grey: np.ndarray, grid: np.ndarray) -> bool:
    """Whether the squares between the corners (rows, columns, 2) have the colours of a chessboard."""
    rows, columns = grid.shape[:2]
    board = Board("chessboard", columns, rows)
    points = _right_handed(grid.reshape(-1, 2), board)
    detail = _detail(grey, max(spacing_of(points, board), 2.0))
    steps = _steps(detail, _smooth_model(points, board), board, board.lattice())
    sign = 1 if np.nanmedian(steps) > 0 else -1
    clear = steps * sign > 4 * noise_of(grey)
    return bool(np.isfinite(steps).all() and clear.mean() >= MIN_AGREEMENT)


def _about_part(grey: np.ndarray, partial: tuple[np.ndarray, tuple[int, int]], board: Board) -> Refusal:
    grid, (columns, rows) = partial
    spacing_px = float(np.median(np.linalg.norm(np.diff(grid, axis=1), axis=2)))
    if spacing_px < MIN_SPACING_PX:
        return _too_small(spacing_px)
    if sorted((columns, rows)) == sorted((board.columns, board.rows)):
        return Refusal("blurred", "the board was found, but its corners cannot be measured: focus, or more contrast")
    flat = grid.reshape(-1, 2)
    margin = 1.6 * spacing_px
    touches = bool(np.any(flat < margin) or np.any(flat > np.array(grey.shape[::-1]) - 1 - margin))
    fewer = columns * rows < board.count
    if fewer and touches:
        return Refusal("cut", f"only {columns}x{rows} of its {board.label} corners are in the picture: show all of it")
    return Refusal(
        "count",
        f"a chessboard of {columns}x{rows} inner corners is there, not {board.label}: is it covered, or miscounted?",
        (columns, rows),
    )
