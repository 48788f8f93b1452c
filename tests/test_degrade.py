"""Every degradation does to a picture what its name says, and nothing else."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from engines.base import INFRARED_DEGRADATIONS, VISIBLE_DEGRADATIONS
from engines.degrade import CAMERA, CODED, degrade_infrared, degrade_visible


def scene() -> np.ndarray:
    """A grey ramp with a textured square, float32 in [0, 1], (96, 128)."""
    picture = np.tile(np.linspace(0.2, 0.7, 128, dtype=np.float32), (96, 1))
    picture[30:60, 40:80] += 0.1 * (np.indices((30, 40)).sum(0) % 2)
    return picture


def colours() -> np.ndarray:
    return np.stack([scene(), scene() * 0.8, scene() * 0.6], -1).astype(np.float32)


def fine_detail(picture: np.ndarray) -> float:
    """Mean size of the Laplacian: noise raises it, blur lowers it."""
    return float(np.abs(cv2.Laplacian(picture, cv2.CV_32F)).mean())


def blockiness(picture: np.ndarray) -> float:
    """How much larger steps between columns are where blocks of 8 pixels meet, below the textured square."""
    steps = np.abs(np.diff(picture[64:], axis=1))
    return float(steps[:, 7::8].mean() - np.delete(steps, np.s_[7::8], axis=1).mean())


def over_seeds(degrade, picture: np.ndarray, kind: str, measure) -> list[float]:
    """The mean of the measure at strength 0 and at strength 1."""
    seeds = range(12)
    return [float(np.mean([measure(degrade(picture, kind, seed, strength)) for seed in seeds])) for strength in (0, 1)]


@pytest.mark.parametrize("kind", VISIBLE_DEGRADATIONS)
def test_visible_pictures_stay_pictures(kind: str):
    picture = colours()
    spoiled = degrade_visible(picture, kind, seed=1)
    assert spoiled.shape == picture.shape
    assert spoiled.dtype == np.float32
    assert spoiled.min() >= 0
    assert spoiled.max() <= 1
    assert np.array_equal(picture, colours())  # the input is left as it was


@pytest.mark.parametrize("kind", INFRARED_DEGRADATIONS)
def test_infrared_pictures_stay_pictures(kind: str):
    picture = scene()
    spoiled = degrade_infrared(picture, kind, seed=1)
    assert spoiled.shape == picture.shape
    assert spoiled.dtype == np.float32
    assert 0 <= spoiled.min() <= spoiled.max() <= 1
    assert np.array_equal(picture, scene())


@pytest.mark.parametrize("kind", VISIBLE_DEGRADATIONS[1:])
def test_equal_seeds_give_equal_visible_pictures(kind: str):
    first = degrade_visible(colours(), kind, seed=5)
    assert np.array_equal(first, degrade_visible(colours(), kind, seed=5))
    assert not np.array_equal(first, colours())


@pytest.mark.parametrize("kind", INFRARED_DEGRADATIONS[1:])
def test_equal_seeds_give_equal_infrared_pictures(kind: str):
    first = degrade_infrared(scene(), kind, seed=5)
    assert np.array_equal(first, degrade_infrared(scene(), kind, seed=5))
    assert not np.array_equal(first, scene())


@pytest.mark.parametrize("kind", ["low_light", "noise", "rain", "haze"])
def test_other_seeds_give_other_pictures(kind: str):
    assert not np.array_equal(degrade_visible(colours(), kind, 1), degrade_visible(colours(), kind, 2))


@pytest.mark.parametrize("kind", ["low_contrast", "noise", "stripes", "dead_pixels", "banding"])
def test_other_seeds_give_other_infrared_pictures(kind: str):
    assert not np.array_equal(degrade_infrared(scene(), kind, 1), degrade_infrared(scene(), kind, 2))


def change_of(degrade, picture: np.ndarray, kind: str, seed: int, strength: float) -> float:
    return float(np.sqrt(np.mean((degrade(picture, kind, seed, strength) - picture) ** 2)))


@pytest.mark.parametrize(("degrade", "picture"), [(degrade_visible, colours()), (degrade_infrared, scene())])
def test_what_every_camera_adds_is_slight_and_no_kind_to_be_named(degrade, picture):
    strong = [change_of(degrade, picture, CAMERA, seed, 1.0) for seed in range(20)]
    assert 0.003 < np.mean(strong) < 0.02  # 0.8 to 5 grey levels
    assert max(change_of(degrade, picture, CAMERA, seed, 0.0) for seed in range(20)) < 1e-6
    assert CAMERA not in (*VISIBLE_DEGRADATIONS, *INFRARED_DEGRADATIONS)


@pytest.mark.parametrize(("degrade", "picture"), [(degrade_visible, colours()), (degrade_infrared, scene())])
def test_a_coded_picture_lost_little_and_is_no_kind_to_be_named(degrade, picture):
    assert change_of(degrade, picture, CODED, 1, 0.0) < 0.012
    assert change_of(degrade, picture, CODED, 1, 0.0) < change_of(degrade, picture, CODED, 1, 1.0) < 0.03
    assert CODED not in (*VISIBLE_DEGRADATIONS, *INFRARED_DEGRADATIONS)


def test_coding_halves_the_resolution_of_colour_and_keeps_that_of_light():
    stripes = np.full((64, 64, 3), 0.5, np.float32)
    stripes[:, ::2] = [0.9, 0.3, 0.5]  # one column red, the next grey
    seen = degrade_visible(stripes, CODED, 1, 0.0)
    light = np.array([0.299, 0.587, 0.114], np.float32)
    assert np.abs(seen @ light - stripes @ light).mean() < 0.005
    redness = seen[..., 0] - seen[..., 1]
    assert abs(redness[:, ::2].mean() - redness[:, 1::2].mean()) < 0.05  # 0.6 before
    lines = np.zeros((64, 64, 3), np.float32)
    lines[:, ::2] = 1
    assert np.abs(degrade_visible(lines, CODED, 1, 0.0) - lines).mean() < 0.01


def test_none_changes_nothing():
    assert np.array_equal(degrade_visible(colours(), "none", 1), colours())
    assert np.array_equal(degrade_infrared(scene(), "none", 1), scene())


@pytest.mark.parametrize(
    ("kind", "measure"),
    [
        ("low_light", lambda picture: -picture.mean()),
        ("over_exposure", lambda picture: picture.mean()),
        ("blur", lambda picture: -fine_detail(picture)),
        ("noise", fine_detail),
        ("rain", fine_detail),
        ("haze", lambda picture: -picture.std()),
        ("compression", blockiness),
    ],
)
def test_more_strength_spoils_a_visible_picture_more(kind: str, measure):
    weak, strong = over_seeds(degrade_visible, colours(), kind, measure)
    assert measure(colours()) <= weak < strong


@pytest.mark.parametrize(
    ("kind", "measure"),
    [
        ("low_contrast", lambda picture: -picture.std()),
        ("noise", fine_detail),
        ("stripes", fine_detail),
        ("blur", lambda picture: -fine_detail(picture)),
        ("dead_pixels", lambda picture: np.isin(picture, (0, 1)).mean()),
        ("banding", lambda picture: -len(np.unique(picture))),
    ],
)
def test_more_strength_spoils_an_infrared_picture_more(kind: str, measure):
    weak, strong = over_seeds(degrade_infrared, scene(), kind, measure)
    assert measure(scene()) <= weak < strong


@pytest.mark.parametrize(("strength", "sigma"), [(0.0, 0.015), (1.0, 0.1)])
def test_noise_is_each_pixels_own(strength: float, sigma: float):
    """What neighbours have in common would be stripes or streaks."""
    for degrade, shape in ((degrade_visible, (96, 128, 3)), (degrade_infrared, (96, 128))):
        noise = degrade(np.full(shape, 0.5, np.float32), "noise", 1, strength) - 0.5
        assert noise.std() == pytest.approx(sigma, rel=0.05)
        assert abs(np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1]) < 0.05
        assert abs(np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]) < 0.05


def test_over_exposure_blows_out_bright_parts_and_no_others():
    """At half strength: gain 1.85 clips from 0.54 on, 1.15 over a veil of 0.12 to 0.38 from 0.85 on at the latest."""
    ramp = np.tile(np.linspace(0, 1, 128, dtype=np.float32)[:, None], (96, 1, 3))
    for seed in range(20):
        exposed = degrade_visible(ramp, "over_exposure", seed, strength=0.5)
        assert (exposed[ramp > 0.86] == 1).all()
        assert (exposed[ramp < 0.53] < 1).all()
        assert (exposed >= ramp).all()


def test_stray_light_is_seldom_and_thicker_in_some_places():
    """Any stretch of contrast would undo an even veil."""
    black = np.zeros((96, 128, 3), np.float32)
    lights = [degrade_visible(black, "over_exposure", seed, strength=1.0)[..., 0] for seed in range(40)]
    veils = [light for light in lights if light.any()]  # gain alone leaves black as it was
    assert 4 <= len(veils) <= 20
    assert min(np.ptp(veil) for veil in veils) > 0.1
    assert np.mean(veils) == pytest.approx(1.15 * 0.4, rel=0.15)
    assert max(np.abs(np.diff(veil)).max() for veil in veils) < 0.03  # smooth


def test_strong_compression_turns_a_gentle_ramp_into_steps_of_8_pixels():
    """One grey level a pixel is too flat for quality 8 to keep: a block has one grey, and rises by all 8 at its end."""
    ramp = np.tile((np.arange(128, dtype=np.float32)[:, None] + 60) / 255, (96, 1, 3))
    steps = np.diff(degrade_visible(ramp, "compression", 1, strength=1.0), axis=1) * 255
    assert steps[:, 7::8].mean() == pytest.approx(8, rel=0.1)
    assert np.abs(np.delete(steps, np.s_[7::8], axis=1)).max() <= 1


@pytest.mark.parametrize(("strength", "share"), [(0.0, 0.0005), (1.0, 0.01)])
def test_dead_pixels_are_cold_or_hot_some_in_pairs_and_the_rest_is_untouched(strength: float, share: float):
    grey = np.full((1000, 1000), 0.4, np.float32)
    spoiled = degrade_infrared(grey, "dead_pixels", 1, strength)
    dead = spoiled != grey
    assert np.isin(spoiled[dead], (0, 1)).all()
    assert spoiled[dead].mean() == pytest.approx(0.5, abs=0.1)
    assert dead.mean() == pytest.approx(1.2 * share, rel=0.1)  # one in five takes its neighbour along
    assert (dead[:, 1:] & dead[:, :-1]).sum() / dead.sum() == pytest.approx(0.2 / 1.2, abs=0.06)


@pytest.mark.parametrize(("strength", "levels"), [(0.0, 32), (1.0, 8)])
def test_banding_leaves_few_grey_levels_and_each_pixel_near_its_own(strength: float, levels: int):
    ramp = np.tile(np.linspace(0, 1, 512, dtype=np.float32), (8, 1))
    for seed in range(5):
        banded = degrade_infrared(ramp, "banding", seed, strength)
        assert len(np.unique(banded)) == levels + 1  # the first and the last one are narrower
        assert np.abs(banded - ramp).max() <= 0.5 / levels + 1e-6


LOW_CONTRASTS = [degrade_infrared(scene(), "low_contrast", seed, strength=1.0) for seed in range(40)]


def test_low_contrast_leaves_a_fraction_of_the_spread():
    kept = [float(spoiled.std() / scene().std()) for spoiled in LOW_CONTRASTS]
    assert max(kept) < 0.5
    assert min(kept) == pytest.approx(0.2, abs=0.1)


def test_low_contrast_takes_more_in_some_places():
    """Any stretch of contrast would undo an even loss."""
    lines = np.tile(np.array([0.4, 0.6], np.float32), (96, 64))
    for seed in range(12):
        left = np.abs(np.diff(degrade_infrared(lines, "low_contrast", seed, strength=0.5), axis=1))
        assert left.max() > 1.05 * left.min()


def test_low_contrast_comes_dark_as_well_as_washed_out():
    """A camera's own gain leaves all but one very cold thing bright and flat."""
    cold = [float(np.quantile(spoiled, 0.05)) for spoiled in LOW_CONTRASTS]
    assert min(cold) < float(np.quantile(scene(), 0.05)) + 0.3
    assert max(cold) > 0.6


