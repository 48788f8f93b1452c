"""DSPFusion: image fusion guided by a degradation prior and a semantic prior (arXiv 2503.23355).

Two paths. `estimate_priors` reads the tokens of a scene now and then; `forward` fuses every frame with the tokens at
hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.base import INFRARED_DEGRADATIONS, VISIBLE_DEGRADATIONS
from engines.dspfusion.blocks import (
    Downsample,
    DualPriorGuidance,
    PriorGuidedFusion,
    SemanticIntegration,
    TransformerBlock,
    Upsample,
)
from engines.dspfusion.diffusion import SemanticDiffusion
from engines.dspfusion.head import RestoredHead, VisibleHead
from engines.dspfusion.priors import TOKENS, PriorEncoder, TokenPyramid, mosaic, thumbnail
from engines.dspfusion.variants import Variant

READOUT = 2 * (len(INFRARED_DEGRADATIONS) + len(VISIBLE_DEGRADATIONS))  # numbers: see `DSPFusion.readout`
Join = Callable[[int, Tensor, Tensor], Tensor]  # (level, from the level below, from the encoder)


class PriorTokens(NamedTuple):
    """What the network knows about a pair of frames as a whole."""

    degradation_infrared: Tensor  # (B, 16, Cd)
    degradation_visible: Tensor  # (B, 16, Cd)
    semantic: Tensor  # (B, 16, Cs)
    infrared_logits: Tensor  # (B, 7), in the order of INFRARED_DEGRADATIONS
    visible_logits: Tensor  # (B, 8), in the order of VISIBLE_DEGRADATIONS
    infrared_strengths: Tensor  # (B, 7), 0 to 1: how strong it is, were it that degradation
    visible_strengths: Tensor  # (B, 8)
    infrared_embedding: Tensor  # (B, Cd), 128 wide in the published size
    visible_embedding: Tensor  # (B, Cd)


class FusionUNet(nn.Module):
    """Restores and fuses: one encoder for both modalities, gates at every level, one decoder."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        widths, levels = variant.widths, len(variant.widths)
        step = variant.unshuffle
        # A patch of step x step pixels becomes one position; without reduction, the usual 3x3 convolution.
        self.enter = nn.Conv2d(3, widths[0], step, step) if step > 1 else nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        degradation_widths = (variant.degradation_tokens, *(2 * width for width in widths[1:]))
        semantic_widths = (variant.semantic_tokens, *(2 * width for width in widths[1:]))
        self.degradation_pyramid = TokenPyramid(degradation_widths)
        self.semantic_pyramid = TokenPyramid(semantic_widths)
        light = [level < variant.attention_from for level in range(levels)]

        def blocks(level: int, count: int, width: int) -> nn.Sequential:
            return nn.Sequential(
                *(TransformerBlock(width, variant.heads[level], variant.expansion, light[level]) for _ in range(count))
            )

        self.guide = nn.ModuleList(
            DualPriorGuidance(
                widths[level],
                variant.heads[level],
                TOKENS if level == 0 else TokenPyramid.FEWER,
                (degradation_widths[level], semantic_widths[level]),
                light[level],
            )
            for level in range(levels)
        )
        self.encode = nn.ModuleList(blocks(level, variant.blocks[level], widths[level]) for level in range(levels))
        self.down = nn.ModuleList(Downsample(widths[level], widths[level + 1]) for level in range(levels - 1))
        self.fuse = nn.ModuleList(PriorGuidedFusion(width, variant.semantic_tokens) for width in widths)

        self.up = nn.ModuleList(Upsample(widths[level + 1], widths[level]) for level in range(levels - 1))
        decoded = [2 * widths[0] if variant.wide_top else widths[0], *widths[1:-1]]
        self.reduce = nn.ModuleList(
            nn.Identity() if out == 2 * width else nn.Conv2d(2 * width, out, 1, bias=False)
            for width, out in zip(widths[:-1], decoded, strict=True)
        )
        self.integrate = nn.ModuleList(
            nn.Identity() if light[level] else SemanticIntegration(decoded[level], semantic_widths[level])
            for level in range(levels - 1)
        )
        self.decode = nn.ModuleList(blocks(level, variant.blocks[level], decoded[level]) for level in range(levels - 1))
        self.refine = blocks(0, variant.refinement_blocks, decoded[0])
        self.tell = TellHead(decoded[0], variant) if variant.output == "restored" else None
        self.head = VisibleHead(decoded[0]) if variant.output == "visible" else RestoredHead(decoded[0], step, READOUT)

    def enter_infrared(self, infrared: Tensor) -> Tensor:
        """The visible entry, as if the one infrared channel were repeated three times."""
        weight = self.enter.weight.sum(1, keepdim=True)
        return F.conv2d(infrared, weight, self.enter.bias, self.enter.stride, self.enter.padding)

    def forward(
        self, infrared: Tensor, visible: Tensor, degradation: tuple[Tensor, Tensor], semantic: Tensor, readout: Tensor
    ) -> Tensor:
        streams = self.enter_infrared(infrared), self.enter(visible)
        return self.head(self.features(streams, degradation, semantic, self.join), infrared, visible, readout)

    def features(
        self, streams: tuple[Tensor, Tensor], degradation: tuple[Tensor, Tensor], semantic: Tensor, join: Join
    ) -> Tensor:
        """From what entered of each modality (infrared first) to what the head reads.

        Both modalities go through the encoder as one batch: half the steps, for the same arithmetic.
        """
        both = torch.cat(streams)
        degradations = self.degradation_pyramid(torch.cat(degradation))
        semantics = self.semantic_pyramid(semantic)
        fused: list[Tensor] = []
        for level, (guide, encode, fuse) in enumerate(zip(self.guide, self.encode, self.fuse, strict=True)):
            both = encode(guide(both, degradations[level], torch.cat([semantics[level]] * 2)))
            fused.append(fuse(*both.chunk(2), semantic))
            if level < len(self.down):
                both = self.down[level](both)
        x = fused[-1]
        for level in reversed(range(len(self.up))):
            x = join(level, x, fused[level])
            if isinstance(self.integrate[level], SemanticIntegration):
                x = self.integrate[level](x, semantics[level])
            x = self.decode[level](x)
        x = self.refine(x)
        return x if self.tell is None else x + self.tell(degradation, semantic)

    def join(self, level: int, coarse: Tensor, fine: Tensor) -> Tensor:
        """A level's decoder input: what comes from the level below, and what the encoder kept of this one."""
        return self.reduce[level](torch.cat([self.up[level](coarse), fine], 1))


