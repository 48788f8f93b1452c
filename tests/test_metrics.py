"""The scores: of pictures that one can score by hand, by brute force, and of the trivial methods as published."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from engines.evaluation import cases, evaluate, metrics
from engines.evaluation.degradations import DEGRADATIONS, degrade


@pytest.fixture
def textured() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (60, 70)).astype(np.uint8)


@pytest.fixture
def other() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (60, 70)).astype(np.uint8)


def test_a_picture_of_two_equally_frequent_levels_carries_one_bit():
    image = np.zeros((8, 8), np.uint8)
    image[:4] = 200
    assert metrics.entropy(image) == pytest.approx(1.0)


def test_a_flat_picture_has_no_entropy_spread_frequency_or_gradient():
    flat = np.full((50, 50), 77, np.uint8)
    assert metrics.entropy(flat) == 0
    assert metrics.standard_deviation(flat) == 0
    assert metrics.spatial_frequency(flat) == 0
    assert metrics.average_gradient(flat) == 0


def test_spread_of_black_and_white_halves_is_half_the_range():
    image = np.zeros((8, 8), np.uint8)
    image[:4] = 255
    assert metrics.standard_deviation(image) == 127.5


def test_a_ramp_of_three_levels_a_pixel_has_that_frequency_and_gradient():
    ramp = np.tile(np.arange(0, 60, 3, dtype=np.uint8), (20, 1))
    assert metrics.spatial_frequency(ramp) == pytest.approx(3.0)
    assert metrics.average_gradient(ramp) == pytest.approx(3 / np.sqrt(2))


def test_entropy_and_spread_agree_with_counting_and_moments(textured):
    dim = textured // 3  # levels come up unequally often
    _, counts = np.unique(dim, return_counts=True)
    bits = -sum(count / dim.size * np.log2(count / dim.size) for count in counts)
    assert metrics.entropy(dim) == pytest.approx(bits, rel=1e-12)
    levels = dim.astype(float)
    assert metrics.standard_deviation(dim) == pytest.approx(np.sqrt((levels**2).mean() - levels.mean() ** 2), rel=1e-12)


def test_frequency_and_gradient_agree_with_the_formulas_written_out_pixel_by_pixel(textured):
    image = textured[:9, :11].astype(float)
    height, width = image.shape
    right = [(image[y, x] - image[y, x - 1]) ** 2 for y in range(height) for x in range(1, width)]
    down = [(image[y, x] - image[y - 1, x]) ** 2 for y in range(1, height) for x in range(width)]
    frequency = np.sqrt(sum(right) / len(right) + sum(down) / len(down))
    assert metrics.spatial_frequency(textured[:9, :11]) == pytest.approx(frequency, rel=1e-12)

    def slope(line: np.ndarray, at: int) -> float:
        before, after = max(at - 1, 0), min(at + 1, len(line) - 1)
        return (line[after] - line[before]) / (after - before)

    slopes = [
        np.sqrt((slope(image[y], x) ** 2 + slope(image[:, x], y) ** 2) / 2) for y in range(height) for x in range(width)
    ]
    assert metrics.average_gradient(textured[:9, :11]) == pytest.approx(sum(slopes) / len(slopes), rel=1e-12)


def test_colour_error_agrees_with_opencvs_colour_space():
    random = np.random.default_rng(4)
    fused, visible = random.integers(0, 256, (2, 50, 60, 3)).astype(np.uint8)
    red_and_blue = [cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2YCrCb)[..., 1:] for image in (fused, visible)]
    distance = np.sqrt(((red_and_blue[0] - red_and_blue[1]) ** 2).sum(-1).mean())
    # OpenCV's factors 0.713 and 0.564 are rounded.
    assert metrics.colour_error(fused, visible) == pytest.approx(distance, rel=1e-3)


def test_mutual_information_with_itself_is_the_entropy_in_nats(textured):
    flat = np.full_like(textured, 5)
    expected = metrics.entropy(textured) * np.log(2)
    assert metrics.mutual_information(textured, textured, flat) == pytest.approx(expected)


def test_intensity_error_is_the_distance_to_the_brighter_source():
    infrared, visible = np.full((50, 50), 40, np.uint8), np.full((50, 50, 3), 100, np.uint8)
    infrared[:10] = 240
    assert metrics.intensity_error(np.maximum(infrared, 100), infrared, visible) == 0
    # A fifth of the picture is 140 levels too dark where the infrared was left out.
    assert metrics.intensity_error(visible, infrared, visible) == pytest.approx(140 / 5)


def test_differences_that_are_exactly_the_other_source_correlate_fully():
    infrared = np.zeros((40, 40))
    visible = np.zeros((40, 40))
    infrared[:20] = 100
    visible[:, :20] = 50
    assert metrics.sum_of_correlations_of_differences(infrared + visible, infrared, visible) == pytest.approx(2.0)


def test_vif_of_equal_pictures_is_two_and_falls_with_noise(textured):
    noisy = np.clip(textured + np.random.default_rng(0).normal(0, 40, textured.shape), 0, 255)
    assert metrics.visual_information_fidelity(textured, textured, textured) == pytest.approx(2.0)
    assert metrics.visual_information_fidelity(noisy, textured, textured) < 1.8


def test_qabf_of_equal_pictures_is_the_sigmoids_ceiling(textured):
    ceiling = 0.9994 / (1 + np.exp(-15 * 0.5)) * 0.9879 / (1 + np.exp(-22 * 0.2))
    assert metrics.edge_preservation(textured, textured, textured) == pytest.approx(ceiling, abs=0.01)


def test_qabf_of_a_flat_picture_is_nearly_nothing(textured):
    assert metrics.edge_preservation(np.zeros_like(textured), textured, textured) < 0.02


def test_ssim_of_equal_pictures_sums_to_two(textured):
    assert metrics.structural_similarity(textured, textured, textured) == pytest.approx(2.0)


def test_ssim_agrees_with_the_formula_written_out_window_by_window(textured, other):
    x, y = textured[:14, :15].astype(float), other[:14, :15].astype(float)
    c1, c2, values = 6.5025, 58.5225, []
    for row in range(8):
        for column in range(9):
            a, b = x[row : row + 7, column : column + 7], y[row : row + 7, column : column + 7]
            covariance = np.cov(a.ravel(), b.ravel())
            values.append(
                (2 * a.mean() * b.mean() + c1)
                * (2 * covariance[0, 1] + c2)
                / ((a.mean() ** 2 + b.mean() ** 2 + c1) * (covariance[0, 0] + covariance[1, 1] + c2))
            )
    assert metrics.structural_similarity(x, y, y) == pytest.approx(2 * np.mean(values), rel=1e-9)


def test_sources_give_every_metric_by_name_and_take_colour(textured, other):
    colour = np.repeat(textured[..., None], 3, -1)
    scores = metrics.Sources(other, colour).score(colour)
    assert tuple(scores) == metrics.METRICS
    assert scores == pytest.approx(metrics.Sources(other, textured).score(textured))


def test_pictures_of_different_or_tiny_size_are_refused(textured):
    with pytest.raises(ValueError, match="differ in size"):
        metrics.Sources(textured, textured[:-1])
    with pytest.raises(ValueError, match="differ in size"):
        metrics.Sources(textured, textured).score(textured[:-1])
    with pytest.raises(ValueError, match="too small"):
        metrics.Sources(*[textured[:40, :40]] * 2)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_a_degradation_changes_one_picture_and_repeats_itself(name, textured):
    visible = np.repeat(textured[..., None], 3, -1)
    once, again = degrade(name, textured, visible, seed=4), degrade(name, textured, visible, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    unchanged = [np.array_equal(once[0], textured), np.array_equal(once[1], visible)]
    assert unchanged == [DEGRADATIONS[name][0] == "visible", DEGRADATIONS[name][0] == "infrared"]


def test_pairs_are_scored_against_their_clean_sources(textured):
    visible = np.repeat(textured[..., None], 3, -1)
    pair = cases.Pair("street", textured, visible)
    method = evaluate.fusing_with(lambda infrared, seen: visible)
    (row,) = evaluate.score_cases(method, cases.degraded_cases([pair], ["ir_stripe"]))
    assert (row["name"], row["degradation"]) == ("street", "ir_stripe")
    assert row["SSIM"] == pytest.approx(2.0)


def test_a_picture_without_a_partner_is_named(tmp_path: Path):
    (tmp_path / "ir").mkdir()
    (tmp_path / "vi").mkdir()
    (tmp_path / "ir" / "0007.png").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="0007"):
        list(cases.folder_pairs(tmp_path / "ir", tmp_path / "vi"))


def average(infrared: np.ndarray, visible: np.ndarray) -> np.ndarray:
    return np.rint((infrared.astype(float) + metrics.luminance(visible)) / 2).astype(np.uint8)


def maximum(infrared: np.ndarray, visible: np.ndarray) -> np.ndarray:
    return np.maximum(infrared, metrics.luminance(visible))


# Published for the twelve pairs: VIF, Qabf, SSIM.
PUBLISHED = {
    (maximum, "clean"): (0.969, 0.670, 1.384),
    (average, "clean"): (0.672, 0.390, 1.449),
    (maximum, "vis_lowlight"): (0.679, 0.486, 1.217),
    (maximum, "vis_blur"): (0.687, 0.406, 1.332),
    (maximum, "ir_lowcon"): (0.814, 0.468, 1.348),
    (maximum, "ir_stripe"): (0.578, 0.465, 0.992),
    (maximum, "vis_haze"): (0.623, 0.331, 0.840),
    (maximum, "vis_rain"): (0.604, 0.584, 1.129),
}


@pytest.mark.realdata
@pytest.mark.parametrize(("method", "degradation"), PUBLISHED)
def test_the_trivial_methods_score_as_published(method, degradation, data_dir: Path):
    judged = cases.degraded_cases(cases.public_pairs(data_dir), [degradation])
    mean = evaluate.mean_scores(evaluate.score_cases(evaluate.fusing_with(method), judged))
    found = [mean[name] for name in ("VIF", "Qabf", "SSIM")]
    # The degradations are drawn by our own generator and streaks: 0.01 is what twelve pairs cannot tell apart.
    assert found == pytest.approx(PUBLISHED[method, degradation], abs=0.011 if degradation == "vis_rain" else 0.01)
    json.dumps(mean, allow_nan=False)
