"""Dead pixels and stripes of a thermal detector: found, removed, and nothing else touched."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.conditioning import DeadPixels, Stripes
from pipeline.config import GainConfig, SyntheticSource
from pipeline.frame import Frame
from pipeline.gain import InfraredGain
from pipeline.sources.synthetic import SyntheticCamera

HEIGHT, WIDTH = 240, 320
NOISE = 4.0


def scene(index: int, moving: bool = True) -> np.ndarray:
    """A warm gradient with a pole, a warm person of 12 x 40 pixels and a far point of heat, all behind one lens."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float64)
    shift = 1.7 * index if moving else 0.0
    counts = 8000 + 150 * rows / HEIGHT + 100 * np.sin((columns + shift) / 37)
    counts[:, 60:63] -= 250  # a pole that turns with the camera over the whole height
    left = 100 + shift % 150
    counts += 600 * ((np.abs(columns - left) < 6) & (np.abs(rows - 150) < 20))
    counts += 900 * np.exp(-0.5 * ((columns - 200 - 0.31 * shift % 60) ** 2 + (rows - 40) ** 2) / 0.8**2)
    return counts


def sensed(index: int, moving: bool = True, stripes: np.ndarray | None = None) -> np.ndarray:
    noisy = scene(index, moving) + np.random.default_rng(index).normal(0, NOISE, (HEIGHT, WIDTH))
    if stripes is not None:
        noisy += stripes
    return noisy.round().astype(np.uint16)


def with_dead(image: np.ndarray, places: np.ndarray, values: np.ndarray) -> np.ndarray:
    image = image.copy()
    image.reshape(-1)[places] = values
    return image


@pytest.fixture
def dead() -> tuple[np.ndarray, np.ndarray]:
    """60 dead pixels, two of them side by side."""
    random = np.random.default_rng(3)
    inner = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)[1:-1, 1:-1].ravel()
    places = random.choice(inner, 60, replace=False)
    places[1] = places[0] + 1
    return places, random.choice(np.array([0, 16383], np.uint16), 60)


# Dead pixels


def test_dead_pixels_are_filled_from_their_neighbours_within_a_few_pictures(dead):
    places, values = dead
    repair = DeadPixels()
    for index in range(6):
        picture = repair(with_dead(sensed(index), places, values))
    error = picture.reshape(-1)[places].astype(float) - scene(5).reshape(-1)[places]
    assert np.median(np.abs(error)) < 6  # as good as the noise lets it be
    assert np.percentile(np.abs(error), 90) < 60
    assert abs(repair.count - 60) <= 3


def test_pixels_that_work_are_left_as_they_are(dead):
    places, values = dead
    repair = DeadPixels()
    for index in range(20):
        image = with_dead(sensed(index), places, values)
        picture = repair(image)
    changed = np.flatnonzero((picture != image).reshape(-1))
    assert set(changed) - set(places.tolist()) == set() or len(set(changed) - set(places.tolist())) <= 2
    point = scene(19)[40].argmax()
    assert picture[40, point] == image[40, point]  # a far point of heat is no dead pixel: the lens has blurred it


def test_a_detector_without_dead_pixels_passes_untouched():
    repair = DeadPixels()
    for index in range(20):
        image = sensed(index)
        assert repair(image) is image
    assert repair.count == 0


def test_a_pixel_that_comes_back_to_life_is_shown_again(dead):
    places, values = dead
    repair = DeadPixels()
    for index in range(12):
        repair(with_dead(sensed(index), places, values))
    for index in range(12, 12 + 5 * 14):
        picture = repair(sensed(index))
    assert repair.count == 0
    assert np.array_equal(picture, sensed(81))


def test_rain_of_outliers_is_not_taken_for_dead_pixels():
    repair = DeadPixels()
    for index in range(12):
        random = np.random.default_rng(index)
        places = random.choice(HEIGHT * WIDTH, 2000, replace=False)
        repair(with_dead(sensed(index), places, np.uint16(16383)))
    assert repair.count < 20


# Stripes


def test_columns_that_are_off_are_brought_back_to_within_the_noise():
    offsets = np.random.default_rng(5).normal(0, 8, WIDTH)
    repair = Stripes()
    for index in range(40):
        picture = repair(sensed(index, stripes=offsets))
    left = picture.astype(float) - scene(39)
    column = left.mean(axis=0)
    fine = column - np.convolve(np.pad(column, 15, "reflect"), np.ones(31) / 31, "valid")
    keep = np.abs(np.arange(WIDTH) - 61) > 3  # the pole
    assert offsets.std() > 7
    assert fine[keep].std() < 2.0


