"""How a camera turns, measured in its own pictures alone: the motion that two unlike cameras on one mount share.

Each picture is aligned, by a shift, with a reference picture a little before it (inverse-compositional Gauss-Newton
after Lucas and Kanade), at a small size and with little weight on what moves by itself. The reference is renewed when
the view has moved on, so errors add up per reference and not per frame. The result is a path in pixels of the small
picture; its scale does not matter to whoever compares two paths in time.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

WIDTH_PX = 160  # of the picture that is measured; 240 are no better (0.01 px either way) and cost three times as much
DETAIL_PX = (0.8, 6.0)  # finer is noise, coarser is light, vignetting and the step after a thermal shutter
COARSE = 4  # quick turns are first guessed at a quarter of that
ITERATIONS = 8
SETTLING = 5  # iterations after which the weights stay
CONVERGED_PX = 0.003
REFERENCE_SHIFT_PX = 10.0  # a reference serves until the view has moved so far...
REFERENCE_PICTURES = 150  # ...or for so many pictures, as light and traffic change
LEAST_CORRELATION = 0.35  # of reference and shifted picture; below it nothing is known about the motion
OUTLIER_SIGMAS = 2.5  # residuals beyond carry little weight: moving objects, flicker
MARGIN_PX = 4


@dataclass(frozen=True, slots=True)
class Motion:
    """Where the view of one picture lies."""

    x_px: float  # cumulative shift of the scene since the first picture, in pixels of the small picture
    y_px: float
    correlation: float  # with the reference picture, 0 to 1
    broken: bool = False  # nothing ties this picture to the one before: the path begins anew here


class EgoMotion:
    """Follows the view of one camera from picture to picture.

    Args:
        width_px: of the picture that is measured; fewer pixels are quicker and noisier.
    """

    def __init__(self, width_px: int = WIDTH_PX) -> None:
        self._width_px = width_px
        self._reference: _Reference | None = None
        self._previous = np.zeros((0, 0), np.float32)
        self._origin = np.zeros(2)  # the path at the reference
        self._shift = np.zeros(2)  # from the reference to the previous picture
        self._velocity = np.zeros(2)
        self._age = 0

    def add(self, image: np.ndarray) -> Motion:
        """Measures the next picture.

        Args:
            image: uint8 or uint16, (H, W) or RGB (H, W, 3), of one size throughout.
        """
        small = _prepared(image, self._width_px)
        if self._reference is None or self._previous.shape != small.shape:
            return self._begin(small)
        shift, correlation = self._reference.align(small, self._shift + self._velocity)
        if correlation < LEAST_CORRELATION:  # the view has changed: is the picture before this one still like it?
            self._renew(self._previous)
            shift, correlation = self._reference.align(small, self._velocity)
            if correlation < LEAST_CORRELATION:
                return self._begin(small)
        self._velocity, self._shift, self._previous = shift - self._shift, shift, small
        self._age += 1
        place = self._origin + shift
        if np.abs(shift).max() > REFERENCE_SHIFT_PX or self._age >= REFERENCE_PICTURES:
            self._renew(small)
        return Motion(float(place[0]), float(place[1]), correlation)

    def _begin(self, small: np.ndarray) -> Motion:
        self._velocity = np.zeros(2)
        self._previous = small
        self._renew(small)
        return Motion(float(self._origin[0]), float(self._origin[1]), 0.0, broken=True)

    def _renew(self, small: np.ndarray) -> None:
        self._origin = self._origin + self._shift
        self._shift = np.zeros(2)
        self._age = 0
        self._reference = _Reference(small)


class _Reference:
    """One picture, ready to have others aligned with it."""

    def __init__(self, image: np.ndarray) -> None:
        self._image = image
        self._gradient_x = cv2.Sobel(image, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8)
        self._gradient_y = cv2.Sobel(image, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8)
        self._coarse = _coarse(image)
        self._coarse_window = cv2.createHanningWindow((self._coarse.shape[1], self._coarse.shape[0]), cv2.CV_32F)

    def align(self, image: np.ndarray, guess: np.ndarray) -> tuple[np.ndarray, float]:
        """The shift (x, y) of the scene from the reference to a picture, pixels, and the correlation after it."""
        shift, correlation = self._refine(image, guess)
        if correlation > 0.8:
            return shift, correlation
        coarse, _ = cv2.phaseCorrelate(self._coarse, _coarse(image), self._coarse_window)
        other, other_correlation = self._refine(image, np.array(coarse) * COARSE)
        return (other, other_correlation) if other_correlation > correlation + 0.02 else (shift, correlation)

    def _refine(self, image: np.ndarray, guess: np.ndarray) -> tuple[np.ndarray, float]:
        shift = np.array(guess, np.float64)
        common: _Common | None = None
        for iteration in range(ITERATIONS):
            if common is None or np.abs(shift - common.shift).max() > MARGIN_PX / 2:
                common = self._common(image.shape, shift)
                if common is None:
                    return np.zeros(2), 0.0
            moved = _moved(image, common, shift)
            residual = np.asarray(cv2.subtract(moved, common.fixed))
            residual -= residual.mean()
            if iteration < SETTLING or not common.weighted:
                common.weigh(residual)
            step = common.step(residual)
            if step is None:  # a blank picture, or stripes of one direction
                return np.zeros(2), 0.0
            shift = shift + np.clip(step, -3, 3)
            if np.abs(step).max() < CONVERGED_PX:
                break
        assert common is not None
        return shift, _correlation(common.fixed, moved, common.weight)

    def _common(self, shape: tuple[int, ...], shift: np.ndarray) -> _Common | None:
        inside = _overlap(shape, shift)
        if inside is None:
            return None
        parts = (np.ascontiguousarray(part[inside]) for part in (self._image, self._gradient_x, self._gradient_y))
        return _Common(shift, np.array([inside[1].start, inside[0].start]), *parts)


class _Common:
    """What reference and shifted picture have both, and the normal equations of the shift.

    Contiguous copies: on the slices themselves everything takes twice as long.
    """

    def __init__(
        self, shift: np.ndarray, corner: np.ndarray, fixed: np.ndarray, by_x: np.ndarray, by_y: np.ndarray
    ) -> None:
        self.shift = shift  # that the part was cut out for
        self.corner = corner  # column and row of its first pixel in the reference
        self.fixed = fixed
        self.weighted = False
        self.weight = fixed
        self._by_x, self._by_y = by_x, by_y

    def weigh(self, residual: np.ndarray) -> None:
        """Gives what moves by itself little weight."""
        sigma = 1.4826 * float(np.median(np.abs(residual[::4, ::3]))) + 1e-6
        scaled = cv2.multiply(residual, residual, scale=1 / (OUTLIER_SIGMAS * sigma) ** 2)
        self.weight = np.asarray(1 / (1 + scaled))
        self._weighted_x, self._weighted_y = self.weight * self._by_x, self.weight * self._by_y
        self._xx = float(np.vdot(self._weighted_x, self._by_x))
        self._xy = float(np.vdot(self._weighted_x, self._by_y))
        self._yy = float(np.vdot(self._weighted_y, self._by_y))
        self.weighted = True

    def step(self, residual: np.ndarray) -> np.ndarray | None:
        """The next step of the shift; None where the picture does not tell."""
        determinant = self._xx * self._yy - self._xy**2
        if determinant <= 1e-6 * (self._xx + self._yy) ** 2:
            return None
        x, y = -float(np.vdot(self._weighted_x, residual)), -float(np.vdot(self._weighted_y, residual))
        return np.array([self._yy * x - self._xy * y, self._xx * y - self._xy * x]) / determinant


def _moved(image: np.ndarray, common: _Common, shift: np.ndarray) -> np.ndarray:
    """The picture's value at reference pixel + shift, over the common part."""
    x, y = common.corner + shift
    size = (common.fixed.shape[1], common.fixed.shape[0])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, np.array([[1, 0, x], [0, 1, y]]), size, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _overlap(shape: tuple[int, ...], shift: np.ndarray) -> tuple[slice, slice] | None:
    """Where reference and shifted picture have both pixels; None where that is less than half of a side."""
    ranges = []
    for size, moved in ((shape[0], shift[1]), (shape[1], shift[0])):
        first = MARGIN_PX + max(0, int(np.ceil(-moved)))
        last = size - MARGIN_PX - max(0, int(np.ceil(moved)))
        if last - first < size // 2:
            return None
        ranges.append(slice(first, last))
    return ranges[0], ranges[1]


