"""The path of a frame as a processor runs it best: the same function as `FrameGraph`, by other steps.

Processors are bound by memory here, so every step that only moves bytes is folded into one that computes:

- A row of `step` RGB pixels is one position of 3 * step channels. Pictures enter as they lie in memory, and the strided
  convolutions that unshuffle them read them so.
- What a decoder level gets is linear in both of its inputs: expanding, shuffling and joining become one transposed
  convolution and one of 1x1.
- One 1x1 convolution turns luminance and colour differences into RGB in the order of the picture's bytes.

Nano at 640x480 in OpenVINO: 14.2 instead of 18.0 ms (bf16, two threads; medians of one run).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.dspfusion.blocks import Upsample
from engines.dspfusion.head import BLUE, GREEN, RED, RestoredHead
from engines.dspfusion.network import DSPFusion


class FoldedFrame(nn.Module):
    """A trained network with a `RestoredHead`, rearranged. `arrays.picture_of` makes the picture of what it returns."""

    def __init__(self, network: DSPFusion) -> None:
        super().__init__()
        unet, head = network.unet, network.unet.head
        assert isinstance(head, RestoredHead)
        self.network, self.unet, self.head = network, unet, head
        self.step, self.multiple = network.variant.unshuffle, network.variant.multiple
        with torch.no_grad():
            self._enter = row_kernel(unet.enter.weight.sum(1, keepdim=True)), row_kernel(unet.enter.weight)
            self._unshuffle = row_kernel(head.plain)
            self._colours = [row_kernel(kernel) for kernel in head.colours.chunk(3)]  # luminance, blue, red
            self._to_bytes = to_bytes_kernel(self.step)
            self._joins = [joined(up, reduce) for up, reduce in zip(unet.up, unet.reduce, strict=True)]

    def forward(
        self,
        infrared: Tensor,  # uint8 (H, W)
        visible: Tensor,  # uint8 (H, W, 3)
        degradation_infrared: Tensor,  # (16, Cd)
        degradation_visible: Tensor,  # (16, Cd)
        semantic: Tensor,  # (16, Cs)
    ) -> Tensor:
        """The fused picture as uint8 blocks: (1, H / step, W / step, 3 * step * step), padded sizes."""
        infrared, visible = (rows_of(padded(picture, self.multiple), self.step) for picture in (infrared, visible))
        stride, bias = (self.step, 1), self.unet.enter.bias
        degradation = degradation_infrared[None], degradation_visible[None]
        features = self.unet.features(
            (F.conv2d(infrared, self._enter[0], bias, stride), F.conv2d(visible, self._enter[1], bias, stride)),
            degradation,
            semantic[None],
            self._join,
        )
        luminance, blue, red = (F.conv2d(visible, kernel, stride=stride) for kernel in self._colours)
        infrared = F.conv2d(infrared, self._unshuffle, stride=stride)
        fused = self.head.restore(features, infrared, luminance, blue, red, self.network.readout(*degradation))
        picture = F.conv2d(torch.cat(fused, 1), self._to_bytes)
        return picture.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)

    def _join(self, level: int, coarse: Tensor, fine: Tensor) -> Tensor:
        from_coarse, from_fine = self._joins[level]
        return F.conv_transpose2d(coarse, from_coarse, stride=2) + F.conv2d(fine, from_fine)


def joined(up: nn.Module, reduce: nn.Module) -> tuple[Tensor, Tensor]:
    """`reduce` of what `up` shuffles, beside the encoder's features, as two kernels: one transposed, one of 1x1."""
    assert isinstance(up, Upsample)
    assert isinstance(reduce, nn.Conv2d)
    expand, join = up.expand.weight[..., 0, 0], reduce.weight[..., 0, 0]
    width = expand.shape[0] // 4
    coarse = torch.einsum("oc,cki->iok", join[:, :width], expand.reshape(width, 4, -1)).unflatten(2, (2, 2))
    return coarse.contiguous(), join[:, width:, None, None].contiguous()


def padded(picture: Tensor, multiple: int) -> Tensor:
    """`network.pad` for bytes (H, W) or (H, W, 3), which PyTorch does not reflect."""
    for axis in (0, 1):
        size = picture.shape[axis]
        if missing := -size % multiple:
            indices = [*range(size), *range(size - 2, size - 2 - missing, -1)]
            picture = picture.index_select(axis, torch.tensor(indices))
    return picture


def rows_of(picture: Tensor, step: int) -> Tensor:
    """uint8 (H, W) or (H, W, 3) -> float32 (1, C * step, H, W / step), 0 to 255, without moving a byte."""
    height, width = picture.shape[:2]
    return picture.reshape(1, height, width // step, -1).float().permute(0, 3, 1, 2)


def row_kernel(kernel: Tensor) -> Tensor:
    """A kernel (O, C, step, step) for pictures in [0, 1], as one (O, step * C, step, 1) for `rows_of` them."""
    return kernel.permute(0, 3, 1, 2).flatten(1, 2)[..., None] / 255


def to_bytes_kernel(step: int) -> Tensor:
    """(fused, blue, red) planes of step * step channels in [0, 1] -> (pixel, RGB) channels in 0 to 255."""
    rgb = torch.tensor([[1, 0, 1], [1, -BLUE / GREEN, -RED / GREEN], [1, 1, 0]])  # rows R, G, B
    return 255 * torch.einsum("ck,pq->pckq", rgb, torch.eye(step**2)).reshape(3 * step**2, 3 * step**2, 1, 1)
