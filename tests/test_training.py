"""Training: two steps, an exact resume, who learns in which stage, and what a batch is made of."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from engines.base import VISIBLE_DEGRADATIONS, EngineError
from engines.dspfusion import variants
from engines.dspfusion.loading import load
from engines.training import journal as journal_module
from engines.training import stages
from engines.training import train as train_module
from engines.training import validation as validation_module
from engines.training.checkpoint import read_checkpoint, write_whole
from engines.training.config import TrainConfig, checked, read_config
from engines.training.data import (
    IGNORED,
    Batch,
    Pair,
    Spoiling,
    balanced,
    draw_batch,
    hold_back,
    read_pairs,
    reading_pairs,
)
from engines.training.distributed import Processes
from engines.training.journal import Journal
from engines.training.losses import (
    LossWeights,
    chroma,
    fusion_losses,
    info_nce,
    luminance,
    structural_similarity,
    teacher_losses,
)
from engines.training.stages import (
    IMAGE_LOSSES,
    Noise,
    clean_priors,
    clean_tokens,
    degraded_priors,
    image_losses,
    rating_loss,
    weighted,
)
from engines.training.train import Training, main, take_fitting, train, with_minutes
from engines.training.validation import Validation
from engines.training.video import VideoBatch, draw_video_batch
from pipeline.cli import app
from tests.rigs.training import DRAW, TINY, write_dataset


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network small enough for a test, under a name of its own, and one thread: two wait for each other."""
    torch.set_num_threads(1)
    monkeypatch.setitem(variants.VARIANTS, "tiny", TINY)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data")


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
        device="cpu",
    )


def changed(config: TrainConfig, **values: Any) -> TrainConfig:
    return checked(config.model_dump() | values, "test")


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


def test_fields_of_another_size_than_their_pictures_are_counted(dataset: Path, tmp_path: Path):
    np.savez(tmp_path / "fields.npz", road=np.zeros((80, 96, 2)), wood=np.zeros((480, 640, 2)), sea=np.zeros((2, 2, 2)))
    said: list[str] = []
    number, pairs = reading_pairs(dataset, ("road", "wood"), tmp_path / "fields.npz", 64, said.append)
    assert len(list(pairs)) == number == 3
    assert said == ["fields: road fits 1 of 2 pictures, wood fits 0 of 1 pictures, sea fits 0 of 0 pictures"]


def replace_member(folder: Path, name: str, content: bytes) -> None:
    """Writes the tar part anew with another content of one of its files."""
    with tarfile.open(folder / "part.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar} | {name: content}
    with tarfile.open(folder / "part.tar", "w") as tar:
        for path, data in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_the_two_pictures_of_a_pair_have_one_size(dataset: Path):
    replace_member(dataset, "road/vi/a.png", cv2.imencode(".png", np.zeros((75, 96, 3), np.uint8))[1].tobytes())
    with pytest.raises(EngineError, match=r"road/ir/a\.png has 96x80 pixels and road/vi/a\.png 96x75") as error:
        read_pairs(dataset, ("road",), None, 64)
    assert "\n" not in str(error.value)


def half_of(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "index.csv").write_text("subset,name\nroad,a\n"), "has no column tar, ir, vi"),
        (lambda f: (f / "index.csv").write_text("subset,tar,ir,vi\nroad,part.tar\n"), "row 1 of .* is cut off"),
        (lambda f: (f / "index.csv").write_bytes(b"\xff\xfe"), "index.csv cannot be read"),
        (lambda f: replace_member(f, "road/ir/a.png", b""), "road/ir/a.png in .* is no picture"),
        (lambda f: replace_member(f, "road/vi/a.png", b"hello"), "road/vi/a.png in .* is no picture"),
        (lambda f: half_of(f / "part.tar"), "part.tar cannot be read .*: fetch the tar part again"),
        (lambda f: (f / "part.tar").unlink(), "part.tar cannot be read"),
        (lambda f: half_of(f / "fields.npz"), "holds no displacement fields"),
        (lambda f: (f / "fields.npz").write_bytes(b""), "holds no displacement fields"),
        (lambda f: np.savez(f / "fields.npz", wood=np.zeros((80, 80))), r"`wood` .* is float64 of \(80, 80\)"),
        (lambda f: np.savez(f / "fields.npz", wood=np.zeros((80, 80, 3))), r"`wood` .* of shape \(height, width, 2\)"),
    ],
)
def test_damaged_training_data_is_told_in_one_line(dataset: Path, damage: Callable[[Path], object], said: str):
    np.savez(dataset / "fields.npz", wood=np.zeros((80, 80, 2)))
    read_pairs(dataset, ("road", "wood"), dataset / "fields.npz", 64)
    damage(dataset)
    with pytest.raises(EngineError, match=said) as error:
        read_pairs(dataset, ("road", "wood"), dataset / "fields.npz", 64)
    assert "\n" not in str(error.value)


def test_missing_data_says_what_is_needed(tmp_path: Path, dataset: Path):
    with pytest.raises(EngineError, match=r"needs index\.csv"):
        read_pairs(tmp_path / "nothing", ("road",), None, 64)
    with pytest.raises(EngineError, match="no pair of sea"):
        read_pairs(dataset, ("sea",), None, 64)


# Nothing is changed in the clean pictures but where they are cut, and what is degraded is degraded once.
AS_TAKEN = dataclasses.replace(DRAW, missing_share=0, gamma_range=0, second_share=0)


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


def test_infrared_lies_up_to_shift_px_beside_visible():
    """Both pictures count their own columns, or rows: what differs within a region is how far one was moved."""
    columns = np.tile(np.arange(100, dtype=np.uint8), (100, 1))
    for ramp in (columns, columns.T):
        pair = Pair(ramp, np.dstack([ramp] * 3))
        assert moves(pair, shift_px=2) == {-2, -1, 0, 1, 2}
        assert moves(pair, shift_px=0) == {0}


def moves(pair: Pair, shift_px: int) -> set[int]:
    draw = dataclasses.replace(AS_TAKEN, clean_share=1, shift_px=shift_px)
    batch = draw_batch([pair], 64, draw, 1, 0)
    apart = ((batch.clean_region_infrared - batch.clean_region_visible[:, :1]) * 255).round()
    assert torch.equal(apart.amin((1, 2, 3)), apart.amax((1, 2, 3)))
    return {int(move) for move in apart[:, 0, 0, 0]}


