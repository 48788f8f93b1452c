"""Noise is averaged over time where nothing moves, and motion passes at once."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import pytest

from pipeline.config import SteadyConfig
from pipeline.steady import Steady

BOTH = (True, True)


def noisy(clean: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sigma, clean.shape)
    return np.rint(np.clip(clean + noise, 0, 255)).astype(np.uint8)


def grey(value: int) -> np.ndarray:
    return np.full((96, 128, 3), value, np.uint8)


def flicker(pictures: list[np.ndarray]) -> float:
    """Mean change from frame to frame, in grey levels."""
    return float(np.mean([np.abs(b.astype(float) - a).mean() for a, b in pairwise(pictures)]))


def test_noise_in_a_still_scene_falls_as_a_recursive_filter_of_this_share_predicts():
    frames = [noisy(grey(100), 4, seed) for seed in range(40)]
    steady = Steady(SteadyConfig(share=0.25))
    result = [steady(frame, BOTH) for frame in frames]
    # A share a of white noise: changes shrink by a / sqrt(2 - a) = 0.19; the local mean lets a little more through.
    assert flicker(result[10:]) / flicker(frames[10:]) == pytest.approx(0.19, abs=0.05)
    assert np.mean(result[-1]) == pytest.approx(100, abs=0.3)


def test_a_moving_square_is_where_it_is_and_nowhere_else():
    steady, last = Steady(SteadyConfig()), None
    for step in range(10):
        frame = noisy(grey(60), 2, step)
        frame[40:52, 8 * step : 8 * step + 12] = 200
        last = steady(frame, BOTH)
    assert last is not None
    inside, behind = last[42:50, 74:82], last[42:50, 40:62]
    assert inside.mean() == pytest.approx(200, abs=1)
    assert behind.mean() == pytest.approx(60, abs=2)  # no ghost of where it was


def test_a_small_warm_spot_appears_at_once():
    steady = Steady(SteadyConfig())
    for step in range(5):
        steady(noisy(grey(60), 1, step), BOTH)
    frame = noisy(grey(60), 1, 9)
    frame[30:33, 50:53] = 160
    assert steady(frame, BOTH)[30:33, 50:53].mean() > 150


def test_a_slow_change_of_light_is_followed():
    steady = Steady(SteadyConfig())
    for level in range(60, 160):
        result = steady(grey(level), BOTH)
    assert result.mean() == pytest.approx(159, abs=3.1)  # one level a frame lags by at most (1 - share) / share


def test_a_share_of_one_changes_nothing():
    steady = Steady(SteadyConfig(share=1))
    for step in range(4):
        frame = noisy(grey(90), 5, step)
        assert np.array_equal(steady(frame, BOTH), frame)


def test_switched_off_the_very_picture_passes():
    frame = noisy(grey(90), 5, 0)
    assert Steady(SteadyConfig(enabled=False))(frame, BOTH) is frame


def test_another_scene_shows_nothing_of_the_last_one():
    steady = Steady(SteadyConfig())
    steady(noisy(grey(100), 2, 0), BOTH)
    frame = noisy(grey(106), 2, 1)
    assert np.array_equal(steady(frame, BOTH), frame)


@pytest.mark.parametrize("change", ["camera lost", "other size"])
def test_it_starts_anew_when_there_is_nothing_to_compare_with(change: str):
    steady = Steady(SteadyConfig())
    steady(grey(100), BOTH)
    frame = grey(102) if change == "camera lost" else grey(102)[:64]
    presence = (False, True) if change == "camera lost" else BOTH
    assert np.array_equal(steady(frame, presence), frame)


def test_the_same_frames_give_the_same_bits():
    runs = []
    for _ in range(2):
        steady = Steady(SteadyConfig())
        runs.append([steady(noisy(grey(80), 3, step), BOTH) for step in range(8)])
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_picture_given_stays_as_it_was():
    steady, frame = Steady(SteadyConfig()), noisy(grey(80), 3, 1)
    before = frame.copy()
    steady(noisy(grey(80), 3, 0), BOTH)
    steady(frame, BOTH)
    assert np.array_equal(frame, before)


def test_a_scene_that_moves_is_not_taken_for_noise_and_does_not_lag():
    """Weak texture under a slow pan, each picture shown twice: what lagged would still arrive in the repeat."""
    random = np.random.default_rng(3)
    texture = cv2.GaussianBlur(random.normal(0, 40, (160, 240)).astype(np.float32), (0, 0), 1.2) + 80
    frames = [np.roll(texture, step // 2, 1)[16:-16, 16:-16].astype(np.uint8) for step in range(16)]
    steady = Steady(SteadyConfig())
    shown = [steady(cv2.cvtColor(frame, cv2.COLOR_GRAY2RGB), BOTH)[..., 0].astype(float) for frame in frames]
    moved = np.mean([np.abs(b.astype(float) - a).mean() for a, b in zip(frames[1::2], frames[2::2], strict=False)])
    lag = np.mean([np.abs(picture - frame).mean() for picture, frame in zip(shown[4:], frames[4:], strict=True)])
    assert 2 < moved < 6
    assert lag < 0.2 * moved
