"""The loss of visual information says what VIF says, and does not reward contrast that no source has."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from engines.evaluation.metrics import visual_information_fidelity
from engines.training.losses import local_mean, lost_information


def texture(seed: int) -> Tensor:
    """A smooth random picture, (1, 1, 96, 128) in [0, 1]."""
    coarse = np.random.default_rng(seed).random((12, 16), np.float32)
    return torch.from_numpy(cv2.resize(coarse, (128, 96), interpolation=cv2.INTER_CUBIC).clip(0, 1))[None, None]


def test_nothing_is_lost_from_a_picture_that_is_its_source():
    assert lost_information(texture(1), texture(1)).item() == pytest.approx(0, abs=0.01)


def test_all_is_lost_in_a_grey_picture():
    assert lost_information(torch.full((1, 1, 96, 128), 0.5), texture(1)).item() > 0.9


def test_it_ranks_pictures_as_the_metric_does():
    first, second = texture(1), texture(2)
    candidates = [first, second, (first + second) / 2, torch.maximum(first, second)]
    found = [2 - lost_information(picture, torch.cat([first, second], 1)).item() for picture in candidates]
    expected = [
        visual_information_fidelity(*(255 * picture[0, 0].numpy() for picture in (candidate, first, second)))
        for candidate in candidates
    ]
    assert found == pytest.approx(expected, abs=0.08)


def test_stretched_contrast_earns_nothing():
    source = 0.3 + 0.3 * texture(1)
    stretched = (source - 0.45) * 1.6 + 0.45
    assert lost_information(stretched, source).item() >= lost_information(source, source).item() - 1e-4


def test_noise_costs_information_and_the_gradient_removes_it():
    torch.manual_seed(0)
    source = texture(1)
    noisy = (source + 0.1 * torch.randn_like(source)).requires_grad_()
    loss = lost_information(noisy, source)
    assert loss.item() > 0.3
    loss.backward()
    assert noisy.grad is not None
    with torch.no_grad():
        assert lost_information(noisy - 20 * noisy.grad, source) < loss


def test_a_black_source_costs_nothing_whatever_is_shown():
    assert lost_information(texture(1), torch.zeros(1, 1, 96, 128)).item() == pytest.approx(0, abs=1e-5)


def test_the_local_mean_is_the_mean_of_its_window():
    picture = torch.arange(2 * 5 * 6, dtype=torch.float32).reshape(1, 2, 5, 6)
    found = local_mean(picture, 3)
    assert found.shape == (1, 2, 3, 4)
    assert found[0, 1, 1, 2].item() == pytest.approx(picture[0, 1, 1:4, 2:5].mean().item())
