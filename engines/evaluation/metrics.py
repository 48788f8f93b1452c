"""How good is a fused picture: the nine scores that the field reports, on luminance.

Every score takes grey pictures of 0..255 as (H, W) arrays, of any number type; nothing is scaled. The values agree with
the evaluator that papers of the field pass on, quirks included, because a score is only worth something beside other
people's. What they cannot tell: copying a clean source scores well, and SF, AG, SD and EN reward noise. Look at
degraded inputs, too.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Grey = NDArray[np.float64]

METRICS = ("EN", "SD", "SF", "AG", "MI", "SCD", "VIF", "Qabf", "SSIM")


def luminance(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The rounded BT.601 luminance 0..255 of an RGB picture (H, W, 3); a grey picture (H, W) comes back as it is."""
    return image if image.ndim == 2 else np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), dtype=np.uint8)


def entropy(fused: ArrayLike) -> float:
    """EN: how many bits a pixel's grey level carries, 0 (flat) to 8 (all 256 levels alike).

    Reference: Roberts, van Aardt and Ahmed, "Assessment of image fusion procedures using entropy", 2008.
    """
    counts = np.bincount(_levels(fused), minlength=256)
    return _entropy_of(counts) / float(np.log(2))


def standard_deviation(fused: ArrayLike) -> float:
    """SD: the spread of the grey levels, in grey levels.

    Reference: Rao, "In-fibre Bragg grating sensors", 1997, as the field cites it.
    """
    return float(_grey(fused).std())


def spatial_frequency(fused: ArrayLike) -> float:
    """SF: the root of the mean squared steps to the right and downwards, in grey levels.

    Reference: Eskicioglu and Fisher, "Image quality measures and their performance", 1995.
    """
    image = _grey(fused)
    return float(np.sqrt(np.mean(np.diff(image, axis=1) ** 2) + np.mean(np.diff(image, axis=0) ** 2)))


def average_gradient(fused: ArrayLike) -> float:
    """AG: the mean slope (central differences, one-sided at the border), in grey levels a pixel.

    Reference: Cui, Feng, Xu, Li and Chen, "Detail preserved fusion of visible and infrared images using regional
    saliency extraction and multi-scale image decomposition", 2015.
    """
    down, right = np.gradient(_grey(fused))
    return float(np.mean(np.sqrt((down**2 + right**2) / 2)))


def mutual_information(fused: ArrayLike, infrared: ArrayLike, visible: ArrayLike) -> float:
    """MI: how much of each source can be told from the fused picture, summed, in nats.

    Reference: Qu, Zhang and Yan, "Information measure for performance of image fusion", 2002.
    """
    return _shared_nats(fused, infrared) + _shared_nats(fused, visible)


def sum_of_correlations_of_differences(fused: ArrayLike, infrared: ArrayLike, visible: ArrayLike) -> float:
    """SCD: does what is left after one source is taken away look like the other one? -2 to 2.

    Reference: Aslantas and Bendes, "A new image quality metric for image fusion: the sum of the correlations of
    differences", 2015.
    """
    result, warm, bright = _grey(fused), _grey(infrared), _grey(visible)
    return _correlation(warm, result - bright) + _correlation(bright, result - warm)


def visual_information_fidelity(fused: ArrayLike, infrared: ArrayLike, visible: ArrayLike) -> float:
    """VIF: the share of each source's visual information that the fused picture keeps, summed; 2 if both equal it.

    The pixel-domain form, 4 scales, visual noise variance 2. Above 1 a source where contrast was gained.

    Reference: Sheikh and Bovik, "Image information and visual quality", 2006.
    """
    return _fidelity(_grey(infrared), _grey(fused)) + _fidelity(_grey(visible), _grey(fused))


