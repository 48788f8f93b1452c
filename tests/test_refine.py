"""Online refinement: the filter against known drifts and knocks, and the stage that uses it, in step and live."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest

from calibration.refine import Bounds, Refiner
from calibration.residual import Residual, Surfaces, Survey, displacement_px, similarity
from calibration.warp import Warp
from pipeline.config import RegistrationConfig
from pipeline.frame import Frame, FramePair
from pipeline.gain import InfraredGain
from pipeline.register import Register

SIZE = (320, 240)
NO_SURFACES = Surfaces(np.zeros((0, 17, 17)), np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(4), 1.0, SIZE)


class Scenes:
    """Keyframes whose residual is known: each scene is off by itself, as real ones are (at half the width)."""

    def __init__(self, seed: int = 0, off_px: float = 0.4) -> None:
        self._random = np.random.default_rng(seed)
        self._off_px = off_px

    def survey(
        self, truth: np.ndarray, shown: np.ndarray, informative: bool = True, same_scene: bool = False
    ) -> Survey:
        left = similarity(truth, SIZE) @ np.linalg.inv(similarity(shown, SIZE))
        off = self._random.normal(0, 1, 4) * (self._off_px, self._off_px, 0.001, 0.0005)
        matrix = similarity(off, SIZE) @ left
        parameters = np.array(
            [*(matrix[:2] @ (159.5, 119.5, 1) - (159.5, 119.5)), np.arctan2(matrix[1, 0], matrix[0, 0]), 0]
        )
        residual = Residual(parameters, np.eye(4) * 1e-8, 60.0 if informative else 0.0, 30, 0.2, 0.0, SIZE)
        picture = np.zeros((24, 32)) if same_scene else self._random.integers(0, 255, (24, 32))
        return Survey(NO_SURFACES, residual, False, picture.astype(np.uint8))


def left_px(refiner: Refiner, truth: np.ndarray) -> float:
    """What the correction leaves of the truth, over the picture."""
    return displacement_px(similarity(truth, SIZE) @ np.linalg.inv(similarity(refiner.correction, SIZE)), SIZE)


def follow(refiner: Refiner, scenes: Scenes, truth: np.ndarray, keyframes: int) -> list[float]:
    errors = []
    for _ in range(keyframes):
        refiner.add(scenes.survey(truth, refiner.correction), refiner.correction)
        errors.append(left_px(refiner, truth))
    return errors


def shift(x: float, y: float = 0.0, roll: float = 0.0) -> np.ndarray:
    return np.array([x, y, roll, 0.0])


def test_a_rig_that_is_right_is_left_alone():
    for seed in range(5):
        refiner = Refiner(SIZE)
        assert max(follow(refiner, Scenes(seed), shift(0), 60)) < 0.25
        assert refiner.verdict(refiner.correction)[0] == "ok"


def test_an_offset_is_found_after_a_few_scenes_and_stays_found():
    errors = follow(Refiner(SIZE), Scenes(1), shift(2.0, -1.5, 0.004), 40)
    assert max(errors[8:]) < 0.75


def test_a_slow_drift_is_followed():
    refiner, scenes, errors = Refiner(SIZE), Scenes(2), []
    for step in range(100):
        errors += follow(refiner, scenes, shift(3.0 * step / 100, 1.0 * step / 100), 1)
    assert np.median(errors) < 0.4  # pixels of a picture 320 wide
    assert np.percentile(errors, 95) < 0.75


@pytest.mark.parametrize("seed", range(4))
def test_a_knock_is_recovered_from_within_six_keyframes(seed: int):
    refiner, scenes = Refiner(SIZE), Scenes(seed)
    follow(refiner, scenes, shift(1.0), 30)
    errors = follow(refiner, scenes, shift(1.0 + 1.4, 1.4), 12)  # 2 px: 4 px of a picture 640 wide
    assert max(errors[5:]) < 1.0


def test_a_single_stray_scene_is_refused():
    refiner, scenes = Refiner(SIZE), Scenes(3)
    follow(refiner, scenes, shift(2.0), 20)
    before = refiner.correction
    assert refiner.add(scenes.survey(shift(-2.0, 3.0), before), before) == "gated"
    assert np.abs(refiner.correction - before)[:2].max() < 0.05


def test_scenes_without_information_change_nothing_but_the_doubt():
    refiner, scenes = Refiner(SIZE), Scenes(4)
    follow(refiner, scenes, shift(2.0), 20)
    before, sigma_px = refiner.parameters.copy(), refiner.sigma_px
    for _ in range(10):
        assert refiner.add(scenes.survey(shift(9.0), shift(0), informative=False), shift(0)) == "no_information"
    assert np.array_equal(refiner.parameters, before)
    assert refiner.sigma_px > sigma_px
    assert refiner.verdict(refiner.correction) == ("no_information", 0.0)


def test_a_correction_beyond_the_bounds_is_not_made_and_the_rig_is_lost():
    refiner, scenes = Refiner(SIZE, Bounds(shift_px=12)), Scenes(5)
    follow(refiner, scenes, shift(9.0), 12)  # 18 px of a picture 640 wide
    assert refiner.counts["out_of_bounds"] == 12
    assert not refiner.correction.any()
    assert refiner.verdict(refiner.correction)[0] == "lost"


def test_a_rig_that_is_off_and_not_yet_corrected_says_so():
    refiner, scenes = Refiner(SIZE), Scenes(6)
    for _ in range(8):
        refiner.add(scenes.survey(shift(3.0), shift(0)), shift(0))  # 6 px of 640, and nobody corrects
    assert refiner.verdict(shift(0))[0] == "lost"
    assert refiner.verdict(refiner.correction)[0] == "ok"


def test_repeats_of_one_scene_count_less_than_new_ones():
    sigmas = []
    for same in (True, False):
        refiner, scenes = Refiner(SIZE), Scenes(7)
        for _ in range(12):
            refiner.add(scenes.survey(shift(0), shift(0), same_scene=same), shift(0))
        sigmas.append(refiner.sigma_px)
    assert sigmas[0] > 1.2 * sigmas[1]


# The stage


def street(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Infrared and visible picture of the same shapes, aligned, with grey levels of their own."""
    random = np.random.default_rng(seed)
    infrared, visible = np.full(SIZE[::-1], 90, np.uint8), np.full(SIZE[::-1], 120, np.uint8)
    for _ in range(50):
        middle = tuple(float(random.integers(0, side)) for side in SIZE)
        box = cv2.boxPoints((middle, tuple(random.uniform(6, 50, 2)), float(random.uniform(0, 180)))).astype(np.int32)
        for picture in (infrared, visible):
            cv2.fillConvexPoly(picture, box, int(random.integers(20, 235)), cv2.LINE_AA)
    return cv2.GaussianBlur(infrared, (0, 0), 0.8), cv2.GaussianBlur(visible, (0, 0), 0.8)


