"""Stage IV: two neighbouring frames, spoiled alike, and what may not change between their fused pictures."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from engines.base import EngineError
from engines.degrade import degrade_infrared, degrade_visible
from engines.dspfusion.network import DSPFusion
from engines.training import stages
from engines.training.data import Draw, Pair
from engines.training.losses import flicker, warp, warped
from engines.training.stages import Noise, video_losses
from engines.training.video import Moment, draw_video_batch, flow_between, read_clips, stills
from tests.rigs.training import TINY

DRAW = Draw(region_px=64, crop_px=32, missing_share=0)


def write_clip(path: Path, frames: list[np.ndarray]) -> None:
    with av.open(str(path), "w") as container:
        height, width = frames[0].shape[:2]
        stream = container.add_stream("ffv1", rate=30, options={}, width=width, height=height)
        stream.pix_fmt = "gray" if frames[0].ndim == 2 else "bgr0"
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, format="gray" if picture.ndim == 2 else "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def textured(seed: int, height: int = 96, width: int = 96) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """One clip of three frames, each moved by two pixels to the right."""
    visible = [np.roll(textured(1), 2 * index, 1) for index in range(3)]
    write_clip(tmp_path / "street_vi.mkv", visible)
    write_clip(tmp_path / "street_ir.mkv", [picture[..., 0].copy() for picture in visible])
    return tmp_path


def test_clips_are_read_frame_by_frame_as_pairs(clips: Path):
    (clip,) = read_clips(clips, 64)
    assert len(clip) == 3
    assert np.array_equal(clip[1].visible, np.roll(textured(1), 2, 1))
    assert np.array_equal(clip[1].infrared, clip[1].visible[..., 0])


def test_the_stages_before_learn_from_the_first_and_the_middle_frame_of_a_clip(clips: Path):
    (clip,) = read_clips(clips, 64)
    first, middle = stills([clip])
    assert np.array_equal(first.visible, clip[0].visible)
    assert np.array_equal(middle.infrared, clip[1].infrared)
    assert first.subset == middle.subset == "video"


def test_a_folder_that_cannot_be_used_is_refused(clips: Path, tmp_path: Path):
    with pytest.raises(EngineError, match="there are no clips"):
        read_clips(tmp_path / "nothing", 64)
    with pytest.raises(EngineError, match=r"smaller than draw\.region_px"):
        read_clips(clips, 128)
    (clips / "street_vi.mkv").write_bytes(b"no video")
    with pytest.raises(EngineError, match="no video that can be decoded"):
        read_clips(clips, 64)
    (clips / "street_vi.mkv").unlink()
    with pytest.raises(EngineError, match="no visible partner"):
        read_clips(clips, 64)


def test_clips_of_unequal_length_or_size_are_refused(clips: Path):
    write_clip(clips / "street_ir.mkv", [textured(1)[..., 0].copy()] * 2)
    with pytest.raises(EngineError, match=r"street_ir\.mkv has 2 frames and street_vi\.mkv 3"):
        read_clips(clips, 64)
    write_clip(clips / "street_ir.mkv", [textured(1, 96, 104)[..., 0].copy()] * 3)
    with pytest.raises(EngineError, match="differ in size"):
        read_clips(clips, 64)


def test_a_clip_whose_size_changes_is_refused(tmp_path: Path):
    """As a stream of pictures can: the first frames of both agree."""
    for kind, last in (("ir", 96), ("vi", 104)):
        pictures = [textured(1), textured(2), textured(3, 96, last)]
        stream = b"".join(cv2.imencode(".jpg", picture)[1].tobytes() for picture in pictures)
        (tmp_path / f"street_{kind}.mjpeg").write_bytes(stream)
    with pytest.raises(EngineError, match="differ in size"):
        read_clips(tmp_path, 64)


def test_a_video_batch_depends_on_its_number_alone(clips: Path):
    clip = read_clips(clips, 64)
    pairs = [Pair(textured(2)[..., 0].copy(), textured(2))]
    first, again, other = (draw_video_batch(clip, pairs, 2, DRAW, 1, number) for number in (7, 7, 8))
    assert all(torch.equal(one, two) for one, two in zip(first.second, again.second, strict=True))
    assert torch.equal(first.flow, again.flow)
    assert not torch.equal(first.first.visible, other.first.visible)


def test_the_clean_second_frame_is_the_first_one_moved_along_the_flow():
    pair = Pair(textured(2)[..., 0].copy(), textured(2))
    batch = draw_video_batch([], [pair], 8, DRAW, 3, 0)
    assert batch.flow.abs().amax((1, 2, 3)).max() > 0  # some of the eight move
    moved = warp(batch.first.clean_visible, batch.flow)
    assert ((moved - batch.second.clean_visible).abs() * batch.trusted).max() < 1e-4


def at(moment: int, kind: str) -> Moment:
    return Moment(kind, 5, moment)


def test_stripes_stand_still_and_their_noise_does_not():
    grey = np.full((64, 64), 0.5, np.float32)
    first, second = (degrade_infrared(grey, "stripes", at(moment, "stripes"), 1.0) for moment in (0, 1))
    columns = np.corrcoef(first.mean(0), second.mean(0))[0, 1]
    left = [(picture - picture.mean(0)).ravel() for picture in (first, second)]
    assert columns > 0.9
    assert abs(np.corrcoef(*left)[0, 1]) < 0.1


def test_dead_pixels_and_haze_stay_where_they_are_and_noise_and_rain_do_not():
    grey = np.full((64, 64), 0.5, np.float32)
    colour = np.full((64, 64, 3), 0.5, np.float32)
    same = {
        kind: np.array_equal(*(degrade(picture, kind, at(moment, kind), 1.0) for moment in (0, 1)))
        for degrade, picture, kinds in (
            (degrade_infrared, grey, ("dead_pixels", "low_contrast", "noise")),
            (degrade_visible, colour, ("haze", "rain", "low_light")),
        )
        for kind in kinds
    }
    assert same == {
        "dead_pixels": True,
        "low_contrast": True,
        "noise": False,
        "haze": True,
        "rain": False,
        "low_light": False,
    }


def test_both_frames_bear_the_same_labels_but_not_the_same_noise():
    pair = Pair(textured(2)[..., 0].copy(), textured(2))
    batch = draw_video_batch([], [pair], 16, DRAW, 3, 0)
    assert torch.equal(batch.first.visible_kind, batch.second.visible_kind)
    assert torch.equal(batch.first.infrared_strength, batch.second.infrared_strength)


def test_flow_is_found_and_trusted_where_both_directions_agree():
    first = np.asarray(textured(4), np.float32) / 255
    flow, trusted = flow_between(first, np.roll(first, 2, 1))
    assert np.median(flow[0]) == pytest.approx(-2, abs=0.3)  # found two pixels further left
    assert np.median(flow[1]) == pytest.approx(0, abs=0.3)
    assert trusted.mean() > 0.7


def test_flicker_counts_pixels_that_stand_still_in_both_sources():
    clean = torch.zeros(1, 2, 4, 4)
    moving = clean.clone()
    moving[:, 0, :, :2] = 0.5  # infrared changes in the left half
    first = torch.zeros(1, 3, 4, 4)
    second = torch.full((1, 3, 4, 4), 0.1)
    second[..., :2] = 0.9
    assert flicker(first, second, clean, moving).item() == pytest.approx(0.1)
    assert flicker(first, second, clean, clean).item() == pytest.approx(0.5)
    assert flicker(first, second, clean, clean + 1).item() == 0


@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize(("levels", "counted"), [(0, 0.1), (1, 0.1), (2, 0), (3, 0)])
def test_a_pixel_stands_still_that_changes_by_less_than_two_grey_levels(source: int, levels: int, counted: float):
    before = torch.zeros(1, 2, 4, 4)
    after = before.clone()
    after[:, source] = levels / 255
    fused = torch.full((1, 3, 4, 4), 0.5)
    assert flicker(fused, fused + 0.1, before, after).item() == pytest.approx(counted)


def test_the_clean_frames_tell_what_stands_still(monkeypatch: pytest.MonkeyPatch):
    """Noise moves in every degraded frame: were it asked, nothing would ever stand still."""

    def brightens(_: object, infrared: torch.Tensor, visible: torch.Tensor, __: object) -> torch.Tensor:
        fused = torch.full_like(visible, 0.5)
        fused[len(infrared) // 2 :] = 0.6  # the second frames
        return fused

    monkeypatch.setattr(stages, "fuse", brightens)
    pair = Pair(textured(2)[..., 0].copy(), textured(2))
    batch = draw_video_batch([], [pair], 1, DRAW, 1, 0)
    standing = batch._replace(
        first=batch.first._replace(infrared=torch.rand(1, 1, 32, 32), visible=torch.rand(1, 3, 32, 32)),
        second=batch.second._replace(
            clean_infrared=batch.first.clean_infrared, clean_visible=batch.first.clean_visible
        ),
    )
    assert video_losses(DSPFusion(TINY), standing, Noise(1))["flicker"].item() == pytest.approx(0.1)
    moving = standing._replace(
        second=standing.second._replace(
            infrared=standing.first.infrared,
            visible=standing.first.visible,
            clean_infrared=1 - standing.first.clean_infrared,
        )
    )
    assert video_losses(DSPFusion(TINY), moving, Noise(1))["flicker"].item() < 0.1


def test_the_warped_error_is_zero_along_the_motion():
    first = torch.arange(8.0).expand(1, 3, 8, 8) / 8
    second = first - 1 / 8  # moved by one pixel to the right
    flow = torch.zeros(1, 2, 8, 8)
    flow[:, 0] = -1
    trusted = torch.ones(1, 1, 8, 8)
    trusted[..., 0] = 0  # comes from outside
    assert warped(first, second, flow, trusted).item() == pytest.approx(0, abs=1e-6)
    assert warped(first, second, torch.zeros_like(flow), trusted).item() == pytest.approx(1 / 8, abs=1e-6)
    assert warped(first, second, flow, torch.zeros_like(trusted)).item() == 0
