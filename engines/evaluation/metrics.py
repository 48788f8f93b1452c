"""How good is a fused picture: the nine scores that the field reports, on luminance.

Every score takes grey pictures of 0..255 as (H, W) arrays, of any number type; nothing is scaled. The values agree with
the evaluator that papers of the field pass on, quirks included, because a score is only worth something beside other
people's. What they cannot tell: copying a clean source scores well, and SF, AG, SD and EN reward noise. Look at
degraded inputs, too.
"""

from __future__ import annotations

from functools import cached_property

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Grey = NDArray[np.float64]

METRICS = ("EN", "SD", "SF", "AG", "MI", "SCD", "VIF", "Qabf", "SSIM")
LEAST_PX = 41  # VIF's coarsest scale needs as many

VIF_SCALES = 4
NOISE_VARIANCE, TINY = 2.0, 1e-10  # of VIF
WINDOW, STEADY_MEAN, STEADY_VARIANCE = 7, (0.01 * 255) ** 2, (0.03 * 255) ** 2  # of SSIM
UNBIASED = WINDOW**2 / (WINDOW**2 - 1)
# Blue and red colour difference of full-range BT.601, from RGB.
COLOUR_DIFFERENCES = np.array([[-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def luminance(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The rounded BT.601 luminance 0..255 of an RGB picture (H, W, 3); a grey picture (H, W) comes back as it is."""
    return image if image.ndim == 2 else np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), dtype=np.uint8)


def entropy(fused: ArrayLike) -> float:
    """EN: how many bits a pixel's grey level carries, 0 (flat) to 8 (all 256 levels alike).

    Reference: Roberts, van Aardt and Ahmed, "Assessment of image fusion procedures using entropy", 2008.
    """
    return _entropy(_Terms(fused))


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
    result = _Terms(fused)
    return _shared_nats(result, _Terms(infrared)) + _shared_nats(result, _Terms(visible))


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
    result = _Terms(fused)
    return _fidelity(_Terms(infrared), result) + _fidelity(_Terms(visible), result)


def edge_preservation(fused: ArrayLike, infrared: ArrayLike, visible: ArrayLike) -> float:
    """Qabf: how much of the sources' edges, weighted by their strength, the fused picture shows; 0 to 1.

    Reference: Xydeas and Petrovic, "Objective image fusion performance measure", 2000 (Sobel, L = 1).
    """
    return _edge_preservation(_Terms(fused), _Terms(infrared), _Terms(visible))


def structural_similarity(fused: ArrayLike, infrared: ArrayLike, visible: ArrayLike) -> float:
    """SSIM: the structural similarity to each source, summed; 2 when both are equal to the fused picture.

    7x7 uniform window, sample covariance, range 255, border of 3 pixels left out.

    Reference: Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural
    similarity", 2004.
    """
    result = _Terms(fused)
    return _similarity(result, _Terms(infrared)) + _similarity(result, _Terms(visible))


def colour_error(fused: NDArray[np.uint8], visible: NDArray[np.uint8]) -> float:
    """CbCr: the root mean square distance of the colours to the clean visible picture's, in levels of 255.

    Brightness does not count. A grey picture has no colour: its error is how colourful the visible picture is.

    Args:
        fused, visible: uint8, RGB (H, W, 3) or grey (H, W).
    """
    found, wanted = (
        cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if image.ndim == 2 else image for image in (fused, visible)
    )
    difference = cv2.transform(cv2.subtract(found, wanted, dtype=cv2.CV_64F), COLOUR_DIFFERENCES)
    return float(np.sqrt(np.mean(np.square(difference)) * 2))


def intensity_error(fused: NDArray[np.uint8], infrared: NDArray[np.uint8], visible: NDArray[np.uint8]) -> float:
    """How far the luminance is from that of the brighter source, pixel by pixel, on average, in levels of 255.

    It tells what VIF, a sum over both sources, does not: a fused picture that leaves the infrared out may have the
    higher VIF for its likeness to the visible picture alone.

    Args:
        fused, infrared, visible: uint8, grey (H, W) or RGB (H, W, 3); the sources clean.
    """
    brighter = np.maximum(luminance(infrared), luminance(visible))
    return float(np.mean(cv2.absdiff(luminance(fused), brighter)))


class Sources:
    """The two CLEAN sources of a pair, ready to score many fused pictures: what depends on them alone is kept.

    Args:
        infrared, visible: uint8, grey (H, W) or RGB (H, W, 3), of one size and at least 41x41 pixels.

    Raises:
        ValueError: if the sizes differ or are too small.
    """

    def __init__(self, infrared: NDArray[np.uint8], visible: NDArray[np.uint8]) -> None:
        self._visible = visible
        self._warm, self._bright = _Terms(luminance(infrared)), _Terms(luminance(visible))
        if self._warm.shape != self._bright.shape:
            raise ValueError(f"the pictures differ in size: infrared {self._warm.shape}, visible {self._bright.shape}")
        if min(self._warm.shape) < LEAST_PX:
            raise ValueError(f"too small to judge: {self._warm.shape}, both sides need at least {LEAST_PX} pixels")

    def score(self, fused: NDArray[np.uint8]) -> dict[str, float]:
        """All nine scores of one fused picture, by the names in `METRICS`.

        Args:
            fused: uint8, grey (H, W) or RGB (H, W, 3).

        Raises:
            ValueError: if its size is not that of the sources.
        """
        result = _Terms(luminance(fused))
        if result.shape != self._warm.shape:
            raise ValueError(f"the pictures differ in size: fused {result.shape}, sources {self._warm.shape}")
        sources = (self._warm, self._bright)
        return {
            "EN": _entropy(result),
            "SD": standard_deviation(result.grey),
            "SF": spatial_frequency(result.grey),
            "AG": average_gradient(result.grey),
            "MI": sum(_shared_nats(result, source) for source in sources),
            "SCD": sum_of_correlations_of_differences(result.grey, self._warm.grey, self._bright.grey),
            "VIF": sum(_fidelity(source, result) for source in sources),
            "Qabf": _edge_preservation(result, *sources),
            "SSIM": sum(_similarity(result, source) for source in sources),
        }

    def colour_error(self, fused: NDArray[np.uint8]) -> float:
        """See `colour_error`."""
        return colour_error(fused, self._visible)

    def likeness(self, picture: NDArray[np.uint8], source: str) -> dict[str, float]:
        """How near a picture comes to ONE source, "infrared" or "visible": VIF and SSIM (1 when equal), PSNR in dB."""
        found, wanted = _Terms(luminance(picture)), self._warm if source == "infrared" else self._bright
        error = float(np.mean((found.grey - wanted.grey) ** 2))
        return {
            "VIF": _fidelity(wanted, found),
            "SSIM": _similarity(found, wanted),
            "PSNR": 10 * float(np.log10(255**2 / max(error, 1e-4))),  # equal pictures: 88 dB, and JSON has no infinity
        }


class _Terms:
    """A grey picture and what several scores need of it, computed when first asked for."""

    def __init__(self, image: ArrayLike) -> None:
        self._image = np.asarray(image)
        self.shape = self._image.shape

    @cached_property
    def grey(self) -> Grey:
        return _grey(self._image)

    @cached_property
    def levels(self) -> NDArray[np.intp]:
        if self._image.dtype == np.uint8:
            return self._image.astype(np.intp).ravel()
        return np.clip(np.rint(self.grey), 0, 255).astype(np.intp).ravel()

    @cached_property
    def edges(self) -> tuple[Grey, Grey]:
        """Sobel strength, and angle in (-pi/2, pi/2]; the world outside of the picture counts as black."""
        padded = cv2.copyMakeBorder(self.grey, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        right = cv2.Sobel(padded, cv2.CV_64F, 1, 0, ksize=3)[1:-1, 1:-1]
        down = cv2.Sobel(padded, cv2.CV_64F, 0, 1, ksize=3)[1:-1, 1:-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            angle = np.arctan(-down / right)
        angle[right == 0] = np.pi / 2  # where nothing changes to the right; the sign of the others is convention
        return np.hypot(right, down), angle

    @cached_property
    def windows(self) -> tuple[Grey, Grey]:
        """Mean and sample variance of every window of SSIM."""
        mean = _window(self.grey)
        return mean, UNBIASED * (_window(self.grey * self.grey) - mean**2)

    @cached_property
    def scales(self) -> list[tuple[Grey, Grey, Grey]]:
        """For each scale of VIF the picture, and mean and variance of every window."""
        image, scales = self.grey, []
        for scale in range(VIF_SCALES):
            if scale > 0:
                image = np.ascontiguousarray(_smooth(image, _side(scale))[::2, ::2])
            mean = _smooth(image, _side(scale))
            scales.append((image, mean, np.maximum(_smooth(image**2, _side(scale)) - mean**2, 0)))
        return scales


def _grey(image: ArrayLike) -> Grey:
    return np.asarray(image, dtype=np.float64)


def _entropy(image: _Terms) -> float:
    return _entropy_of(np.bincount(image.levels, minlength=256)) / float(np.log(2))


def _entropy_of(counts: NDArray[np.intp]) -> float:
    """Nats."""
    shares = counts[counts > 0] / counts.sum()
    return float(np.sum(shares * np.log(1 / shares)))


def _shared_nats(one: _Terms, other: _Terms) -> float:
    joint = np.bincount(one.levels * 256 + other.levels, minlength=256 * 256).reshape(256, 256)
    return _entropy_of(joint.sum(0)) + _entropy_of(joint.sum(1)) - _entropy_of(joint.ravel())


def _correlation(one: Grey, other: Grey) -> float:
    """Pearson's, 0 where one of the two is flat."""
    one, other = one - one.mean(), other - other.mean()
    spread = float(np.sqrt(np.sum(one**2) * np.sum(other**2)))
    return float(np.sum(one * other)) / spread if spread > 0 else 0.0


def _fidelity(source: _Terms, fused: _Terms) -> float:
    """VIFp of `fused` with `source` as the reference."""
    kept = total = 0.0
    for scale, ((image, mean_source, variance_source), (result, mean_fused, variance_fused)) in enumerate(
        zip(source.scales, fused.scales, strict=True)
    ):
        covariance = _smooth(image * result, _side(scale)) - mean_source * mean_fused
        gain = covariance / (variance_source + TINY)
        rest = variance_fused - gain * covariance
        flat_source, flat_fused = variance_source < TINY, variance_fused < TINY
        gain[flat_source | flat_fused] = 0
        rest[flat_source] = variance_fused[flat_source]
        rest[flat_fused] = 0
        signal = np.where(flat_source, 0, variance_source)
        inverted = gain < 0  # an inverted edge counts as noise
        rest[inverted] = variance_fused[inverted]
        gain[inverted] = 0
        rest = np.maximum(rest, TINY)

        kept += float(np.sum(np.log10(1 + gain**2 * signal / (rest + NOISE_VARIANCE))))
        total += float(np.sum(np.log10(1 + signal / NOISE_VARIANCE)))
    return kept / total if total > 0 else 1.0


def _side(scale: int) -> int:
    """The width of VIF's window: 17, 9, 5, 3."""
    return int(2 ** (VIF_SCALES - scale) + 1)


def _smooth(image: Grey, side: int) -> Grey:
    """Gaussian of sigma side / 5, only where the whole window lies inside the picture."""
    kernel = cv2.getGaussianKernel(side, side / 5, cv2.CV_64F)
    half = side // 2
    return np.asarray(cv2.sepFilter2D(image, cv2.CV_64F, kernel, kernel)[half:-half, half:-half], dtype=np.float64)


def _edge_preservation(fused: _Terms, *sources: _Terms) -> float:
    kept = total = 0.0
    for source in sources:
        strength = source.edges[0]
        kept += float(np.sum(_edge_similarity(source.edges, fused.edges) * strength))
        total += float(np.sum(strength))
    return kept / total if total > 0 else 0.0


def _edge_similarity(source: tuple[Grey, Grey], fused: tuple[Grey, Grey]) -> Grey:
    (strength, angle), (fused_strength, fused_angle) = source, fused
    weaker, stronger = np.minimum(strength, fused_strength), np.maximum(strength, fused_strength)
    # In the code that every paper uses equal strengths give the strength, not 1; the sigmoid saturates either way.
    ratio = np.divide(weaker, stronger, out=strength.copy(), where=strength != fused_strength)
    agreement = 1 - np.abs(angle - fused_angle) / (np.pi / 2)
    of_strength = 0.9994 / (1 + np.exp(-15 * (ratio - 0.5)))
    of_angle = 0.9879 / (1 + np.exp(-22 * (agreement - 0.8)))
    return np.asarray(of_strength * of_angle, dtype=np.float64)


def _window(image: Grey) -> Grey:
    half = WINDOW // 2
    return np.asarray(cv2.blur(image, (WINDOW, WINDOW))[half:-half, half:-half], dtype=np.float64)


def _similarity(one: _Terms, other: _Terms) -> float:
    (mean_one, variance_one), (mean_other, variance_other) = one.windows, other.windows
    means = mean_one * mean_other
    covariance = UNBIASED * (_window(one.grey * other.grey) - means)
    numerator = (2 * means + STEADY_MEAN) * (2 * covariance + STEADY_VARIANCE)
    denominator = (mean_one**2 + mean_other**2 + STEADY_MEAN) * (variance_one + variance_other + STEADY_VARIANCE)
    return float(np.mean(numerator / denominator))
