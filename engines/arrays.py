"""What every runtime does alike: checks its inputs, makes `Priors` of its outputs, is compared with the reference."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.base import EngineDescription, EngineError, FusionEngine, PictureError, Priors
from engines.cache import EngineCache
from engines.dspfusion import variants

Image = NDArray[np.uint8]

MINIMUM_PX = 32  # below, the border is wider than the picture that is mirrored into it
# Height and width; no multiple of a network's stride, so that padding is compared, too.
REFERENCE_SIZE = (136, 168)
PSNR_LIMIT_DB = {"fp32": 50.0, "bf16": 40.0, "fp16": 40.0, "int8": 35.0}
PSNR_MOST_DB = 99.0  # equal pictures have an infinite one, which no report can hold
PROOF = "psnr_db"  # the cached file of a proof
TOKEN_LIMIT = 0.05  # root mean square; tokens have about unit variance


def checked_pair(infrared: Image, visible: Image) -> tuple[Image, Image]:
    """The pair, contiguous in memory.

    Raises:
        PictureError: if it is no registered pair of uint8 pictures of at least 32 x 32 pixels.
    """
    if infrared.dtype != np.uint8 or visible.dtype != np.uint8:
        raise PictureError(f"pictures must be uint8, got {infrared.dtype = } and {visible.dtype = }")
    if infrared.ndim != 2 or visible.shape != (*infrared.shape, 3):
        raise PictureError(f"need (H, W) and (H, W, 3), got {infrared.shape = } and {visible.shape = }")
    if min(infrared.shape) < MINIMUM_PX:
        raise PictureError(f"{infrared.shape = } is too small: give pictures of at least {MINIMUM_PX} pixels a side")
    return np.ascontiguousarray(infrared), np.ascontiguousarray(visible)


def checked_priors(priors: Priors, widths: tuple[int, int]) -> tuple[NDArray[np.float32], ...]:
    """The three token sets that the network reads; `widths` are those of degradation and semantic tokens.

    Raises:
        EngineError: if they come from another variant.
    """
    tokens = (priors.degradation_infrared, priors.degradation_visible, priors.semantic)
    expected = [(16, widths[0]), (16, widths[0]), (16, widths[1])]
    found = [array.shape for array in tokens]
    if found != expected:
        raise EngineError(f"these priors have the shapes {found}, this engine reads {expected}: estimate them with it")
    return tuple(np.ascontiguousarray(array, dtype=np.float32) for array in tokens)


def picture_of(blocks: Image, size: tuple[int, ...]) -> Image:
    """The picture, uint8 (height, width, 3) in memory of its own, that `FoldedFrame` returned as blocks."""
    rows, columns, bytes_of_block = blocks.shape[1:]
    step = round((bytes_of_block / 3) ** 0.5)
    pixels = blocks.view(np.dtype((np.void, 3 * step))).reshape(rows, columns, step)  # a block's rows as one item each
    picture = np.ascontiguousarray(pixels.transpose(0, 2, 1)).view(np.uint8).reshape(rows * step, columns * step, 3)
    return picture if picture.shape[:2] == size else np.ascontiguousarray(picture[: size[0], : size[1]])


def priors_from(arrays: Sequence[NDArray[np.float32]]) -> Priors:
    """`Priors` of a network's seven outputs, in the order of its fields.

    Of the strengths, one for every kind, the likeliest kind's is taken: here, because TensorRT has no way to pick it.
    """
    values: dict[str, Any] = {
        name: np.array(array, dtype=np.float32) for name, array in zip(Priors.__dataclass_fields__, arrays, strict=True)
    }
    for camera in ("infrared", "visible"):
        values[f"{camera}_strength"] = values[f"{camera}_strength"][values[f"{camera}_probabilities"].argmax()]
    return Priors(**values)


@dataclass(frozen=True)
class Reference:
    """What PyTorch makes of the reference pair: the measure for every other runtime."""

    tokens: NDArray[np.float32]  # all three token sets, flat
    fused: Image  # (H, W, 3)

    @classmethod
    def of(cls, engine: FusionEngine) -> Reference:
        infrared, visible = reference_pair()
        priors = engine.estimate_priors(infrared, visible)
        tokens = np.concatenate(
            [priors.degradation_infrared.ravel(), priors.degradation_visible.ravel(), priors.semantic.ravel()]
        )
        return cls(tokens, engine.fuse(infrared, visible, priors))

    @classmethod
    def cached(cls, cache: EngineCache, key: str, make: Callable[[], Reference]) -> Reference:
        """The reference that the cache holds under `key`; made, and kept there, if it holds none that can be read."""
        with cache.building(key):
            if (entry := cache.find(key)) is not None:
                try:
                    with np.load(entry / "reference.npz", allow_pickle=False) as arrays:
                        return cls(arrays["tokens"], arrays["fused"])
                except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                    cache.report(f"entry {key[:8]} cannot be read and is made again ({last_line(error)})")
            made = make()
            cache.store(key, lambda folder: np.savez(folder / "reference.npz", tokens=made.tokens, fused=made.fused))
            return made


def reference_pair(size: tuple[int, int] = REFERENCE_SIZE) -> tuple[Image, Image]:
    """A fixed pair with everything that can go wrong in it: ramps, edges, texture, colour, black and white."""
    height, width = size
    random = np.random.default_rng(20250331)
    rows, columns = np.mgrid[:height, :width]
    ramp = 255.0 * columns / width
    checks = 60.0 * ((rows // 8 + columns // 8) % 2)
    grain = random.normal(0, 12, (height, width))
    warm = np.where((rows - height / 2) ** 2 + (columns - width / 3) ** 2 < (height / 5) ** 2, 230.0, 40.0)
    infrared = warm + 0.15 * ramp + grain
    colours = np.stack([ramp, 255.0 - ramp, 255.0 * rows / height], -1)
    visible = 0.6 * colours + (checks + random.normal(0, 12, (height, width)))[..., None]
    visible[: height // 8], visible[-height // 8 :] = 0, 255
    return _to_bytes(cv2.GaussianBlur(infrared, (0, 0), 0.6)), _to_bytes(visible)


def psnr_db(one: Image, other: Image) -> float:
    """The peak signal to noise ratio of two pictures; infinite when they are equal."""
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def agreement(engine: FusionEngine, reference: FusionEngine, infrared: Image, visible: Image) -> float:
    """The PSNR of an engine's picture against the reference's, in dB, both with the reference's priors."""
    priors = reference.estimate_priors(infrared, visible)
    return psnr_db(engine.fuse(infrared, visible, priors), reference.fuse(infrared, visible, priors))


