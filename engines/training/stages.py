"""What each stage of the training teaches, and to which part of the network.

Stage I trains everything but the diffusion: semantic tokens come from the clean pair, degradation tokens from the
degraded one. Stage II trains the denoiser alone: the tokens that it restores from the degraded pair take the place of
the clean ones. Stage III is ours, not the paper's: the network learns together from the degraded pair. The U-Net gets
to know the tokens that it will be given, because clean ones tell it more (how bright a darkened scene was) than any
denoiser can restore, and those who make the tokens learn what the U-Net needs to be told. The semantic encoder rests:
what it finds in the clean pair stays what the denoiser aims at, or the tokens would end as anything but restored. Stage
IV, ours too, shows the U-Net two neighbouring video frames with the priors of the first, as a running camera will.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.base import INFRARED_DEGRADATIONS
from engines.dspfusion.diffusion import STEPS
from engines.dspfusion.loading import load
from engines.dspfusion.network import DSPFusion, PriorTokens
from engines.dspfusion.priors import mosaic
from engines.training.config import TeacherConfig, TrainConfig
from engines.training.data import Batch, Pair, draw_batch
from engines.training.losses import LossWeights, flicker, fusion_losses, info_nce, luminance, teacher_losses, warped
from engines.training.video import VideoBatch

NAMES = ("I", "II", "III", "IV")
WARM_UP_RATE = 3e-3
WARM_UP_DRAWS = 3  # which of a seed's streams of draws the warm-up takes; the still stages take 0, 1 and 2
SEMANTIC_STEP = 4  # a region is reduced by this, as a 640 x 480 frame is for its semantic view
IMAGE_LOSSES = ("structure", "fidelity", "intensity", "consistency", "colour", "gradient")
TAUGHT_STAGES = (1, 3)


def learns(parameter: str, stage: int) -> bool:
    """Whether a parameter of this name is trained in a stage."""
    if stage == 3:
        return not parameter.startswith("semantic_encoder.")
    if stage == 1:
        return not parameter.startswith("diffusion.")
    return parameter.startswith("diffusion." if stage == 2 else "unet.")


@dataclass(frozen=True)
class Noise:
    """The diffusion of one iteration."""

    steps: int = STEPS
    start: Tensor | None = None  # tokens to begin with; None takes the stored ones


ALL_STEPS = Noise()


class Teacher:
    """A trained network whose pictures a smaller one is drawn to."""

    def __init__(self, config: TeacherConfig, device: torch.device) -> None:
        """Loads it.

        Raises:
            EngineError: it has no weights.
        """
        weights = None if config.weights is None else Path(config.weights)
        network, self.sha256 = load(config.variant, weights)
        self.network = network.to(device).requires_grad_(False)
        keep_precise(self.network.unet.head)
        self.share, self.steps = config.share, config.steps

    @torch.no_grad()
    def picture(self, batch: Batch, half: bool) -> Tensor:
        """What it makes of the degraded pair, with priors that it restores itself."""
        with autocast(batch.infrared.device, half):
            priors = degraded_priors(self.network, batch, Noise(self.steps))
            return fuse(self.network, batch.infrared, batch.visible, priors)


def autocast(device: torch.device, half: bool) -> torch.autocast:
    """Runs the network in bf16 when `half`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def keep_precise(head: nn.Module) -> None:
    """Takes the head out of the autocast: it works on the pictures themselves, and bf16 has 8 bits for their 8."""
    forward: Callable[..., Tensor] = head.forward

    def precise(*inputs: Tensor) -> Tensor:
        with torch.autocast(inputs[0].device.type, enabled=False):
            return forward(*(tensor.float() for tensor in inputs))

    head.forward = precise  # type: ignore[method-assign]


def fuse(network: DSPFusion, infrared: Tensor, visible: Tensor, priors: PriorTokens) -> Tensor:
    """The fused picture in float32."""
    tokens = (priors.degradation_infrared, priors.degradation_visible, priors.semantic)
    return network(infrared, visible, *tokens).float()


def clean_tokens(network: DSPFusion, batch: Batch) -> Tensor:
    """Semantic tokens of the clean pair."""
    return network.encode_semantics(*_reduced(batch.clean_region_infrared, batch.clean_region_visible))


