"""How far the infrared picture, as it would be fused, lies from the visible picture: a shift, a roll and a scale.

Grey levels of the two cameras have nothing in common, and the sign of an edge may be opposite. What they share is
where edges run. So both pictures become fields of edge direction (the angle doubled, so that opposite signs agree),
normalised by their neighbourhood. The field of each block of the infrared picture is correlated with the visible
field around it. A block's correlation becomes a probability of each displacement, with a share left for "this block
has edges that only one camera sees"; one shift, roll and scale then has to explain all blocks. The blocks that have
nothing to say weigh nothing, and their number says whether the answer may be trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np

from calibration.rig import CalibrationError

State = Literal["ok", "degraded", "lost", "no_information"]

WORKING_PIXELS = 320 * 240  # more pixels do not make the answer better, and fewer make it worse
WINDOW = 64  # working pixels: side of the visible window that a block is searched in
RADIUS = 8  # working pixels that a block is moved by, at most, in each direction
BLOCK = WINDOW - 2 * RADIUS
STRIDE = 40
SIZE = 2 * RADIUS + 1
CERTAINTY = 0.15  # correlation to log-probability; fitted on real pairs
UNRELATED_SHARE = 0.2  # of the probability: the block shows nothing that both cameras see

GRADIENT_BLUR_PX = 0.6
NEIGHBOURHOOD = 0.04  # of the picture's width: what an edge is compared with
FLOOR = 0.2  # of the picture's typical gradient: weaker ones fade
NOISE_FLOOR = 0.04  # squared grey levels per pixel: what a sensor's noise leaves after the blur

NATURAL_WIDTH_PX = 640.0  # widths and tolerances below are for pictures of this width and grow with it
DRIFT_SIGMA = (6.0, 6.0, 0.003, 0.0012)  # pixels, pixels, radians, logarithm of the scale: what a mount may have moved
COLD_SIGMA = (25.0, 25.0, 0.04, 0.04)  # of cameras that were only put side by side
ROLLS = (0.0, -0.012, 0.012, -0.006, 0.006)  # tried before the climb
WIDE_ROLLS = (0.0, -0.02, 0.02, -0.04, 0.04)

# What one scene gets wrong however clear it is, fitted on real pairs: edges of heat are not quite edges of light, near
# things show parallax, moving things moved between the exposures. Pixels, pixels, radians, logarithm of the scale.
SCENE_SIGMA = (0.8, 0.8, 0.002, 0.0012)
MOVED_SIGMA_PX = 4.0  # how far a calibration that is no longer right is off, typically
NEW_SCENE_LEVELS = 12.0  # mean difference of the thumbnails, in grey levels
THUMBNAIL = (32, 24)

DEGRADED_PX, LOST_PX = 2.0, 4.0  # of displacement
HEALTH_SPAN_PX = 8.0  # displacement at which nothing is left of the health

AGREEING = 0.1  # product of two edges that are strong and run the same way
MIN_EVIDENCE = 15.0  # log of how much more probable the pictures are together than as strangers
MIN_BLOCKS = 6  # that support the answer
MIN_SPREAD = 0.07  # of the picture's width and height: root mean square distance of these blocks from their middle
# The outline of one near person alone is 0.03, and he may have moved; dark real scenes have 0.053 and more.
MIN_AGREEMENT = 0.042


@dataclass(frozen=True, eq=False)
class Fields:
    """The edges of a pair, at the working size; see `edge_field`."""

    infrared: np.ndarray  # float32 (h, w, 2), 0 where the infrared picture is not valid
    visible: np.ndarray
    valid: float  # share of the picture where infrared is valid
    size: tuple[int, int]  # (width, height) of the picture


@dataclass(frozen=True, eq=False)
class Surfaces:
    """For every block of the infrared picture, how probable each displacement is."""

    log_likelihood: np.ndarray  # float32 (blocks, SIZE, SIZE), rows are displacement in y; 0: no more than by chance
    centres: np.ndarray  # (blocks, 2) pixels of the picture, relative to its middle
    offsets: np.ndarray  # (blocks, 2) working pixels: the displacement in the middle of the surface
    start: np.ndarray  # (4,) parameters that the offsets come from
    scale: float  # working pixels per pixel
    size: tuple[int, int]  # (width, height) of the picture


@dataclass(frozen=True, eq=False)
class Residual:
    """One shift, roll and scale, and how far it may be trusted."""

    # (4,): x, y in pixels, roll in radians, logarithm of the scale, about the picture's middle; or (6,), see `affine`
    parameters: np.ndarray
    covariance: np.ndarray  # of the parameters, as far as this scene tells
    evidence: float  # log of the odds against pictures that have nothing in common
    blocks: int  # that support the answer
    spread: float  # of these blocks over the picture, see MIN_SPREAD
    peak_distance_px: float  # from "aligned" to the peak of the whole picture's correlation
    size: tuple[int, int]
    agreement: float = 1.0  # share of the valid picture where both cameras see the same edge

    @property
    def informative(self) -> bool:
        """Whether the pictures have enough in common to say anything. False is no sign of misalignment."""
        enough = self.evidence >= MIN_EVIDENCE and self.blocks >= MIN_BLOCKS
        return enough and self.spread >= MIN_SPREAD and self.agreement >= MIN_AGREEMENT

    @property
    def matrix(self) -> np.ndarray:
        """(3, 3), maps a pixel of the infrared picture to the visible pixel that it belongs to."""
        return affine(self.parameters, self.size)


def similarity(parameters: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The 3x3 matrix of (x, y, roll, log scale) about the middle of a picture of `size` (width, height)."""
    x, y, roll, log_scale = (float(value) for value in parameters)
    middle = _middle(size)
    cosine, sine = np.exp(log_scale) * np.cos(roll), np.exp(log_scale) * np.sin(roll)
    turn = np.array([[cosine, -sine], [sine, cosine]])
    matrix = np.eye(3)
    matrix[:2, :2] = turn
    matrix[:2, 2] = middle + np.array([x, y]) - turn @ middle
    return matrix


