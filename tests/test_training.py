"""Training: two steps, an exact resume, who learns in which stage, and what a batch is made of."""

from __future__ import annotations

import csv
import dataclasses
import io
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from engines.base import EngineError
from engines.dspfusion import variants
from engines.dspfusion.variants import VARIANTS, load
from engines.training.config import TrainConfig, read_config
from engines.training.data import IGNORED, Draw, Pair, draw_batch, read_pairs
from engines.training.losses import chroma, fusion_losses, info_nce, luminance, structural_similarity
from engines.training.train import Training, main, take_fitting, train

DRAW = Draw(region_px=64, crop_px=32)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network small enough for a test, under a name of its own, and one thread: two wait for each other."""
    torch.set_num_threads(1)
    tiny = dataclasses.replace(
        VARIANTS["nano"],
        name="tiny",
        widths=(8, 8, 8),
        degradation_width=8,
        degradation_blocks=1,
        semantic_width=8,
        semantic_blocks=1,
        denoiser_width=16,
        denoiser_layers=1,
    )
    monkeypatch.setitem(variants.VARIANTS, "tiny", tiny)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three synthetic pairs of two subsets in one tar part."""
    folder = tmp_path / "data"
    folder.mkdir()
    random = np.random.default_rng(0)
    rows = []
    with tarfile.open(folder / "part.tar", "w") as tar:
        for name, subset, size in (("a", "road", (80, 96)), ("b", "road", (40, 48)), ("c", "wood", (80, 80))):
            visible = cv2.resize(random.integers(0, 255, (6, 6, 3), np.uint8), size[::-1])
            for kind, picture in (("ir", visible[..., 0]), ("vi", visible)):
                encoded = cv2.imencode(".png", picture)[1].tobytes()
                member = tarfile.TarInfo(f"{subset}/{kind}/{name}.png")
                member.size = len(encoded)
                tar.addfile(member, io.BytesIO(encoded))
            paths = {"ir": f"{subset}/ir/{name}.png", "vi": f"{subset}/vi/{name}.png"}
            rows.append({"subset": subset, "name": name, "tar": "part.tar", **paths})
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture
def config(dataset: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        variant="tiny",
        data=str(dataset),
        subsets=("road", "wood"),
        output=str(tmp_path / "out"),
        iterations=(2, 2, 2),
        batch=2,
        threads=1,
        warm_up_items=4,
        warm_up_iterations=2,
        draw=DRAW,
    )


def pairs_of(config: TrainConfig) -> list[Pair]:
    return read_pairs(Path(config.data), config.subsets, None, config.draw.region_px)


def test_pairs_are_read_by_subset_and_enlarged_to_the_region(dataset: Path):
    pairs = read_pairs(dataset, ("road",), None, 64)
    assert [pair.infrared.shape for pair in pairs] == [(80, 96), (64, 77)]
    assert pairs[0].visible.shape == (80, 96, 3)


def test_a_residual_field_moves_the_infrared_picture_of_its_subset(dataset: Path, tmp_path: Path):
    field = np.zeros((80, 80, 2), np.float16)
    field[..., 0] = 3  # what is shown at x is found at x + 3
    np.savez(tmp_path / "fields.npz", wood=field)
    plain = read_pairs(dataset, ("wood",), None, 64)[0].infrared
    moved = read_pairs(dataset, ("wood",), tmp_path / "fields.npz", 64)[0].infrared
    assert np.array_equal(moved[:, :-3], plain[:, 3:])


def test_missing_data_says_what_is_needed(tmp_path: Path, dataset: Path):
    with pytest.raises(EngineError, match=r"needs index\.csv"):
        read_pairs(tmp_path / "nothing", ("road",), None, 64)
    with pytest.raises(EngineError, match="no pair of sea"):
        read_pairs(dataset, ("sea",), None, 64)


def test_a_batch_depends_on_its_number_alone(config: TrainConfig):
    pairs = pairs_of(config)
    first, again, other = (draw_batch(pairs, 2, DRAW, 1, number) for number in (7, 7, 8))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first.visible, other.visible)


def test_a_crop_is_a_part_of_its_region(config: TrainConfig):
    batch = draw_batch(pairs_of(config), 2, DRAW, 1, 0)
    assert batch.region_visible.shape == (2, 3, 64, 64)
    assert batch.visible.shape == (2, 3, 32, 32)
    windows = batch.region_visible[0].unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 33, 33, 32, 32)
    assert (windows == batch.visible[0][:, None, None]).all(-1).all(-1).all(0).any()


def test_a_missing_modality_is_black_and_has_no_name(config: TrainConfig):
    batch = draw_batch(pairs_of(config), 8, dataclasses.replace(DRAW, missing_share=1.0), 1, 0)
    missing_infrared = batch.infrared_kind == IGNORED
    assert (missing_infrared ^ (batch.visible_kind == IGNORED)).all()
    assert batch.infrared[missing_infrared].abs().sum() == 0
    assert batch.clean_visible[~missing_infrared].abs().sum() == 0


