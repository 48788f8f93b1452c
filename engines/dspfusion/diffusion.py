"""Diffusion on the semantic tokens: from noise, and from what the degraded pair shows, to the tokens of the clean pair.

Ten steps of a linear schedule, predicting the clean tokens; every step takes the mean of the posterior and adds no
noise, so the same input gives the same tokens. Fewer steps stride over the schedule.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from engines.base import NOISE_SEED, EngineError
from engines.dspfusion.priors import TOKENS, TokenMixer

STEPS = 10
BETA_FIRST, BETA_LAST = 0.1, 0.99


class Denoiser(nn.Module):
    """Predicts the clean semantic tokens from noisy ones, the time and the conditions."""

    def __init__(self, semantic: int, degradation: int, width: int, layers: int) -> None:
        super().__init__()
        self.time_scale = nn.Parameter(torch.ones(1))
        self.enter = nn.Linear(2 * semantic + 2 * degradation + 1, width)
        self.mix = nn.Sequential(*(TokenMixer(width, 2 * width) for _ in range(layers)))
        self.leave = nn.Linear(width, semantic)

    def forward(self, noisy: Tensor, time: float, condition: Tensor) -> Tensor:
        clock = torch.full_like(noisy[..., :1], time) * self.time_scale
        return self.leave(self.mix(self.enter(torch.cat([noisy, condition, clock], -1))))


def alpha_bars() -> list[float]:
    """Share of signal (squared) left after each step; index 0 is the clean end."""
    shares = [1.0]
    for step in range(STEPS):  # plain numbers, so that an export of the network holds constants
        beta = BETA_FIRST + (BETA_LAST - BETA_FIRST) * step / (STEPS - 1)
        shares.append(shares[-1] * (1 - beta))
    return shares


def stride(steps: int) -> list[int]:
    """The times visited, from STEPS down to 0, in `steps` strides.

    >>> stride(2)
    [10, 5, 0]
    """
    if not 1 <= steps <= STEPS:
        raise EngineError(f"{steps} diffusion steps cannot be run: choose 1 to {STEPS}")
    return [round(STEPS * (steps - index) / steps) for index in range(steps + 1)]


class SemanticDiffusion(nn.Module):
    """Restores semantic tokens (B, 16, D) in 1 to 10 steps."""

    noise: Tensor

    def __init__(self, semantic: int, degradation: int, width: int, layers: int) -> None:
        super().__init__()
        self.denoiser = Denoiser(semantic, degradation, width, layers)
        generator = torch.Generator().manual_seed(NOISE_SEED)
        # Kept with the weights: fresh noise at every frame would make the video flicker.
        self.register_buffer("noise", torch.randn(1, TOKENS, semantic, generator=generator))

    def forward(
        self,
        semantic: Tensor,
        degradation_infrared: Tensor,
        degradation_visible: Tensor,
        steps: int,
        start: Tensor | None = None,
    ) -> Tensor:
        """Runs the chain.

        Args:
            semantic: tokens of the degraded pair, (B, 16, D).
            degradation_infrared, degradation_visible: (B, 16, Cd).
            steps: 1 to 10.
            start: the noisy tokens to begin from; None takes the stored noise.
        """
        condition = torch.cat([semantic, degradation_infrared, degradation_visible], -1)
        x = self.noise.expand_as(semantic) if start is None else start
        shares = alpha_bars()
        times = stride(steps)
        for now, after in pairwise(times):
            clean = self.denoiser(x, now / STEPS, condition)
            kept = shares[now] / shares[after]  # signal kept from `after` to `now`
            x_weight = kept**0.5 * (1 - shares[after]) / (1 - shares[now])
            clean_weight = shares[after] ** 0.5 * (1 - kept) / (1 - shares[now])
            x = clean_weight * clean + x_weight * x
        return x