def test_rows_are_the_same_the_other_way_round():
    offsets = np.random.default_rng(5).normal(0, 8, WIDTH)
    columns, rows = Stripes(axis=1), Stripes(axis=0)
    for index in range(8):
        image = sensed(index, stripes=offsets)
        assert np.array_equal(rows(np.ascontiguousarray(image.T)).T, columns(image))


def test_a_detector_without_stripes_passes_untouched():
    repair = Stripes()
    for index in range(30):
        image = sensed(index)
        assert repair(image) is image


def test_a_pole_is_no_stripe():
    offsets = np.random.default_rng(5).normal(0, 6, WIDTH)
    repair = Stripes()
    for index in range(60):
        picture = repair(sensed(index, moving=False, stripes=offsets))
    pole = picture[:, 60:63].mean() - 0.5 * (picture[:, 55:58].mean() + picture[:, 65:68].mean())
    truth = scene(59, moving=False)
    wanted = truth[:, 60:63].mean() - 0.5 * (truth[:, 55:58].mean() + truth[:, 65:68].mean())
    assert pole == pytest.approx(wanted, abs=12)  # of 250


def test_after_the_shutter_a_new_pattern_is_learnt_at_once():
    before, after = (np.random.default_rng(seed).normal(0, 8, WIDTH) for seed in (5, 6))
    repair = Stripes()
    for index in range(60):
        repair(sensed(index, stripes=before))
    repair.relearn()
    for index in range(60, 72):
        picture = repair(sensed(index, stripes=after))
    column = (picture.astype(float) - scene(71)).mean(axis=0)
    fine = column - np.convolve(np.pad(column, 15, "reflect"), np.ones(31) / 31, "valid")
    assert fine[np.abs(np.arange(WIDTH) - 61) > 3].std() < 3.0


def test_the_input_keeps_its_pixels(dead):
    repair = (DeadPixels(), Stripes())
    for index in range(10):
        image = with_dead(sensed(index, stripes=np.random.default_rng(5).normal(0, 8, WIDTH)), *dead)
        before = image.copy()
        repair[1](repair[0](image))
        assert np.array_equal(image, before)


def test_another_size_begins_anew():
    pixels, stripes = DeadPixels(), Stripes()
    for index in range(6):
        stripes(pixels(sensed(index)))
    small = sensed(7)[:100, :120].copy()
    assert stripes(pixels(small)).shape == (100, 120)


# Together, on the synthetic rig


def grab(count: int, **settings) -> list[Frame]:
    camera = SyntheticCamera(
        SyntheticSource(scene="night", width=320, height=256, realtime=False, **settings), "infrared"
    )
    camera.open()
    return [camera.grab() for _ in range(count)]


def test_with_the_default_settings_a_striped_camera_with_dead_pixels_shows_what_a_good_one_shows():
    bad, good = InfraredGain(), InfraredGain(GainConfig(stripes="off", dead_pixels="off"))
    untreated = InfraredGain(GainConfig(stripes="off", dead_pixels="off"))
    for spoilt, clean in zip(grab(30, stripe_counts=10, dead_pixels=60), grab(30), strict=True):
        shown, info = bad(spoilt)
        wanted, _ = good(clean)
        raw, _ = untreated(spoilt)
    error = np.abs(shown.astype(float) - wanted).mean()
    assert error < 0.6 * np.abs(raw.astype(float) - wanted).mean()
    assert 50 <= info["dead_pixels"] <= 64
    assert 6 < info["stripes"] < 12
    assert set(info["times_ms"]) == {"dead_pixels", "stripes", "gain"}


def test_conditioning_is_bit_identical_from_run_to_run():
    frames = grab(12, stripe_counts=10, dead_pixels=60)

    def run() -> bytes:
        gain = InfraredGain(GainConfig(stripes="both"))
        return b"".join(gain(one)[0].tobytes() for one in frames)

    assert run() == run()


def test_an_eight_bit_camera_is_conditioned_only_when_asked():
    image = np.clip(sensed(0, stripes=np.random.default_rng(5).normal(0, 20, WIDTH)) // 8 - 950, 0, 255).astype(
        np.uint8
    )
    plain, asked = InfraredGain(), InfraredGain(GainConfig(stripes="columns", dead_pixels="on"))
    for index in range(10):
        one = Frame("infrared", image.copy(), index * 40_000_000, index)
        one.image[0, 0] = index  # no closed shutter
        assert np.array_equal(plain(one)[0], one.image)
        picture, info = asked(one)
    assert info["stripes"] > 1
    assert not np.array_equal(picture, one.image)