def edge_preservation(fused: ArrayLike, infrared: ArrayLike, visible: ArrayLike) -> float:
    """Qabf: how much of the sources' edges, weighted by their strength, the fused picture shows; 0 to 1.

    Reference: Xydeas and Petrovic, "Objective image fusion performance measure", 2000 (Sobel, L = 1).
    """
    fused_edges = _edges(_grey(fused))
    kept = total = 0.0
    for source in (infrared, visible):
        strength, angle = _edges(_grey(source))
        kept += float(np.sum(_edge_similarity((strength, angle), fused_edges) * strength))
        total += float(np.sum(strength))
    return kept / total if total > 0 else 0.0


def structural_similarity(fused: ArrayLike, infrared: ArrayLike, visible: ArrayLike) -> float:
    """SSIM: the structural similarity to each source, summed; 2 when both are equal to the fused picture.

    7x7 uniform window, sample covariance, range 255, border of 3 pixels left out.

    Reference: Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural
    similarity", 2004.
    """
    result = _grey(fused)
    return _similarity(result, _grey(infrared)) + _similarity(result, _grey(visible))


_OF_FUSED: dict[str, Callable[[ArrayLike], float]] = {
    "EN": entropy,
    "SD": standard_deviation,
    "SF": spatial_frequency,
    "AG": average_gradient,
}
_OF_PAIR: dict[str, Callable[[ArrayLike, ArrayLike, ArrayLike], float]] = {
    "MI": mutual_information,
    "SCD": sum_of_correlations_of_differences,
    "VIF": visual_information_fidelity,
    "Qabf": edge_preservation,
    "SSIM": structural_similarity,
}


def evaluate_pair(
    fused: NDArray[np.uint8], infrared: NDArray[np.uint8], visible: NDArray[np.uint8]
) -> dict[str, float]:
    """All nine scores of one fused picture, by the names in `METRICS`.

    Args:
        fused, infrared, visible: uint8, grey (H, W) or RGB (H, W, 3), of one size and at least 41x41 pixels
            (VIF's coarsest scale needs them). Give the CLEAN sources, also where degraded ones were fused.

    Raises:
        ValueError: if the sizes differ or are too small.
    """
    result, warm, bright = luminance(fused), luminance(infrared), luminance(visible)
    if not result.shape == warm.shape == bright.shape:
        raise ValueError(f"the pictures differ in size: {result.shape = }, {warm.shape = }, {bright.shape = }")
    if min(result.shape) < 41:
        raise ValueError(f"too small to judge: {result.shape = }, both sides need at least 41 pixels")
    scores = {name: metric(result) for name, metric in _OF_FUSED.items()}
    scores.update({name: metric(result, warm, bright) for name, metric in _OF_PAIR.items()})
    return scores


def _grey(image: ArrayLike) -> Grey:
    return np.asarray(image, dtype=np.float64)


def _levels(image: ArrayLike) -> NDArray[np.intp]:
    return np.clip(np.rint(_grey(image)), 0, 255).astype(np.intp).ravel()


def _entropy_of(counts: NDArray[np.intp]) -> float:
    """Nats."""
    shares = counts[counts > 0] / counts.sum()
    return float(np.sum(shares * np.log(1 / shares)))


def _shared_nats(one: ArrayLike, other: ArrayLike) -> float:
    joint = np.bincount(_levels(one) * 256 + _levels(other), minlength=256 * 256).reshape(256, 256)
    return _entropy_of(joint.sum(0)) + _entropy_of(joint.sum(1)) - _entropy_of(joint.ravel())


def _correlation(one: Grey, other: Grey) -> float:
    """Pearson's, 0 where one of the two is flat."""
    one, other = one - one.mean(), other - other.mean()
    spread = float(np.sqrt(np.sum(one**2) * np.sum(other**2)))
    return float(np.sum(one * other)) / spread if spread > 0 else 0.0