def refuse_unless_close(engine: FusionEngine, reference: Reference) -> float:
    """Compares an engine with the reference, on the reference pair.

    Returns:
        The PSNR of its fused picture.

    Raises:
        EngineError: if its priors or its picture lie outside of the tolerance of its precision.
    """
    found, description = Reference.of(engine), engine.description
    error = float(np.sqrt(np.mean((found.tokens - reference.tokens) ** 2)))
    if not error <= TOKEN_LIMIT:  # so written, a NaN is refused as well
        raise EngineError(
            f"{_refusal(description)} (priors differ by {error:.3g}, allowed {TOKEN_LIMIT}): use runtime 'pytorch'"
        )
    return _within_tolerance(description, found.fused, reference.fused)


class Proofs:
    """The PSNR of an engine's real pictures against PyTorch's: each is found once, and then the cache holds it."""

    def __init__(self, cache: EngineCache | None) -> None:
        self._cache = cache
        self._found: dict[str, float] = {}  # also where nothing can be kept in the cache

    def find(self, engine: FusionEngine, key: str, fused: Image, ask_pytorch: Callable[[], Image]) -> float:
        """The proof of `key`: of now, or of when it was made.

        Raises:
            EngineError: if it lies outside of the tolerance of the engine's precision.
        """
        if key not in self._found:
            psnr = self._cached(key)
            if psnr is None:
                psnr = min(PSNR_MOST_DB, _within_tolerance(engine.description, fused, ask_pytorch()))
                self._keep(key, psnr)
            self._found[key] = psnr
        return self._found[key]

    def _cached(self, key: str) -> float | None:
        if self._cache is None or (entry := self._cache.find(key)) is None:
            return None
        try:
            return float((entry / PROOF).read_text())
        except (OSError, ValueError) as error:
            self._cache.report(f"entry {key[:8]} cannot be read and is made again ({last_line(error)})")
            return None

    def _keep(self, key: str, psnr: float) -> None:
        def write(folder: Path) -> None:
            (folder / PROOF).write_text(f"{psnr:.2f}")

        if self._cache is not None:
            self._cache.store(key, write)


def _within_tolerance(description: EngineDescription, found: Image, expected: Image) -> float:
    psnr, limit = psnr_db(found, expected), PSNR_LIMIT_DB[description.precision]
    if not psnr >= limit:
        raise EngineError(
            f"{_refusal(description)} ({psnr:.1f} dB, at least {limit:g} needed): use runtime 'pytorch' or fp32"
        )
    return psnr


def _refusal(description: EngineDescription) -> str:
    return f"{description.runtime} {description.precision} does not compute what PyTorch computes on this machine"


def shape_of(variant: str) -> variants.Variant:
    """The numbers of a variant.

    Raises:
        EngineError: if there is none of this name.
    """
    if variant not in variants.VARIANTS:
        raise EngineError(f"there is no variant '{variant}': choose one of {', '.join(variants.VARIANTS)}")
    return variants.VARIANTS[variant]


def weights_sha256(variant: str, weights: Path | None) -> str:
    """The SHA-256 of a variant's weights file.

    Raises:
        EngineError: if there is no such file.
    """
    path = variants.default_weights(variant) if weights is None else Path(weights)
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise EngineError(
            f"the weights {path.name} of variant '{variant}' cannot be read ({error.strerror}): "
            "give a safetensors file, or train it with `dspfusion train`"
        ) from error


def last_line(error: BaseException) -> str:
    """The last line of an error's text, where libraries put the reason; at most 160 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:160] if lines else type(error).__name__


def _to_bytes(image: NDArray[np.float64]) -> Image:
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8)