def test_stripes_differ_between_columns_and_hardly_within_one():
    seed = next(seed for seed in range(20) if np.random.default_rng(seed).random() >= 0.15)  # columns, not rows
    offsets = degrade_infrared(np.full((96, 128), 0.5, np.float32), "stripes", seed, strength=1.0) - 0.5
    of_columns = offsets.mean(0).std()
    assert of_columns == pytest.approx(0.07, rel=0.25)
    assert of_columns > 4 * offsets.mean(1).std()


def test_stripes_seldom_lie_along_rows():
    grey = np.full((96, 128), 0.5, np.float32)
    spoiled = [degrade_infrared(grey, "stripes", seed, strength=1.0) for seed in range(40)]
    assert 1 <= sum(picture.mean(1).std() > picture.mean(0).std() for picture in spoiled) <= 12


@pytest.mark.parametrize(("strength", "gamma"), [(0.0, 1.5), (1.0, 3.0)])
def test_low_light_bends_the_curve_by_gamma(strength: float, gamma: float):
    flat = np.full((96, 128, 3), 0.5, np.float32)
    for seed in range(5):
        assert degrade_visible(flat, "low_light", seed, strength).mean() == pytest.approx(0.5**gamma, abs=0.01)


@pytest.mark.parametrize(("strength", "thickness"), [(0.0, 0.25), (1.0, 1.1)])
def test_haze_takes_contrast_as_air_of_its_mean_thickness_does(strength: float, thickness: float):
    lines = np.tile(np.array([0, 1], np.float32)[:, None], (96, 64, 1)).repeat(3, 2)
    hazy = np.stack([degrade_visible(lines, "haze", seed, strength) for seed in range(20)])
    assert (hazy[:, :, 1::2] - hazy[:, :, ::2]).mean() == pytest.approx(np.exp(-thickness), abs=0.04)


