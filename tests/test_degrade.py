"""Every degradation does to a picture what its name says, and nothing else."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from engines.base import INFRARED_DEGRADATIONS, VISIBLE_DEGRADATIONS
from engines.degrade import CAMERA, degrade_infrared, degrade_visible


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


@pytest.mark.parametrize(("degrade", "picture"), [(degrade_visible, colours()), (degrade_infrared, scene())])
def test_what_every_camera_adds_is_slight_and_no_kind_to_be_named(degrade, picture):
    changes = [np.sqrt(np.mean((degrade(picture, CAMERA, seed, 1.0) - picture) ** 2)) for seed in range(20)]
    assert 0.003 < np.mean(changes) < 0.02  # 0.8 to 5 grey levels
    faint = [np.sqrt(np.mean((degrade(picture, CAMERA, seed, 0.0) - picture) ** 2)) for seed in range(20)]
    assert max(faint) < 0.012  # at most the best compression
    assert min(faint) < 1e-6
    assert CAMERA not in (*VISIBLE_DEGRADATIONS, *INFRARED_DEGRADATIONS)


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
        ("rain", lambda picture: (picture - colours()).mean()),
        ("haze", lambda picture: -picture.std()),
    ],
)
def test_more_strength_spoils_a_visible_picture_more(kind: str, measure):
    weak, strong = (measure(degrade_visible(colours(), kind, 3, strength)) for strength in (0.0, 1.0))
    assert measure(colours()) <= weak < strong


LOW_CONTRASTS = [degrade_infrared(scene(), "low_contrast", seed, strength=1.0) for seed in range(40)]


def test_low_contrast_leaves_a_fraction_of_the_spread():
    kept = [float(spoiled.std() / scene().std()) for spoiled in LOW_CONTRASTS]
    assert max(kept) < 0.5
    assert min(kept) == pytest.approx(0.2, abs=0.1)


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


def test_unknown_kinds_and_strengths_are_refused():
    with pytest.raises(ValueError, match="no degradation 'snow'"):
        degrade_visible(colours(), "snow", 1)
    with pytest.raises(ValueError, match="no degradation 'rain'"):
        degrade_infrared(scene(), "rain", 1)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        degrade_infrared(scene(), "noise", 1, strength=2.0)
