"""The network: its size, what it promises about shapes and ranges, and which parameters learn when."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from engines.arrays import picture_of, priors_from
from engines.base import INFRARED_DEGRADATIONS, VISIBLE_DEGRADATIONS, EngineError
from engines.dspfusion.diffusion import STEPS, SemanticDiffusion, alpha_bars, stride
from engines.dspfusion.folded import FoldedFrame
from engines.dspfusion.head import DetailBands, RestoredHead
from engines.dspfusion.loading import build, load
from engines.dspfusion.network import DSPFusion, PriorTokens, TellHead, pad
from engines.dspfusion.priors import mosaic, thumbnail
from engines.dspfusion.variants import VARIANTS, default_weights
from engines.evaluation.cases import public_pairs
from engines.evaluation.degradations import degrade
from engines.evaluation.metrics import intensity_error
from engines.pytorch_engine import FrameGraph, PriorGraph
from engines.training.losses import luminance
from tests.rigs.training import TINY


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(3)


def pair(height: int, width: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    return torch.rand(batch, 1, height, width), torch.rand(batch, 3, height, width)


def to_tensors(infrared: np.ndarray, visible: np.ndarray) -> tuple[Tensor, Tensor]:
    """uint8 (H, W) and (H, W, 3) -> (1, 1, H, W) and (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(infrared)[None, None] / 255, torch.from_numpy(visible).permute(2, 0, 1)[None] / 255


def fused(network: DSPFusion, infrared: Tensor, visible: Tensor, steps: int = 2) -> Tensor:
    with torch.no_grad():
        priors = network.estimate_priors(infrared, visible, steps)
        return network(infrared, visible, priors.degradation_infrared, priors.degradation_visible, priors.semantic)


def count(module: nn.Module) -> float:
    """Parameters in millions."""
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def test_base_has_the_published_size():
    base = build("base")
    assert count(base) == pytest.approx(14.0, rel=0.02)
    assert count(base.unet) == pytest.approx(8.42, rel=0.02)
    assert count(base.diffusion.denoiser) == pytest.approx(4.87, rel=0.02)
    assert count(base.semantic_encoder) == pytest.approx(0.61, rel=0.02)
    assert count(base.degradation_encoder) == pytest.approx(0.12, rel=0.02)


def test_nano_is_twenty_times_smaller_in_every_frame():
    assert count(build("nano").unet) < count(build("base").unet) / 20


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_gives_tokens_names_and_a_picture(name: str):
    network = build(name).eval()
    infrared, visible = pair(40, 56)
    with torch.no_grad():
        priors = network.estimate_priors(infrared, visible, 1)
        picture = network(infrared, visible, priors.degradation_infrared, priors.degradation_visible, priors.semantic)
    assert isinstance(priors, PriorTokens)
    assert priors.degradation_infrared.shape == (1, 16, network.variant.degradation_tokens)
    assert priors.degradation_visible.shape == (1, 16, network.variant.degradation_tokens)
    assert priors.semantic.shape == (1, 16, network.variant.semantic_tokens)
    assert priors.infrared_logits.shape == (1, len(INFRARED_DEGRADATIONS))
    assert priors.visible_logits.shape == (1, len(VISIBLE_DEGRADATIONS))
    assert picture.shape == (1, 3, 40, 56)
    assert picture.min() >= 0
    assert picture.max() <= 1


@pytest.mark.parametrize(("height", "width"), [(33, 47), (130, 131), (120, 161)])
def test_odd_sizes_keep_their_size(height: int, width: int):
    assert fused(DSPFusion(TINY), *pair(height, width)).shape == (1, 3, height, width)


def test_padding_mirrors_the_bottom_and_the_right():
    image = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert pad(image, 4)[0, 0].tolist() == [[0, 1, 2, 1], [3, 4, 5, 4], [6, 7, 8, 7], [3, 4, 5, 4]]


def test_a_picture_that_fits_is_not_padded():
    image = torch.rand(1, 1, 16, 32)
    assert pad(image, 16) is image


@pytest.mark.parametrize("name", ["nano", "small"])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (69, 103)])
def test_the_folded_frame_is_the_same_function(name: str, height: int, width: int):
    """What processors run is rearranged, and rounds to the same bytes but for ties that fall to the other side."""
    network = build(name).eval()
    for part in (network.unet.head, network.unet.tell):
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.1)
    random = np.random.default_rng(4)
    infrared = torch.from_numpy(random.integers(0, 256, (height, width), np.uint8))
    visible = torch.from_numpy(random.integers(0, 256, (height, width, 3), np.uint8))
    widths = network.variant.degradation_tokens, network.variant.semantic_tokens
    tokens = torch.randn(16, widths[0]), torch.randn(16, widths[0]), torch.randn(16, widths[1])
    with torch.no_grad():
        expected = FrameGraph(network)(infrared, visible, *tokens).numpy()
        blocks = FoldedFrame(network)(infrared, visible, *tokens).numpy()
    found = picture_of(blocks, (height, width))
    assert found.shape == expected.shape
    assert expected.std() > 20  # the picture is no plain one
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert (found != expected).mean() < 1e-3