def _correlation(one: np.ndarray, other: np.ndarray, weight: np.ndarray) -> float:
    total = float(weight.sum())
    one = one - np.float32(np.vdot(weight, one) / total)
    other = other - np.float32(np.vdot(weight, other) / total)
    weighted = weight * one
    power = float(np.vdot(weighted, one)) * float(np.vdot(weight * other, other))
    return max(0.0, float(np.vdot(weighted, other)) / power**0.5) if power > 0 else 0.0


def _coarse(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, (image.shape[1] // COARSE, image.shape[0] // COARSE), interpolation=cv2.INTER_AREA)


def _prepared(image: np.ndarray, width_px: int) -> np.ndarray:
    """Small, grey, float32; only middle detail, and bright and faint detail made alike."""
    height, width = image.shape[:2]
    small_width = min(width_px, width)
    size = (small_width, max(32, round(height * small_width / width)))
    rows = max(1, height // (2 * size[1]))  # two rows averaged to one do as well as four, in half of the time
    small = cv2.resize(image[::rows], size, interpolation=cv2.INTER_AREA)
    if small.ndim == 3:
        small = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    grey = small.astype(np.float32)
    fine = cv2.GaussianBlur(grey, (0, 0), DETAIL_PX[0])
    side = 2 * round(DETAIL_PX[1]) + 1
    broad = cv2.blur(cv2.blur(grey, (side, side)), (side, side))  # as good as a Gaussian of that sigma, in a tenth
    detail = cv2.subtract(fine, broad)
    # A lamp or a hot exhaust outshines the whole street by a hundred times, and is what moves most.
    strength = np.abs(detail)
    return detail / (strength + 2 * strength.mean() + np.float32(1e-3))