def test_only_what_was_degraded_has_a_strength(config: TrainConfig):
    batch = draw_batch(pairs_of(config), 64, dataclasses.replace(DRAW, clean_share=0.5, missing_share=0.2), 1, 0)
    for kind, strength in (
        (batch.infrared_kind, batch.infrared_strength),
        (batch.visible_kind, batch.visible_strength),
    ):
        assert {IGNORED, 0} < set(kind.tolist())
        assert torch.equal(strength > 0, kind > 0)


def test_a_night_scene_is_darkened_two_fifths_as_much():
    ratios: dict[str, set[float]] = {"low_light": set(), "another": set()}
    for seed in range(64):
        night, dusk = (
            Spoiling.drawn(np.full((8, 8, 3), light, np.float32), AS_TAKEN, np.random.default_rng(seed))
            for light in (0.24, 0.26)
        )
        name = VISIBLE_DEGRADATIONS[night.visible_kind]
        ratio = night.strength[1] / dusk.strength[1]
        ratios[name if name == "low_light" else "another"].add(round(ratio, 6))
        assert night.strength[0] == dusk.strength[0]
        assert night.visible_steps[0][2] == night.strength[1]  # the label tells what was done
    assert ratios == {"low_light": {0.4}, "another": {1.0}}


def test_stage_one_reaches_every_parameter_but_the_diffusion(config: TrainConfig):
    training = Training(config, pairs_of(config))
    training.step(draw_batch(training.pairs, 4, DRAW, 1, 0))
    for name, parameter in training.network.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert learns == (not name.startswith("diffusion.")), name


@pytest.mark.parametrize(
    ("stage", "learns"),
    [
        (2, lambda name: name.startswith("diffusion.")),
        (3, lambda name: not name.startswith("semantic_encoder.")),  # what is restored must not move
        (4, lambda name: name.startswith("unet.")),
    ],
)
def test_later_stages_reach_their_part_alone(config: TrainConfig, stage: int, learns: Callable[[str], bool]):
    training = Training(config, pairs_of(config))
    training.run(stop_after=2)
    while training.stage < stage:
        training._end_stage()
    before = {name: value.clone() for name, value in training.network.state_dict().items()}
    video = draw_video_batch([], training.pairs, 2, DRAW, 1, 0)
    training.step(video if stage == 4 else draw_batch(training.pairs, 2, DRAW, 1, 0))
    for name, value in training.network.named_parameters():
        reached = value.grad is not None and bool(value.grad.abs().sum() > 0)
        assert reached == learns(name), name
        assert reached or torch.equal(before[name], value), name


def test_a_resumed_training_ends_where_an_unbroken_one_does(config: TrainConfig, tmp_path: Path):
    """With every option on: video, a teacher, bf16, a shortcut of the diffusion, pairs held back."""
    teacher = Training(config, pairs_of(config))
    teacher.export(tmp_path / "teacher.safetensors")
    every = changed(
        config,
        iterations=(2, 2, 2, 2),
        videos=str(tmp_path),
        precision="bf16",
        held_back=1,
        validate_minutes=1e-5,
        teacher={"variant": "tiny", "weights": str(tmp_path / "teacher.safetensors")},
        weights={"few_steps": 1.0},
        drawing_threads=2,
    )
    pairs, clips = pairs_of(config), [pairs_of(config)[:1] * 2]
    unbroken = Training(every, pairs, clips)
    assert unbroken.run()
    for stop_after in (1, 2, 2, 2, None):  # within each stage, and then on to the end
        broken = Training(every, pairs, clips)
        if (tmp_path / "a.checkpoint").exists():
            broken.load(tmp_path / "a.checkpoint")
        assert broken.run(tmp_path / "a.checkpoint", stop_after) == (stop_after is None)
    assert broken.done == [2, 2, 2, 2]
    for name, value in unbroken.average.items():
        assert torch.equal(value, broken.average[name]), name


def flat(light: float, channels: int, size: int) -> torch.Tensor:
    return torch.full((2, channels, size, size), light)


@pytest.fixture
def flat_batch() -> Batch:
    """Clean pictures of brightness 0.2 in infrared and 0.6 in visible, degraded ones of 0.9 and 0.8."""
    pictures = [
        flat(light, channels, size) for size in (64, 32) for light, channels in ((0.9, 1), (0.8, 3), (0.2, 1), (0.6, 3))
    ]
    kinds, strengths = torch.ones(2, dtype=torch.long), torch.full((2,), 0.5)
    return Batch(*pictures, kinds, kinds, strengths, strengths)


def half_grey(_: object, __: torch.Tensor, visible: torch.Tensor, ___: object) -> torch.Tensor:
    """In place of the network's picture."""
    return torch.full_like(visible, 0.5)


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_a_picture_is_compared_with_the_clean_sources(
    config: TrainConfig, flat_batch: Batch, stage: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stages, "fuse", half_grey)
    network = Training(config, pairs_of(config)).network
    if stage == 4:
        nowhere, everywhere = torch.zeros(2, 2, 32, 32), torch.ones(2, 1, 32, 32)
        losses = stages.video_losses(network, VideoBatch(flat_batch, flat_batch, nowhere, everywhere), Noise(1))
    else:
        losses = image_losses(network, flat_batch, stage, Noise(1))
    assert losses["intensity"].item() == pytest.approx(0.1)  # 0.6 is the brighter one
    assert losses["consistency"].item() == pytest.approx(0.3 + 0.1)


