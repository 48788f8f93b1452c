"""Priors are estimated now and then and smoothed; the per-frame path takes them as they are."""

from __future__ import annotations

import threading
import time

import cv2
import numpy as np
import pytest

from calibration.rig import CameraModel, Rig
from calibration.warp import Warp
from pipeline.config import PriorsConfig, RegistrationConfig
from pipeline.frame import AlignedPair, Frame, FramePair
from pipeline.fuse import Fade, Fuse, borders_of
from pipeline.gain import InfraredGain
from pipeline.register import Register
from tests.rigs.engines import MaximumEngine, RegisteringMaximumEngine


def aligned(
    level: int = 100, infrared: bool = True, visible: bool = True, weight: np.ndarray | None = None
) -> AlignedPair:
    heat = np.full((48, 64), 200, np.uint8)
    colour = np.full((48, 64, 3), level, np.uint8)
    mode = "fused" if infrared and visible else "ir_only" if infrared else "vis_only"
    pair = FramePair(
        Frame("infrared", heat, 0, 0) if infrared else None, Frame("visible", colour, 0, 0) if visible else None, mode
    )
    return AlignedPair(pair, heat if infrared else None, colour if visible else None, weight)


def pictures_of(pair: AlignedPair) -> tuple[np.ndarray, np.ndarray]:
    assert pair.infrared is not None
    assert pair.visible is not None
    return pair.infrared, pair.visible


def test_in_step_priors_are_estimated_at_fixed_frames():
    engine = MaximumEngine()
    fuse = Fuse(engine, PriorsConfig(every_frames=5), background=False)
    ages = [fuse(aligned()).priors_age_frames for _ in range(11)]
    assert engine.estimates == 3
    assert ages == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]


def test_a_new_estimate_moves_the_priors_by_its_share():
    engine = MaximumEngine()
    fuse = Fuse(engine, PriorsConfig(every_frames=1, smoothing=0.25, scene_change=200), background=False)
    fuse(aligned(100))
    fuse(aligned(140))
    semantic = fuse.keeper.priors(aligned(140).infrared, aligned(140).visible, (True, True), 1).semantic  # type: ignore[arg-type]
    assert semantic[0, 0] == pytest.approx((100 + 0.25 * 40) / 255, abs=1e-6)


def test_a_scene_change_replaces_the_priors_at_once():
    engine = MaximumEngine()
    fuse = Fuse(engine, PriorsConfig(every_frames=1000, smoothing=0.1, scene_change=12), background=False)
    fuse(aligned(30))
    fuse(aligned(200))
    assert engine.estimates == 2
    fuse(aligned(205))
    assert engine.estimates == 2


def test_losing_a_camera_is_a_new_scene():
    engine = MaximumEngine()
    fuse = Fuse(engine, PriorsConfig(every_frames=1000, scene_change=250), background=False)
    fuse(aligned())
    fuse(aligned(infrared=False))
    assert engine.estimates == 2


def test_in_the_background_only_the_first_frame_waits():
    class SlowPriors(MaximumEngine):
        def estimate_priors(self, infrared, visible):
            if self.estimates:
                seen.wait(60)
            return super().estimate_priors(infrared, visible)

    engine, seen = SlowPriors(), threading.Event()
    fuse = Fuse(engine, PriorsConfig(every_frames=1), background=True)
    results = [fuse(aligned()) for _ in range(20)]
    assert results[-1].priors_age_frames == 19  # the second estimate is still on its way
    seen.set()
    deadline = time.monotonic() + 20
    while fuse.keeper.updates < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fuse.keeper.updates >= 2
    fuse.close()


def test_a_new_scene_replaces_the_priors_though_its_own_request_was_pushed_out_by_a_later_one():
    class SlowPriors(MaximumEngine):
        def estimate_priors(self, infrared, visible):
            if self.estimates:
                asked.set()
                seen.wait(60)
            return super().estimate_priors(infrared, visible)

    engine, asked, seen = SlowPriors(), threading.Event(), threading.Event()
    fuse = Fuse(engine, PriorsConfig(every_frames=1, smoothing=0.25, scene_change=12), background=True)
    fuse(aligned(20))
    fuse(aligned(20))
    assert asked.wait(20)  # an estimate is under way
    fuse(aligned(200))  # the cut waits for it, and is pushed out
    fuse(aligned(204))
    seen.set()
    deadline = time.monotonic() + 20
    while fuse.keeper.updates < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    fuse.close()
    now = fuse.keeper.priors(*pictures_of(aligned(204)), (True, True), 4)
    assert now.semantic[0, 0] == pytest.approx(204 / 255, abs=1e-6)


def test_a_new_scene_replaces_the_priors_though_its_first_estimate_failed(caplog):
    class Fails(MaximumEngine):
        def estimate_priors(self, infrared, visible):
            if visible.mean() == 200:
                raise RuntimeError("no memory left")
            return super().estimate_priors(infrared, visible)

    fuse = Fuse(Fails(), PriorsConfig(every_frames=1, smoothing=0.25, scene_change=12), background=True)
    for level, done in ((20, 1), (200, 1), (204, 2)):
        fuse(aligned(level))
        deadline = time.monotonic() + 20
        while fuse.keeper.updates + fuse.keeper.failures < done + (level > 20) and time.monotonic() < deadline:
            time.sleep(0.01)
    fuse.close()
    assert (fuse.keeper.updates, fuse.keeper.failures) == (2, 1)
    now = fuse.keeper.priors(*pictures_of(aligned(204)), (True, True), 3)
    assert now.semantic[0, 0] == pytest.approx(204 / 255, abs=1e-6)
    assert [record.getMessage() for record in caplog.records] == [fuse.keeper.first_failure]


