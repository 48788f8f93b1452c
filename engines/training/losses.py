"""What a fused picture should be: measured against the clean sources, although the network saw degraded ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import Tensor

from engines.dspfusion.head import BLUE, GREEN, RED

FIDELITY_WINDOWS = (11, 7, 3, 3)  # pixels, at full resolution and at each half
FIDELITY_NOISE = 2 / 255**2  # variance of the noise of seeing
FIDELITY_FLOOR = 0.2  # nats per pixel: a source without information is not worth copying its noise
STILL = 2 / 255  # a pixel that changes by less, in both clean sources, stands still: the evaluation counts likewise
Weight = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class LossWeights:
    __pydantic_config__ = ConfigDict(extra="forbid")

    structure: Weight = 0.5
    fidelity: Weight = 1.0
    intensity: Weight = 15.0
    consistency: Weight = 0.25
    colour: Weight = 20.0
    gradient: Weight = 20.0
    contrast: Weight = 0.1  # InfoNCE on the degradation embeddings
    naming: Weight = 0.5  # cross entropy of the degradation names
    rating: Weight = 0.5  # L1 of their strengths
    tokens: Weight = 10.0  # stages II and III: L1 between restored and clean semantic tokens
    few_steps: Weight = 0.0  # stage II: L1 between the tokens after one or two steps and after all ten
    flicker: Weight = 20.0  # stage IV: change from frame to frame where nothing changes
    warped: Weight = 10.0  # stage IV: change along the motion


def luminance(picture: Tensor) -> Tensor:
    """BT.601 luminance, (B, 3, H, W) -> (B, 1, H, W)."""
    return RED * picture[:, 0:1] + GREEN * picture[:, 1:2] + BLUE * picture[:, 2:3]


def chroma(picture: Tensor) -> Tensor:
    """Cb and Cr about zero, (B, 3, H, W) -> (B, 2, H, W)."""
    light = luminance(picture)
    return torch.cat([(picture[:, 2:3] - light) / 1.772, (picture[:, 0:1] - light) / 1.402], 1)


def local_mean(x: Tensor, window: int) -> Tensor:
    """Means of window x window pixels, without a border: (B, C, H, W) -> (B, C, H - window + 1, W - window + 1).

    Two narrow depthwise convolutions; pooling takes four times as long to train through on a processor.
    """
    channels = x.shape[1]
    weight = x.new_full((channels, 1, window, 1), 1 / window)
    down = F.conv2d(x, weight, groups=channels)
    return F.conv2d(down, weight.transpose(-1, -2), groups=channels)


def structural_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Mean SSIM of two pictures in [0, 1], 7 x 7 windows."""
    pictures = torch.cat([first, second, first * first, second * second, first * second], 1)
    mean_1, mean_2, square_1, square_2, product = local_mean(pictures, 7).split(1, 1)
    variances = square_1 - mean_1**2 + square_2 - mean_2**2
    covariance = product - mean_1 * mean_2
    similarity = (2 * mean_1 * mean_2 + 0.01**2) * (2 * covariance + 0.03**2)
    return (similarity / ((mean_1**2 + mean_2**2 + 0.01**2) * (variances + 0.03**2))).mean()


def lost_information(picture: Tensor, sources: Tensor) -> Tensor:
    """Share of each source's visual information that a picture lost: pixel-domain VIF turned round, with box windows.

    Contrast beyond the source's earns nothing, so that nothing is sharpened or stretched for its sake.

    Args:
        picture: (B, 1, H, W) in [0, 1].
        sources: (B, S, H, W).

    Returns:
        A scalar: the mean over the pictures of the sum over the sources; 0 where nothing was lost.

    Reference: Sheikh and Bovik, "Image information and visual quality", 2006.
    """
    count = sources.shape[1]
    kept = all_of_it = sources.new_zeros(())
    for level, window in enumerate(FIDELITY_WINDOWS):
        if level:
            picture, sources = F.avg_pool2d(picture, 2), F.avg_pool2d(sources, 2)
        if min(picture.shape[-2:]) < window:
            break  # a small picture has fewer scales
        moments = torch.cat([picture, picture * picture, sources, sources * sources, sources * picture], 1)
        moments = local_mean(moments, window)
        mean_picture, square_picture, mean, square, product = moments.split([1, 1, count, count, count], 1)
        variance = (square - mean * mean).clamp(min=0)
        covariance = product - mean * mean_picture
        gain = covariance / (variance + 1e-6)
        rest = (square_picture - mean_picture * mean_picture - gain * covariance).clamp(min=0)
        gain = gain.clamp(0, 1)
        kept = kept + torch.log1p(gain * gain * variance / (rest + FIDELITY_NOISE)).mean((-2, -1))
        all_of_it = all_of_it + torch.log1p(variance / FIDELITY_NOISE).mean((-2, -1))
    return (1 - (kept + FIDELITY_FLOOR) / (all_of_it + FIDELITY_FLOOR)).sum(1).mean()