class TellHead(nn.Module):
    """What the priors tell the head directly: how blurred or washed out a picture is as a whole.

    What the U-Net's features carry of it is steered by every level on the way; this path is linear and reaches every
    map of the head at once.
    """

    def __init__(self, width: int, variant: Variant) -> None:
        super().__init__()
        self.project = nn.Linear(2 * variant.degradation_tokens + variant.semantic_tokens, width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, degradation: tuple[Tensor, Tensor], semantic: Tensor) -> Tensor:
        """(B, width, 1, 1), to be added to the features, from tokens (B, 16, D)."""
        return self.project(torch.cat([*degradation, semantic], -1).mean(1))[..., None, None]


class DSPFusion(nn.Module):
    """The whole network of one size. Pictures are in [0, 1]: infrared (B, 1, H, W), visible RGB (B, 3, H, W)."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        # One set of weights for both modalities; the infrared channel is repeated.
        self.degradation_encoder = PriorEncoder(3, variant.degradation_width, variant.degradation_blocks)
        self.semantic_encoder = PriorEncoder(6, variant.semantic_width, variant.semantic_blocks)
        self.diffusion = SemanticDiffusion(
            variant.semantic_tokens, variant.degradation_tokens, variant.denoiser_width, variant.denoiser_layers
        )
        self.unet = FusionUNet(variant)
        self.name_infrared = nn.Linear(variant.degradation_tokens, len(INFRARED_DEGRADATIONS))
        self.name_visible = nn.Linear(variant.degradation_tokens, len(VISIBLE_DEGRADATIONS))
        self.rate_infrared = nn.Linear(variant.degradation_tokens, len(INFRARED_DEGRADATIONS))
        self.rate_visible = nn.Linear(variant.degradation_tokens, len(VISIBLE_DEGRADATIONS))

    def encode_semantics(self, infrared: Tensor, visible: Tensor) -> Tensor:
        """Semantic tokens (B, 16, Cs) of a pair as it is (not restored)."""
        return self.semantic_encoder(torch.cat([thumbnail(infrared).expand(-1, 3, -1, -1), thumbnail(visible)], 1))

    def estimate_priors(self, infrared: Tensor, visible: Tensor, steps: int) -> PriorTokens:
        """Reads the priors of a pair of frames.

        Give whole frames at their own resolution: the small views are taken inside, and a frame that was reduced before
        no longer shows its noise, stripes and blur.

        Args:
            infrared: (B, 1, H, W) in [0, 1].
            visible: (B, 3, H, W) in [0, 1].
            steps: diffusion steps, 1 to 10.

        Raises:
            EngineError: the number of steps cannot be run.
        """
        return self.complete_priors(infrared, visible, self.encode_semantics(infrared, visible), steps)

    def complete_priors(
        self, infrared: Tensor, visible: Tensor, semantic: Tensor, steps: int, start: Tensor | None = None
    ) -> PriorTokens:
        """Adds degradation tokens to semantic ones, and restores the latter when `steps` is above 0."""
        infrared_tokens = self.degradation_encoder(mosaic(infrared).expand(-1, 3, -1, -1))
        visible_tokens = self.degradation_encoder(mosaic(visible))
        if steps > 0:
            semantic = self.diffusion(semantic, infrared_tokens, visible_tokens, steps, start)
        named = self._name(infrared_tokens.mean(1), visible_tokens.mean(1))
        return PriorTokens(infrared_tokens, visible_tokens, semantic, *named)

    def _name(self, infrared: Tensor, visible: Tensor) -> tuple[Tensor, ...]:
        """The last six fields of `PriorTokens`, from the embeddings."""
        return (
            self.name_infrared(infrared),
            self.name_visible(visible),
            torch.sigmoid(self.rate_infrared(infrared)),
            torch.sigmoid(self.rate_visible(visible)),
            infrared,
            visible,
        )

    def readout(self, infrared: Tensor, visible: Tensor) -> Tensor:
        """How likely each degradation is, and that times its strength: (B, 30) in [0, 1], from both (B, 16, Cd)."""
        infrared_logits, visible_logits, infrared_strengths, visible_strengths, *_ = self._name(
            infrared.mean(1), visible.mean(1)
        )
        shares = torch.cat([infrared_logits.softmax(-1), visible_logits.softmax(-1)], -1)
        return torch.cat([shares, shares * torch.cat([infrared_strengths, visible_strengths], -1)], -1)

    def forward(
        self,
        infrared: Tensor,
        visible: Tensor,
        degradation_infrared: Tensor,
        degradation_visible: Tensor,
        semantic: Tensor,
    ) -> Tensor:
        """Fuses a pair: (B, 1, H, W) and (B, 3, H, W) -> (B, 3, H, W) in [0, 1]. A missing modality is black."""
        height, width = infrared.shape[-2:]
        tokens = degradation_infrared, degradation_visible, semantic
        multiple = self.variant.multiple
        return self.fuse_padded(pad(infrared, multiple), pad(visible, multiple), *tokens)[..., :height, :width]

    def fuse_padded(self, infrared: Tensor, visible: Tensor, *tokens: Tensor) -> Tensor:
        """As `forward`, for pictures whose sides are multiples of `Variant.multiple`."""
        *degradation, semantic = tokens
        fused: Tensor = self.unet(infrared, visible, tuple(degradation), semantic, self.readout(*degradation))
        return fused


def pad(image: Tensor, multiple: int) -> Tensor:
    """Reflects the bottom and right border until height and width are multiples of `multiple`."""
    bottom, right = -image.shape[-2] % multiple, -image.shape[-1] % multiple
    if bottom == 0 and right == 0:
        return image
    return F.pad(image, (0, right, 0, bottom), mode="reflect")