def test_a_missing_camera_is_black_and_has_no_readout():
    fused = Fuse(MaximumEngine(), PriorsConfig(), background=False)(aligned(visible=False))
    assert (fused.image == 200).all()
    assert set(fused.degradation) == set(fused.degradation_strength) == {"infrared"}


def test_outside_the_infrared_view_the_visible_picture_stands_alone():
    weight = np.ones((48, 64), np.float32)
    weight[:, 32:] = 0
    weight[:, 31] = 0.5
    image = Fuse(MaximumEngine(), PriorsConfig(), background=False)(aligned(100, weight=weight)).image
    assert (image[:, :31] == 200).all()
    assert (image[:, 32:] == 100).all()
    assert image[0, 31, 0] in (149, 150, 151)  # half of 200 and half of 100, rounded


def weight_of(name: str) -> np.ndarray:
    """float32 (90, 120): where infrared sees, feathered over a few pixels."""
    seen = np.zeros((90, 120), np.uint8)
    if name == "turned":
        cv2.fillConvexPoly(seen, np.array([[10, 2], [116, 8], [110, 86], [4, 80]]), 1)
    elif name == "small":
        seen[60:80, 5:25] = 1
    elif name == "all":
        return np.ones(seen.shape, np.float32)
    return cv2.blur(seen.astype(np.float32), (5, 5))


@pytest.mark.parametrize("name", ["turned", "small", "nowhere", "all"])
def test_the_fade_is_that_of_the_whole_picture_whatever_is_left_out(name: str):
    random, fade = np.random.default_rng(1), Fade()
    weight = weight_of(name)
    for _ in range(2):  # the second picture finds the borders of the first
        fused, visible = (random.integers(0, 256, (90, 120, 3), np.uint8) for _ in range(2))
        assert np.array_equal(fade(fused, visible, weight), cv2.blendLinear(fused, visible, weight, 1 - weight))


def test_the_fade_leaves_the_middle_of_the_picture_alone():
    weight = weight_of("turned")
    left = np.ones(weight.shape, bool)
    for rows, columns in borders_of(weight == 1):
        left[rows, columns] = False
    assert (weight[left] == 1).all()
    assert left.mean() > 0.5


def test_texture_that_moves_is_no_new_scene():
    engine = MaximumEngine()
    fuse = Fuse(engine, PriorsConfig(every_frames=1000), background=False)
    texture = np.kron(np.indices((48, 64)).sum(0) % 2, np.ones((10, 10))).astype(np.uint8) * 120 + 60
    for step in range(12):
        heat = np.roll(texture, 2 * step, axis=0)
        colour = np.dstack([heat] * 3)
        pair = FramePair(Frame("infrared", heat, 0, 0), Frame("visible", colour, 0, 0), "fused")
        fuse(AlignedPair(pair, heat, colour, None))
    assert engine.estimates == 1


def unregistered_pair() -> AlignedPair:
    """A turned infrared picture whose warp is left to the engine."""
    maps = Warp.of_aligned((64, 48), feather_px=4).corrected(np.array([3.0, -2.0, 0.02, 0.0]))
    random = np.random.default_rng(3)
    heat = cv2.GaussianBlur(random.integers(0, 256, (48, 64), np.uint8), (0, 0), 1.5)
    colour = random.integers(0, 100, (48, 64, 3), np.uint8)
    pair = FramePair(Frame("infrared", heat, 0, 0), Frame("visible", colour, 0, 0), "fused")
    return AlignedPair(pair, heat, colour, maps.weight, warp=maps)


@pytest.mark.parametrize("background", [False, True])
def test_a_warp_that_is_left_is_done_by_an_engine_that_registers_and_else_before_it(background: bool):
    left = unregistered_pair()
    assert left.warp is not None
    done = AlignedPair(left.pair, left.registered(), left.visible, left.weight)
    pictures, engines = [], [MaximumEngine(), MaximumEngine(), RegisteringMaximumEngine(), RegisteringMaximumEngine()]
    for engine, aligned in zip(engines, (done, left, done, left), strict=True):
        fuse = Fuse(engine, PriorsConfig(), background=background)
        pictures.append(fuse.finish(fuse.begin(aligned)).image)
        fuse.close()
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures[1:])
    assert [engine.registered for engine in engines[2:]] == [0, 1]


def test_registration_leaves_the_warp_of_pairs_and_not_of_lone_frames():
    pair = unregistered_pair().pair
    size = (64, 48)
    camera = CameraModel(*size, np.array([[64.0, 0, 32], [0, 64, 24], [0, 0, 1]]))
    rig = Rig(camera, camera, np.eye(4), homography=np.array([[1, 0, 4.0], [0, 1, 0], [0, 0, 1]]))
    register = Register(RegistrationConfig(refine=False), InfraredGain(), rig=rig)
    eager = register(pair)
    register.leaves_warp = True
    left = register(pair)
    assert eager.warp is None
    assert left.warp is not None
    assert left.infrared is not None
    assert np.array_equal(left.infrared, pair.infrared.image)  # type: ignore[union-attr]
    assert np.array_equal(left.registered(), eager.infrared)  # type: ignore[arg-type]
    assert register(FramePair(pair.infrared, None, "ir_only")).warp is None
    assert register(FramePair(None, pair.visible, "vis_only")).warp is None
