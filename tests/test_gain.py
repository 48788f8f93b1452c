"""Gain control: 16-bit counts become a steady picture."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from pipeline.config import GainConfig, SyntheticSource
from pipeline.frame import Frame
from pipeline.gain import InfraredGain
from pipeline.shutter import Repeats, Shutter
from pipeline.sources.synthetic import SyntheticCamera
from tests.rigs.counts import HEIGHT, WIDTH, background_change, frame, scene

PERCENTILES = GainConfig(method="percentile")


def test_the_percentiles_become_black_and_white():
    picture, info = InfraredGain(PERCENTILES)(frame(scene(0)))
    assert picture.dtype == np.uint8
    assert picture.shape == (HEIGHT, WIDTH)
    assert info["method"] == "percentile"
    low, high = np.percentile(scene(0), (1, 99))
    assert info["low"] == pytest.approx(low, abs=3)
    assert info["high"] == pytest.approx(high, abs=3)
    assert (picture == 0).mean() == pytest.approx(0.01, abs=0.005)
    assert (picture == 255).mean() == pytest.approx(0.01, abs=0.005)


def test_the_conversion_is_linear_and_monotonic():
    counts = np.repeat(np.arange(7000, 9000, dtype=np.uint16)[None], 8, axis=0)
    picture, info = InfraredGain(PERCENTILES)(frame(counts))
    expected = np.clip((counts - info["low"]) * 255 / (info["high"] - info["low"]), 0, 255)
    assert np.abs(picture.astype(float) - expected).max() <= 1
    assert (np.diff(picture[0].astype(int)) >= 0).all()


@pytest.mark.parametrize("method", ["plateau", "percentile"])
@pytest.mark.parametrize("value", [0, 1, 40000, 65535])
def test_a_flat_wall_is_not_stretched_into_noise(value, method):
    counts = np.clip(value + np.random.default_rng(1).normal(0, 2, (64, 64)).round(), 0, 65535).astype(np.uint16)
    picture, info = InfraredGain(GainConfig(method=method, min_span_counts=200))(frame(counts))
    assert info["high"] - info["low"] == pytest.approx(200, abs=16)  # the plateau's bins are 8 counts wide
    assert picture.std() < 4
    if value == 40000 or method == "percentile":
        assert 90 < picture.mean() < 165


@pytest.mark.parametrize("method", ["plateau", "percentile"])
def test_a_hot_object_that_enters_does_not_change_the_background(method):
    gain = InfraredGain(GainConfig(method=method))
    pictures = [gain(frame(scene(index, hot=20 <= index < 120), index))[0] for index in range(220)]
    change = background_change(pictures)
    assert np.percentile(change, 99) <= 2.0  # grey levels from one frame to the next
    assert change.max() <= 2.5


def test_the_hot_object_gets_its_own_grey_levels_in_the_end():
    gain = InfraredGain(PERCENTILES)
    for index in range(250):
        _, info = gain(frame(scene(index, hot=True), index))
    assert info["high"] == pytest.approx(12000, abs=100)


def test_beside_something_very_hot_the_background_keeps_most_of_its_contrast():
    def spread(hot: bool, method: str) -> float:
        gain = InfraredGain(GainConfig(method=method))
        for index in range(150):
            picture, _ = gain(frame(scene(index, hot=hot), index))
        return float(np.ptp([picture[10:20, 10:20].mean(), picture[-20:-10, -20:-10].mean()]))

    assert spread(True, "plateau") > 0.4 * spread(False, "plateau")
    assert spread(True, "percentile") < 0.15 * spread(False, "percentile")  # what the plateau is for


@pytest.mark.parametrize("method", ["plateau", "percentile"])
@pytest.mark.parametrize("closed", ["repeats", "sends nothing"])
def test_when_the_shutter_has_shifted_all_counts_the_picture_stays_as_it_was(closed, method):
    gain = InfraredGain(GainConfig(method=method))
    pictures = [gain(frame(scene(index), index))[0] for index in range(30)]
    if closed == "repeats":
        pictures += [gain(frame(scene(29), index, repeats=index - 29))[0] for index in range(30, 42)]
    pictures += [gain(frame(scene(index, offset=60), index))[0] for index in range(42, 60)]
    assert background_change(pictures).max() <= 2.0


def test_a_picture_of_which_only_the_repeat_was_given_is_followed():
    """Some cores send each picture twice, and pairing may take the second one each time."""
    gain, once = InfraredGain(PERCENTILES), InfraredGain(PERCENTILES)
    for number in range(30):
        counts = scene(number, hot=number > 3)
        _, info = gain(frame(counts, 2 * number + 1, repeats=1))
        assert info["high"] == once(frame(counts, number))[1]["high"]


def test_without_a_shutter_the_same_shift_would_show():
    gain = InfraredGain()
    pictures = [gain(frame(scene(index, offset=60 * (index >= 30)), index))[0] for index in range(60)]
    assert background_change(pictures).max() > 10


def test_a_wholly_different_scene_is_caught_up_with_quickly():
    gain = InfraredGain()
    gain(frame(scene(0), 0))
    for index in range(1, 60):
        picture, _ = gain(frame(scene(index, offset=5000), index))
    assert 60 < picture.mean() < 200


def test_an_eight_bit_camera_has_its_own_gain_control_and_passes_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    picture, info = InfraredGain()(frame(image))
    assert np.array_equal(picture, image)
    assert info["method"] == "camera"


def test_a_black_hot_camera_is_turned_into_white_hot():
    image = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    assert np.array_equal(InfraredGain(GainConfig(polarity="black_hot"))(frame(image))[0], 255 - image)
    white, info = InfraredGain()(frame(scene(0)))
    black, black_info = InfraredGain(GainConfig(polarity="black_hot"))(frame(65535 - scene(0)))
    assert np.array_equal(black, white)
    assert (black_info["low"], black_info["high"]) == (65535 - info["low"], 65535 - info["high"])


def test_the_input_keeps_its_pixels():
    image = scene(0)
    before = image.copy()
    InfraredGain(GainConfig(polarity="black_hot"))(frame(image))
    assert np.array_equal(image, before)


def test_a_held_frame_gives_the_same_picture_and_moves_nothing():
    gain, again = InfraredGain(), InfraredGain()
    for index in range(10):
        one = frame(scene(index, hot=index > 3), index)
        first = gain(one)
        assert gain(one) is first
        assert np.array_equal(again(one)[0], first[0])


def test_two_runs_give_the_same_bits():
    def run() -> bytes:
        gain = InfraredGain()
        return b"".join(gain(frame(scene(index, hot=index > 5), index))[0].tobytes() for index in range(12))

    assert run() == run()


def test_a_new_size_begins_anew():
    gain = InfraredGain()
    gain(frame(scene(0), 0))
    picture, info = gain(frame(scene(1, offset=9000)[:120, :160].copy(), 1))
    assert picture.shape == (120, 160)
    assert info["low"] > 16000


# Under a cold sky


PEOPLE = ("near", "back", "across", "pavement", "left", "far", "distant")


def contrast_of_people(picture: np.ndarray, camera: SyntheticCamera, true_ns: int) -> dict[str, float]:
    """Mean grey of each person minus that of what is just around."""
    contrast = {}
    for name in PEOPLE:
        covered = camera.coverage(name, true_ns)
        ring = (cv2.dilate((covered > 0.02).astype(np.uint8), np.ones((15, 15), np.uint8)) > 0) & (covered < 0.01)
        if (covered > 0.9).sum() > 20:
            contrast[name] = float(picture[covered > 0.9].mean() - picture[ring].mean())
    return contrast


@pytest.mark.parametrize(("scene_name", "least"), [("night", 110), ("day", 90), ("rain", 110), ("fog", 110)])
def test_warm_people_keep_their_contrast_on_the_street_with_the_settings_that_everybody_gets(scene_name, least):
    config = SyntheticSource(scene=scene_name, width=640, height=512, realtime=False)
    camera = SyntheticCamera(config, "infrared")
    camera.open()
    one = camera.grab()
    picture, _ = InfraredGain()(one)
    people = contrast_of_people(picture, camera, camera.true_capture_ns(one.index))
    assert len(people) >= 5
    assert np.median(list(people.values())) >= least
    assert min(people.values()) >= 50
    assert (picture == 255).mean() < 0.01  # nobody is a white patch: inside of people there is something to see
    linear, _ = InfraredGain(PERCENTILES)(one)
    if scene_name in ("night", "day"):  # a clear, cold sky
        before = contrast_of_people(linear, camera, camera.true_capture_ns(one.index))
        assert np.median(list(people.values())) > 1.5 * np.median(list(before.values()))


def test_a_configuration_that_names_percentiles_means_the_linear_stretch():
    assert GainConfig().method == "plateau"
    assert GainConfig(low_percentile=25).method == "percentile"
    assert GainConfig(low_percentile=25, method="plateau").method == "plateau"


# The shutter


def test_repeats_are_counted_until_a_new_picture_comes():
    repeats = Repeats()
    one, other = np.zeros((16, 16), np.uint8), np.ones((16, 16), np.uint8)
    assert [repeats.add(image) for image in (one, one, one, other, other, one)] == [0, 1, 2, 0, 1, 0]


def test_three_equal_pictures_in_a_row_are_a_closed_shutter():
    shutter, image = Shutter(), np.zeros((16, 16), np.uint16)
    frozen = [shutter.judged(Frame("infrared", image, 40_000_000 * index, index)).frozen for index in range(4)]
    assert frozen == [False, False, True, True]


def test_a_source_that_fills_the_same_buffer_again_is_not_mistaken_for_a_closed_shutter():
    repeats, buffer = Repeats(), np.zeros((16, 16), np.uint16)
    for value in range(5):
        buffer[:] = value
        assert repeats.add(buffer) == 0
