"""From features to the fused picture.

`VisibleHead` is the published one: what the network adds to the visible picture. `RestoredHead` starts from the
brighter source at every pixel. Trained for minutes, the first loses infrared detail (VIF 0.75 on clean pairs after
twenty minutes) and the second has it from the start (0.93 after nine).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RED, GREEN, BLUE = 0.299, 0.587, 0.114  # luminance of full-range BT.601
GATE_AT_START = 2.2  # sigmoid(2.2) = 0.9: the first output is close to the brighter source


class VisibleHead(nn.Module):
    """tanh(features + visible), in [-1, 1], mapped to [0, 1]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(width, 3, 3, padding=1, bias=False)

    def forward(self, x: Tensor, infrared: Tensor, visible: Tensor, readout: Tensor) -> Tensor:
        return torch.tanh(self.project(x) + (2 * visible - 1)) * 0.5 + 0.5


class RestoredHead(nn.Module):
    """Restores both sources by detail bands, a gain and an offset at every pixel, then lifts the visible one towards
    a brighter infrared.

    Detail is raised (blur) or lowered (noise) at the picture's own precision, which the U-Net's few features cannot
    carry, and in each source by itself: seldom are both blurred, and what sharpens one spoils the other. Gains let a
    smooth correction keep full-resolution detail (a dark picture needs a gain); offsets repaint what a gain cannot
    (noise, stripes). Colour is the visible picture's own chroma, corrected as the sources are. All of it happens on
    unshuffled pictures, (B, step * step, H / step, W / step): compilers are several times slower on planes of one
    channel.
    """

    plain: Tensor
    colours: Tensor
    MAPS = 8  # visible gain, offset; infrared gain, offset; gate; chroma gain; blue and red chroma offset

    def __init__(self, width: int, step: int, readout: int) -> None:
        super().__init__()
        self.step = step
        # One layer a map: cutting one wide result into maps costs a copy in every compiled engine.
        layers = [nn.Conv2d(width, step**2, 1) for _ in range(self.MAPS)]
        self.maps = nn.ModuleList(layers)
        for layer in layers:
            assert layer.bias is not None
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.visible_details = DetailBands(width, step, readout)
        self.infrared_details = DetailBands(width, step, readout)
        # Fixed strided convolutions unshuffle the pictures and turn RGB into luminance and colour differences.
        one = torch.eye(step**2).reshape(step**2, 1, step, step)
        colours = torch.tensor([[RED, GREEN, BLUE], [-RED, -GREEN, 1 - BLUE], [1 - RED, -GREEN, -BLUE]])
        self.register_buffer("plain", one, persistent=False)
        self.register_buffer("colours", (one * colours[:, None, :, None, None]).flatten(0, 1), persistent=False)

    def forward(self, x: Tensor, infrared: Tensor, visible: Tensor, readout: Tensor) -> Tensor:
        infrared = F.conv2d(infrared, self.plain, stride=self.step)
        luminance, blue, red = (F.conv2d(visible, kernel, stride=self.step) for kernel in self.colours.chunk(3))
        fused, blue, red = self.restore(x, infrared, luminance, blue, red, readout)
        green = blue * (-BLUE / GREEN) + red * (-RED / GREEN)  # keeps the luminance
        picture = torch.cat([fused + red, fused + green, fused + blue], 1).clamp(0, 1)
        return F.pixel_shuffle(picture, self.step)

    def restore(
        self, x: Tensor, infrared: Tensor, luminance: Tensor, blue: Tensor, red: Tensor, readout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fused luminance and the corrected colour differences, from unshuffled planes."""
        maps = [layer(x) for layer in self.maps]
        luminance = luminance + self.visible_details(x, luminance, readout)
        infrared = infrared + self.infrared_details(x, infrared, readout)
        restored_visible = luminance + maps[0] * luminance + maps[1]
        restored_infrared = infrared + maps[2] * infrared + maps[3]
        gate = torch.sigmoid(maps[4] + GATE_AT_START)
        fused = restored_visible + gate * F.relu(restored_infrared - restored_visible)
        # 1.772 Cb and 1.402 Cr
        return fused, blue + blue * maps[5] + maps[6], red + red * maps[5] + maps[7]


class DetailBands(nn.Module):
    """A learned, local unsharp mask: raises or lowers two bands of a picture's detail by a factor at every position.

    What the factors are is told by the U-Net's features, position by position, and by the readout of the picture as a
    whole: undoing blur takes large factors that depend on how strong it is, as the readout says. The bands are
    differences of Gaussians. On an unshuffled picture both are one convolution; the outermost positions, where it would
    look over the border, keep their detail as it is.
    """

    kernel: Tensor
    SIGMAS_PX = (0.7, 1.4)
    REACH_PX = 4

    def __init__(self, width: int, step: int, readout: int) -> None:
        super().__init__()
        self.factors = nn.Conv2d(width, len(self.SIGMAS_PX), 1)
        self.steer = nn.Linear(readout, len(self.SIGMAS_PX), bias=False)
        nn.init.zeros_(self.steer.weight)
        nn.init.zeros_(self.factors.weight)
        assert self.factors.bias is not None
        nn.init.zeros_(self.factors.bias)
        self.border = -(-self.REACH_PX // step)  # positions
        size = 2 * self.REACH_PX + 1
        same = torch.zeros(size, size)
        same[self.REACH_PX, self.REACH_PX] = 1
        smooth = [same, *(gaussian(size, sigma) for sigma in self.SIGMAS_PX)]
        bands = torch.stack([finer - coarser for finer, coarser in pairwise(smooth)])
        self.register_buffer("kernel", unshuffled(bands, step), persistent=False)

    def forward(self, x: Tensor, picture: Tensor, readout: Tensor) -> Tensor:
        """What to add to an unshuffled picture (B, step * step, H, W), by features (B, width, H, W) and readout."""
        fine, middle = F.pad(F.conv2d(picture, self.kernel), [self.border] * 4).chunk(2, 1)
        factors = self.factors(x) + self.steer(readout)[..., None, None]
        factor_of_fine, factor_of_middle = factors.chunk(2, 1)
        return factor_of_fine * fine + factor_of_middle * middle


def gaussian(size: int, sigma: float) -> Tensor:
    """A round Gaussian of size x size that sums to one."""
    line = torch.exp(-((torch.arange(size) - size // 2) ** 2) / (2 * sigma**2))
    square = line[:, None] * line
    return square / square.sum()


def unshuffled(filters: Tensor, step: int) -> Tensor:
    """Filters (N, size, size) for a plane, as one kernel (N * step * step, step * step, n, n) for it unshuffled."""
    reach = filters.shape[-1] // 2
    border = -(-reach // step)  # positions
    free = (2 * border + 1) * step - filters.shape[-1]  # pixels that the positions cover beyond one filter
    first = border * step - reach  # where the filter of a position's first pixel begins
    placed = [
        F.pad(filters, (first + x, free - first - x, first + y, free - first - y))
        for y in range(step)
        for x in range(step)
    ]
    return F.pixel_unshuffle(torch.stack(placed, 1)[:, :, None], step).flatten(0, 1)