def affine(parameters: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The 3x3 matrix of the parameters of a similarity, and of stretch and shear before it if they are given too."""
    if len(parameters) == 4:
        return similarity(parameters, size)
    stretch, shear = (float(value) for value in parameters[4:])
    middle = _middle(size)
    matrix = np.eye(3)
    matrix[:2, :2] += [[stretch, shear], [shear, -stretch]]
    matrix[:2, 2] = middle - matrix[:2, :2] @ middle
    return similarity(parameters[:4], size) @ matrix


def parameters_of(matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The inverse of `similarity`; of another transform, the shift of its middle, its roll and its scale."""
    middle = _middle(size)
    shift = matrix[:2, :2] @ middle + matrix[:2, 2] - middle
    roll = np.arctan2(matrix[1, 0], matrix[0, 0])
    return np.array([*shift, roll, 0.5 * np.log(np.linalg.det(matrix[:2, :2]))])


def displacement_px(matrix: np.ndarray, size: tuple[int, int]) -> float:
    """How far a transform moves the pixels of a picture, on average over a 9x7 grid."""
    grid = _grid(size)
    moved = np.c_[grid, np.ones(len(grid))] @ np.asarray(matrix).T
    return float(np.linalg.norm(moved[:, :2] / moved[:, 2:] - grid, axis=1).mean())


@dataclass(frozen=True, eq=False)
class Survey:
    """What one pair says, kept so that several pairs can be settled together."""

    surfaces: Surfaces
    residual: Residual
    wide: bool  # found only by looking far
    thumbnail: np.ndarray  # of the visible picture, uint8: tells scenes apart


@dataclass(frozen=True, eq=False)
class Verdict:
    """What several pairs of one rig say together."""

    state: State
    health: float  # 1 aligned, 0.75 and 0.5 where degraded and lost begin, 0 for none or no information
    matrix: np.ndarray  # (3, 3), see Residual; the identity without information
    sigma_px: float | None  # expected error of the transform, over the picture; None without information
    informative: int  # pairs that told something
    size: tuple[int, int]


def measure(infrared: np.ndarray, visible: np.ndarray, weight: np.ndarray | None = None) -> Residual:
    """The residual transform of one pair, as it is seen: see `survey`."""
    return survey(infrared, visible, weight).residual


def survey(infrared: np.ndarray, visible: np.ndarray, weight: np.ndarray | None = None) -> Survey:
    """Compares one pair; looks far only if nothing is found near. Arguments as of `fields_of`."""
    thumbnail = thumbnail_of(visible)
    fields = fields_of(infrared, visible, weight)
    surfaces = correlate(fields)
    near = with_agreement(fit([surfaces]), fields)
    if near.informative and not _at_the_edge(near):
        return Survey(surfaces, near, False, thumbnail)
    far_surfaces = correlate(fields, wide=True)
    far = with_agreement(fit([far_surfaces], sigma=COLD_SIGMA), fields)
    if far.informative and far.evidence > near.evidence:
        return Survey(far_surfaces, far, True, thumbnail)
    return Survey(surfaces, near, False, thumbnail)


def _at_the_edge(residual: Residual) -> bool:
    """Whether the answer lies so far off that a better one may lie beyond what was searched."""
    scale = _working_size(residual.size)[0] / residual.size[0]
    return float(np.abs(residual.parameters[:2]).max()) * scale > RADIUS - 2


def with_agreement(residual: Residual, fields: Fields) -> Residual:
    """The residual with the share of the picture whose edges agree under it."""
    if residual.evidence < MIN_EVIDENCE:
        return replace(residual, agreement=0.0)
    height, width = fields.visible.shape[:2]
    # From the picture's pixels to the working ones, whose first middle is half a working pixel from the corner.
    shrink = np.diag([width / residual.size[0], height / residual.size[1], 1.0])
    half = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
    # Every second pixel of every second row says the same in a quarter of the time.
    to_sample = np.diag([0.5, 0.5, 1.0]) @ half @ shrink @ np.linalg.inv(half)
    moved = (to_sample @ residual.matrix @ np.linalg.inv(to_sample))[:2]
    infrared, visible = (np.ascontiguousarray(field[::2, ::2]) for field in (fields.infrared, fields.visible))
    size = (visible.shape[1], visible.shape[0])
    visible = cv2.warpAffine(visible, moved, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    products = cv2.multiply(visible, infrared)
    agreeing = np.count_nonzero(products[..., 0] + products[..., 1] > AGREEING)
    return replace(residual, agreement=agreeing / (size[0] * size[1] * max(fields.valid, 1e-6)))


def settle(surveys: Sequence[Survey]) -> Verdict:
    """The residual transform of a rig from one or more pairs, with how far to trust it.

    Pairs without information are left out. What is found is believed as far as it is more than what a scene may get
    wrong: of two cameras that are aligned, this says so.
    """
    telling = [one for one in surveys if one.residual.informative]
    if not telling:
        return Verdict("no_information", 0.0, np.eye(3), None, 0, surveys[0].residual.size)
    camps = [[one for one in telling if one.wide is wide] for wide in (False, True)]
    chosen = max(camps, key=lambda camp: sum(one.residual.evidence for one in camp))
    wide = chosen[0].wide
    found = fit([one.surfaces for one in chosen], sigma=COLD_SIGMA if wide else DRIFT_SIGMA)
    sigma_px = grid_sigma_px(found.covariance + scene_covariance(found.size) / _scenes(chosen), found.size)
    matrix = similarity(found.parameters * moved_probability(found.parameters, sigma_px, found.size), found.size)
    state, health = judge(displacement_px(matrix, found.size), found.size)
    return Verdict(state, health, matrix, sigma_px, len(telling), found.size)


def judge(distance_px: float, size: tuple[int, int]) -> tuple[State, float]:
    """State and health for a displacement over the picture."""
    natural_px = distance_px * NATURAL_WIDTH_PX / size[0]
    state: State = "ok" if natural_px < DEGRADED_PX else "degraded" if natural_px < LOST_PX else "lost"
    return state, max(0.0, 1.0 - natural_px / HEALTH_SPAN_PX)


def moved_probability(parameters: np.ndarray, sigma_px: float, size: tuple[int, int]) -> float:
    """How probably a measured transform is a real one, rather than the error of measuring an aligned rig.

    Even odds before the measurement; a rig that moved is expected to be MOVED_SIGMA_PX off.
    """
    distance_px = displacement_px(similarity(parameters, size), size)
    # sigma_px is of the length of a vector in the plane; half its square is the variance along each axis.
    still = sigma_px**2 / 2
    moved = still + (MOVED_SIGMA_PX * size[0] / NATURAL_WIDTH_PX) ** 2
    log_odds = np.log(still / moved) + 0.5 * distance_px**2 * (1 / still - 1 / moved)
    return float(1 / (1 + np.exp(-np.clip(log_odds, -50, 50))))


def scene_covariance(size: tuple[int, int]) -> np.ndarray:
    """(4, 4) covariance of what a single scene gets wrong."""
    wide = size[0] / NATURAL_WIDTH_PX
    return np.diag((np.array(SCENE_SIGMA) * (wide, wide, 1, 1)) ** 2)


def grid_sigma_px(covariance: np.ndarray, size: tuple[int, int]) -> float:
    """Root mean square displacement over the picture that a covariance of the parameters stands for."""
    jacobian = _jacobian(_grid(size) - _middle(size), len(covariance))
    return float(np.sqrt(np.einsum("nij,jk,nik->n", jacobian, covariance, jacobian).mean()))


def _scenes(surveys: Sequence[Survey]) -> int:
    """How many different scenes there are: their errors are independent, those of one scene are all the same."""
    seen: list[np.ndarray] = []
    for one in surveys:
        if all(scene_difference(one.thumbnail, other) > NEW_SCENE_LEVELS for other in seen):
            seen.append(one.thumbnail)
    return len(seen)


def scene_difference(thumbnail: np.ndarray, other: np.ndarray) -> float:
    """Mean difference of two thumbnails, in grey levels."""
    return float(cv2.mean(cv2.absdiff(thumbnail, other))[0])


def thumbnail_of(visible: np.ndarray) -> np.ndarray:
    """A small grey copy that tells scenes apart."""
    step = max(1, visible.shape[0] // (4 * THUMBNAIL[1]))  # four rows a pixel tell as much as all of them
    small = cv2.resize(visible[::step], THUMBNAIL, interpolation=cv2.INTER_AREA)
    return np.asarray(small if small.ndim == 2 else cv2.cvtColor(small, cv2.COLOR_RGB2GRAY))


def fields_of(infrared: np.ndarray, visible: np.ndarray, weight: np.ndarray | None = None) -> Fields:
    """The edges of a pair.

    Args:
        infrared: uint8 (H, W), on the visible camera's pixels.
        visible: uint8 (H, W), or RGB (H, W, 3).
        weight: float32 (H, W), below 1 where the infrared picture is not valid; None: valid everywhere.

    Raises:
        CalibrationError: sizes differ, or are too small to hold a block.
    """
    if infrared.shape[:2] != visible.shape[:2]:
        raise CalibrationError(
            f"the infrared picture is {infrared.shape[1]}x{infrared.shape[0]} and the visible one "
            f"{visible.shape[1]}x{visible.shape[0]}: bring infrared onto the visible pixels first"
        )
    size = (visible.shape[1], visible.shape[0])
    working = _working_size(size)
    if not comparable(size):
        raise CalibrationError(f"pictures of {size[0]}x{size[1]} are too small or too narrow to be compared")
    # Grey first: a third of the samples to average.
    grey = visible if visible.ndim == 2 else cv2.cvtColor(visible, cv2.COLOR_RGB2GRAY)
    edges, valid = edge_field(_shrunk(infrared, working)), 1.0
    if weight is not None:
        inside = _inside(weight, working)
        edges, valid = edges * inside[..., None], float(inside.mean())
    return Fields(edges, edge_field(_shrunk(grey, working)), valid, size)


def correlate(fields: Fields, wide: bool = False) -> Surfaces:
    """Compares the blocks of a pair.

    Args:
        fields: the pair's edges.
        wide: looks for shifts of up to a twentieth of the picture's width and rolls of 3 degrees; otherwise for half
            of that shift, and 1 degree.
    """
    start = np.zeros(4)
    if wide:
        start = fit([correlate(halved(fields))], sigma=COLD_SIGMA, rolls=WIDE_ROLLS).parameters
    return _surfaces(fields.infrared, fields.visible, start, fields.size)


def halved(fields: Fields) -> Fields:
    """The edges at half the working size, where a search reaches twice as far; as they are, if that is too small."""
    half = [
        cv2.resize(field, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        for field in (fields.infrared, fields.visible)
    ]
    return replace(fields, infrared=half[0], visible=half[1]) if min(half[0].shape[:2]) >= WINDOW else fields


def comparable(size: tuple[int, int]) -> bool:
    """Whether pictures of a size (width, height) hold at least one block."""
    return min(_working_size(size)) >= WINDOW


def _working_size(size: tuple[int, int]) -> tuple[int, int]:
    scale = min(1.0, float(np.sqrt(WORKING_PIXELS / (size[0] * size[1]))))
    return round(size[0] * scale), round(size[1] * scale)


def edge_field(picture: np.ndarray) -> np.ndarray:
    """Edge direction, angle doubled, as float32 (H, W, 2); length 0 (none) to 1 (an edge that stands out)."""
    smooth = cv2.GaussianBlur(picture, (0, 0), GRADIENT_BLUR_PX)
    along_x = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, ksize=3, scale=0.125)
    along_y = cv2.Sobel(smooth, cv2.CV_32F, 0, 1, ksize=3, scale=0.125)
    x_squared, y_squared = cv2.multiply(along_x, along_x), cv2.multiply(along_y, along_y)
    energy = cv2.add(x_squared, y_squared)
    side = int(NEIGHBOURHOOD * picture.shape[1]) | 1
    floor = FLOOR * FLOOR * cv2.mean(energy)[0] + NOISE_FLOOR
    total = cv2.add(cv2.add(energy, cv2.blur(energy, (side, side))), floor)  # type: ignore[call-overload]
    cosine = cv2.divide(cv2.subtract(x_squared, y_squared), total)
    sine = cv2.divide(cv2.multiply(along_x, along_y, scale=2.0), total)
    return np.asarray(cv2.merge([cosine, sine]))


def fit(
    surfaces: Sequence[Surfaces],
    sigma: Sequence[float] = DRIFT_SIGMA,
    rolls: Sequence[float] = ROLLS,
) -> Residual:
    """The shift, roll and scale that explain all blocks of one or more pairs of the same rig best.

    Args:
        surfaces: of pairs of one size. Different scenes count most; repeats of one scene add up as if they did not.
        sigma: how far each parameter is expected to be from 0, for a picture 640 pixels wide; of six, stretch and
            shear are found as well.
        rolls: tried before the climb, beside the start of the surfaces.
    """
    first = surfaces[0]
    if any(other.size != first.size for other in surfaces):
        raise CalibrationError("pictures of different sizes cannot share one residual transform")
    wide = first.size[0] / NATURAL_WIDTH_PX
    spread = np.array(sigma)
    spread[:2] *= wide
    problem = _Problem(surfaces, 1 / spread**2)
    start, peak_px = problem.search(first.start, rolls)
    parameters, covariance = problem.climb(start)
    support = problem.support(parameters)
    supporting = support > np.log(3.0)
    places = problem.centres[supporting] / np.array(first.size)
    return Residual(
        parameters=parameters,
        covariance=covariance,
        evidence=float(support.sum()) / len(surfaces),
        blocks=int(supporting.sum()) // len(surfaces),
        spread=float(places.std(axis=0).min()) if supporting.any() else 0.0,
        peak_distance_px=peak_px,
        size=first.size,
    )


class _Problem:
    """The log-probability of a transform, given all blocks."""

    def __init__(self, surfaces: Sequence[Surfaces], precision: np.ndarray) -> None:
        self.precision = precision
        self.surfaces = np.concatenate([one.log_likelihood for one in surfaces])
        self.centres = np.concatenate([one.centres for one in surfaces])
        self.offsets = np.concatenate([one.offsets for one in surfaces])
        self.scale = surfaces[0].scale
        # Steps of about equal effect on the picture: one pixel of shift, or what moves its outer parts by one.
        reach = float(np.sqrt((self.centres**2).sum(axis=1).mean()))
        self.units = np.array([1.0, 1.0] + [1 / reach] * (len(precision) - 2))
        self.jacobian = _jacobian(self.centres, len(precision)) * self.units * self.scale

    def search(self, start: np.ndarray, rolls: Sequence[float]) -> tuple[np.ndarray, float]:
        """The best whole-pixel shift for a few rolls, and how far from 0 the best shift without more roll is."""
        best, found, peak_px = -np.inf, start, 0.0
        more_parameters = np.zeros(len(self.precision) - len(start))
        middle = np.round(start[:2] * self.scale)
        steps = np.arange(-RADIUS, RADIUS + 1)
        x, y = (middle[0] + steps) / self.scale, (middle[1] + steps) / self.scale
        prior = 0.5 * (self.precision[0] * x[None, :] ** 2 + self.precision[1] * y[:, None] ** 2)
        for more in rolls:
            roll = start[2] + more
            total = self._sum_of_shifted(roll, start[3], middle) - prior - 0.5 * self.precision[2] * roll * roll
            row, column = np.unravel_index(int(total.argmax()), total.shape)
            if more == 0:
                peak_px = float(np.hypot(x[column], y[row]))
            if total[row, column] > best:
                best = float(total[row, column])
                found = np.array([x[column], y[row], roll, start[3], *more_parameters])
        return found, peak_px

    def _sum_of_shifted(self, roll: float, log_scale: float, middle: np.ndarray) -> np.ndarray:
        turned = _moved_by(self.centres, np.array([0, 0, roll, log_scale]))
        moved = np.round(turned * self.scale - self.offsets + middle).astype(int)
        total = np.zeros((SIZE, SIZE), np.float32)
        for x, y in {(int(x), int(y)) for x, y in moved}:
            alike = self.surfaces[(moved[:, 0] == x) & (moved[:, 1] == y)].sum(axis=0)
            total += _shifted(alike, x, y)
        return total

    def climb(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Newton steps to the top. Returns the parameters and their covariance there."""
        q = parameters / self.units
        precision = self.precision * self.units**2
        jacobian = self.jacobian
        value = self._value(q, precision)
        for _ in range(12):
            _, slope, bend = _spline(self.surfaces, self._places(q), derivatives=True)
            gradient = np.einsum("bi,bij->j", slope, jacobian) - precision * q
            curvature = np.einsum("bik,bij,bjl->kl", jacobian, bend, jacobian) - np.diag(precision)
            sizes, axes = np.linalg.eigh(-curvature)
            sizes = np.maximum(np.abs(sizes), 1e-3 * np.abs(sizes).max())
            step = axes @ ((axes.T @ gradient) / sizes)
            step *= min(1.0, 2.0 / max(float(np.linalg.norm(step)), 1e-12))
            for _ in range(5):
                trial = q + step
                trial_value = self._value(trial, precision)
                if trial_value > value:
                    break
                step *= 0.4
            else:
                break
            q, value = trial, trial_value
            if np.abs(step).max() < 0.01:
                break
        covariance = (axes / sizes) @ axes.T
        return q * self.units, covariance * np.outer(self.units, self.units)

    def support(self, parameters: np.ndarray) -> np.ndarray:
        """(blocks,) how much more probable each block is at this transform than by chance, as a logarithm."""
        return _spline(self.surfaces, self._places(parameters / self.units))[0]

    def _places(self, q: np.ndarray) -> np.ndarray:
        """Where in each surface the transform lands, columns and rows."""
        return np.asarray(self.jacobian @ q - self.offsets + RADIUS)

    def _value(self, q: np.ndarray, precision: np.ndarray) -> float:
        return float(_spline(self.surfaces, self._places(q))[0].sum() - 0.5 * (precision * q * q).sum())


def _surfaces(infrared: np.ndarray, visible: np.ndarray, start: np.ndarray, size: tuple[int, int]) -> Surfaces:
    """Correlates every block with its window, by way of the Fourier transform: two real channels are one complex."""
    height, width = infrared.shape[:2]
    rows, columns = (_starts(side) for side in (height, width))
    y, x = (grid.ravel() for grid in np.meshgrid(rows, columns, indexing="ij"))
    scale = width / size[0]
    # The middle of working pixel i is at (i + 0.5) / scale - 0.5 of the picture.
    corners = np.stack([x, y], axis=1)
    centres = (corners + WINDOW / 2) * (size[0] / width, size[1] / height) - 0.5 - _middle(size)
    offsets = np.round(_moved_by(centres, start) * scale).astype(int)
    margin = int(np.abs(offsets).max())
    padded = cv2.copyMakeBorder(visible, margin, margin, margin, margin, cv2.BORDER_CONSTANT) if margin else visible
    block = np.zeros((WINDOW, WINDOW, 2), np.float32)
    correlation = np.empty((len(x), SIZE, SIZE), np.float32)
    inner = slice(RADIUS, RADIUS + BLOCK)
    for number, (column, row) in enumerate(corners):
        block[inner, inner] = infrared[row + RADIUS : row + RADIUS + BLOCK, column + RADIUS : column + RADIUS + BLOCK]
        left, top = corners[number] + offsets[number] + margin
        window = np.ascontiguousarray(padded[top : top + WINDOW, left : left + WINDOW])
        spectrum = cv2.mulSpectrums(cv2.dft(window), cv2.dft(block), 0, conjB=True)
        plane = cv2.dft(spectrum, flags=cv2.DFT_INVERSE | cv2.DFT_SCALE)[..., 0]
        # The surface's middle, no displacement, is sample (0, 0), and negative ones come from the far end.
        correlation[number, RADIUS:, RADIUS:] = plane[: RADIUS + 1, : RADIUS + 1]
        correlation[number, :RADIUS, RADIUS:] = plane[-RADIUS:, : RADIUS + 1]
        correlation[number, RADIUS:, :RADIUS] = plane[: RADIUS + 1, -RADIUS:]
        correlation[number, :RADIUS, :RADIUS] = plane[-RADIUS:, -RADIUS:]
    return Surfaces(_log_likelihood(correlation), centres, offsets.astype(float), start, scale, size)


def _moved_by(centres: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    """(n, 2) displacement of points that are given relative to the picture's middle; for small rolls and scales."""
    x, y, roll, log_scale = parameters
    return np.asarray(centres @ np.array([[log_scale, roll], [-roll, log_scale]]) + (x, y))


def _log_likelihood(correlation: np.ndarray) -> np.ndarray:
    """Correlation to the logarithm of a probability, in units of chance, with a floor for unrelated blocks."""
    raised = CERTAINTY * correlation
    weights = np.exp(raised - raised.max(axis=(1, 2), keepdims=True))
    share = weights * (SIZE * SIZE / weights.sum(axis=(1, 2), keepdims=True))
    return np.asarray(np.log((1 - UNRELATED_SHARE) * share + UNRELATED_SHARE), np.float32)


def _starts(side: int) -> np.ndarray:
    """Where windows begin, so that they cover a side evenly."""
    count = int(np.ceil((side - WINDOW) / STRIDE)) + 1
    return np.round(np.linspace(0, side - WINDOW, count)).astype(int)


def _shifted(surface: np.ndarray, x: int, y: int) -> np.ndarray:
    """A surface read at (column + x, row + y); beyond its edge the edge's value goes on."""
    index = np.arange(SIZE)
    rows, columns = np.clip(index + y, 0, SIZE - 1), np.clip(index + x, 0, SIZE - 1)
    return surface[rows[:, None], columns[None, :]]


def _spline(
    surfaces: np.ndarray, places: np.ndarray, derivatives: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each surface at its place (column, row), through the cubic B-spline of its samples, which also smooths them.

    Returns:
        values (n,), and if asked for, gradients (n, 2) and second derivatives (n, 2, 2).
    """
    kept = np.clip(places, 1.0, SIZE - 2.001)
    whole = np.floor(kept).astype(int)
    weights, slopes, bends = _spline_weights(kept - whole)
    near = np.arange(-1, 3)
    patch = surfaces[
        np.arange(len(surfaces))[:, None, None],
        (whole[:, 1, None] + near)[:, :, None],
        (whole[:, 0, None] + near)[:, None, :],
    ]

    def along(of_x: np.ndarray, of_y: np.ndarray) -> np.ndarray:
        return np.asarray(((patch * of_x[:, None, :]).sum(axis=2) * of_y).sum(axis=1))

    x, y = 0, 1
    values = along(weights[:, x], weights[:, y])
    if not derivatives:
        return values, np.empty(0), np.empty(0)
    gradients = np.stack([along(slopes[:, x], weights[:, y]), along(weights[:, x], slopes[:, y])], axis=1)
    mixed = along(slopes[:, x], slopes[:, y])
    second = np.array([[along(bends[:, x], weights[:, y]), mixed], [mixed, along(weights[:, x], bends[:, y])]])
    return values, gradients, np.moveaxis(second, 2, 0)


def _spline_weights(t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of the four samples around a place, and their first and second derivatives; `t` in [0, 1)."""
    u = 1 - t
    values = [u**3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (3 * u**3 - 6 * u**2 + 4) / 6, t**3 / 6]
    slopes = [-(u**2) / 2, (3 * t**2 - 4 * t) / 2, (4 * u - 3 * u**2) / 2, t**2 / 2]
    bends = [u, 3 * t - 2, 3 * u - 2, t]
    stacked = (np.stack(rows, axis=-1) for rows in (values, slopes, bends))
    return tuple(stacked)  # type: ignore[return-value]


def _jacobian(points: np.ndarray, degrees: int) -> np.ndarray:
    """(n, 2, degrees) derivative of the displacement of points, relative to the middle, by the 4 or 6 parameters."""
    jacobian = np.zeros((len(points), 2, 6))
    jacobian[:, 0, 0] = jacobian[:, 1, 1] = 1
    jacobian[:, 0, 2], jacobian[:, 1, 2] = -points[:, 1], points[:, 0]
    jacobian[:, :, 3] = points
    jacobian[:, 0, 4], jacobian[:, 1, 4] = points[:, 0], -points[:, 1]
    jacobian[:, 0, 5], jacobian[:, 1, 5] = points[:, 1], points[:, 0]
    return jacobian[..., :degrees]


def _shrunk(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if size == (picture.shape[1], picture.shape[0]):
        return picture
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))


def _inside(weight: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """1 where the infrared picture is valid, well away from its edge, which would look like an edge of the scene."""
    valid = (_shrunk(weight, size) > 0.99).astype(np.uint8)
    return cv2.erode(valid, np.ones((5, 5), np.uint8), borderType=cv2.BORDER_REPLICATE).astype(np.float32)


def _middle(size: tuple[int, int]) -> np.ndarray:
    return (np.array(size) - 1) / 2


def _grid(size: tuple[int, int]) -> np.ndarray:
    """A 9x7 grid of pixels over the whole picture."""
    x, y = np.meshgrid(np.linspace(0, size[0] - 1, 9), np.linspace(0, size[1] - 1, 7))
    return np.stack([x.ravel(), y.ravel()], axis=1)