def sobel(picture: Tensor) -> Tensor:
    """Gradients along x and y, (B, 1, H, W) -> (B, 2, H - 2, W - 2)."""
    along_x = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=picture.device)
    return F.conv2d(picture, torch.stack([along_x, along_x.T])[:, None])


def fusion_losses(fused: Tensor, infrared: Tensor, visible: Tensor) -> dict[str, Tensor]:
    """The image losses by name, before weighting.

    Args:
        fused: (B, 3, H, W).
        infrared, visible: the clean sources, (B, 1, H, W) and (B, 3, H, W). One that is black all over is missing: the
            other is asked for in its place, for likeness to black would be asking for darkness.
    """
    infrared, visible = _stand_in(infrared, luminance(visible)), _stand_in(visible, infrared)
    fused_light, visible_light = luminance(fused), luminance(visible)
    gradients = sobel(torch.cat([fused_light, infrared, visible_light])).chunk(3)
    # The signed gradient of the stronger source: its magnitude alone would allow inverted edges, that is halos.
    stronger = torch.where(gradients[1].abs() > gradients[2].abs(), gradients[1], gradients[2])
    return {
        "structure": 2
        - structural_similarity(fused_light, visible_light)
        - structural_similarity(fused_light, infrared),
        "fidelity": lost_information(fused_light, torch.cat([infrared, visible_light], 1)),
        "intensity": F.l1_loss(fused_light, torch.maximum(infrared, visible_light)),
        "consistency": F.l1_loss(fused_light, infrared) + F.l1_loss(fused_light, visible_light),
        "colour": F.l1_loss(chroma(fused), chroma(visible)),
        "gradient": F.l1_loss(gradients[0], stronger),
    }


def _stand_in(source: Tensor, other: Tensor) -> Tensor:
    """The source, or the other one in those items of the batch where it is black all over."""
    return torch.where(source.amax((1, 2, 3), keepdim=True) > 0, source, other)


def info_nce(embeddings: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Equal labels attract, all others repel (InfoNCE with several positives).

    Args:
        embeddings: (N, D).
        labels: (N,), negative ones are left out.

    Returns:
        A scalar; zero where no two labels are equal.
    """
    kept = labels >= 0
    embeddings, labels = F.normalize(embeddings[kept], dim=-1), labels[kept]
    alike = (labels[:, None] == labels[None]).float()
    alike.fill_diagonal_(0)
    likeness = embeddings @ embeddings.T / temperature
    likeness = likeness - torch.eye(len(labels), device=labels.device) * 1e4  # nobody is compared with itself
    share = F.log_softmax(likeness, -1)
    return -(alike * share).sum() / alike.sum().clamp(min=1)


def teacher_losses(fused: Tensor, taught: Tensor) -> dict[str, Tensor]:
    """Distance to a teacher's picture of the same input, both (B, 3, H, W)."""
    gradients = sobel(torch.cat([luminance(fused), luminance(taught)])).chunk(2)
    return {
        "teacher_intensity": F.l1_loss(fused, taught),
        "teacher_gradient": F.l1_loss(gradients[0], gradients[1]),
    }


def flicker(first: Tensor, second: Tensor, clean_first: Tensor, clean_second: Tensor) -> Tensor:
    """Mean change of the fused luminance where no clean source changes.

    Args:
        first, second: fused pictures of neighbouring frames, (B, 3, H, W).
        clean_first, clean_second: clean infrared and visible luminance of these frames, (B, 2, H, W).

    Returns:
        A scalar; zero where everything moves.
    """
    still = ((clean_second - clean_first).abs() < STILL).all(1, keepdim=True).to(first)
    return _mean_where((luminance(second) - luminance(first)).abs(), still)


def warped(first: Tensor, second: Tensor, flow: Tensor, trusted: Tensor) -> Tensor:
    """Mean difference between the second fused picture and the first one moved along the flow.

    Args:
        first, second: (B, 3, H, W).
        flow: where a pixel of the second frame comes from, in pixels from itself, (B, 2, H, W) as (dx, dy).
        trusted: 1 where the flow is to be believed, else 0, (B, 1, H, W).
    """
    return _mean_where((second - warp(first, flow)).abs(), trusted)


def warp(picture: Tensor, flow: Tensor) -> Tensor:
    """The picture as seen at every pixel's origin, (B, C, H, W); borders are repeated."""
    height, width = picture.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=picture.device), torch.arange(width, device=picture.device), indexing="ij"
    )
    sampled = torch.stack([(x + flow[:, 0]) * (2 / (width - 1)) - 1, (y + flow[:, 1]) * (2 / (height - 1)) - 1], -1)
    return F.grid_sample(picture, sampled, padding_mode="border", align_corners=True)


def _mean_where(values: Tensor, there: Tensor) -> Tensor:
    """Mean of (B, C, H, W) over the pixels of (B, 1, H, W) that are 1."""
    return (values * there).sum() / (there.sum() * values.shape[1]).clamp(min=1)