def test_stage_one_reaches_every_parameter_but_the_diffusion(config: TrainConfig):
    training = Training(config, pairs_of(config))
    training.step(draw_batch(training.pairs, 4, DRAW, 1, 0))
    for name, parameter in training.network.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert learns == (not name.startswith("diffusion.")), name


@pytest.mark.parametrize(("stage", "part"), [(2, "diffusion."), (3, "unet.")])
def test_the_later_stages_reach_one_part_alone(config: TrainConfig, stage: int, part: str):
    training = Training(config, pairs_of(config))
    training.run(stop_after=2)
    while training.stage < stage:
        training._end_stage()
    before = {name: value.clone() for name, value in training.network.state_dict().items()}
    training.step(draw_batch(training.pairs, 2, DRAW, 1, 0))
    for name, value in training.network.named_parameters():
        assert torch.equal(before[name], value) == (not name.startswith(part)), name


def test_a_resumed_training_ends_where_an_unbroken_one_does(config: TrainConfig, tmp_path: Path):
    pairs = pairs_of(config)
    unbroken = Training(config, pairs)
    unbroken.run()
    for stop in (1, 3, 5):  # within each stage
        broken = Training(config, pairs)
        broken.run(tmp_path / "a.checkpoint", stop_after=stop)
        resumed = Training(config, pairs)
        resumed.load(tmp_path / "a.checkpoint")
        resumed.run()
        assert resumed.done == [2, 2, 2, 0]
        for name, value in unbroken.average.items():
            assert torch.equal(value, resumed.average[name]), (stop, name)


def test_training_exports_weights_that_load(config: TrainConfig):
    weights = train(config).weights
    network, _ = load("tiny", weights)
    assert not network.training
    with safe_open(weights, framework="pt") as file:
        assert file.metadata()["variant"] == "tiny"
        assert file.metadata()["iterations"] == "2+2+2+0"


def test_a_finished_training_resumes_to_nothing(config: TrainConfig):
    before = load_file(train(config).weights)
    after = load_file(train(config, resume=True).weights)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_resuming_without_a_checkpoint_is_refused(config: TrainConfig):
    with pytest.raises(EngineError, match="no checkpoint"):
        train(config, resume=True)


def test_a_training_can_begin_with_the_weights_of_another(config: TrainConfig):
    weights = train(config).weights
    following = Training(config, pairs_of(config))
    assert take_fitting(following.network, weights) == len(following.average)


def test_the_command_reads_its_configuration(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "train.yaml"
    path.write_text(
        "variant: tiny\ndata: data\nsubsets: [road]\noutput: out\niterations: [1, 1, 1]\nbatch: 2\nthreads: 1\n"
        "warm_up_items: 0\ndraw: {region_px: 64, crop_px: 32}\n"
    )
    main([str(path)])
    assert capsys.readouterr().out.strip().endswith("tiny.safetensors")


def test_unknown_keys_are_refused(tmp_path: Path):
    path = tmp_path / "train.yaml"
    path.write_text("data: x\noutput: y\nlearning: fast\n")
    with pytest.raises(EngineError, match="learning"):
        read_config(path)


def test_the_brighter_source_has_no_intensity_loss():
    infrared = torch.zeros(1, 1, 16, 16)
    infrared[..., 8:] = 0.9
    visible = torch.full((1, 3, 16, 16), 0.4)
    brighter = torch.maximum(infrared, visible)
    losses = fusion_losses(brighter, infrared, visible)
    assert losses["intensity"].item() == pytest.approx(0, abs=1e-6)
    assert losses["gradient"].item() == pytest.approx(0.1, abs=0.1)
    assert losses["colour"].item() == pytest.approx(0, abs=1e-6)


def test_similarity_is_one_for_equal_pictures_and_less_for_others():
    picture = torch.rand(1, 1, 32, 32)
    assert structural_similarity(picture, picture).item() == pytest.approx(1)
    assert structural_similarity(picture, 1 - picture) < 0


def test_luminance_and_chroma_of_primaries():
    red = torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1)
    assert luminance(red).item() == pytest.approx(0.299)
    assert chroma(red).flatten().tolist() == pytest.approx([-0.169, 0.5], abs=1e-3)
    assert chroma(torch.full((1, 3, 1, 1), 0.7)).abs().max() < 1e-6


def test_info_nce_rewards_equal_names_that_lie_together():
    together = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    apart = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    labels = torch.tensor([0, 0, 1, 1])
    assert info_nce(together, labels) < 0.01
    assert info_nce(apart, labels) > 5
    assert info_nce(together, torch.full((4,), IGNORED)) == 0
