"""Priors: a handful of tokens that say how a scene is degraded and what it shows.

Both are read from small views of the frame. The semantic view is the whole frame, reduced. Reducing would average
noise, stripes and blur away, so the degradation view is a mosaic of sixteen tiles at native resolution, one for every
token.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRID = 4  # the frame is seen as GRID x GRID cells, one token each
TOKENS = GRID * GRID
TILE_PX = 32
THUMBNAIL_PX = (120, 160)  # height and width that the semantic view comes near to
# Noise of a few grey levels must bend the first GELU, or no later layer can tell it from none: without this factor
# the encoder names no degradation after a thousand iterations.
CONTRAST = 10.0


def mosaic(image: Tensor) -> Tensor:
    """Sixteen native tiles of a frame, (B, C, H, W) -> (B, C, 128, 128); smaller frames are taken whole."""
    height, width = image.shape[-2:]
    if height < GRID * TILE_PX or width < GRID * TILE_PX:
        return image
    rows = [row * height // GRID + (height // GRID - TILE_PX) // 2 for row in range(GRID)]
    columns = [column * width // GRID + (width // GRID - TILE_PX) // 2 for column in range(GRID)]
    image = torch.cat([image[..., top : top + TILE_PX, :] for top in rows], -2)
    return torch.cat([image[..., left : left + TILE_PX] for left in columns], -1)


def thumbnail(image: Tensor) -> Tensor:
    """The frame reduced by whole steps to about 160 x 120, (B, C, H, W) -> (B, C, h, w)."""
    step = max(1, min(round(image.shape[-2] / THUMBNAIL_PX[0]), round(image.shape[-1] / THUMBNAIL_PX[1])))
    return F.avg_pool2d(image, step) if step > 1 else image


class TokenMixer(nn.Module):
    """One MLP-mixer layer: across the tokens, then across the channels."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm_tokens = nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(TOKENS, hidden), nn.GELU(), nn.Linear(hidden, TOKENS))
        self.norm_channels = nn.LayerNorm(width)
        self.channels = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm_tokens(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm_channels(x))


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class PriorEncoder(nn.Module):
    """Image (B, C, H, W) -> tokens (B, 16, 4 * width), of about unit variance so that diffusion can restore them."""

    def __init__(self, channels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 7, stride=4, padding=3),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            *(ResidualBlock(width) for _ in range(blocks)),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.mix = TokenMixer(width, 4 * width)
        self.widen = nn.Linear(width, 4 * width)
        self.carry = nn.Linear(width, 4 * width)  # of the spread: noise and blur show in it, not in the mean
        self.norm = nn.LayerNorm(4 * width, elementwise_affine=False)

    def forward(self, image: Tensor) -> Tensor:
        features = self.features((image - 0.5) * CONTRAST)
        # A static kernel instead of an adaptive one: compilers refuse adaptive pooling of unknown sizes.
        kernel = (features.shape[-2] // GRID, features.shape[-1] // GRID)
        mean = F.avg_pool2d(features, kernel)
        spread = F.avg_pool2d(features * features, kernel) - mean * mean
        mean, spread = (
            cells[..., :GRID, :GRID].flatten(2).transpose(1, 2) for cells in (mean, spread)
        )  # (B, 16, width)
        return self.norm(self.widen(self.mix(mean)) + self.carry(torch.log(spread.clamp(min=0) + 1e-4)))


class TokenPyramid(nn.Module):
    """Tokens for every level of the U-Net: all sixteen for the first, four for each of the others."""

    FEWER = 4

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        steps = list(pairwise(widths))
        self.reduce = nn.ModuleList(nn.Linear(TOKENS if i == 0 else self.FEWER, self.FEWER) for i in range(len(steps)))
        self.channels = nn.ModuleList(nn.Linear(before, after) for before, after in steps)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        levels = [tokens]
        for reduce, channels in zip(self.reduce, self.channels, strict=True):
            levels.append(channels(reduce(levels[-1].transpose(1, 2)).transpose(1, 2)))
        return levels
