"""Boards in rendered pictures: where the points are found, and why a picture is refused."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from calibration.lattice import largest_lattice
from calibration.rig import CalibrationError, CameraModel, Rig
from calibration.targets import Board, Detection, Refusal, detect
from tests.rigs import boards
from tests.rigs.boards import INFRARED, VISIBLE, Look, draw, random_poses, synthetic_rig, true_points

RIG = synthetic_rig(480, 360)  # small pictures: the search takes a tenth of a second
CHESS = Board("chessboard", 9, 6, 0.05)
CIRCLES = Board("circles", 4, 11, 0.04)


def pose_at(distance_m: float, board: Board, x_m: float = 0.0, y_m: float = 0.0) -> np.ndarray:
    """Square on, its middle at a place before the visible camera."""
    points = board.points()
    pose = np.eye(4)
    pose[:3, 3] = np.array([x_m, y_m, distance_m]) - (points.max(axis=0) + points.min(axis=0)) / 2
    return pose


def picture(board: Board, pose: np.ndarray, look: Look = VISIBLE, seed: int = 1) -> np.ndarray:
    return draw(RIG.visible, pose, board, look, np.random.default_rng(seed))


def errors(result: Detection, board: Board, pose: np.ndarray) -> np.ndarray:
    truth = true_points(RIG.visible, pose, board.points())
    return min((np.linalg.norm(result.points - truth[order], axis=1) for order in board.orders()), key=np.nanmean)


@pytest.mark.parametrize("board", [CHESS, CIRCLES], ids=lambda board: board.kind)
@pytest.mark.parametrize(("look", "within_px"), [(VISIBLE, 0.12), (INFRARED, 0.25)], ids=["visible", "heated"])
def test_points_are_found_to_a_fraction_of_a_pixel_in_visible_and_heated_boards(board, look, within_px):
    for index, pose in enumerate(random_poses(board, 2, RIG, seed=11)):
        result = detect(picture(board, pose, look, index), board)
        assert isinstance(result, Detection)
        assert np.nanmean(errors(result, board, pose)) < within_px
        assert np.isfinite(result.points).all(axis=1).mean() > 0.9


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_either_polarity_in_eight_or_sixteen_bits(inverted, bits):
    pose = pose_at(0.9, CIRCLES)
    look = Look(contrast=40, inverted=inverted, bits=bits, heat=25)
    result = detect(picture(CIRCLES, pose, look), CIRCLES)
    assert isinstance(result, Detection)
    assert result.inverted is inverted
    assert np.nanmean(errors(result, CIRCLES, pose)) < 0.3


def test_colour_pictures_are_taken_as_they_are():
    pose = pose_at(1.0, CHESS)
    grey = picture(CHESS, pose)
    one, other = detect(grey, CHESS), detect(np.repeat(grey[..., None], 3, axis=2), CHESS)
    assert isinstance(one, Detection)
    assert isinstance(other, Detection)
    assert np.nanmax(np.abs(one.points - other.points)) < 0.02


def refusal(image: np.ndarray, board: Board) -> Refusal:
    result = detect(image, board)
    assert isinstance(result, Refusal), result
    assert "\n" not in result.text
    return result


def test_a_picture_without_a_board_says_so():
    empty = picture(CHESS, pose_at(1.0, CHESS, x_m=50.0))
    assert refusal(empty, CHESS).reason == "absent"
    assert refusal(empty, CIRCLES).reason == "absent"
    assert refusal(np.full((480, 640), 7000, np.uint16), CHESS).reason == "absent"


def test_a_board_that_is_too_far_away_says_so():
    assert refusal(picture(CHESS, pose_at(3.6, CHESS)), CHESS).reason == "small"


def test_a_board_that_leaves_the_picture_says_so():
    cut = picture(CHESS, pose_at(0.8, CHESS, x_m=0.36))
    assert refusal(cut, CHESS).reason == "cut"


def test_a_blurred_board_says_so():
    blurred = picture(CHESS, pose_at(1.1, CHESS), Look(blur_px=8.0, contrast=120, noise=1.0))
    assert refusal(blurred, CHESS).reason in ("blurred", "absent")
    smeared = picture(CHESS, pose_at(1.1, CHESS), Look(smear_px=(25.0, 9.0), contrast=120, noise=1.0))
    assert refusal(smeared, CHESS).reason in ("blurred", "absent", "bent")


@pytest.mark.parametrize("asked", [(8, 6), (9, 5), (10, 7), (7, 5)])
def test_a_wrong_number_of_inner_corners_is_refused_with_the_right_one(asked):
    result = refusal(picture(CHESS, pose_at(0.9, CHESS)), Board("chessboard", *asked))
    assert result.reason == "count"
    assert result.found is not None
    assert sorted(result.found) == [6, 9]


@pytest.mark.parametrize("asked", [(4, 9), (3, 11), (4, 10)])
def test_a_part_of_a_grid_of_circles_is_not_taken_for_the_whole(asked):
    result = refusal(picture(CIRCLES, pose_at(0.8, CIRCLES)), Board("circles", *asked))
    assert result.reason in ("count", "absent")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (("chessboard", 2, 6), "inner corners"),
        (("circles", 4, 100), "circles"),
        (("charuco", 4, 11), "chessboard or circles"),
        (("chessboard", 9, 6, 30.0), "spacing"),
        (("chessboard", 9, 6, float("nan")), "spacing"),
    ],
)
def test_a_board_that_is_none_is_refused(values, says):
    with pytest.raises(CalibrationError, match=says):
        Board(*values)


def clutter(random: np.random.Generator) -> np.ndarray:
    """A street's worth of edges and corners, and a fence, but no board."""
    picture = np.full((480, 640), 90, np.uint8)
    for _ in range(300):
        box = cv2.boxPoints((tuple(random.uniform(0, 640, 2)), tuple(random.uniform(4, 90, 2)), random.uniform(0, 180)))
        cv2.fillConvexPoly(picture, box.astype(np.int32), int(random.integers(20, 235)), cv2.LINE_AA)
    picture[300:, ::24] = 200
    return np.clip(picture + random.normal(0, 3, picture.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("board", [CHESS, CIRCLES], ids=lambda board: board.kind)
def test_pictures_with_nothing_like_a_board_are_never_searched(board, monkeypatch):
    def searched(*_: object, **__: object) -> None:
        raise AssertionError("the search takes seconds")

    for search in ("findChessboardCornersSB", "findChessboardCornersSBWithMeta", "findCirclesGrid"):
        monkeypatch.setattr(cv2, search, searched)
    for seed in range(3):
        result = refusal(clutter(np.random.default_rng(seed)), board)
        assert result.reason == "absent"
        assert board.name in result.text


@pytest.mark.parametrize("board", [CHESS, CIRCLES], ids=lambda board: board.kind)
def test_boards_before_a_street_are_searched_for(board, monkeypatch):
    """However faint, noisy and blurred; the points on a lattice are counted, which is what decides."""
    behind = clutter(np.random.default_rng(5))[:360, :480].astype(np.float32)
    monkeypatch.setattr(boards, "_background", lambda _: behind.copy())
    faint = Look(blur_px=2.0, noise=3.0, contrast=20.0, inverted=True, heat=50.0, bits=16)
    for index, pose in enumerate(random_poses(board, 6, RIG, seed=4)):
        grey = picture(board, pose, faint, index).astype(np.float32)
        assert largest_lattice(grey, board.kind == "chessboard", 100) >= 12


@pytest.mark.parametrize("board", [CHESS, CIRCLES], ids=lambda board: board.kind)
def test_near_boards_are_found_through_a_lens_of_110_degrees(board):
    focal_px = 240 / np.radians(55)
    lens = CameraModel(
        480, 360, np.array([[focal_px, 0, 239.5], [0, focal_px, 179.5], [0, 0, 1]]), np.zeros(4), "equidistant"
    )
    rig = Rig(lens, lens, RIG.infrared_from_visible)
    for index, pose in enumerate(random_poses(board, 4, rig, seed=8, distance_m=(0.25, 0.4), tilt_deg=20)):
        result = detect(draw(lens, pose, board, VISIBLE, np.random.default_rng(index)), board)
        assert isinstance(result, Detection)
        truth = true_points(lens, pose, board.points())
        assert min(np.nanmean(np.linalg.norm(result.points - truth[order], axis=1)) for order in board.orders()) < 0.3