def test_the_head_is_told_nothing_at_first_and_then_what_the_tokens_say_on_average():
    tell = TellHead(5, TINY)
    infrared, visible = torch.randn(2, 2, 16, TINY.degradation_tokens)
    semantic = torch.randn(2, 16, TINY.semantic_tokens)
    assert tell((infrared, visible), semantic).tolist() == torch.zeros(2, 5, 1, 1).tolist()
    nn.init.ones_(tell.project.weight)
    told = tell((infrared, visible), semantic)
    assert told.shape == (2, 5, 1, 1)
    expected = sum(tokens.mean(1).sum(-1) for tokens in (infrared, visible, semantic))
    torch.testing.assert_close(told[:, 3, 0, 0], expected)


@pytest.mark.parametrize("step", [4, 2])
def test_detail_is_raised_band_by_band_as_on_the_plane(step: int):
    """0.7 of the detail finer than a Gaussian of 0.7 px, and -1.3 of that between 0.7 and 1.4 px."""
    plane = torch.rand(1, 1, 48, 64)
    details = DetailBands(5, step, 1)
    details.factors.bias.data = torch.tensor([0.7, -2.0])  # by what stands there...
    details.steer.weight.data = torch.tensor([[0.0], [1.4]])  # ...and by the readout of the picture, which says 0.5
    with torch.no_grad():
        features = torch.zeros(1, 5, 48 // step, 64 // step)
        added = F.pixel_shuffle(details(features, F.pixel_unshuffle(plane, step), torch.tensor([[0.5]])), step)
    picture = plane[0, 0].numpy()
    smooth = [picture, *(cv2.GaussianBlur(picture, (9, 9), sigma) for sigma in (0.7, 1.4))]
    expected = 0.7 * (smooth[0] - smooth[1]) - 1.3 * (smooth[1] - smooth[2])
    inside = (slice(4, -4), slice(4, -4))
    assert np.abs(added[0, 0].numpy()[inside] - expected[inside]).max() < 1e-5
    border = np.ones_like(picture, bool)
    border[inside] = False
    assert not added[0, 0].numpy()[border].any()  # it never looks over the border


def test_a_plain_picture_has_no_detail():
    details = DetailBands(5, 4, 1)
    details.factors.bias.data = torch.tensor([5.0, 5.0])
    assert details(torch.zeros(1, 5, 6, 8), torch.full((1, 16, 6, 8), 0.8), torch.ones(1, 1)).abs().max() < 1e-5


@pytest.mark.parametrize("raised", ["infrared", "visible"])
@pytest.mark.parametrize("shown", ["infrared", "visible"])
def test_what_sharpens_one_source_leaves_the_other_as_it_is(raised: str, shown: str):
    head = RestoredHead(5, 4, 1)
    head.get_submodule(f"{raised}_details").factors.bias.data = torch.tensor([1.0, 1.0])
    assert head.maps[4].bias is not None
    head.maps[4].bias.data.fill_(20)  # the gate shows the brighter source alone
    bright, dark = torch.rand(2, 1, 16, 8, 8) * 0.3 + torch.tensor([0.6, 0.1])[:, None, None, None, None]
    infrared, luminance = (bright, dark) if shown == "infrared" else (dark, bright)
    with torch.no_grad():
        picture = head.restore(torch.zeros(1, 5, 8, 8), infrared, luminance, dark, dark, torch.zeros(1, 1))[0]
    changed = (picture - bright).abs().mean()
    assert changed > 0.02 if raised == shown else changed < 1e-6


def test_the_readout_says_how_likely_each_degradation_is_and_how_strong():
    network = DSPFusion(TINY)
    with torch.no_grad():
        priors = network.estimate_priors(*pair(128, 128), 1)
        readout = network.readout(priors.degradation_infrared, priors.degradation_visible)
    shares = torch.cat([priors.infrared_logits.softmax(-1), priors.visible_logits.softmax(-1)], -1)
    torch.testing.assert_close(readout[:, :15], shares)
    torch.testing.assert_close(readout[:, 15:22], shares[:, :7] * priors.infrared_strengths)
    torch.testing.assert_close(readout[:, 22:], shares[:, 7:] * priors.visible_strengths)


def test_the_strength_that_is_told_is_that_of_the_likeliest_degradation():
    network = DSPFusion(TINY)
    network.name_visible.bias.data[3] = 20  # blur, whatever is seen
    network.rate_visible.weight.data.zero_()
    network.rate_visible.bias.data[:] = torch.tensor([0.0, 1, 2, 1.5, -1, -2, 3, 4])
    with torch.no_grad():
        priors = priors_from([output.numpy() for output in PriorGraph(network, 1).of_units(*pair(128, 128))])
    assert priors.visible_strength == pytest.approx(1 / (1 + math.exp(-1.5)))


def test_an_untrained_nano_shows_nearly_the_brighter_source():
    infrared, visible = pair(32, 32)
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    visible = visible * 0.5 + 0.2
    picture = fused(build("nano"), infrared * 0.5 + 0.2, visible)
    brighter = torch.maximum((visible * weights).sum(1), infrared[:, 0] * 0.5 + 0.2)
    assert ((picture * weights).sum(1) - brighter).abs().mean() < 0.05


def test_equal_inputs_give_equal_priors_and_pictures():
    network = DSPFusion(TINY)
    infrared, visible = pair(128, 128)
    assert torch.equal(fused(network, infrared, visible), fused(network, infrared, visible))


def test_a_batch_is_its_items():
    network = DSPFusion(TINY)
    infrared, visible = pair(64, 64, batch=2)
    alone = fused(network, infrared[1:], visible[1:])
    torch.testing.assert_close(fused(network, infrared, visible)[1:], alone, atol=1e-5, rtol=0)


def test_the_degradation_view_keeps_native_pixels():
    image = torch.arange(256.0 * 512).reshape(1, 1, 256, 512)
    view = mosaic(image)
    assert view.shape == (1, 1, 128, 128)
    assert view[0, 0, 0, 1] - view[0, 0, 0, 0] == 1  # neighbours stay neighbours
    assert view[0, 0, 0, 0] == image[0, 0, 16, 48]  # the middle of the first of four by four cells


def test_the_semantic_view_of_a_large_frame_is_small():
    assert thumbnail(torch.rand(1, 3, 480, 640)).shape == (1, 3, 120, 160)
    assert thumbnail(torch.rand(1, 3, 1024, 1280)).shape == (1, 3, 128, 160)
    assert thumbnail(torch.rand(1, 3, 100, 100)).shape == (1, 3, 100, 100)


@pytest.mark.parametrize("steps", range(1, STEPS + 1))
def test_diffusion_strides_over_the_schedule(steps: int):
    times = stride(steps)
    assert times[0] == STEPS
    assert times[-1] == 0
    assert len(set(times)) == steps + 1
    network = DSPFusion(TINY)
    with torch.no_grad():
        tokens = network.estimate_priors(*pair(128, 128), steps).semantic
    assert tokens.isfinite().all()


@pytest.mark.parametrize("steps", [0, 11])
def test_impossible_step_counts_are_refused(steps: int):
    with pytest.raises(EngineError, match="choose 1 to 10"):
        stride(steps)


def test_the_schedule_ends_in_noise():
    shares = alpha_bars()
    assert shares[0] == 1
    assert shares[1] == pytest.approx(0.9)
    assert shares[-1] < 1e-4


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_diffusion_returns_what_a_perfect_denoiser_predicts(steps: int):
    diffusion = SemanticDiffusion(semantic=8, degradation=8, width=16, layers=1)
    truth = torch.randn(1, 16, 8)
    diffusion.denoiser.forward = lambda noisy, time, condition: truth  # type: ignore[method-assign]
    restored = diffusion(truth, truth, truth, steps)
    torch.testing.assert_close(restored, truth)


def test_the_noise_travels_with_the_weights():
    assert "diffusion.noise" in DSPFusion(TINY).state_dict()
    assert torch.equal(DSPFusion(TINY).diffusion.noise, DSPFusion(TINY).diffusion.noise)


def test_a_tiny_network_overfits_one_pair():
    """Sixty iterations take the error to the per-pixel mean (which no gate starts from) under a third."""
    network = DSPFusion(dataclasses.replace(TINY, widths=(16, 16, 16)))
    infrared, visible = pair(32, 32)
    target = visible * 0.5 + infrared * 0.5
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        priors = network.estimate_priors(infrared, visible, 1)
        loss = (network(infrared, visible, *priors[:3]) - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_unknown_variants_are_refused_by_name():
    with pytest.raises(EngineError, match=r"no variant 'huge'.*base, nano"):
        build("huge")


def test_missing_weights_say_what_is_shipped(tmp_path: Path):
    with pytest.raises(EngineError, match=r"no weights none\.safetensors"):
        load("nano", tmp_path / "none.safetensors")


def test_weights_of_another_variant_are_refused(tmp_path: Path):
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"variant": "base"})
    with pytest.raises(EngineError, match="weights of variant 'base', not 'nano'"):
        load("nano", path)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path):
    path = tmp_path / "old.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"variant": "nano"})
    with pytest.raises(EngineError, match="does not fit"):
        load("nano", path)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path):
    path = tmp_path / "text.safetensors"
    path.write_text("no weights")
    with pytest.raises(EngineError, match="not a safetensors file"):
        load("nano", path)


