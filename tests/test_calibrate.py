"""From views of a board to the rig: how right it is, what it says of its error, and what is refused."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from calibration.judge import judge, solve_plane
from calibration.report import of_solution, render
from calibration.rig import CalibrationError, CameraModel, Rig
from calibration.rig_file import load_quality, load_rig, save_rig
from calibration.solve import DISTANCES_M, Solution, distance_name, map_of, map_points, parallax, solve
from calibration.targets import Board, Detection, Refusal
from calibration.views import BoardView, Detections, choose, load_detections, refuse_wrong_count, save_detections
from pipeline.cli import app
from pipeline.commands.check import check_each
from pipeline.errors import SourceError
from tests.rigs.boards import Scene, draw_pair, map_error_px, random_poses, seen_from, synthetic_rig, true_points

BOARD = Board("chessboard", 9, 6, 0.05)
SIZES = {"infrared": (640, 480), "visible": (640, 480)}


def views_of(rig: Rig, board: Board, poses, noise_px=(0.15, 0.06), seed=1) -> Detections:
    """Views with points as the detector would measure them: noise, and the numbering turned in every other view."""
    random = np.random.default_rng(seed)
    views = []
    for index, pose in enumerate(poses):
        results = {}
        for camera, sigma, (model, placed) in zip(
            ("visible", "infrared"), (noise_px[1], noise_px[0]), seen_from(rig, pose), strict=True
        ):
            noise = random.normal(0, sigma / math.sqrt(2), (board.count, 2))
            points = true_points(model, placed, board.points()) + noise
            if camera == "infrared" and index % 2:
                points = points[board.orders()[-1]]
            results[camera] = Detection(points, sigma, 25.0, 3.0, 20.0, False)
        views.append(BoardView(f"view {index}", results))
    sizes = {"infrared": rig.infrared.size, "visible": rig.visible.size}
    return Detections(board, sizes, {"infrared": 16, "visible": 8}, tuple(views))


TRUTH = synthetic_rig()
POSES = random_poses(BOARD, 24, TRUTH, seed=5)


@pytest.fixture(scope="module")
def seen() -> Detections:
    return views_of(TRUTH, BOARD, POSES)


@pytest.fixture(scope="module")
def solution(seen) -> Solution:
    return solve(seen)


def seen_and_worst_px(rig: Rig, truth: Rig, distance_m: float) -> tuple[float, float]:
    """(share of the map that the lens model gives, 95th percentile of its error there)."""
    pixels, there = map_points(truth, distance_m)
    errors = np.linalg.norm(map_of(rig, pixels, distance_m) - there, axis=1)
    return float(np.isfinite(errors).mean()), float(np.nanpercentile(errors, 95))


def test_the_map_is_right_to_a_fifth_of_a_pixel_from_two_metres_to_very_far(solution):
    for distance_m in DISTANCES_M:
        assert map_error_px(solution.rig, TRUTH, distance_m) < 0.2
    assert solution.rig.baseline_m == pytest.approx(TRUTH.baseline_m, abs=0.001)


def test_the_predicted_error_of_the_map_is_about_the_true_one(solution):
    for distance_m in DISTANCES_M:
        predicted = solution.map_sigma_px[distance_name(distance_m)]
        assert predicted / 4 < map_error_px(solution.rig, TRUTH, distance_m) < 4 * predicted


def test_residuals_and_held_out_error_are_those_of_the_noise(solution):
    assert solution.rms_px["infrared"] == pytest.approx(0.15, rel=0.2)
    assert solution.rms_px["visible"] == pytest.approx(0.06, rel=0.2)
    assert solution.heldout_px["rms"] == pytest.approx(0.16, rel=0.3)


def test_few_views_are_warned_of_and_very_few_refused(seen, solution):
    assert any("few" in line for line in solution.warnings)
    with pytest.raises(CalibrationError, match=r"3 of 3 views.*4 are the least.*--homography"):
        solve(replace(seen, views=seen.views[:3]))


def test_views_that_do_not_fit_are_left_out_and_named(seen):
    views = list(seen.views[:14])
    moved = views[4].points("infrared") + np.array([9.0, 0.0])
    views[4] = BoardView("moved", views[4].results | {"infrared": replace(views[4].results["infrared"], points=moved)})
    result = solve(replace(seen, views=tuple(views)))
    assert [name for name, _ in result.outliers] == ["moved"]
    assert map_error_px(result.rig, TRUTH, 20.0) < 0.3


def test_moving_views_are_not_used(seen):
    views = [replace(view, motion_px=3.0 if index < 4 else 0.1) for index, view in enumerate(seen.views)]
    chosen = choose(replace(seen, views=tuple(views)))
    assert [view.name for view in chosen] == [view.name for view in seen.views[4:]]


def test_the_most_different_views_are_chosen(seen):
    alike = [replace(seen.views[0], name=f"again {index}") for index in range(40)]
    chosen = choose(replace(seen, views=(*alike, *seen.views)), limit=24)
    assert sum(view.name.startswith("again") for view in chosen) <= 1


def test_mirrored_pictures_are_refused_with_their_cause(seen):
    index = np.arange(BOARD.count).reshape(BOARD.rows, BOARD.columns)[:, ::-1].ravel()  # the detector's own numbering
    views = []
    for view in seen.views[:14]:
        points = view.points("infrared")[index] * (-1, 1) + (SIZES["infrared"][0] - 1, 0)
        felt = replace(view.results["infrared"], points=points)
        views.append(BoardView(view.name, view.results | {"infrared": felt}))
    with pytest.raises(CalibrationError, match="mirrored"):
        solve(replace(seen, views=tuple(views)))


def test_pictures_of_different_moments_are_refused(seen):
    felt = [view.results["infrared"] for view in seen.views]
    views = [
        BoardView(view.name, view.results | {"infrared": other})
        for view, other in zip(seen.views, felt[5:] + felt[:5], strict=True)
    ]
    with pytest.raises(CalibrationError, match="paired"):
        solve(replace(seen, views=tuple(views)))


def test_a_board_that_was_never_tilted_is_refused():
    square_on = [pose for pose in random_poses(BOARD, 8, TRUTH, seed=2, distance_m=(1.0, 1.05), tilt_deg=0.5)]
    with pytest.raises(CalibrationError, match=r"tilted|no lens has"):
        solve(views_of(TRUTH, BOARD, square_on, noise_px=(0.4, 0.3)))


def fisheye_rig(view_deg: float) -> Rig:
    half = math.radians(view_deg / 2)
    focal = 320 / (half * (1 - 0.03 * half**2))
    matrix = np.array([[focal, 0, 319.5], [0, focal, 239.5], [0, 0, 1]])
    lens = CameraModel(640, 480, matrix, np.array([-0.03, 0.002, 0, 0]), "equidistant")
    return Rig(lens, lens, TRUTH.infrared_from_visible)


def test_a_fisheye_that_the_model_does_not_follow_is_refused_with_what_to_do():
    rig = fisheye_rig(130)
    with pytest.raises(CalibrationError, match="pinhole-equi"):
        solve(views_of(rig, BOARD, random_poses(BOARD, 20, rig, seed=5)))


def test_a_wide_lens_is_calibrated_as_far_as_the_model_reaches_and_the_rest_is_said():
    rig = fisheye_rig(90)
    seen = views_of(rig, BOARD, random_poses(BOARD, 16, rig, seed=5))
    solution = solve(seen)
    assert solution.heldout_px["rms"] < 0.3
    assert any("corners" in line for line in solution.warnings)
    assert judge(rig, seen).transfer_px["rms"] < 0.2  # the true lens, given as a file


@pytest.mark.parametrize("view_deg", [60, 130, 150])
def test_a_fisheye_is_calibrated_by_the_equidistant_lens(view_deg):
    rig = fisheye_rig(view_deg)
    seen = views_of(rig, BOARD, random_poses(BOARD, 16, rig, seed=5))
    solution = solve(seen, lenses=dict.fromkeys(SIZES, "equidistant"))
    assert solution.heldout_px["rms"] == pytest.approx(0.16, rel=0.3)  # that of the noise
    for distance_m in DISTANCES_M:
        share, worst_px = seen_and_worst_px(solution.rig, rig, distance_m)
        assert share > 0.95  # at 150 degrees two corners are beyond what a plane in front of the camera shows
        assert worst_px < 0.2
    assert solution.rig.visible.lens == "equidistant"
    assert not any("corners" in line for line in solution.warnings)


def test_each_camera_may_have_a_lens_of_its_own():
    fisheye, narrow = fisheye_rig(110).visible, TRUTH.infrared
    rig = Rig(fisheye, narrow, TRUTH.infrared_from_visible)
    seen = views_of(rig, BOARD, random_poses(BOARD, 20, rig, seed=5))
    solution = solve(seen, lenses={"visible": "equidistant"})
    assert (solution.rig.visible.lens, solution.rig.infrared.lens) == ("equidistant", "plumb_bob")
    assert max(seen_and_worst_px(solution.rig, rig, distance_m)[1] for distance_m in DISTANCES_M) < 0.5


def test_a_rational_lens_is_fitted_where_it_is_asked_for():
    bent = np.array([0.9, 0.25, 0, 0, 0.01, 1.25, 0.55, 0.06])
    lens = CameraModel(640, 480, np.array([[420.0, 0, 319.5], [0, 420, 239.5], [0, 0, 1]]), bent, "rational_polynomial")
    rig = Rig(lens, lens, TRUTH.infrared_from_visible)
    seen = views_of(rig, BOARD, random_poses(BOARD, 24, rig, seed=5), noise_px=(0.06, 0.06))
    solution = solve(seen, lenses=dict.fromkeys(SIZES, "rational_polynomial"))
    assert solution.rig.visible.lens == "rational_polynomial"
    assert seen_and_worst_px(solution.rig, rig, 5.0)[1] < 0.3


def test_without_the_spacing_there_is_no_rig(seen):
    with pytest.raises(CalibrationError, match="--spacing"):
        solve(replace(seen, board=replace(BOARD, spacing_m=None)))


def test_an_upside_down_camera_is_calibrated_too():
    turn = np.eye(4)
    turn[:2, :2] = -np.eye(2)
    upside_down = replace(TRUTH, infrared_from_visible=turn @ TRUTH.infrared_from_visible)
    result = solve(views_of(upside_down, BOARD, POSES[:14]))
    assert map_error_px(result.rig, upside_down, 20.0) < 0.3


# --- parallax, judging, homography ---


def test_parallax_follows_the_formula(solution):
    (plane_m, row), *_ = parallax(TRUTH, (10.0,))
    focal, baseline = TRUTH.visible.matrix[0, 0], TRUTH.baseline_m
    assert plane_m == 10.0
    assert row["10 m"] == pytest.approx(0, abs=1e-6)
    for distance in (2.0, 5.0, 50.0):
        assert row[distance_name(distance)] == pytest.approx(focal * baseline * abs(1 / distance - 0.1), rel=0.08)


def test_a_right_calibration_judges_well_and_a_wrong_one_badly(seen):
    assert judge(TRUTH, seen).transfer_px["rms"] < 0.2
    bumped = TRUTH.infrared_from_visible.copy()
    bumped[:3, :3] = cv2.Rodrigues(np.radians([0.0, 0.5, 0.0]))[0] @ bumped[:3, :3]
    expected_px = TRUTH.infrared.matrix[0, 0] * math.radians(0.5)
    wrong = judge(replace(TRUTH, infrared_from_visible=bumped), seen).transfer_px
    assert wrong["median"] == pytest.approx(expected_px, rel=0.3)


def test_a_calibration_of_another_resolution_or_of_swapped_cameras_is_refused(seen):
    with pytest.raises(CalibrationError, match=r"320x240.*640x480"):
        judge(synthetic_rig(320, 240), seen)
    sizes = {"infrared": (320, 240), "visible": (640, 480)}
    with pytest.raises(CalibrationError, match="swapped"):
        judge(replace(TRUTH, infrared=synthetic_rig(320, 240).infrared),
              replace(seen, sizes={"infrared": sizes["visible"], "visible": sizes["infrared"]}))  # fmt: skip


@pytest.mark.parametrize("both", [False, True])
def test_a_calibration_whose_cameras_were_exchanged_is_refused(seen, both):
    pose = np.linalg.inv(TRUTH.infrared_from_visible) if both else TRUTH.infrared_from_visible
    other = Rig(TRUTH.infrared, TRUTH.visible, pose)
    with pytest.raises(
        CalibrationError, match=r"swapped: the views are \d.* off .* 0\.\d px with its cameras exchanged"
    ):
        judge(other, seen)


def test_a_homography_serves_at_the_boards_distance():
    poses = random_poses(BOARD, 6, TRUTH, seed=8, distance_m=(2.0, 2.02), tilt_deg=2.0)
    plane = solve_plane(views_of(TRUTH, BOARD, poses))
    assert plane.heldout
    assert plane.heldout_px["rms"] < 4.0  # what lens distortion leaves
    assert plane.rig.homography is not None
    centre = np.array([[320.0, 240.0]])
    infrared = map_of(TRUTH, centre, 2.0)[0]
    seen_at = plane.rig.homography @ (*infrared, 1.0)
    assert seen_at[:2] / seen_at[2] == pytest.approx(centre[0], abs=2.5)


def test_one_mirrored_view_of_a_tilted_board_has_no_homography(seen):
    for view in (seen.views[number] for number in (0, 2, 4, 5, 6, 7, 8)):
        turned = np.arange(BOARD.count).reshape(BOARD.rows, BOARD.columns)[:, ::-1].ravel()
        points = view.points("infrared")[turned] * (-1, 1) + (SIZES["infrared"][0] - 1, 0)
        felt = replace(view.results["infrared"], points=points)
        assert solve_plane(replace(seen, views=(view,))).heldout_px["rms"] < 3
        with pytest.raises(CalibrationError, match="mirrored"):
            solve_plane(replace(seen, views=(BoardView("one", view.results | {"infrared": felt}),)))


def test_boards_at_many_distances_have_no_common_homography(seen):
    near_and_far = views_of(TRUTH, BOARD, random_poses(BOARD, 8, TRUTH, seed=4, distance_m=(0.35, 3.0)))
    plane_or_error = pytest.raises(CalibrationError, match="different distances")
    wide = replace(TRUTH, infrared_from_visible=_shifted(0.6))
    with plane_or_error:
        solve_plane(views_of(wide, BOARD, random_poses(BOARD, 8, wide, seed=4, distance_m=(1.4, 4.0))))
    assert solve_plane(near_and_far).heldout_px["rms"] > 2


def _shifted(x_m: float) -> np.ndarray:
    pose = np.eye(4)
    pose[0, 3] = -x_m
    return pose


# --- files and report ---


def test_detections_survive_the_file(seen, tmp_path):
    refused = BoardView(
        "gone", {"infrared": Refusal("cut", "show all of it"), "visible": seen.views[0].results["visible"]}
    )
    lost = seen.views[1].points("visible").copy()
    lost[3] = math.nan
    partly = BoardView("partly", {"visible": replace(seen.views[1].results["visible"], points=lost)}, math.inf)
    save_detections(replace(seen, views=(*seen.views, refused, partly)), tmp_path / "seen.json")
    again = load_detections(tmp_path / "seen.json")
    assert again.board == seen.board
    assert np.allclose(again.views[0].points("infrared"), seen.views[0].points("infrared"), atol=1e-4)
    assert again.views[-2].results["infrared"] == Refusal("cut", "show all of it")
    assert np.isnan(again.views[-1].points("visible")[3]).all()
    assert not again.views[-1].still


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": "other"}', '{"format": "dspfusion-detections/1"}', "\x00\x01", "[" * 5000]
)
def test_a_file_that_holds_no_detections_gets_one_line(tmp_path, content):
    (tmp_path / "seen.json").write_text(content)
    with pytest.raises(CalibrationError, match=r"seen\.json") as caught:
        load_detections(tmp_path / "seen.json")
    assert "\n" not in str(caught.value)


def test_points_that_are_not_finite_or_too_few_are_refused(seen, tmp_path):
    save_detections(seen, tmp_path / "seen.json")
    document = json.loads((tmp_path / "seen.json").read_text())
    for points in (document["views"][0]["visible"]["points"][:-1], [[math.inf, 1]] * BOARD.count):
        document["views"][0]["visible"]["points"] = points
        (tmp_path / "bad.json").write_text(json.dumps(document))
        with pytest.raises(CalibrationError, match="view 0"):
            load_detections(tmp_path / "bad.json")


def test_pictures_that_agree_on_another_size_say_which(seen):
    other = Refusal("count", "10x7", (10, 7))
    views = tuple(BoardView(f"v{index}", {"infrared": other, "visible": other}) for index in range(4))
    with pytest.raises(CalibrationError, match="10x7 inner corners, not 9x6: give --size 10x7"):
        refuse_wrong_count(replace(seen, views=views))


def test_the_report_shows_what_it_must_and_needs_nothing_else(solution, seen):
    page = render(of_solution(solution, seen))
    for text in ("Residual vectors", "Coverage", "held-out error", "Predicted error of the map", "Parallax", "few"):
        assert text in page
    for name in ("2 m", "5 m", "20 m", "inf"):
        assert f"<th>{name}</th>" in page
    assert page.count("<svg") >= 7
    assert not re.search(r"<script|<link|src=|href=|https?://", page)
    assert "nan" not in re.sub(r"<[^>]*>", " ", page).lower().split()


def test_the_calibration_file_carries_its_own_error(solution, tmp_path):
    save_rig(solution.rig, tmp_path / "rig.yaml", {"quality": solution.quality()})
    again = load_rig(tmp_path / "rig.yaml")
    assert np.allclose(again.infrared_from_visible, solution.rig.infrared_from_visible)
    quality = load_quality(tmp_path / "rig.yaml")
    assert set(quality["map_sigma_px"]) == {"2 m", "5 m", "20 m", "inf"}
    assert quality["views"] == 24


# --- the commands ---

runner = CliRunner()


def small_pictures(folder: Path, count: int = 7) -> Path:
    """Rendered pairs as a user would record them."""
    rig = synthetic_rig(400, 300)
    board = Board("circles", 4, 11, 0.04)
    scene = Scene(board, random_poses(board, count, rig, seed=6, distance_m=(0.65, 1.0)))
    for camera in ("ir", "vis"):
        (folder / camera).mkdir()
    for index in range(count):
        infrared, visible = draw_pair(rig, scene, index)
        cv2.imwrite(str(folder / "ir" / f"view{index}.png"), infrared)
        cv2.imwrite(str(folder / "vis" / f"view{index}.png"), visible)
    return folder


def test_pictures_become_a_calibration_with_three_commands(tmp_path):
    folder = small_pictures(tmp_path)
    detected = runner.invoke(
        app,
        ["calibrate", "detect", str(folder / "ir"), str(folder / "vis"), "--board", "circles", "--size", "4x11",
         "--spacing", "0.04", "-o", str(tmp_path / "seen.json"), "--json", str(tmp_path / "detected.json")],
    )  # fmt: skip
    assert detected.exit_code == 0, detected.output
    found = json.loads((tmp_path / "detected.json").read_text())
    assert found["paired"] >= 6
    assert found["infrared"]["share"] >= 0.85
    solved = runner.invoke(
        app,
        ["calibrate", "solve", str(tmp_path / "seen.json"), "-o", str(tmp_path / "rig.yaml"), "--plane", "10",
         "--report", str(tmp_path / "report.html"), "--json", str(tmp_path / "solved.json")],
    )  # fmt: skip
    assert solved.exit_code == 0, solved.output
    rig, result = load_rig(tmp_path / "rig.yaml"), json.loads((tmp_path / "solved.json").read_text())
    assert rig.plane_distance_m == 10
    assert map_error_px(rig, synthetic_rig(400, 300), 2.0) < 1.0
    assert result["map_sigma_px"]["inf"] > 0
    document = yaml.safe_load((tmp_path / "rig.yaml").read_text())
    assert document["cameras"]["thermal"]["bit_depth"] == 16
    assert "seen.json" in document["inputs_sha256"]
    judged = runner.invoke(
        app, ["calibrate", "report", str(tmp_path / "rig.yaml"), str(tmp_path / "seen.json"), "-o",
              str(tmp_path / "again.html"), "--json", str(tmp_path / "judged.json")],
    )  # fmt: skip
    assert judged.exit_code == 0, judged.output
    assert json.loads((tmp_path / "judged.json").read_text())["transfer_px"]["rms"] < 0.6
    assert "<svg" in (tmp_path / "again.html").read_text()


def test_rendered_boards_seen_through_a_fisheye_become_its_calibration(tmp_path):
    rig, board = fisheye_rig(120), Board("circles", 4, 11, 0.04)
    scene = Scene(board, random_poses(board, 5, rig, seed=6, distance_m=(0.3, 0.5), tilt_deg=20))
    for camera in ("ir", "vis"):
        (tmp_path / camera).mkdir()
    for index in range(5):
        infrared, visible = draw_pair(rig, scene, index)
        cv2.imwrite(str(tmp_path / "ir" / f"view{index}.png"), infrared)
        cv2.imwrite(str(tmp_path / "vis" / f"view{index}.png"), visible)
    folders, seen, file = (
        [str(tmp_path / "ir"), str(tmp_path / "vis")],
        str(tmp_path / "seen.json"),
        tmp_path / "rig.yaml",
    )
    how = ["--board", "circles", "--size", "4x11", "--spacing", "0.04", "-o", seen]
    detected = runner.invoke(app, ["calibrate", "detect", *folders, *how])
    assert detected.exit_code == 0, detected.output
    solved = runner.invoke(app, ["calibrate", "solve", seen, "--lens", "equidistant", "-o", str(file)])
    assert solved.exit_code == 0, solved.output
    found = load_rig(file)
    assert found.visible.lens == "equidistant"
    assert found.visible.matrix[0, 0] == pytest.approx(rig.visible.matrix[0, 0], rel=0.005)
    assert load_quality(file)["heldout_px"]["median"] < 1.0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["solve", "{none}", "--lens", "fisheye"], "plumb_bob or rational_polynomial or equidistant"),
        (["detect", "{ir}", "{vis}", "--size", "9by6"], "COLUMNSxROWS"),
        (["detect", "{ir}", "{vis}", "--size", "9x6", "--board", "aruco"], "chessboard or circles"),
        (["detect", "{none}", "{vis}", "--size", "9x6"], "does not exist"),
        (["detect", "{vis}", "{ir}", "--size", "9x6"], "swapped"),
        (
            ["detect", "{ir}", "{vis}", "--size", "9x6", "-o", "{out}"],
            "0 infrared and 0 visible of 1.*chessboard of 9x6",
        ),
        (["solve", "{none}"], "cannot read the detections"),
        (["solve", "{none}", "--plane", "-1"], "cannot read|plane"),
        (["report", "{none}", "{none}"], "cannot read the calibration"),
    ],
)
def test_a_users_mistake_gets_one_line(tmp_path, arguments, says):
    for camera in ("ir", "vis"):
        (tmp_path / camera).mkdir()
    random = np.random.default_rng(1)
    cv2.imwrite(str(tmp_path / "ir" / "a.png"), random.integers(0, 9999, (120, 160), np.uint16))
    cv2.imwrite(str(tmp_path / "vis" / "a.png"), random.integers(90, 255, (120, 160, 1), np.uint8))
    names = {name: str(tmp_path / name) for name in ("ir", "vis", "none", "out")}
    result = runner.invoke(app, ["calibrate", *(argument.format(**names) for argument in arguments)])
    assert result.exit_code != 0
    assert re.search(says, str(result.exception))
    assert "\n" not in str(result.exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ["detect", "{ir}", "{vis}", "--size", "9x6", "--json", "{ir}"],
        ["detect", "{ir}", "{vis}", "--size", "9x6", "-o", "{ir}"],
        ["solve", "{seen}", "--json", "{ir}"],
        ["solve", "{seen}", "-o", "{ir}"],
        ["solve", "{seen}", "--report", "{ir}"],
        ["report", "{seen}", "{seen}", "--json", "{ir}"],
        ["report", "{seen}", "{seen}", "-o", "{ir}"],
        ["selfcal", "{ir}", "{vis}", "--json", "{ir}"],
        ["selfcal", "{ir}", "{vis}", "-o", "{ir}"],
        ["time", "{ir}", "{vis}", "--json", "{ir}"],
    ],
    ids=" ".join,
)
def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, arguments, monkeypatch):
    for work in (
        "pipeline.board_views.pair_up",
        "pipeline.recording.probe",
        "calibration.views.load_detections",
        "calibration.rig_file.load_rig",
    ):
        monkeypatch.setattr(work, lambda *_: pytest.fail("the work was begun"))
    names = {name: str(tmp_path / name) for name in ("ir", "vis", "seen")}
    (tmp_path / "ir").mkdir()
    result = runner.invoke(app, ["calibrate", *(argument.format(**names) for argument in arguments)])
    assert re.search(r"cannot write the report .*/ir: it is a folder", str(result.exception))


def _broken_archive(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def _plain_array(_: bytes) -> bytes:
    content = io.BytesIO()
    np.save(content, np.zeros((3, 4, 2)))
    return content.getvalue()


def _damaged(whole: bytes) -> bytes:
    middle = len(whole) // 2
    return whole[:middle] + bytes(40) + whole[middle + 40 :]


@pytest.mark.parametrize("spoil", [_broken_archive, _plain_array, _damaged, lambda _: b""])
def test_a_displacement_file_that_is_broken_or_of_another_kind_gets_one_line(tmp_path, spoil):
    for camera in ("ir", "vis"):
        (tmp_path / camera).mkdir()
        cv2.imwrite(str(tmp_path / camera / "a.png"), np.full((96, 128), 90, np.uint8))
    content = io.BytesIO()
    np.savez_compressed(content, disp=np.random.default_rng(0).normal(size=(24, 32, 2)))
    (tmp_path / "a.npz").write_bytes(spoil(content.getvalue()))
    with pytest.raises(SourceError, match=r"a\.npz holds no array named disp"):
        check_each(tmp_path / "ir", tmp_path / "vis", displacement=tmp_path)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("infrared", "visible", "size", "least_share"),
    [
        ("uav_board/ir", "uav_board/vi", "6x5", 1.0),
        ("quad_rig/thermal_5003", "quad_rig/rgb_13232653", "9x6", 0.85),
    ],
)
def test_real_boards_are_found(data_dir, tmp_path, infrared, visible, size, least_share):
    calib = data_dir / "calib"
    result = runner.invoke(
        app, ["calibrate", "detect", str(calib / infrared), str(calib / visible), "--size", size, "--spacing", "0.03",
              "-o", str(tmp_path / "seen.json"), "--json", str(tmp_path / "found.json")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["infrared"]["share"] == 1.0
    assert found["visible"]["share"] >= least_share
    assert found["infrared"]["misfit_px"] < 1.0
    if "quad" in infrared:
        real = solve(load_detections(tmp_path / "seen.json"))
        assert real.heldout_px["median"] < 1.5
        assert any("few" in line for line in real.warnings)
    else:  # its pairs were not taken at one moment: refused, with the figures that show it
        with pytest.raises(CalibrationError, match="not of one moment"):
            solve(load_detections(tmp_path / "seen.json"))