def test_haze_is_thicker_in_some_places():
    veil = degrade_visible(np.zeros((96, 128, 3), np.float32), "haze", 4, strength=1.0)
    assert veil.max() - veil.min() > 0.1


def test_rain_is_made_of_brighter_streaks():
    """Under a sky that may be up to 12 % darker."""
    for seed in range(6):
        change = (degrade_visible(colours(), "rain", seed, strength=1.0) - 0.88 * colours()).mean(-1)
        assert (change >= -1e-6).all()
        assert (change > 0.1).mean() > 0.005  # streaks cover some of the picture


def test_rain_comes_as_single_drops_and_as_dense_drizzle():
    covered = []
    for seed in range(12):
        change = (degrade_visible(np.zeros((96, 128, 3), np.float32), "rain", seed, strength=0.5)).mean(-1)
        covered.append(float((change > change.min() + 0.02).mean()))
    assert min(covered) < 0.12
    assert max(covered) > 0.2


def test_streaks_of_rain_show_on_bright_ground_or_fade_there():
    bright = np.full((96, 128, 3), 0.8, np.float32)
    streaks = []
    for seed in range(24):
        changed = degrade_visible(bright, "rain", seed, strength=0.5).mean(-1)
        streaks.append(float(np.quantile(changed, 0.99) - np.quantile(changed, 0.2)))
    assert max(streaks) > 0.12
    assert min(streaks) < 0.05


