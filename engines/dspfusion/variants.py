"""The sizes of the one architecture, and where their weights lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One size of DSPFusion. Tuples hold one number per level of the U-Net, finest level first."""

    name: str
    unshuffle: int  # the U-Net works at 1/unshuffle of the picture; its channels hold the rest
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    heads: tuple[int, ...]
    refinement_blocks: int
    expansion: float  # of the feed-forward layers
    attention_from: int  # first level (from 0) with attention; finer ones are light: no attention, no norms
    wide_top: bool  # level 1 of the decoder keeps the concatenated width
    output: Literal["visible", "restored"]  # see `head.py`
    degradation_width: int
    degradation_blocks: int
    semantic_width: int
    semantic_blocks: int
    denoiser_width: int
    denoiser_layers: int

    @property
    def degradation_tokens(self) -> int:
        """Width of a degradation token."""
        return 4 * self.degradation_width

    @property
    def semantic_tokens(self) -> int:
        """Width of a semantic token."""
        return 4 * self.semantic_width

    @property
    def multiple(self) -> int:
        """Height and width are padded to a multiple of this many pixels."""
        return self.unshuffle * 2 ** (len(self.widths) - 1)


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        # The published configuration: 14.0 M parameters, 282 GMAC at 640x480.
        Variant(
            name="base",
            unshuffle=1,
            widths=(32, 64, 128, 256),
            blocks=(2, 2, 4, 4),
            heads=(1, 1, 2, 2),
            refinement_blocks=1,
            expansion=2.66,
            attention_from=0,
            wide_top=True,
            output="visible",
            degradation_width=32,
            degradation_blocks=4,
            semantic_width=64,
            semantic_blocks=6,
            denoiser_width=512,
            denoiser_layers=4,
        ),
        # For processors: fewer pixels and more channels, because the blocks are bound by memory and not by arithmetic.
        Variant(
            name="nano",
            unshuffle=4,
            widths=(32, 64, 64),
            blocks=(1, 1, 1),
            heads=(1, 1, 2),
            refinement_blocks=1,
            expansion=1.0,
            attention_from=2,
            wide_top=False,
            output="restored",
            degradation_width=24,
            degradation_blocks=2,
            semantic_width=24,
            semantic_blocks=2,
            denoiser_width=128,
            denoiser_layers=3,
        ),
        # Between the two, for a small GPU or a strong processor: 3.0 M parameters, 11.2 GMAC at 640x480. OpenVINO takes
        # 475 ms of processor time a frame in fp32, 227 ms in bf16, where nano takes 48 and 34 (minima, busy machine).
        Variant(
            name="small",
            unshuffle=2,
            widths=(32, 64, 96, 128),
            blocks=(1, 1, 2, 2),
            heads=(1, 1, 2, 4),
            refinement_blocks=1,
            expansion=1.5,
            attention_from=2,
            wide_top=False,
            output="restored",
            degradation_width=32,
            degradation_blocks=3,
            semantic_width=32,
            semantic_blocks=3,
            denoiser_width=256,
            denoiser_layers=3,
        ),
    )
}


def default_weights(variant: str) -> Path:
    """Where the shipped weights of a variant lie."""
    return Path(__file__).resolve().parent.parent / "weights" / f"{variant}.safetensors"
