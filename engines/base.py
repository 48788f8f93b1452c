"""The contract between the pipeline and a runtime: same arrays in and out, whatever runs the network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np

VISIBLE_DEGRADATIONS = ("none", "low_light", "over_exposure", "blur", "noise", "rain", "haze", "compression")
INFRARED_DEGRADATIONS = ("none", "low_contrast", "noise", "stripes", "blur", "dead_pixels", "banding")
NOISE_SEED = 20260  # of the noise that the diffusion starts from: kept with the weights, told in every message


class EngineError(Exception):
    """A runtime that cannot serve here: says what, why and what to do."""


class PictureError(EngineError, ValueError):
    """Pictures that no runtime takes."""


@dataclass(frozen=True)
class Priors:
    """What the network knows about a scene as a whole; slowly varying, so estimated now and then."""

    degradation_infrared: np.ndarray  # float32 (16, degradation width)
    degradation_visible: np.ndarray  # float32 (16, degradation width)
    semantic: np.ndarray  # float32 (16, semantic width), restored by the diffusion
    infrared_probabilities: np.ndarray  # float32 (len(INFRARED_DEGRADATIONS),), sums to 1
    visible_probabilities: np.ndarray  # float32 (len(VISIBLE_DEGRADATIONS),), sums to 1
    # How strong the likeliest degradation is, float32 (): 0 (just visible, or none) to 1 (the strongest in training)
    infrared_strength: np.floating | np.ndarray
    visible_strength: np.floating | np.ndarray

    def blend(self, newer: Priors, share: float) -> Priors:
        """Moves from these priors towards `newer`: share 0 keeps these, 1 takes the newer ones."""
        return Priors(
            **{
                name: ((1 - share) * getattr(self, name) + share * getattr(newer, name)).astype(np.float32)
                for name in self.__dataclass_fields__
            }
        )


@dataclass(frozen=True)
class EngineDescription:
    """Which engine serves, for the report and the message header."""

    runtime: Literal["pytorch", "openvino", "compile", "tensorrt"]
    precision: Literal["fp32", "bf16", "fp16", "int8"]
    variant: str
    why: str  # why this runtime was chosen
    weights_sha256: str
    threads: int = 0  # of one frame; 0: the runtime decides
    at_once: int = 1  # frames that may be fused at the same time, each by a call of its own
    fallbacks: tuple[str, ...] = field(default=())  # what was tried before, and why it does not serve


def fallbacks_of(engine: FusionEngine) -> list[str]:
    """What an engine did without so far, one line each: runtimes that do not serve, faults of its cache."""
    cache = getattr(engine, "cache", None)
    faults = [] if cache is None else [f"engine cache: {fault}" for fault in cache.faults]
    return [*engine.description.fallbacks, *faults]


class FusionEngine(Protocol):
    """Runs the fusion network. `estimate_priors` and `fuse` may be called from several threads at once.

    No more than `description.at_once` calls of `fuse` shall run at the same time.
    """

    description: EngineDescription

    def estimate_priors(self, infrared: np.ndarray, visible: np.ndarray) -> Priors:
        """Estimates the priors from a pair of any size (a small copy is made inside).

        Args:
            infrared: uint8 (H, W).
            visible: uint8 RGB (H, W, 3), of the same size.
        """
        ...

    def fuse(self, infrared: np.ndarray, visible: np.ndarray, priors: Priors) -> np.ndarray:
        """Fuses one registered pair.

        Args:
            infrared: uint8 (H, W).
            visible: uint8 RGB (H, W, 3), of the same size.
            priors: from `estimate_priors`, of this or an earlier pair.

        Returns:
            The fused picture, uint8 RGB (H, W, 3).
        """
        ...

    def prove(self, infrared: np.ndarray, visible: np.ndarray, priors: Priors, fused: np.ndarray) -> float | None:
        """Compares what `fuse` made of a real pair with PyTorch's picture: once for every build and picture size.

        Returns:
            The peak signal to noise ratio in dB, of now or of when this build was proven; None of PyTorch in fp32.

        Raises:
            EngineError: it lies outside the tolerance of the precision.
        """
        ...

    def close(self) -> None:
        """Frees what the runtime holds. The engine serves no more afterwards."""
        ...


class PixelMap(Protocol):
    """Where each visible pixel lies in the infrared picture, as for cv2.remap. Never changed once made."""

    @property
    def map_x(self) -> np.ndarray: ...  # float32 (H, W) of the visible picture's size

    @property
    def map_y(self) -> np.ndarray: ...


@runtime_checkable
class RegisteringEngine(FusionEngine, Protocol):
    """An engine that can also register: the infrared picture goes to its device as it is, and is warped there."""

    def fuse_unregistered(
        self, infrared: np.ndarray, visible: np.ndarray, priors: Priors, pixel_map: PixelMap
    ) -> np.ndarray:
        """Fuses one pair whose infrared picture still has to be warped.

        Args:
            infrared: uint8 (h, w), of any size.
            visible: uint8 RGB (H, W, 3).
            priors: as for `fuse`.
            pixel_map: from visible to infrared pixels. The same object is uploaded once; a correction is a new one.

        Returns:
            The fused picture, uint8 RGB (H, W, 3).
        """
        ...