def _fidelity(source: Grey, fused: Grey) -> float:
    """VIFp of `fused` with `source` as the reference."""
    noise_variance, tiny = 2.0, 1e-10
    kept = total = 0.0
    for scale in range(4):
        side = 2 ** (4 - scale) + 1  # 17, 9, 5, 3
        if scale > 0:
            source, fused = (_smooth(image, side)[::2, ::2] for image in (source, fused))
        mean_source, mean_fused = _smooth(source, side), _smooth(fused, side)
        variance_source = np.maximum(_smooth(source**2, side) - mean_source**2, 0)
        variance_fused = np.maximum(_smooth(fused**2, side) - mean_fused**2, 0)
        covariance = _smooth(source * fused, side) - mean_source * mean_fused

        gain = covariance / (variance_source + tiny)
        rest = variance_fused - gain * covariance
        flat_source, flat_fused = variance_source < tiny, variance_fused < tiny
        gain[flat_source | flat_fused] = 0
        rest[flat_source] = variance_fused[flat_source]
        rest[flat_fused] = 0
        variance_source[flat_source] = 0
        inverted = gain < 0  # an inverted edge counts as noise
        rest[inverted] = variance_fused[inverted]
        gain[inverted] = 0
        rest = np.maximum(rest, tiny)

        kept += float(np.sum(np.log10(1 + gain**2 * variance_source / (rest + noise_variance))))
        total += float(np.sum(np.log10(1 + variance_source / noise_variance)))
    return kept / total if total > 0 else 1.0


def _smooth(image: Grey, side: int) -> Grey:
    """Gaussian of sigma side / 5, only where the whole window lies inside the picture."""
    kernel = cv2.getGaussianKernel(side, side / 5, cv2.CV_64F)
    half = side // 2
    return np.asarray(cv2.sepFilter2D(image, cv2.CV_64F, kernel, kernel)[half:-half, half:-half], dtype=np.float64)


def _edges(image: Grey) -> tuple[Grey, Grey]:
    """Sobel strength, and angle in (-pi/2, pi/2]; the world outside of the picture counts as black."""
    padded = cv2.copyMakeBorder(image, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    right = cv2.Sobel(padded, cv2.CV_64F, 1, 0, ksize=3)[1:-1, 1:-1]
    down = cv2.Sobel(padded, cv2.CV_64F, 0, 1, ksize=3)[1:-1, 1:-1]
    angle = np.full(image.shape, np.pi / 2)  # where nothing changes to the right; the sign of the others is convention
    np.arctan(np.divide(-down, right, out=angle.copy(), where=right != 0), out=angle, where=right != 0)
    return np.asarray(np.hypot(right, down), dtype=np.float64), angle


def _edge_similarity(source: tuple[Grey, Grey], fused: tuple[Grey, Grey]) -> Grey:
    (strength, angle), (fused_strength, fused_angle) = source, fused
    weaker, stronger = np.minimum(strength, fused_strength), np.maximum(strength, fused_strength)
    # In the code that every paper uses equal strengths give the strength, not 1; the sigmoid saturates either way.
    ratio = np.divide(weaker, stronger, out=strength.copy(), where=strength != fused_strength)
    agreement = 1 - np.abs(angle - fused_angle) / (np.pi / 2)
    of_strength = 0.9994 / (1 + np.exp(-15 * (ratio - 0.5)))
    of_angle = 0.9879 / (1 + np.exp(-22 * (agreement - 0.8)))
    return np.asarray(of_strength * of_angle, dtype=np.float64)


def _similarity(one: Grey, other: Grey) -> float:
    side, steady_mean, steady_variance = 7, (0.01 * 255) ** 2, (0.03 * 255) ** 2
    unbiased = side**2 / (side**2 - 1)

    def window(image: Grey) -> Grey:
        half = side // 2
        return np.asarray(cv2.blur(image, (side, side))[half:-half, half:-half], dtype=np.float64)

    mean_one, mean_other = window(one), window(other)
    variance_one = unbiased * (window(one * one) - mean_one**2)
    variance_other = unbiased * (window(other * other) - mean_other**2)
    covariance = unbiased * (window(one * other) - mean_one * mean_other)
    numerator = (2 * mean_one * mean_other + steady_mean) * (2 * covariance + steady_variance)
    denominator = (mean_one**2 + mean_other**2 + steady_mean) * (variance_one + variance_other + steady_variance)
    return float(np.mean(numerator / denominator))
