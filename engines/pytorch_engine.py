"""PyTorch: the reference that the compiled runtimes are measured against, and what serves where none of them can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from engines.arrays import (
    Image,
    Proofs,
    Reference,
    checked_pair,
    checked_priors,
    last_line,
    priors_from,
    refuse_unless_close,
)
from engines.base import EngineDescription, EngineError, Priors
from engines.dspfusion.loading import load
from engines.dspfusion.network import DSPFusion

Output = TypeVar("Output")


class FrameGraph(nn.Module):
    """The path of every frame, from bytes to bytes, so that a compiler sees the conversions, too."""

    def __init__(self, network: DSPFusion) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        infrared: Tensor,  # uint8 (H, W)
        visible: Tensor,  # uint8 (H, W, 3)
        degradation_infrared: Tensor,  # (16, Cd)
        degradation_visible: Tensor,  # (16, Cd)
        semantic: Tensor,  # (16, Cs)
    ) -> Tensor:
        tokens = (tokens[None] for tokens in (degradation_infrared, degradation_visible, semantic))
        fused = self.network(unit_infrared(infrared), unit_visible(visible), *tokens)[0]
        return (fused.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)  # (H, W, 3)


class PriorGraph(nn.Module):
    """The path of the priors, from bytes to three token sets, two sets of probabilities and two of strengths."""

    def __init__(self, network: DSPFusion, diffusion_steps: int) -> None:
        super().__init__()
        self.network = network
        self.diffusion_steps = diffusion_steps

    def forward(self, infrared: Tensor, visible: Tensor) -> tuple[Tensor, ...]:
        return self.of_units(unit_infrared(infrared), unit_visible(visible))

    def of_units(self, infrared: Tensor, visible: Tensor) -> tuple[Tensor, ...]:
        """The same of pictures in [0, 1], (1, 1, H, W) and (1, 3, H, W)."""
        priors = self.network.estimate_priors(infrared, visible, self.diffusion_steps)
        return (
            priors.degradation_infrared[0],
            priors.degradation_visible[0],
            priors.semantic[0],
            priors.infrared_logits[0].softmax(-1),
            priors.visible_logits[0].softmax(-1),
            priors.infrared_strengths[0],
            priors.visible_strengths[0],
        )


class PyTorchEngine:
    """Runs the network eagerly on the processor. Implements `FusionEngine`.

    Args:
        variant: a name of `engines.dspfusion.variants.VARIANTS`.
        weights: a safetensors file; None takes the shipped weights.
        precision: "fp32", "bf16" (checked against fp32 at load) or "auto", which is fp32.
        threads: for the whole process, because PyTorch knows no other; 0 leaves its choice.
        diffusion_steps: 1 to 10.

    Raises:
        EngineError: if the weights cannot be loaded or the precision is not served.
    """

    def __init__(
        self,
        variant: str = "nano",
        weights: Path | None = None,
        precision: str = "auto",
        threads: int = 0,
        diffusion_steps: int = 4,
        why: str = "asked for",
    ) -> None:
        if precision not in ("auto", "fp32", "bf16"):
            raise EngineError(f"PyTorch on a processor does not serve {precision}: choose fp32 or bf16")
        network, digest = load(variant, weights)
        if threads > 0:
            torch.set_num_threads(threads)
        # Channels last is 1.24 times as fast here, and gives the same picture to 1e-7.
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network: DSPFusion | None = network.requires_grad_(False)
        self._token_widths = (network.variant.degradation_tokens, network.variant.semantic_tokens)
        self._frame, self._priors = FrameGraph(network), PriorGraph(network, diffusion_steps)
        self._bf16 = False
        self._proofs = Proofs(None)
        self.description = EngineDescription(
            runtime="pytorch",
            precision="bf16" if precision == "bf16" else "fp32",
            variant=variant,
            why=why,
            weights_sha256=digest,
            threads=torch.get_num_threads(),
        )
        if precision == "bf16":
            reference = Reference.of(self)
            self._bf16 = True
            refuse_unless_close(self, reference)

    def estimate_priors(self, infrared: Image, visible: Image) -> Priors:
        """See `FusionEngine`."""
        infrared, visible = checked_pair(infrared, visible)
        outputs = self._run(self._priors, False, infrared, visible)
        return priors_from([output.numpy() for output in outputs])

    def fuse(self, infrared: Image, visible: Image, priors: Priors) -> Image:
        """See `FusionEngine`."""
        infrared, visible = checked_pair(infrared, visible)
        tokens = checked_priors(priors, self._token_widths)
        return np.ascontiguousarray(self._run(self._frame, self._bf16, infrared, visible, *tokens).numpy())

    def prove(self, infrared: Image, visible: Image, priors: Priors, fused: Image) -> float | None:
        """See `FusionEngine`."""
        if not self._bf16:
            return None

        def in_fp32() -> Image:
            pair = checked_pair(infrared, visible)
            return self._run(self._frame, False, *pair, *checked_priors(priors, self._token_widths)).numpy()

        return self._proofs.find(self, str(infrared.shape), fused, in_fp32)

    def close(self) -> None:
        """See `FusionEngine`."""
        self.network = None
        self._frame = self._priors = nn.Identity()  # type: ignore[assignment]

    def _run(self, graph: Callable[..., Output], bf16: bool, *arrays: np.ndarray) -> Output:
        if self.network is None:
            raise EngineError("this engine was closed: create another one")
        try:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return graph(*(tensor_of(array) for array in arrays))
        except (RuntimeError, MemoryError) as error:
            raise EngineError(
                f"PyTorch failed ({last_line(error)}): end other programs that use memory, send smaller pictures, or "
                "choose a smaller variant"
            ) from error


def tensor_of(array: np.ndarray) -> Tensor:
    """The array as a tensor; of a read-only one a copy, because PyTorch knows no read-only tensors."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def unit_infrared(image: Tensor) -> Tensor:
    """uint8 (H, W) -> float32 (1, 1, H, W) in [0, 1]."""
    return image[None, None].float() / 255


def unit_visible(image: Tensor) -> Tensor:
    """uint8 (H, W, 3) -> float32 (1, 3, H, W) in [0, 1]."""
    return image.permute(2, 0, 1)[None].float() / 255