def test_clean_tokens_come_from_the_clean_region_and_degraded_ones_from_the_degraded(config: TrainConfig):
    network = Training(config, pairs_of(config)).network
    batch, other = (draw_batch(pairs_of(config), 2, DRAW, 1, number) for number in (0, 1))
    otherwise_degraded = batch._replace(region_infrared=other.region_infrared, region_visible=other.region_visible)
    otherwise_clean = batch._replace(
        clean_region_infrared=other.clean_region_infrared, clean_region_visible=other.clean_region_visible
    )
    tokens = clean_tokens(network, batch)
    assert torch.equal(tokens, clean_tokens(network, otherwise_degraded))
    assert not torch.allclose(tokens, clean_tokens(network, otherwise_clean))

    first, degraded, clean = (clean_priors(network, seen) for seen in (batch, otherwise_degraded, otherwise_clean))
    assert torch.equal(first.semantic, degraded.semantic)
    assert not torch.allclose(first.degradation_visible, degraded.degradation_visible)
    assert not torch.allclose(first.semantic, clean.semantic)
    assert torch.equal(first.degradation_infrared, clean.degradation_infrared)

    first, degraded, clean = (
        degraded_priors(network, seen, Noise(2)) for seen in (batch, otherwise_degraded, otherwise_clean)
    )
    assert not torch.allclose(first.semantic, degraded.semantic)
    assert all(torch.equal(one, two) for one, two in zip(first, clean, strict=True))


def test_restored_tokens_are_compared_with_those_of_the_clean_pair(config: TrainConfig):
    """Where nothing is degraded and nothing restored, there is no distance; where it is degraded, there is."""
    network = Training(config, pairs_of(config)).network
    clean, degraded = (
        image_losses(network, draw_batch(pairs_of(config), 2, draw, 1, 0), 2, Noise(0))["tokens"].item()
        for draw in (dataclasses.replace(AS_TAKEN, clean_share=share) for share in (1, 0))
    )
    assert clean == 0
    assert degraded > 0


@pytest.mark.parametrize(("iteration", "taken"), [(0, 0.9), (8, 0.5), (100_000, 0.002)])
def test_the_average_takes_less_and_less_of_the_newest_weights(config: TrainConfig, iteration: int, taken: float):
    """From 9 / 10 over 9 / 18 down to 1 - `averaging`."""
    training = Training(changed(config, averaging=0.998), pairs_of(config))
    training.done[0] = iteration
    before = {name: torch.full_like(value, 3.0) for name, value in training.average.items()}
    training.average = {name: value.clone() for name, value in before.items()}
    training.step(drawn(training), progress=0.5)
    for name, newest in training.network.state_dict().items():
        assert torch.allclose(training.average[name], (1 - taken) * before[name] + taken * newest, atol=1e-5), name


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_gradients_are_no_longer_than_the_clip(config: TrainConfig, clip: float):
    training = Training(changed(config, clip=clip), pairs_of(config))
    training.step(drawn(training))
    gradients = [parameter.grad for parameter in training.network.parameters() if parameter.grad is not None]
    length = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt().item()
    if clip == 1e-3:
        assert length == pytest.approx(1e-3, rel=1e-3)
    else:
        assert 1e-2 < length < 1e3  # shorter ones stay as they are


@pytest.mark.parametrize(
    ("progress", "iteration", "share"),
    [(0, 0, 1 / 50), (0, 24, 1 / 2), (0, 49, 1), (0, 10_000, 1), (1 / 2, 100, 0.505), (1, 100, 0.01)],
)
def test_the_rate_rises_for_fifty_iterations_and_falls_along_a_cosine(
    config: TrainConfig, progress: float, iteration: int, share: float
):
    training = Training(changed(config, rates=(0.004, 1.0, 1.0)), pairs_of(config))
    training.done[0] = iteration
    training.step(drawn(training), progress)
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0.004 * share)


def test_every_process_starts_its_diffusion_from_noise_of_its_own(config: TrainConfig):
    def begun(rank: int, iteration: int) -> Noise:
        training = Training(config, pairs_of(config), team=Processes(rank, 2))
        training.stage = 2
        training.done[1] = iteration
        return training._noise(drawn(training))

    first, again, second, later = begun(0, 5), begun(0, 5), begun(1, 5), begun(0, 6)
    assert torch.equal(first.start, again.start)
    assert first.steps == again.steps == second.steps  # one process never waits for another's longer chain
    assert abs(np.corrcoef(first.start.flatten(), second.start.flatten())[0, 1]) < 0.1
    assert not torch.equal(first.start, later.start)


def without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


def test_a_checkpoint_from_before_an_option_was_trained_without_what_it_does(config: TrainConfig, tmp_path: Path):
    path = tmp_path / "old.checkpoint"
    Training(changed(config, balance=0), pairs_of(config)).run(path, stop_after=1)
    state = torch.load(path)
    bound = without(state["config"], "balance")
    bound["draw"] = without(bound["draw"], "coded_share", "colour_share", "dim_share")
    torch.save(state | {"config": bound}, path)
    read_checkpoint(path, changed(config, balance=0))
    as_it_comes = dataclasses.asdict(DRAW) | {"coded_share": 0.4, "colour_share": 0.5, "dim_share": 0.3}
    with pytest.raises(EngineError) as error:
        read_checkpoint(path, changed(config, draw=as_it_comes))
    named = ", ".join(
        f"{option} then, {now} now"
        for option, now in {
            "balance: 0": 0.5, "draw.coded_share: 0": 0.4, "draw.colour_share: 0": 0.5, "draw.dim_share: 0": 0.3,
        }.items()
    )  # fmt: skip
    assert f"({named})" in str(error.value)
    torch.save(state | {"config": bound | {"weights": without(bound["weights"], "tokens")}}, path)
    with pytest.raises(EngineError, match=r"\(weights\.tokens: None then, 10\.0 now\)"):
        read_checkpoint(path, changed(config, balance=0))


@pytest.mark.parametrize("part", ["network", "optimizer"])
def test_a_checkpoint_of_an_earlier_network_is_refused_in_one_line(config: TrainConfig, tmp_path: Path, part: str):
    path = tmp_path / "tiny.checkpoint"
    Training(config, pairs_of(config)).run(path, stop_after=1)
    state = torch.load(path)
    if part == "network":
        for name in ("rate_infrared.weight", "rate_infrared.bias"):
            state["network"][name] = state["network"][name][:1]  # one strength for all kinds together
    else:
        state["optimizer"]["param_groups"][0]["params"].pop()
    torch.save(state, path)
    with pytest.raises(
        EngineError, match=r"another version.*begin anew .* with .*tiny\.safetensors as `start`"
    ) as error:
        Training(config, pairs_of(config)).load(path)
    assert "\n" not in str(error.value)