STREETS = [street(seed) for seed in range(6)]


def pair(number: int, truth: np.ndarray, period_ms: float = 400.0) -> FramePair:
    """Frame `number` of a rig whose infrared is off by `truth`; every frame shows another street."""
    infrared, visible = STREETS[number % len(STREETS)]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    off = cv2.warpAffine(infrared, similarity(truth, SIZE)[:2], SIZE, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    captured_ns = round(number * period_ms * 1e6)
    return FramePair(
        Frame("infrared", off, captured_ns, number),
        Frame("visible", np.dstack([visible] * 3), captured_ns, number),
        "fused",
    )


def in_step(truth: np.ndarray, frames: int, **config: object) -> tuple[Register, list[np.ndarray]]:
    register = Register(RegistrationConfig(**config), InfraredGain())  # type: ignore[arg-type]
    return register, [register(pair(number, truth)).infrared for number in range(frames)]


def test_in_step_the_picture_is_brought_into_place():
    truth = shift(2.5, -1.5)
    register, pictures = in_step(truth, 28)
    report = register.report()
    assert report["state"] == "uncalibrated"
    assert report["health_state"] == "ok"
    assert report["correction"]["shift_px"] == pytest.approx((2.5, -1.5), abs=0.3)
    inner = (slice(20, -20), slice(20, -20))
    off = cv2.absdiff(pictures[0], STREETS[0][0])[inner].mean()
    assert cv2.absdiff(pictures[-1], STREETS[27 % 6][0])[inner].mean() < 0.4 * off


def test_in_step_a_run_repeats_bit_by_bit():
    one, other = (in_step(shift(2.0, 1.0), 14)[1] for _ in range(2))
    assert all(np.array_equal(first, second) for first, second in zip(one, other, strict=True))


def test_aligned_cameras_are_passed_on_unchanged():
    _, pictures = in_step(shift(0), 20)
    assert all(np.array_equal(picture, STREETS[number % 6][0]) for number, picture in enumerate(pictures))


def test_refinement_that_is_switched_off_changes_nothing():
    register, pictures = in_step(shift(3.0), 20, refine=False)
    assert np.array_equal(pictures[-1], pair(19, shift(3.0)).infrared.image)
    assert "health_state" not in register.report()


def test_the_picture_moves_by_no_more_than_the_slew_a_frame():
    register = Register(RegistrationConfig(slew_px=0.25), InfraredGain())
    steps, before = [], np.zeros(4)
    for number in range(24):
        register(pair(number, shift(3.0)))
        now = register._refinement.maps.parameters
        steps.append(displacement_px(similarity(now - before, SIZE), SIZE))
        before = now
    assert max(steps) <= 0.26
    assert sum(steps) > 2


def test_stale_and_lone_frames_are_no_keyframes():
    register = Register(RegistrationConfig(), InfraredGain())
    first = pair(0, shift(3.0))
    register(first)
    for number in range(1, 10):
        newer = pair(number, shift(3.0)).visible
        register(FramePair(first.infrared, newer, "held"))
        register(FramePair(None, newer, "vis_only"))
    assert register.report()["keyframes"]["total"] == 1


def test_live_the_correction_comes_from_its_own_thread_and_the_frames_never_wait():
    register = Register(RegistrationConfig(refine_every_s=0.01), InfraredGain(), background=True)
    truth = shift(2.5, -1.5)
    deadline = time.monotonic() + 60
    number, corrected = 0, False
    while not corrected and time.monotonic() < deadline:
        register(pair(number, truth))
        number += 1
        time.sleep(0.01)
        corrected = register.report()["correction"]["shift_px"] == pytest.approx((2.5, -1.5), abs=0.4)
    register.close()
    assert corrected
    assert register.report()["failures"] == 0
    register(pair(number, truth))  # the last maps stay when the thread has gone


def test_a_stream_that_changes_its_size_starts_anew():
    register, _ = in_step(shift(2.5), 10)
    small = Frame("visible", np.zeros((120, 160, 3), np.uint8), 0, 0)
    aligned = register(FramePair(pair(0, shift(0)).infrared, small, "fused"))
    assert aligned.infrared.shape == (120, 160)
    assert register.report()["correction"]["shift_px"] == [0, 0]


def test_on_a_calibrated_rig_map_and_correction_are_one_remap():
    truth = shift(2.0, 1.0)
    warp = Warp.of_aligned(SIZE, feather_px=8)
    infrared = pair(0, truth).infrared.image
    maps = warp.corrected(truth)
    inner = maps.weight == 1
    assert cv2.absdiff(maps.remap(infrared), STREETS[0][0])[inner].mean() < 1.5
    assert maps.weight[:, 0].max() == 0  # infrared has moved away from the left edge
    assert maps.weight[:, 5].max() < 1  # and fades in
    assert maps.weight[120, -1] == 1  # on the right it goes on beyond the picture
    assert np.array_equal(warp.offline.remap(infrared), infrared)