def clean_priors(network: DSPFusion, batch: Batch) -> PriorTokens:
    """Degradation tokens of the degraded pair with semantic tokens of the clean one."""
    return network.complete_priors(batch.region_infrared, batch.region_visible, clean_tokens(network, batch), 0)


def degraded_priors(network: DSPFusion, batch: Batch, noise: Noise) -> PriorTokens:
    """All tokens as the degraded pair gives them, restored by the diffusion (unless it takes 0 steps)."""
    seen = network.encode_semantics(*_reduced(batch.region_infrared, batch.region_visible))
    return network.complete_priors(batch.region_infrared, batch.region_visible, seen, noise.steps, noise.start)


def _reduced(infrared: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    return F.avg_pool2d(infrared, SEMANTIC_STEP), F.avg_pool2d(visible, SEMANTIC_STEP)


def in_float32(priors: PriorTokens) -> PriorTokens:
    return PriorTokens._make(tensor.float() for tensor in priors)


def image_losses(
    network: DSPFusion,
    batch: Batch,
    stage: int,
    noise: Noise = ALL_STEPS,
    teacher: Teacher | None = None,
    half: bool = False,
    few_steps: bool = False,
) -> dict[str, Tensor]:
    """The losses of one batch in stages I to III, by name.

    Args:
        noise: the diffusion; not used in stage I.
        teacher: adds the distance to its picture, in stages I and III.
        half: the network runs in bf16, the losses never do.
        few_steps: stage II also draws the tokens after one or two steps to those after ten.
    """
    with autocast(batch.infrared.device, half):
        priors = clean_priors(network, batch) if stage == 1 else degraded_priors(network, batch, noise)
        fused = fuse(network, batch.infrared, batch.visible, priors)
        clean = clean_tokens(network, batch).float() if stage > 1 else None
        shortcut = _shortcut(network, batch, noise) if stage == 2 and few_steps else None
    priors = in_float32(priors)
    losses = fusion_losses(fused, batch.clean_infrared, batch.clean_visible)
    if stage != 2:
        losses |= _degradation_losses(priors, batch)
    if clean is not None:
        losses["tokens"] = F.l1_loss(priors.semantic, clean)
    if shortcut is not None:
        losses["few_steps"] = shortcut
    if teacher is not None and stage in TAUGHT_STAGES:
        losses |= teacher_losses(fused, teacher.picture(batch, half))
    return losses


def _shortcut(network: DSPFusion, batch: Batch, noise: Noise) -> Tensor:
    """How far one step (two, where this iteration's number of steps is even) ends from where all ten do."""
    with torch.no_grad():
        goal = degraded_priors(network, batch, Noise(STEPS, noise.start)).semantic.float()
    short = degraded_priors(network, batch, Noise(1 + (noise.steps + 1) % 2, noise.start)).semantic.float()
    return F.l1_loss(short, goal)


def video_losses(network: DSPFusion, batch: VideoBatch, noise: Noise, half: bool = False) -> dict[str, Tensor]:
    """The losses of stage IV: those of both pictures, and of what changes between them."""
    first, second = batch.first, batch.second
    with autocast(first.infrared.device, half):
        priors = degraded_priors(network, first, noise)
        both = PriorTokens._make(torch.cat([tokens, tokens]) for tokens in priors)
        infrared, visible = torch.cat([first.infrared, second.infrared]), torch.cat([first.visible, second.visible])
        fused = fuse(network, infrared, visible, both)
    clean_infrared = torch.cat([first.clean_infrared, second.clean_infrared])
    clean_visible = torch.cat([first.clean_visible, second.clean_visible])
    clean = torch.cat([clean_infrared, luminance(clean_visible)], 1)
    earlier, later = fused.chunk(2)
    clean_earlier, clean_later = clean.chunk(2)
    return fusion_losses(fused, clean_infrared, clean_visible) | {
        "flicker": flicker(earlier, later, clean_earlier, clean_later),
        "warped": warped(earlier, later, batch.flow, batch.trusted),
    }


def weighted(losses: dict[str, Tensor], weights: LossWeights, share: float = 0.0) -> Tensor:
    """The sum that is minimised; a teacher takes `share` of the image losses' weight for its own picture."""
    factors = {
        "teacher_intensity": share * weights.intensity,
        "teacher_gradient": share * weights.gradient,
    }
    kept = 1 - share if "teacher_intensity" in losses else 1.0
    for name in losses:
        if name not in factors:
            factors[name] = getattr(weights, name) * (kept if name in IMAGE_LOSSES else 1)
    return torch.stack([factors[name] * value for name, value in losses.items()]).sum()


def _degradation_losses(priors: PriorTokens, batch: Batch) -> dict[str, Tensor]:
    embeddings = torch.cat([priors.infrared_embedding, priors.visible_embedding])
    # The same kind in the other modality is another label.
    visible = torch.where(batch.visible_kind >= 0, batch.visible_kind + len(INFRARED_DEGRADATIONS), batch.visible_kind)
    return {
        "contrast": info_nce(embeddings, torch.cat([batch.infrared_kind, visible])),
        "naming": _naming(priors.infrared_logits, batch.infrared_kind)
        + _naming(priors.visible_logits, batch.visible_kind),
        "rating": rating_loss(priors.infrared_strengths, batch.infrared_strength, batch.infrared_kind)
        + rating_loss(priors.visible_strengths, batch.visible_strength, batch.visible_kind),
    }


def _naming(logits: Tensor, kind: Tensor) -> Tensor:
    """Cross entropy where the modality is there; zero where it is in no item."""
    return F.cross_entropy(logits, kind, reduction="sum") / (kind >= 0).sum().clamp(min=1)


def rating_loss(found: Tensor, true: Tensor, kind: Tensor) -> Tensor:
    """L1 of the strength (B,) of the true kind among those found (B, K), where the modality is there."""
    there = (kind >= 0).to(found)
    of_kind = found.gather(1, kind.clamp(min=0)[:, None])[:, 0]
    return ((of_kind - true).abs() * there).sum() / there.sum().clamp(min=1)


def warm_up(
    network: DSPFusion,
    pairs: list[Pair],
    config: TrainConfig,
    device: torch.device,
    say: Callable[[str], None],
    stopping: Callable[[], bool] = lambda: False,
) -> bool:
    """Teaches the degradation encoder to name degradations, on small views drawn once and shown again and again.

    A prior that says nothing would be ignored by the U-Net; alongside the image losses it takes thousands of
    iterations to say something, alone a few hundred cheap ones.

    Returns:
        Whether it came to its end, that is, was not asked to stop.
    """
    if config.warm_up_items == 0 or config.warm_up_iterations == 0:
        return True
    views: list[tuple[Tensor, ...]] = []
    for number in range(-(-config.warm_up_items // config.batch)):
        if stopping():
            return False
        batch = draw_batch(pairs, config.batch, config.draw, config.seed * 4 + WARM_UP_DRAWS, number)
        pictures = (mosaic(picture).half() for picture in (batch.region_infrared, batch.region_visible))
        views.append((*pictures, batch.infrared_kind, batch.visible_kind))
    infrared, visible, infrared_kind, visible_kind = (
        torch.cat(column).to(device) for column in zip(*views, strict=True)
    )
    generator = torch.Generator().manual_seed(config.seed)
    encoder = network.degradation_encoder
    parts = (encoder, network.name_infrared, network.name_visible)
    optimizer = torch.optim.AdamW([parameter for part in parts for parameter in part.parameters()], lr=WARM_UP_RATE)
    for iteration in range(config.warm_up_iterations):
        if stopping():
            return False
        for group in optimizer.param_groups:
            group["lr"] = WARM_UP_RATE * (1 - iteration / config.warm_up_iterations)
        chosen = torch.randint(len(infrared), (4 * config.batch,), generator=generator).to(device)
        infrared_names = network.name_infrared(encoder(infrared[chosen].float().expand(-1, 3, -1, -1)).mean(1))
        visible_names = network.name_visible(encoder(visible[chosen].float()).mean(1))
        loss = _naming(infrared_names, infrared_kind[chosen]) + _naming(visible_names, visible_kind[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (iteration + 1) % 50 == 0:
            say(f"warm-up  {iteration + 1:6d}  naming {loss.item():.3f}")
    return True
