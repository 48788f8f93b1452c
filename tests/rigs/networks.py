"""A network of the real architecture, small enough that a test can export and compile it in a second."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import save_file

from engines.dspfusion.network import DSPFusion
from engines.dspfusion.variants import VARIANTS, Variant

# One light level and one with attention and norms: every kind of block is there once or twice.
MINI: Variant = dataclasses.replace(
    VARIANTS["nano"],
    widths=(8, 16),
    blocks=(1, 1),
    heads=(1, 2),
    attention_from=1,
    degradation_width=8,
    degradation_blocks=1,
    semantic_width=8,
    semantic_blocks=1,
    denoiser_width=16,
    denoiser_layers=1,
)


def save_random_weights(variant: Variant, path: Path) -> Path:
    """Weights that were never trained, but are all different from zero."""
    torch.manual_seed(0)
    state = {name: value + 0.02 * torch.randn_like(value) for name, value in DSPFusion(variant).state_dict().items()}
    save_file(state, path, metadata={"variant": variant.name})
    return path