def test_the_shipped_nano_shows_the_other_source_when_one_is_black():
    """A missing camera is black: the picture then has the other camera's structure."""
    network, digest = load("nano")
    assert len(digest) == 64
    assert default_weights("nano").is_file()
    y, x = torch.meshgrid(torch.linspace(0, 1, 96), torch.linspace(0, 1, 128), indexing="ij")
    scene = (0.5 + 0.25 * torch.sin(9 * x) * torch.cos(7 * y))[None, None]
    colours = torch.cat([scene, scene * 0.9, scene * 0.8], 1)
    only_infrared = fused(network, scene, torch.zeros(1, 3, 96, 128), 4)
    only_visible = fused(network, torch.zeros_like(scene), colours, 4)
    for picture in (only_infrared, only_visible):
        assert torch.corrcoef(torch.stack([luminance(picture).flatten(), scene.flatten()]))[0, 1] > 0.9
    assert only_infrared.std(1).max() < 0.1  # grey


@pytest.mark.realdata
def test_the_shipped_nano_shows_a_lone_real_source_to_a_few_grey_levels(data_dir: Path):
    network, _ = load("nano")
    pair_read = next(public_pairs(data_dir, ("msrs/00349D",)))
    infrared, visible = to_tensors(pair_read.infrared, pair_read.visible)
    only_infrared = fused(network, infrared, torch.zeros_like(visible), 4)
    only_visible = fused(network, torch.zeros_like(infrared), visible, 4)
    assert (only_infrared - infrared).abs().mean() * 255 < 8
    assert (only_visible - visible).abs().mean() * 255 < 8