def test_a_darkened_picture_keeps_some_noise_by_which_it_is_told_from_a_dark_place():
    flat = np.full((96, 128, 3), 0.5, np.float32)
    noise = [float(degrade_visible(flat, "low_light", seed, strength=0.3).std()) for seed in range(40)]
    assert min(noise) > 0.004
    assert max(noise) > 0.02


def test_what_is_darker_than_any_place_by_day_may_have_lost_all_of_its_noise():
    flat = np.full((96, 128, 3), 0.3, np.float32)
    noise = [float(degrade_visible(flat, "low_light", seed, strength=1.0).std()) for seed in range(40)]
    assert min(noise) < 1e-6
    assert max(noise) > 0.02


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_blur_spreads_a_point_evenly_or_along_a_line(strength: float):
    """Softness and defocus have one spread for one strength, so that one number says how strong they are."""
    point = np.zeros((65, 65, 3), np.float32)
    point[32, 32] = 1
    y, x = np.indices((65, 65)) - 32
    spreads, peaks = [], []
    for seed in range(24):
        kernel = degrade_visible(point, "blur", seed, strength)[..., 0]
        assert kernel.sum() == pytest.approx(1, abs=1e-3)
        along = np.linalg.eigvalsh(np.cov(np.stack([x.ravel(), y.ravel()]), aweights=kernel.ravel(), ddof=0))
        if along[0] > 0.25 * along[1]:  # not a line
            spreads.append(np.sqrt(along.mean()))
            peaks.append(round(float(kernel.max()), 4))
    assert 12 <= len(spreads) <= 22
    assert spreads == pytest.approx([0.8 + 2 * strength] * len(spreads), rel=0.15)
    assert len(set(peaks)) == 2  # a Gaussian and a disc


def test_unknown_kinds_and_strengths_are_refused():
    with pytest.raises(ValueError, match="no degradation 'snow'"):
        degrade_visible(colours(), "snow", 1)
    with pytest.raises(ValueError, match="no degradation 'rain'"):
        degrade_infrared(scene(), "rain", 1)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        degrade_infrared(scene(), "noise", 1, strength=2.0)
