"""The U-Net's parts: Restormer's pair of blocks and the four ways in which priors steer features.

Shapes: features (B, C, H, W), tokens (B, N, D). Only plain operations, so that every compiler takes them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-6


class PixelNorm(nn.Module):
    """LayerNorm over the channels of every pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def unit(x: Tensor) -> Tensor:
    """Scales the last axis to length one (written out: the vector norm has no converter in every compiler)."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPSILON)


def channel_attention(query: Tensor, key: Tensor, value: Tensor, temperature: Tensor) -> Tensor:
    """Attention between channels: the map is (C / heads) x (C / heads), whatever the picture's size.

    Args:
        query, key, value: (B, C, H, W).
        temperature: (heads, 1, 1).
    """
    batch, width, height, columns = query.shape
    heads = temperature.shape[0]
    query, key, value = (x.reshape(batch, heads, width // heads, height * columns) for x in (query, key, value))
    weight = (unit(query) @ unit(key).transpose(-2, -1) * temperature).softmax(-1)
    return (weight @ value).reshape(batch, width, height, columns)


def pointwise_and_near(width: int) -> nn.Sequential:
    """A 1x1 convolution, then a depthwise 3x3 one."""
    return nn.Sequential(
        nn.Conv2d(width, width, 1, bias=False), nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
    )


class ChannelAttention(nn.Module):
    """Multi-Dconv transposed attention of Restormer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.query, self.key, self.value = (pointwise_and_near(width) for _ in range(3))
        self.project = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(channel_attention(self.query(x), self.key(x), self.value(x), self.temperature))


class GatedFeedForward(nn.Module):
    """Gated depthwise feed-forward of Restormer.

    Gate and value have layers of their own: cutting one wide result in two costs a copy in every compiled engine.
    """

    def __init__(self, width: int, expansion: float, bias: bool = False) -> None:
        super().__init__()
        hidden = int(width * expansion)
        self.gate = nn.Conv2d(width, hidden, 1, bias=bias)
        self.near_gate = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=bias)
        self.value = nn.Conv2d(width, hidden, 1, bias=bias)
        self.near_value = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=bias)
        self.project = nn.Conv2d(hidden, width, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.gelu(self.near_gate(self.gate(x))) * self.near_value(self.value(x)))


class TransformerBlock(nn.Module):
    """Channel attention, then the gated feed-forward. A light block is the feed-forward alone, without a norm."""

    def __init__(self, width: int, heads: int, expansion: float, light: bool) -> None:
        super().__init__()
        self.attention = None if light else nn.Sequential(PixelNorm(width), ChannelAttention(width, heads))
        feed_forward = GatedFeedForward(width, expansion, bias=light)
        self.feed_forward = feed_forward if light else nn.Sequential(PixelNorm(width), feed_forward)

    def forward(self, x: Tensor) -> Tensor:
        if self.attention is not None:
            x = x + self.attention(x)
        return x + self.feed_forward(x)


class PriorModulation(nn.Module):
    """Scales and shifts features by the degradation prior, then looks at the neighbourhood."""

    def __init__(self, width: int, tokens: int, token_width: int, light: bool) -> None:
        super().__init__()
        self.choose = nn.Linear(width, tokens)
        self.norm = nn.LayerNorm(token_width)
        self.to_scale = nn.Linear(token_width, width)
        self.to_shift = nn.Linear(token_width, width)
        self.near = nn.Conv2d(width, width, 3, padding=1, groups=width if light else 1, bias=False)

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        weight = self.choose(x.mean((-2, -1))).softmax(-1)  # (B, N): which token matters
        token = self.norm((weight[..., None] * prior).sum(1))  # (B, D)
        scale, shift = self.to_scale(token), self.to_shift(token)  # (B, C) each
        return self.near(x * (1 + scale[..., None, None]) + shift[..., None, None])


class SemanticIntegration(nn.Module):
    """Every pixel asks the semantic tokens what it belongs to."""

    def __init__(self, width: int, token_width: int) -> None:
        super().__init__()
        self.norm = PixelNorm(width)
        self.to_query = nn.Conv2d(width, width, 1, bias=False)
        self.to_key = nn.Linear(token_width, width, bias=False)
        self.to_value = nn.Linear(token_width, width, bias=False)
        self.project = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        batch, width, height, columns = x.shape
        query = self.to_query(self.norm(x)).reshape(batch, width, height * columns)
        weight = (self.to_key(tokens) @ query * width**-0.5).softmax(1)  # (B, N, H*W)
        value = self.to_value(tokens).transpose(1, 2) @ weight  # (B, C, H*W)
        return x + self.project(value.reshape(batch, width, height, columns))


class PriorMeeting(nn.Module):
    """Channel cross-attention: the semantic branch asks, the degradation branch answers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.norm_semantic = PixelNorm(width)
        self.norm_degradation = PixelNorm(width)
        self.query, self.key, self.value = (pointwise_and_near(width) for _ in range(3))
        self.project = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, semantic: Tensor, degradation: Tensor) -> Tensor:
        query = self.query(self.norm_semantic(semantic))
        answer = self.norm_degradation(degradation)
        met = channel_attention(query, self.key(answer), self.value(answer), self.temperature)
        return degradation + self.project(met)


class DualPriorGuidance(nn.Module):
    """At the head of an encoder level: modulation by degradation, integration of semantics, and their meeting.

    A light level has the modulation alone.
    """

    def __init__(self, width: int, heads: int, tokens: int, widths: tuple[int, int], light: bool) -> None:
        super().__init__()
        self.modulate = PriorModulation(width, tokens, widths[0], light)
        self.integrate = None if light else SemanticIntegration(width, widths[1])
        self.meet = None if light else PriorMeeting(width, heads)

    def forward(self, x: Tensor, degradation: Tensor, semantic: Tensor) -> Tensor:
        modulated = x + self.modulate(x, degradation)
        if self.integrate is None or self.meet is None:
            return modulated
        return self.meet(self.integrate(x, semantic), modulated)


class PriorGuidedFusion(nn.Module):
    """Joins the two modalities by gates: which channels matter (semantics) and where (the features themselves)."""

    def __init__(self, width: int, token_width: int) -> None:
        super().__init__()
        self.channels = nn.Linear(token_width, 2 * width)
        self.where = nn.Conv2d(4, 2, 7, padding=3)
        self.project = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, infrared: Tensor, visible: Tensor, semantic: Tensor) -> Tensor:
        batch, width = infrared.shape[:2]
        channels = self.channels(semantic.mean(1)).reshape(batch, 2, width, 1, 1)
        maps = [statistic for x in (infrared, visible) for statistic in (x.mean(1, True), x.amax(1, True))]
        where = self.where(torch.cat(maps, 1))  # (B, 2, H, W)
        gate_infrared = torch.sigmoid(channels[:, 0] * where[:, 0:1])
        gate_visible = torch.sigmoid(channels[:, 1] * where[:, 1:2])
        return self.project(gate_infrared * infrared + gate_visible * visible)


class Downsample(nn.Module):
    """Halves the resolution and changes the width."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, wider // 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(self.reduce(x), 2)


class Upsample(nn.Module):
    """Doubles the resolution and changes the width."""

    def __init__(self, width: int, narrower: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, 4 * narrower, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.expand(x), 2)
