"""The residual transform: its direction, its accuracy on real pairs, and when it says that it does not know."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from calibration.far import Pair, look_far
from calibration.residual import (
    affine,
    comparable,
    displacement_px,
    fields_of,
    parameters_of,
    settle,
    similarity,
    survey,
    thumbnail_of,
)
from calibration.rig import CalibrationError
from calibration.warp import Warp
from pipeline.cli import app
from pipeline.commands.check import check_alignment, check_each
from pipeline.errors import SourceError
from tests.rigs.pairs import SIZE, blank, error_px, person, real_pairs, scene, warped


def found_in(infrared: np.ndarray, visible: np.ndarray) -> np.ndarray:
    return settle([survey(infrared, visible)]).matrix


def test_the_matrix_maps_an_infrared_pixel_to_its_visible_pixel():
    infrared, visible = scene()
    # The visible picture's content lies 5 right of and 3 above where infrared shows it: p belongs to p + (5, -3).
    moved = np.roll(visible, (-3, 5), (0, 1))
    matrix = found_in(infrared, moved)
    assert matrix[:2, 2] == pytest.approx((5, -3), abs=0.3)
    assert matrix[:2, :2] == pytest.approx(np.eye(2), abs=0.003)


def test_moving_infrared_by_the_matrix_aligns_it():
    infrared, visible = scene(1)
    off = warped(infrared, similarity(np.array([-4.0, 5.0, 0.006, 0.003]), SIZE))
    matrix = found_in(off, visible)
    mended = cv2.warpPerspective(off, matrix, SIZE, borderMode=cv2.BORDER_REPLICATE)
    inner = (slice(20, -20), slice(20, -20))
    before, after = (cv2.absdiff(picture, infrared)[inner].mean() for picture in (off, mended))
    assert after < 0.3 * before


@pytest.mark.parametrize("border", [cv2.BORDER_REPLICATE, cv2.BORDER_CONSTANT])
@pytest.mark.parametrize("truth", [(6, -6, 0.0087, 0.005), (-6, 2, -0.0087, -0.005), (3, 4, 0, 0)])
def test_shift_roll_and_scale_of_a_clear_scene_are_found_to_half_a_pixel(truth, border):
    infrared, visible = scene(2)
    matrix = similarity(np.array(truth), SIZE)
    assert error_px(found_in(warped(infrared, matrix, border), visible), matrix) < 0.5


def test_polarity_brightness_and_size_do_not_matter():
    truth = similarity(np.array([4.0, -2.0, 0, 0]), SIZE)
    infrared, visible = scene(3)
    off = warped(infrared, truth)
    for other in (255 - off, (off * 0.3).astype(np.uint8)):
        assert error_px(found_in(other, visible), truth) < 0.5
    large = [cv2.resize(picture, (1280, 960)) for picture in (off, visible)]
    truth = similarity(np.array([8.0, -4.0, 0, 0]), (1280, 960))
    assert error_px(found_in(*large), truth, (1280, 960)) < 1.0


def test_a_shift_beyond_the_near_search_is_found_by_looking_far():
    infrared, visible = scene(4)
    truth = similarity(np.array([-27.0, 14.0, 0.03, 0.02]), SIZE)
    assert error_px(found_in(warped(infrared, truth), visible), truth) < 2


@pytest.mark.parametrize("truth", [(40, -12, 0.16, 0.02), (-35, 20, -0.12, -0.03), (10, 5, 0.05, 0, 0.02, -0.03)])
def test_pictures_that_are_turned_by_ten_degrees_stretched_and_sheared_are_found(truth):
    infrared, visible = scene(4)
    matrix = affine(np.array(truth), SIZE)
    verdict = look_far([Pair(warped(infrared, matrix), visible)])
    assert verdict.state == "lost"
    assert error_px(verdict.matrix, matrix) < 1


def test_several_pairs_that_are_far_off_are_settled_together():
    matrix = affine(np.array((25, 10, -0.1, 0.01, 0.01, 0.01)), SIZE)
    pairs = [Pair(warped(infrared, matrix), visible) for infrared, visible in map(scene, range(3))]
    verdict = look_far(pairs)
    assert verdict.informative == 3
    assert error_px(verdict.matrix, matrix) < 0.5


@pytest.mark.parametrize("seed", range(6))
def test_strangers_are_not_taken_for_pictures_that_are_far_off(seed: int):
    verdict = look_far([Pair(scene(seed)[0], scene(seed + 20)[1])])
    assert verdict.state == "no_information"
    assert np.array_equal(verdict.matrix, np.eye(3))


def test_an_affine_transform_stretches_along_x_and_shears_about_the_middle():
    matrix = affine(np.array([0, 0, 0, 0, 0.01, 0.02]), SIZE)
    assert matrix @ (319.5, 239.5, 1) == pytest.approx((319.5, 239.5, 1))
    assert matrix @ (419.5, 239.5, 1) == pytest.approx((420.5, 241.5, 1))
    assert matrix @ (319.5, 339.5, 1) == pytest.approx((321.5, 338.5, 1))


def test_identical_and_aligned_pictures_give_the_identity():
    infrared, visible = scene(5)
    for pair in ((visible, visible), (infrared, visible)):
        verdict = settle([survey(*pair)])
        assert verdict.state == "ok"
        assert verdict.health > 0.9
        assert displacement_px(verdict.matrix, SIZE) < 0.1


@pytest.mark.parametrize("displacement", [(0, "ok"), (3, "degraded"), (7, "lost")])
def test_the_state_follows_the_displacement(displacement):
    shift, state = displacement
    infrared, visible = scene(6)
    verdict = settle([survey(warped(infrared, similarity(np.array([shift, 0.0, 0, 0]), SIZE)), visible)])
    assert verdict.state == state
    assert verdict.health == pytest.approx(1 - shift / 8, abs=0.06)


def noise(level: float) -> np.ndarray:
    return np.clip(np.random.default_rng(int(level)).normal(128, level, SIZE[::-1]), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("infrared", "visible"),
    [
        (scene()[0], blank(0)),
        (blank(128), scene()[1]),
        (blank(0), blank(0)),
        (scene()[0], noise(3)),
        (noise(2), noise(5)),
        (scene(1)[0], scene(2)[1]),  # strangers
        (person(0, 200, 60), person(9, 60, 110)),  # has moved between the two exposures
    ],
    ids=["black", "blank", "both black", "noise", "both noise", "strangers", "one near person"],
)
def test_pictures_with_nothing_in_common_are_no_information_and_not_lost(infrared, visible):
    verdict = settle([survey(infrared, visible)])
    assert verdict.state == "no_information"
    assert np.array_equal(verdict.matrix, np.eye(3))


def test_thick_fog_moves_nothing():
    infrared, visible = scene(7)
    fog = np.clip(0.01 * visible + 190 + np.random.default_rng(0).normal(0, 3, visible.shape), 0, 255)
    assert displacement_px(found_in(infrared, fog.astype(np.uint8)), SIZE) < 0.5


def test_several_scenes_are_settled_together_and_blind_ones_left_out():
    truth = similarity(np.array([3.0, 2.0, 0.004, 0]), SIZE)
    pairs = [scene(seed) for seed in range(4)]
    surveys = [survey(warped(infrared, truth), visible) for infrared, visible in pairs]
    verdict = settle([*surveys, survey(blank(0), pairs[0][1])])
    assert verdict.informative == 4
    assert error_px(verdict.matrix, truth) < 0.3
    assert verdict.sigma_px < settle(surveys[:1]).sigma_px


def test_outside_the_overlap_nothing_is_compared():
    infrared, visible = scene(8)
    weight = np.ones(SIZE[::-1], np.float32)
    weight[:, :200] = 0
    infrared = infrared.copy()
    infrared[:, :200] = np.roll(infrared[:, 220:420], 9, 0)  # whatever is there is not infrared's view
    assert displacement_px(settle([survey(infrared, visible, weight)]).matrix, SIZE) < 0.3


def test_parameters_and_matrix_are_each_other_s_inverse():
    parameters = np.array([3.0, -7.0, 0.01, -0.004])
    assert parameters_of(similarity(parameters, SIZE), SIZE) == pytest.approx(parameters)
    assert similarity(np.array([3.0, -7.0, 0, 0]), SIZE) @ (10, 20, 1) == pytest.approx((13, 13, 1))


def test_pictures_of_different_sizes_or_too_small_ones_are_refused():
    with pytest.raises(CalibrationError, match=r"640x480.*320x240"):
        fields_of(blank(0), np.zeros((240, 320), np.uint8))
    with pytest.raises(CalibrationError, match="too small"):
        fields_of(np.zeros((40, 40), np.uint8), np.zeros((40, 40), np.uint8))
    assert not comparable((2000, 60))
    assert comparable((128, 128))


def test_the_corrected_map_shows_what_the_matrix_says():
    infrared, visible = scene(9)
    truth = np.array([5.0, -4.0, 0.008, 0.004])
    maps = Warp.of_aligned(SIZE, feather_px=16).corrected(truth)
    mended = maps.remap(warped(infrared, similarity(truth, SIZE)))
    inner = maps.weight > 0.9
    assert cv2.absdiff(mended, infrared)[inner].mean() < 2.5  # two interpolations smooth the noise
    assert displacement_px(settle([survey(mended, visible, maps.weight)]).matrix, SIZE) < 0.3
    assert maps.weight.min() == 0  # where infrared has moved out
    assert not maps.map_x.flags.writeable


# The command


def write_pair(folder: Path, infrared: np.ndarray, visible: np.ndarray, name: str = "a") -> tuple[Path, Path]:
    files = folder / "ir" / f"{name}.png", folder / "vi" / f"{name}.png"
    for file, picture in zip(files, (infrared, visible), strict=True):
        file.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(file), picture)
    return files


def test_check_prints_the_matrix_as_json_and_its_exit_status_says_the_state(tmp_path: Path):
    infrared, visible = scene(10)
    truth = similarity(np.array([6.0, -1.0, 0.0, 0.0]), SIZE)
    for name, picture, state, status in (
        ("aligned", infrared, "ok", 0),
        ("moved", warped(infrared, truth), "lost", 1),
        ("black", blank(0), "no_information", 3),
    ):
        files = write_pair(tmp_path, picture, visible, name)
        result = CliRunner().invoke(app, ["calibrate", "check", *map(str, files), "--json", "-"])
        assert result.exit_code == status
        report = json.loads(result.stdout)
        assert report["state"] == state
        assert 0 <= report["health"] <= 1
        assert report["frames"] == 1
        assert error_px(np.array(report["matrix"]), truth if name == "moved" else np.eye(3)) < 0.5


def test_check_takes_folders(tmp_path: Path):
    truth = similarity(np.array([0.0, 5.0, 0.0, 0.0]), SIZE)
    for seed in range(3):
        infrared, visible = scene(seed)
        write_pair(tmp_path, warped(infrared, truth), visible, f"{seed}")
    result = check_alignment(tmp_path / "ir", tmp_path / "vi")
    assert result["frames"] == result["informative_frames"] == 3
    assert error_px(np.array(result["matrix"]), truth) < 0.3


def test_check_refuses_pictures_that_were_given_the_wrong_way_round(tmp_path: Path):
    infrared, visible = scene()
    thermal, colour = write_pair(tmp_path, infrared.astype(np.uint16) * 50, visible)
    with pytest.raises(SourceError, match="swapped"):
        check_alignment(colour, thermal)


def test_check_refuses_what_is_not_there(tmp_path: Path):
    with pytest.raises(SourceError, match=r"none\.png"):
        check_alignment(tmp_path / "none.png", tmp_path / "none.png")


def known_displacement(folder: Path, matrix: np.ndarray, name: str) -> None:
    """Where each infrared pixel belongs, as it would be stored: relative to itself, at a quarter of the size."""
    row, column = np.mgrid[0:480, 0:640].astype(np.float32)
    moved = cv2.perspectiveTransform(np.stack([column, row], axis=2), matrix) - np.stack([column, row], axis=2)
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"{name}.npz", disp=cv2.resize(moved, (160, 120)).astype(np.float16))


def test_check_of_each_pair_measures_the_error_before_and_after_and_draws_both(tmp_path: Path):
    for name, truth in (("a", (12, -5, 0.02, 0)), ("b", (-30, 10, 0.1, 0.01))):
        infrared, visible = scene(len(name))
        matrix = similarity(np.array(truth), SIZE)
        write_pair(tmp_path, warped(infrared, matrix), visible, name)
        known_displacement(tmp_path / "disp", matrix, name)
    write_pair(tmp_path, *scene(5), "c")
    (tmp_path / "ir" / "c.png").unlink()  # a visible picture without a partner is left out
    folders, disp = [str(tmp_path / "ir"), str(tmp_path / "vi")], str(tmp_path / "disp")
    arguments = ["calibrate", "check", *folders, "--each", "--displacement", disp, "--json", str(tmp_path / "r.json")]
    result = CliRunner().invoke(app, [*arguments, "--pictures", str(tmp_path / "drawn")])
    assert result.exit_code == 1
    report = json.loads((tmp_path / "r.json").read_text())
    assert [row["name"] for row in report["pairs"]] == ["a", "b"]
    assert [row["before_px"] for row in report["pairs"]] == pytest.approx([14.0, 40.0], abs=4)
    assert max(row["after_px"] for row in report["pairs"]) < 1
    assert report["median"]["after_px"] <= 1
    assert "before_px" in result.stdout
    assert sorted(file.name for file in (tmp_path / "drawn").iterdir()) == ["a.png", "b.png", "sheet.png"]
    assert cv2.imread(str(tmp_path / "drawn" / "a.png")).shape[1] > 2 * 640


def test_check_of_each_pair_says_which_displacement_is_missing_or_no_displacement(tmp_path: Path):
    write_pair(tmp_path, *scene(), "a")
    folders = tmp_path / "ir", tmp_path / "vi"
    with pytest.raises(SourceError, match=r"a\.npz does not exist"):
        check_each(*folders, displacement=tmp_path)
    for stored, reason in (
        ({"other": np.zeros(3)}, "no array named disp"),
        ({"disp": np.zeros((3, 4))}, r"\(h, w, 2\)"),
    ):
        np.savez(tmp_path / "a.npz", **stored)
        with pytest.raises(SourceError, match=reason):
            check_each(*folders, displacement=tmp_path)
    (tmp_path / "vi" / "a.png").rename(tmp_path / "vi" / "b.png")
    with pytest.raises(SourceError, match=r"no visible one of the same name \(first: a\)"):
        check_each(*folders)


# Real pairs


@pytest.mark.realdata
@pytest.mark.parametrize(("dataset", "after_px"), [("msrs", 4.7), ("roadscene", 2.7)])
def test_pairs_that_are_bent_by_a_known_displacement_are_brought_together(
    data_dir: Path, dataset: str, after_px: float
):
    """The displacement is a roll of up to ten degrees, and a local one that no affine transform follows: the best one
    leaves 1.5 px. MSRS pictures are 2.7 px apart before any of it."""
    part = data_dir / "misaligned" / f"warped_{dataset}"
    visible = data_dir / "eval" / "msrs" / "vi" if dataset == "msrs" else part / "vi"
    result = check_each(part / "ir_warp", visible, displacement=part / "disp")
    print(f"\n{dataset}: {result['median']['before_px']} -> {result['median']['after_px']} px (median of pairs)")
    assert result["informative_frames"] == result["frames"]
    assert result["median"]["before_px"] > 14
    assert result["median"]["after_px"] <= after_px


@pytest.mark.realdata
def test_strangers_of_real_scenes_are_no_information(data_dir: Path):
    pairs = real_pairs(data_dir, "msrs", "day", 10)
    states = [look_far([Pair(pairs[n][0], pairs[(n + 3) % 10][1])]).state for n in range(10)]
    assert states == ["no_information"] * 10


@pytest.mark.realdata
@pytest.mark.parametrize(("dataset", "light"), [("msrs", "day"), ("msrs", "night"), ("roadscene", "day")])
def test_warps_of_real_pairs_are_found(data_dir: Path, dataset: str, light: str):
    random = np.random.default_rng(0)
    errors = []
    for infrared, visible in real_pairs(data_dir, dataset, light, 10):
        drift = [*random.uniform(-6, 6, 2), np.radians(random.uniform(-0.5, 0.5)), random.uniform(-0.005, 0.005)]
        truth = similarity(np.array(drift), SIZE)
        errors.append(error_px(found_in(warped(infrared, truth), visible), truth))
    assert np.median(errors) <= 1.6  # of ten pairs; 1.4 of all
    assert np.mean(np.array(errors) < 3) >= 0.8


@pytest.mark.realdata
def test_real_aligned_pairs_stay_where_they_are(data_dir: Path):
    moved = [displacement_px(found_in(*pair), SIZE) for pair in real_pairs(data_dir, "msrs", "night", 8)]
    assert np.median(moved) < 0.5


def test_thumbnails_are_small_and_grey():
    assert thumbnail_of(np.zeros((480, 640, 3), np.uint8)).shape == (24, 32)


def test_folders_of_nights_are_recognised_as_swapped_by_several_pictures(tmp_path: Path):
    random = np.random.default_rng(0)
    for number in range(5):
        infrared = random.integers(0, 255, (120, 160), np.uint8)
        visible = random.integers(0, 255, (120, 160, 3), np.uint8) if number else np.repeat(infrared[..., None], 3, 2)
        write_pair(tmp_path, infrared, visible, f"{number}")
    with pytest.raises(SourceError, match=r"vi is in colour and ir is grey.*swapped"):
        check_alignment(tmp_path / "vi", tmp_path / "ir")


def test_a_picture_beside_a_recording_is_refused(tmp_path: Path):
    thermal, colour = write_pair(tmp_path, *scene())
    with pytest.raises(SourceError, match="two pictures, or two recordings"):
        check_alignment(thermal.parent, colour)
