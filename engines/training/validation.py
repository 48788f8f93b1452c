"""Judges the averaged network on pairs that training never draws, the same spoiled pictures every time."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from engines.dspfusion.network import DSPFusion
from engines.training.config import TrainConfig
from engines.training.data import IGNORED, Batch, Pair, collate, draw_item, moved
from engines.training.losses import fusion_losses, luminance
from engines.training.stages import (
    IMAGE_LOSSES,
    Noise,
    clean_priors,
    clean_tokens,
    degraded_priors,
    fuse,
    video_losses,
    weighted,
)
from engines.training.video import draw_video_batch

SEED = 4711
JUDGED_STEPS = 4  # of the diffusion, as the pipeline runs it
REPORTED_STEPS = (10, 4, 2, 1)


class Validation:
    """Fixed spoiled pictures of the pairs that are held back, on the device of the network."""

    def __init__(self, held: list[Pair], config: TrainConfig, device: torch.device) -> None:
        self.weights = config.weights
        items = [draw_item(pair, config.draw, np.random.default_rng((SEED, i))) for i, pair in enumerate(held)]
        self.batches = [moved(collate([item]), device) for item in items]
        self.neighbours = moved(draw_video_batch([], held, len(held), config.draw, SEED, 0), device)

    @torch.no_grad()
    def judge(self, network: DSPFusion, stage: int) -> tuple[dict[str, float], NDArray[np.uint8]]:
        """Mean image losses over the regions, the share of degradations named, and the change between two frames.

        In stage I, before the denoiser has learned anything, nothing passes through it.

        Returns:
            The values by name, and a sheet: infrared | visible, both degraded | fused | brighter clean source,
            one row a pair.
        """
        values: dict[str, list[float]] = {}
        rows = []
        for batch in self.batches:
            priors = (
                clean_priors(network, batch) if stage == 1 else degraded_priors(network, batch, Noise(JUDGED_STEPS))
            )
            fused = fuse(network, batch.region_infrared, batch.region_visible, priors)
            losses = fusion_losses(fused, batch.clean_region_infrared, batch.clean_region_visible)
            for name, value in (losses | {"total": weighted(losses, self.weights)}).items():
                values.setdefault(name, []).append(value.item())
            for name, logits, kind in (
                ("infrared_named", priors.infrared_logits, batch.infrared_kind),
                ("visible_named", priors.visible_logits, batch.visible_kind),
            ):
                if int(kind) != IGNORED:
                    values.setdefault(name, []).append(float(logits.argmax() == kind[0]))
            rows.append(_row(batch, fused))
        moving = video_losses(network, self.neighbours, Noise(0 if stage == 1 else JUDGED_STEPS))
        means = {name: float(np.mean(found)) for name, found in values.items()}
        return means | {name: moving[name].item() for name in ("flicker", "warped")}, np.concatenate(rows)

    @torch.no_grad()
    def prior_errors(self, network: DSPFusion, steps: tuple[int, ...] = REPORTED_STEPS) -> dict[int, dict[str, float]]:
        """What the diffusion is worth by its number of steps; 0 are the tokens of the degraded pair, unrestored.

        Returns:
            For each number of steps: `tokens`, the mean L1 distance to the tokens of the clean pair, and the image
            losses of the pictures fused with them.
        """
        report = {}
        for number in (*steps, 0):
            found = [self._prior_error(network, batch, number) for batch in self.batches]
            report[number] = {name: float(np.mean([row[name] for row in found])) for name in found[0]}
        return report

    def _prior_error(self, network: DSPFusion, batch: Batch, steps: int) -> dict[str, float]:
        priors = degraded_priors(network, batch, Noise(steps))
        fused = fuse(network, batch.region_infrared, batch.region_visible, priors)
        losses = fusion_losses(fused, batch.clean_region_infrared, batch.clean_region_visible)
        tokens = F.l1_loss(priors.semantic, clean_tokens(network, batch))
        return {"tokens": tokens.item()} | {name: losses[name].item() for name in IMAGE_LOSSES}


def _row(batch: Batch, fused: Tensor) -> NDArray[np.uint8]:
    light = luminance(batch.clean_region_visible)
    brighter = batch.clean_region_visible + (batch.clean_region_infrared - light).clamp(min=0)
    pictures = (batch.region_infrared.expand(-1, 3, -1, -1), batch.region_visible, fused, brighter)
    row = torch.cat(pictures, 3)[0].permute(1, 2, 0).clamp(0, 1)
    return (row * 255).round().to(torch.uint8).cpu().numpy()