@pytest.mark.realdata
@pytest.mark.parametrize("degradation", ["ir_stripe", "vis_haze", "vis_blur"])
def test_the_shipped_nano_names_what_spoils_a_real_pair(data_dir: Path, degradation: str):
    expected = {"ir_stripe": "stripes", "vis_haze": "haze", "vis_blur": "blur"}[degradation]
    network, _ = load("nano")
    found = 0
    names = ("msrs/00095D", "msrs/00349D", "msrs/00537D", "msrs/01413D")
    for pair_read in public_pairs(data_dir, names):
        infrared, visible = degrade(degradation, pair_read.infrared, pair_read.visible, seed=1)
        with torch.no_grad():
            priors = network.estimate_priors(*to_tensors(infrared, visible), 4)
        kinds, logits = INFRARED_DEGRADATIONS, priors.infrared_logits
        if degradation.startswith("vis"):
            kinds, logits = VISIBLE_DEGRADATIONS, priors.visible_logits
        found += kinds[int(logits.argmax())] == expected
    assert found >= 3  # of four


@pytest.mark.realdata
def test_the_restored_tokens_serve_better_than_those_of_hazy_pairs(data_dir: Path):
    """What the diffusion is for: the picture comes nearer to what the brighter of the clean sources shows."""
    network, _ = load("nano")
    errors = []
    for pair_read in public_pairs(data_dir, ("msrs/00095D", "msrs/00349D", "msrs/00537D", "msrs/01413D")):
        infrared, visible = degrade("vis_haze", pair_read.infrared, pair_read.visible, seed=1)
        inputs = to_tensors(infrared, visible)
        with torch.no_grad():
            priors = network.estimate_priors(*inputs, 4)
            for semantic in (network.encode_semantics(*inputs), priors.semantic):
                picture = network(*inputs, priors.degradation_infrared, priors.degradation_visible, semantic)
                shown = (picture[0].permute(1, 2, 0) * 255).round().byte().numpy()
                errors.append(intensity_error(shown, pair_read.infrared, pair_read.visible))
    as_seen, restored = np.reshape(errors, (-1, 2)).mean(0)
    assert restored < 0.75 * as_seen