def test_a_training_that_diverged_goes_on_with_a_lower_rate(config: TrainConfig, tmp_path: Path):
    path = tmp_path / "a.checkpoint"
    Training(config, pairs_of(config)).run(path, stop_after=1)
    calmer = Training(changed(config, rates=(1e-9, 1e-9, 1e-9), clip=0.1), pairs_of(config))
    calmer.load(path)
    before = {name: value.clone() for name, value in calmer.network.state_dict().items()}
    calmer.step(drawn(calmer))
    assert calmer.optimizer.param_groups[0]["lr"] <= 1e-9
    assert all(torch.allclose(value, before[name], atol=1e-7) for name, value in calmer.network.state_dict().items())


def test_a_checkpoint_is_tied_to_its_teacher_and_not_to_where_that_lies(config: TrainConfig, tmp_path: Path):
    path, weights = tmp_path / "a.checkpoint", tmp_path / "teacher.safetensors"
    Training(config, pairs_of(config)).export(weights)
    taught = changed(config, teacher={"variant": "tiny", "weights": str(weights)})
    Training(taught, pairs_of(config)).save(path)
    shutil.copy(weights, tmp_path / "elsewhere.safetensors")
    read_checkpoint(
        path, changed(config, teacher={"variant": "tiny", "weights": str(tmp_path / "elsewhere.safetensors")})
    )
    Training(changed(config, seed=2), pairs_of(config)).export(weights)  # another teacher at the same place
    with pytest.raises(EngineError, match=r"\(teacher\.sha256: [0-9a-f]{64} then, [0-9a-f]{64} now\)"):
        read_checkpoint(path, taught)


def test_a_finished_training_goes_on_with_a_stage_that_is_added(config: TrainConfig, tmp_path: Path):
    path = tmp_path / "a.checkpoint"
    Training(changed(config, iterations=(1, 1, 1)), pairs_of(config)).run(path)
    longer = Training(changed(config, iterations=(1, 1, 1, 2), videos=str(tmp_path)), pairs_of(config))
    longer.load(path)
    assert longer.run()
    assert longer.done == [1, 1, 1, 2]


def test_raising_the_minutes_of_a_finished_training_gives_them_to_the_last_stage(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "a.checkpoint"
    timed = changed(config, iterations=None, minutes=0.04, shares=(1, 1, 1, 1), videos=str(tmp_path))
    finished = Training(timed, pairs_of(config))
    finished.stage = 4
    finished.optimizer = finished._optimizer()
    finished.stage, finished.done, finished.spent_s = 5, [9, 9, 9, 9], [0.6, 0.6, 0.6, 0.6]
    finished.save(path)
    with pytest.raises(EngineError, match="finished training with nothing left to do") as error:
        Training(timed, pairs_of(config)).load(path)
    assert "\n" not in str(error.value)
    Training(changed(timed, minutes=40), pairs_of(config), journal=Journal(tmp_path)).load(path)
    assert capsys.readouterr().err.strip() == (
        "of a finished training only the last stage goes on: "
        "stage IV after 9 iterations, with 10.0 minutes left to the end"
    )


def test_a_checkpoint_that_does_not_belong_here_is_refused_in_one_line(config: TrainConfig, tmp_path: Path):
    path = tmp_path / "a.checkpoint"
    training = Training(config, pairs_of(config))
    training.save(path)
    with pytest.raises(EngineError, match=r"another configuration \(batch: 2 then, 4 now, draw.crop_px: 32 then, 16"):
        read_checkpoint(path, changed(config, batch=4, draw=dataclasses.asdict(DRAW) | {"crop_px": 16}))
    with pytest.raises(EngineError, match="a checkpoint of 'tiny', not of 'nano'"):
        read_checkpoint(path, changed(config, variant="nano"))
    # Where, how long and how fast may change.
    read_checkpoint(path, changed(config, minutes=99, threads=2, precision="bf16", rates=(1e-5, 1e-5, 1e-5), clip=0.5))
    torch.save({"weights": 1}, tmp_path / "b.checkpoint")
    with pytest.raises(EngineError, match="no checkpoint of a training"):
        read_checkpoint(tmp_path / "b.checkpoint", config)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(EngineError, match="is damaged") as error:
        read_checkpoint(path, config)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    path = tmp_path / "a.checkpoint"
    path.write_text("old")

    def fails(partial: Path) -> None:
        partial.write_text("half of the n")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_whole(path, fails)
    assert path.read_text() == "old"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_training_keeps_everything_of_the_earlier_ones(config: TrainConfig, capsys: pytest.CaptureFixture[str]):
    short = changed(config, iterations=(1, 0, 0), warm_up_items=0, held_back=1)
    folder = Path(config.output)
    kept = {"tiny.checkpoint", "tiny.safetensors", "log.jsonl", "pictures/0000001_stage_I.png"}
    trained = []
    for seed in (1, 2, 3):
        train(changed(short, seed=seed))
        trained.append({name: (folder / name).read_bytes() for name in kept})
    assert (
        "kept as tiny.previous2.checkpoint, tiny.previous2.safetensors, log.previous2.jsonl" in capsys.readouterr().err
    )
    for word, files in zip(("previous", "previous2"), trained, strict=False):
        assert (folder / f"tiny.{word}.checkpoint").read_bytes() == files["tiny.checkpoint"]
        assert (folder / f"tiny.{word}.safetensors").read_bytes() == files["tiny.safetensors"]
        assert (folder / f"log.{word}.jsonl").read_bytes() == files["log.jsonl"]
        assert contents(folder / f"pictures.{word}") == {"0000001_stage_I.png": files["pictures/0000001_stage_I.png"]}
    assert {name: (folder / name).read_bytes() for name in kept} == trained[2]
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2  # its own: train and validation


@pytest.mark.parametrize("resume", [False, True])
def test_a_training_that_cannot_begin_leaves_the_earlier_one_as_it_is(config: TrainConfig, resume: bool):
    train(changed(config, iterations=(1, 0, 0), warm_up_items=0, held_back=1))
    before = contents(Path(config.output))
    with pytest.raises(EngineError):
        train(changed(config, subsets=("raod",)), resume)
    replace_member(Path(config.data), "wood/ir/c.png", b"")
    with pytest.raises(EngineError, match="no picture"):
        train(changed(config, iterations=(2, 0, 0), warm_up_items=0, held_back=1), resume)
    assert contents(Path(config.output)) == before


def test_a_training_can_begin_with_the_weights_that_it_replaces(config: TrainConfig):
    weights = train(config).weights
    before = weights.read_bytes()
    again = train(changed(config, start=str(weights), seed=2))
    assert weights.with_name("tiny.previous.safetensors").read_bytes() == before
    assert again.weights == weights
    assert weights.read_bytes() != before


@contextmanager
def at_once() -> Iterator[Callable[[], bool]]:
    """In place of a signal."""
    yield lambda: True


def test_a_stop_in_the_warm_up_has_no_result_and_leaves_the_earlier_one(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    train(config)
    before = contents(Path(config.output))

    monkeypatch.setattr(train_module, "stop_requested", at_once)
    (tmp_path / "train.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    capsys.readouterr()
    main([str(tmp_path / "train.yaml")])
    told = capsys.readouterr()
    assert told.out == ""
    assert "stopped during the warm-up" in told.err
    outcome = train(config)
    assert (outcome.weights, outcome.checkpoint, outcome.finished) == (None, None, False)
    assert contents(Path(config.output)) == before


def test_only_the_first_process_tells_and_writes(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    @contextmanager
    def second(_: str) -> Iterator[Processes]:
        yield Processes(rank=1)

    monkeypatch.setattr(train_module, "processes", second)
    assert train(changed(config, iterations=(1, 0, 0), warm_up_items=0)) is None
    assert not Path(config.output).exists()


def test_a_signal_saves_and_ends_with_one_line(config: TrainConfig, capsys: pytest.CaptureFixture[str]):
    endless = changed(config, iterations=(10_000, 0, 0), warm_up_items=0)
    before = signal.getsignal(signal.SIGTERM)

    def stop_it() -> None:
        while signal.getsignal(signal.SIGTERM) is before:  # sooner, it would end the test itself
            time.sleep(0.01)
        time.sleep(1)
        if signal.getsignal(signal.SIGTERM) is not before:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_it, daemon=True).start()
    outcome = train(endless)
    assert not outcome.finished
    assert outcome.iterations[0] < 10_000
    assert torch.load(outcome.checkpoint)["done"] == outcome.iterations
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped in stage I after ")
    assert signal.getsignal(signal.SIGTERM) is before


def test_training_exports_weights_that_load(config: TrainConfig):
    weights = train(config).weights
    network, _ = load("tiny", weights)
    assert not network.training
    assert metadata_of(weights)["variant"] == "tiny"
    assert metadata_of(weights)["iterations"] == "2+2+2+0"


def test_weights_say_what_they_started_from(config: TrainConfig, tmp_path: Path):
    earlier = train(config).weights
    following = changed(config, start=str(earlier), output=str(tmp_path / "following"))
    stopped = Training(following, pairs_of(config))
    stopped.begin()
    stopped.run(tmp_path / "following" / "tiny.checkpoint", stop_after=1)
    later = train(changed(following, start=None), resume=True).weights
    assert metadata_of(earlier).get("started_from") is None
    assert metadata_of(later)["started_from"] == hashlib.sha256(earlier.read_bytes()).hexdigest()


def metadata_of(weights: Path) -> dict[str, str]:
    with safe_open(weights, framework="pt") as file:
        return file.metadata()


def test_a_finished_training_has_nothing_to_resume(config: TrainConfig):
    train(config)
    before = contents(Path(config.output))
    with pytest.raises(EngineError, match="finished training with nothing left to do"):
        train(config, resume=True)
    assert contents(Path(config.output)) == before


def test_resuming_without_a_checkpoint_is_refused(config: TrainConfig):
    with pytest.raises(EngineError, match="no checkpoint"):
        train(config, resume=True)


def test_a_training_can_begin_with_the_weights_of_another(config: TrainConfig):
    weights = train(config).weights
    following = Training(config, pairs_of(config))
    assert take_fitting(following.network, weights) == []


def test_what_does_not_fit_the_weights_to_begin_with_is_named(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    earlier = Training(config, pairs_of(config))
    number = len(earlier.average)
    earlier.average["rate_infrared.weight"] = earlier.average["rate_infrared.weight"][:1]
    del earlier.average["rate_visible.bias"]
    earlier.export(tmp_path / "earlier.safetensors")
    following = changed(config, start=str(tmp_path / "earlier.safetensors"))
    Training(following, pairs_of(config), journal=Journal(tmp_path)).begin()
    assert capsys.readouterr().err.strip() == (
        f"{number - 2} of {number} tensors from earlier.safetensors; anew: rate_infrared.weight, rate_visible.bias"
    )


def test_what_an_encoder_learned_already_is_not_warmed_up_again(config: TrainConfig):
    weights = train(config).weights
    following = Training(changed(config, start=str(weights), warm_up_items=4, warm_up_iterations=2), pairs_of(config))
    assert following.begin()
    found = following.network.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in load_file(weights).items())


def test_the_command_reads_its_configuration(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "train.yaml"
    path.write_text(
        "variant: tiny\ndata: data\nsubsets: [road]\noutput: out\niterations: [1, 1, 1]\nbatch: 2\nthreads: 1\n"
        "warm_up_items: 0\ndraw: {region_px: 64, crop_px: 32}\n"
    )
    main([str(path)])
    assert capsys.readouterr().out.strip().endswith("tiny.safetensors")


@pytest.fixture
def short(config: TrainConfig, tmp_path: Path) -> Path:
    """The configuration file of a training of one iteration."""
    values = changed(config, iterations=(1, 0, 0), held_back=1, warm_up_items=4).model_dump(mode="json")
    (tmp_path / "short.yaml").write_text(json.dumps(values))
    return tmp_path / "short.yaml"


def test_dspfusion_train_prints_the_weights_and_writes_how_it_ended(short: Path, config: TrainConfig, tmp_path: Path):
    weights = Path(config.output) / "tiny.safetensors"
    done = CliRunner().invoke(app, ["train", str(short), "--json", str(tmp_path / "ended.json")])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{weights}\n"
    ended = json.loads((tmp_path / "ended.json").read_text())
    assert ended["weights"] == str(weights)
    assert Path(ended["checkpoint"]).is_file()
    assert ended["finished"]
    assert ended["iterations"] == [1, 0, 0, 0]
    assert ended["minutes"][0] > 0
    assert ended["minutes"][1:] == [0, 0, 0]
    assert ended["validation"]["total"] > 0

    done = CliRunner().invoke(app, ["train", str(short), "--json", "-"])
    assert json.loads(done.stdout)["weights"] == str(weights)  # and nothing else is printed

    for option, refused in ((["--resume"], "nothing left to do"), (["--minutes", "0"], "--minutes is no training")):
        with pytest.raises(EngineError, match=refused):
            CliRunner().invoke(app, ["train", str(short), *option], catch_exceptions=False)


def test_dspfusion_train_that_is_stopped_in_the_warm_up_has_no_weights_to_print(
    short: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(train_module, "stop_requested", at_once)
    assert CliRunner().invoke(app, ["train", str(short)]).stdout == ""
    told = json.loads(CliRunner().invoke(app, ["train", str(short), "--json", "-"]).stdout)
    assert (told["weights"], told["checkpoint"], told["finished"]) == (None, None, False)
    assert told["validation"] == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning: fast", "learning: Extra inputs are not permitted"),
        ("draw: {regoin_px: 64}", "draw.regoin_px: Unexpected keyword argument"),
        ("weights: {colour: -1}", "weights.colour: Input should be greater than or equal to 0"),
        ("draw: {region_px: 64}", "a crop of 128 pixels does not fit into a region of 64"),
        ("variant: giant", "there is no variant 'giant': choose one of base, nano, small, tiny"),
        ("teacher: {variant: giant}", "there is no variant 'giant'"),
        ("shares: [1, 1, 1, 1]", "stage IV learns from video: name a folder in `videos`"),
        ("shares: [0, 0, 0]", "no stage is given any time"),
        ("shares: [1, 1]", "shares"),
        ("minutes: soon", "minutes: Input should be a valid number"),
        ("precision: fp8", "precision: Input should be 'fp32' or 'bf16'"),
        ("batch: [", "is no YAML file"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(tmp_path: Path, text: str, said: str):
    path = tmp_path / "train.yaml"
    path.write_text(f"data: x\noutput: y\n{text}\n")
    with pytest.raises(EngineError) as error:
        read_config(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_shipped_configurations_are_valid():
    folder = Path(__file__).resolve().parent.parent / "configs"
    variants_of = {path.stem: read_config(path).variant for path in sorted(folder.glob("train_*.yaml"))}
    assert variants_of == {
        "train_base": "base",
        "train_nano": "nano",
        "train_nano_distil": "nano",
        "train_nano_distil_small": "nano",
        "train_nano_further": "nano",
        "train_small": "small",
        "train_small_distil": "small",
    }


def test_three_shares_and_rates_leave_the_video_stage_out(config: TrainConfig):
    assert changed(config, shares=(1, 2, 3)).shares == (1, 2, 3, 0)
    assert changed(config, rates=(0.3, 0.2, 0.1)).rates == (0.3, 0.2, 0.1, 0.1)


def test_minutes_on_the_command_line_replace_exact_iterations(config: TrainConfig):
    assert with_minutes(config, None) is config
    assert with_minutes(config, 3.0).iterations is None
    with pytest.raises(EngineError, match="minutes: Input should be greater than 0"):
        with_minutes(config, 0.0)


@pytest.mark.parametrize("key", ["data", "fields", "videos", "start"])
def test_a_file_that_is_not_there_is_told_before_anything_is_read(config: TrainConfig, key: str):
    with pytest.raises(EngineError, match=rf"there is no nowhere: `{key}` of the training configuration names it"):
        train(changed(config, **{key: "nowhere"}))


def test_a_teacher_without_weights_is_refused_in_one_line(config: TrainConfig):
    with pytest.raises(EngineError, match=r"there are no weights none\.safetensors for variant 'tiny'") as error:
        Training(changed(config, teacher={"variant": "tiny", "weights": "none.safetensors"}), pairs_of(config))
    assert "\n" not in str(error.value)


def test_a_teacher_counts_its_share_in_stages_one_and_three_and_learns_nothing(config: TrainConfig, tmp_path: Path):
    plain = Training(config, pairs_of(config))
    plain.export(tmp_path / "teacher.safetensors")
    taught = Training(
        changed(config, teacher={"variant": "tiny", "weights": str(tmp_path / "teacher.safetensors"), "share": 0.25}),
        pairs_of(config),
    )
    assert taught.teacher is not None
    batch = draw_batch(taught.pairs, 2, DRAW, 1, 0)
    own = image_losses(taught.network, batch, 3, Noise(4))
    both = image_losses(taught.network, batch, 3, Noise(4), taught.teacher)
    # The student is the teacher's twin: what the clean sources say has three quarters of its weight, and what the
    # degradations are called has all of it.
    assert both["teacher_intensity"].item() == pytest.approx(0, abs=1e-6)
    pictures = weighted({name: own[name] for name in IMAGE_LOSSES}, LossWeights()).item()
    names = weighted(own, LossWeights()).item() - pictures
    assert names > 0
    assert weighted(both, LossWeights(), 0.25).item() == pytest.approx(0.75 * pictures + names)
    assert "teacher_intensity" not in image_losses(taught.network, batch, 2, Noise(4), taught.teacher)
    taught.step(batch)
    assert all(parameter.grad is None for parameter in taught.teacher.network.parameters())


def test_the_distance_to_a_teacher_is_that_of_pictures_and_gradients():
    ramp = torch.arange(8.0).expand(1, 3, 8, 8) / 8
    losses = teacher_losses(ramp, ramp * 0.5)
    assert losses["teacher_intensity"].item() == pytest.approx(0.5 * 3.5 / 8)
    assert losses["teacher_gradient"].item() == pytest.approx(0.5 * 8 / 8 / 2)  # along x 8 x the slope, along y none


def test_the_shortcut_of_the_diffusion_reaches_the_denoiser_alone(config: TrainConfig):
    training = Training(changed(config, weights={"few_steps": 1.0}), pairs_of(config))
    training.stage = 2
    training.optimizer = training._optimizer()
    losses = image_losses(
        training.network, draw_batch(training.pairs, 2, DRAW, 1, 0), 2, training._noise(drawn(training)), few_steps=True
    )
    assert losses["few_steps"].item() > 0
    losses["few_steps"].backward()
    for name, parameter in training.network.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == name.startswith("diffusion."), name


def drawn(training: Training) -> Batch:
    return draw_batch(training.pairs, 2, DRAW, 1, 0)


def test_bf16_trains_in_float32_and_leaves_the_head_precise(config: TrainConfig):
    full, half = (Training(changed(config, precision=precision), pairs_of(config)) for precision in ("fp32", "bf16"))
    losses = [image_losses(t.network, drawn(t), 3, Noise(4), half=t.half) for t in (full, half)]
    for name, value in losses[1].items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(losses[0][name].item(), rel=0.05, abs=1e-3)
    half.step(drawn(half))
    assert all(parameter.dtype == torch.float32 for parameter in half.network.parameters())


def test_pairs_are_held_back_evenly_and_never_drawn():
    pairs = [Pair(np.full((2, 2), number, np.uint8), np.zeros((2, 2, 3), np.uint8)) for number in range(10)]
    kept, held = hold_back(pairs, 2)
    assert [int(pair.infrared[0, 0]) for pair in held] == [2, 7]
    assert len(kept) == 8
    assert hold_back(pairs, 0) == (pairs, [])
    with pytest.raises(EngineError, match="nothing is left to learn from"):
        hold_back(pairs, 10)


@pytest.mark.parametrize(("balance", "listed"), [(0, (90, 10)), (0.5, (90, 30)), (1, (90, 90))])
def test_pairs_of_a_small_subset_are_drawn_more_often(balance: float, listed: tuple[int, int]):
    grey, colour = np.zeros((2, 2), np.uint8), np.zeros((2, 2, 3), np.uint8)
    pairs = [Pair(grey, colour, "large")] * 90 + [Pair(grey, colour, "small")] * 10
    drawn = [pair.subset for pair in balanced(pairs, balance)]
    assert (drawn.count("large"), drawn.count("small")) == listed


def test_the_journal_tells_losses_validation_priors_and_pictures(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train_module, "REPORTED_ITERATIONS", 2)
    outcome = train(changed(config, held_back=1, iterations=(2, 1, 0), batch=1, warm_up_items=0))
    rows = [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]
    assert [row["what"] for row in rows] == [
        "train",
        "validation",
        "train",
        "validation",
        *(f"priors_{steps}_steps" for steps in (10, 4, 2, 1, 0)),
    ]
    assert rows[0]["stage"] == "I"
    assert rows[0]["step"] == 2
    assert rows[0]["structure"] > 0
    assert {"total", "infrared_named", "flicker", "warped"} <= outcome.validation.keys() <= rows[3].keys()
    assert rows[4]["tokens"] > 0
    sheets = sorted((Path(config.output) / "pictures").iterdir())
    assert [sheet.name for sheet in sheets] == ["0000002_stage_I.png", "0000003_stage_II.png"]
    assert cv2.imread(str(sheets[0])).shape == (64, 4 * 64, 3)


def test_a_journal_that_goes_on_drops_what_will_come_again(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.open()
    for step in (50, 100, 150):
        journal.note("train", "I", step, step, 1.0, {"colour": 0.5})
    journal.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"what": "tra')  # cut off by a power failure
    Journal(tmp_path).open(100)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [50, 100]


def test_a_missing_tensorboard_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(journal_module, "find_spec", lambda _: None)
    Journal(tmp_path).open()
    said = capsys.readouterr().err.split()
    assert " ".join(said).startswith("TensorBoard is not installed")
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_shows_losses_and_pictures_where_it_is_installed(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    journal = Journal(tmp_path)
    journal.open()
    for step, colour in ((50, 0.5), (100, 0.25)):
        journal.note("train", "I", step, step, 1.0, {"colour": colour})
    journal.show(np.zeros((8, 8, 3), np.uint8), "I", 100)
    journal.close()
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/colour")] == [(50, 0.5), (100, 0.25)]
    assert [event.step for event in board.Images("validation/pictures")] == [100]


def test_stage_one_is_judged_without_the_denoiser_that_has_learned_nothing_yet(config: TrainConfig):
    pairs = pairs_of(config)
    network = Training(config, pairs).judged
    validation = Validation(pairs[:1], config, torch.device("cpu"))
    before = {stage: validation.judge(network, stage)[0] for stage in (1, 3)}
    with torch.no_grad():
        for parameter in network.diffusion.parameters():
            parameter += 1
    assert validation.judge(network, 1)[0] == before[1]
    assert validation.judge(network, 3)[0]["flicker"] != before[3]["flicker"]


def test_degraded_pictures_are_judged_by_the_clean_ones(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(validation_module, "fuse", half_grey)
    dark, bright = np.full((64, 64), 51, np.uint8), np.full((64, 64, 3), 153, np.uint8)  # 0.2 and 0.6
    held = [Pair(dark, bright)] * 6
    judging = changed(config, draw=dataclasses.asdict(dataclasses.replace(AS_TAKEN, clean_share=0)))
    validation = Validation(held, judging, torch.device("cpu"))
    assert any((batch.region_infrared - 0.2).abs().max() > 0.05 for batch in validation.batches)
    assert any((batch.region_visible - 0.6).abs().max() > 0.05 for batch in validation.batches)
    network = Training(config, pairs_of(config)).judged
    for stage in (1, 3):
        values, sheet = validation.judge(network, stage)
        assert values["intensity"] == pytest.approx(0.1)  # 0.6 is the brighter one
        assert values["consistency"] == pytest.approx(0.3 + 0.1)
        assert (sheet[:, -64:] == 153).all()
    for found in validation.prior_errors(network, (2,)).values():
        assert found["intensity"] == pytest.approx(0.1)
        assert found["consistency"] == pytest.approx(0.3 + 0.1)


def test_four_pairs_are_learned_by_heart(config: TrainConfig):
    """Within 80 iterations at a high rate the brightness comes twice as near, and the degradations have their names."""
    training = Training(changed(config, iterations=(80, 0, 0), rates=(2e-2, 1e-3, 1e-3)), pairs_of(config))
    batch = draw_batch(training.pairs, 4, dataclasses.replace(DRAW, clean_share=0, missing_share=0), 1, 0)
    before = image_losses(training.network, batch, 1)
    for _ in range(80):
        training.step(batch)
        training.done[0] += 1
    after = image_losses(training.network, batch, 1)
    assert after["intensity"] < before["intensity"] / 2
    assert after["naming"] < before["naming"] / 10


def test_a_loss_that_is_no_number_ends_the_training(config: TrainConfig):
    training = Training(config, pairs_of(config))
    batch = drawn(training)
    with pytest.raises(EngineError, match="lower its rate, and go on with --resume"):
        training.step(batch._replace(visible=batch.visible * float("nan")))


def test_draws_stay_as_they_were_when_a_training_is_resumed_by_a_newer_version():
    random = np.random.default_rng(0)
    pairs = [
        Pair(random.integers(0, 255, (100, 120), np.uint8), random.integers(0, 255, (100, 120, 3), np.uint8))
        for _ in range(5)
    ]
    batch = draw_batch(pairs, 8, DRAW, 29, 0)
    assert batch.infrared_kind.tolist() == [0, 0, 2, 3, 3, 2, 4, 2]
    assert batch.visible_kind.tolist() == [4, 2, 4, 0, 0, 5, 7, 4]


def test_colours_are_changed_in_the_clean_picture_and_its_light_is_kept():
    random = np.random.default_rng(0)
    pair = Pair(random.integers(0, 255, (100, 120), np.uint8), np.full((100, 120, 3), (90, 120, 60), np.uint8))
    draw = dataclasses.replace(DRAW, clean_share=1.0, missing_share=0, colour_share=1.0)
    batch = draw_batch([pair], 64, draw, 3, 0)
    assert torch.equal(batch.region_visible, batch.clean_region_visible)
    spread = chroma(batch.clean_region_visible).abs().mean((1, 2, 3))
    given = float(chroma(torch.tensor([90, 120, 60]).reshape(1, 3, 1, 1) / 255).abs().mean())
    assert spread.min() < 0.3 * given
    assert spread.max() > 1.8 * given
    light = luminance(batch.clean_region_visible).mean((1, 2, 3)) * 255
    assert (light - 104.2).abs().max() < 0.12 * 104.2


def test_a_dim_scene_is_clean_and_stays_dim_in_what_is_aimed_at():
    pair = Pair(np.full((100, 120), 80, np.uint8), np.full((100, 120, 3), 120, np.uint8))
    draw = dataclasses.replace(DRAW, clean_share=1.0, missing_share=0, colour_share=0, gamma_range=0, dim_share=0.5)
    batch = draw_batch([pair], 64, draw, 3, 0)
    assert torch.equal(batch.region_visible, batch.clean_region_visible)
    light = batch.clean_region_visible.amax((1, 2, 3)) * 255
    assert 60 <= light.min() < 70
    assert 0.3 < (light < 119.9).float().mean() < 0.7
    assert torch.allclose(batch.clean_region_infrared * 255, torch.tensor(80.0))


def test_a_missing_source_asks_for_nothing():
    """Likeness to black would pull the other source towards darkness."""
    visible = torch.rand(2, 3, 16, 16)
    infrared = torch.rand(2, 1, 16, 16)
    infrared[1] = 0
    losses = fusion_losses(visible[1:], infrared[1:], visible[1:])
    assert max(losses[name].item() for name in ("structure", "intensity", "consistency", "gradient")) < 1e-5
    grey = infrared[:1].expand(-1, 3, -1, -1)
    losses = fusion_losses(grey, infrared[:1], torch.zeros(1, 3, 16, 16))
    assert max(losses[name].item() for name in (*IMAGE_LOSSES[2:], "structure")) < 1e-5


@pytest.mark.parametrize("share", ["camera_share", "coded_share"])
def test_a_camera_and_its_cable_touch_their_share_of_the_pictures_and_nothing_else_changes(share: str):
    random = np.random.default_rng(0)
    pair = Pair(random.integers(0, 255, (100, 120), np.uint8), random.integers(0, 255, (100, 120, 3), np.uint8))
    draw = dataclasses.replace(DRAW, clean_share=1.0, missing_share=0)
    untouched = draw_batch([pair], 32, draw, 1, 0)
    assert torch.equal(untouched.region_visible, untouched.clean_region_visible)
    touched = draw_batch([pair], 32, dataclasses.replace(draw, **{share: 0.5}), 1, 0)
    for seen, clean, kind in (
        (touched.region_infrared, touched.clean_region_infrared, touched.infrared_kind),
        (touched.region_visible, touched.clean_region_visible, touched.visible_kind),
    ):
        assert 8 <= sum(not torch.equal(*pictures) for pictures in zip(seen, clean, strict=True)) <= 24
        assert not kind.any()  # no degradation to be named


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


def test_strength_is_learned_for_the_true_kind_alone():
    found = torch.full((3, 4), 0.9, requires_grad=True)
    kinds = torch.tensor([2, 0, IGNORED])
    loss = rating_loss(found, torch.tensor([0.3, 0.0, 0.0]), kinds)
    assert loss.item() == pytest.approx((0.6 + 0.9) / 2)
    loss.backward()
    assert found.grad is not None
    assert found.grad.nonzero().tolist() == [[0, 2], [1, 0]]


def test_info_nce_rewards_equal_names_that_lie_together():
    together = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    apart = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    labels = torch.tensor([0, 0, 1, 1])
    assert info_nce(together, labels) < 0.01
    assert info_nce(apart, labels) > 5
    assert info_nce(together, torch.full((4,), IGNORED)) == 0
