"""Registration: the infrared picture on the visible camera's pixels, measured against the geometry itself."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from calibration.rig import CalibrationError, CameraModel, Rig, infrared_map
from calibration.rig_file import load_rig, save_rig
from pipeline.config import RegistrationConfig, SyntheticSource
from pipeline.errors import ConfigError
from pipeline.frame import Frame, FramePair
from pipeline.gain import InfraredGain
from pipeline.register import Register
from pipeline.sources.synthetic import project, true_rig

VISIBLE, INFRARED = (320, 240), (200, 160)
PLANE_M = 12.0


def make_rig() -> Rig:
    pose = np.eye(4)
    pose[:3, :3] = cv2.Rodrigues(np.radians((0.5, -0.7, 0.9)))[0]
    pose[:3, 3] = (-0.08, 0.015, 0.002)
    return Rig(
        visible=CameraModel(
            *VISIBLE, np.array([[300.0, 0, 158], [0, 301, 121], [0, 0, 1]]), np.array([-0.2, 0.05, 0, 0, 0])
        ),
        infrared=CameraModel(
            *INFRARED, np.array([[250.0, 0, 101], [0, 249, 78], [0, 0, 1]]), np.array([-0.3, 0.1, 0.001, 0, 0])
        ),
        infrared_from_visible=pose,
        plane_distance_m=PLANE_M,
    )


def targets() -> np.ndarray:
    """Points on the reference plane, well apart, in visible coordinates."""
    x, y = np.meshgrid(np.linspace(-0.35, 0.35, 6), np.linspace(-0.25, 0.25, 5))
    return np.stack([x.ravel(), y.ravel(), np.ones(x.size)], axis=1) * PLANE_M


def pixels(points: np.ndarray, camera: CameraModel, pose: np.ndarray) -> np.ndarray:
    rotation = cv2.Rodrigues(pose[:3, :3])[0]
    return cv2.projectPoints(points, rotation, pose[:3, 3], camera.matrix, camera.distortion)[0].reshape(-1, 2)


def picture_of_spots(centres: np.ndarray, size: tuple[int, int], radius: float = 2.5) -> np.ndarray:
    row, column = np.mgrid[0 : size[1], 0 : size[0]]
    picture = sum(np.exp(-((column - x) ** 2 + (row - y) ** 2) / (2 * radius**2)) for x, y in centres)
    return np.clip(250 * picture, 0, 255).astype(np.uint8)


def spot_centre(picture: np.ndarray, near: np.ndarray, reach: int = 9) -> np.ndarray:
    column, row = np.round(near).astype(int)
    part = picture[row - reach : row + reach + 1, column - reach : column + reach + 1].astype(float)
    rows, columns = np.mgrid[row - reach : row + reach + 1, column - reach : column + reach + 1]
    return np.array([(columns * part).sum(), (rows * part).sum()]) / part.sum()


def inside(pixel: np.ndarray, size: tuple[int, int], margin: float) -> bool:
    return bool((pixel >= margin).all() and (pixel <= np.array(size) - 1 - margin).all())


def infrared_frame(image: np.ndarray | None = None, size: tuple[int, int] = INFRARED) -> Frame:
    return Frame("infrared", np.full(size[::-1], 90, np.uint8) if image is None else image, 0, 0)


def visible_frame(size: tuple[int, int] = VISIBLE) -> Frame:
    return Frame("visible", np.full((*size[::-1], 3), 50, np.uint8), 0, 0)


def both(infrared: Frame | None = None, visible: Frame | None = None) -> FramePair:
    return FramePair(infrared or infrared_frame(), visible or visible_frame(), "fused")


@pytest.fixture
def calibrated(tmp_path) -> Register:
    save_rig(make_rig(), tmp_path / "rig.yaml")
    return Register(RegistrationConfig(calibration=str(tmp_path / "rig.yaml"), feather_px=16), InfraredGain())


@pytest.fixture
def uncalibrated() -> Register:
    return Register(RegistrationConfig(), InfraredGain())


def test_what_lies_on_the_reference_plane_coincides_within_half_a_pixel(calibrated):
    rig = make_rig()
    felt = pixels(targets(), rig.infrared, rig.infrared_from_visible)
    seen = pixels(targets(), rig.visible, np.eye(4))
    aligned = calibrated(both(infrared_frame(picture_of_spots(felt, INFRARED))))
    whole = [
        number for number in range(len(seen)) if inside(seen[number], VISIBLE, 12) and inside(felt[number], INFRARED, 9)
    ]
    assert len(whole) >= 12
    errors = [np.linalg.norm(spot_centre(aligned.infrared, seen[number]) - seen[number]) for number in whole]
    assert np.mean(errors) <= 0.5
    assert np.mean(errors) <= 0.2  # what the interpolation leaves


def test_nearer_things_are_off_by_the_parallax_and_not_more(calibrated):
    rig = make_rig()
    centre = np.array([[0.0, 0.0, 4.0]])
    felt = pixels(centre, rig.infrared, rig.infrared_from_visible)
    seen = pixels(centre, rig.visible, np.eye(4))[0]
    aligned = calibrated(both(infrared_frame(picture_of_spots(felt, INFRARED))))
    off = np.linalg.norm(spot_centre(aligned.infrared, seen, reach=20) - seen)
    assert off == pytest.approx(300 * rig.baseline_m * (1 / 4 - 1 / PLANE_M), rel=0.05)


def test_the_result_lies_on_the_visible_grid_with_a_weight(calibrated):
    aligned = calibrated(both())
    assert aligned.calibrated
    assert aligned.infrared.shape == aligned.weight.shape == VISIBLE[::-1]
    assert aligned.infrared.dtype == np.uint8
    assert aligned.weight.dtype == np.float32
    assert aligned.weight.min() == 0
    assert aligned.weight.max() == 1
    assert 0.3 < calibrated.overlap < 1


def test_outside_the_infrared_picture_nothing_is_black_in_a_pair(calibrated):
    assert calibrated(both()).infrared.min() == 90


def test_the_pixels_of_the_input_are_left_alone(calibrated):
    pair = both(infrared_frame(np.random.default_rng(0).integers(0, 255, INFRARED[::-1], dtype=np.uint8)))
    before = pair.infrared.image.copy(), pair.visible.image.copy()
    aligned = calibrated(pair)
    assert np.array_equal(pair.infrared.image, before[0])
    assert np.array_equal(pair.visible.image, before[1])
    assert aligned.visible is pair.visible.image
    assert aligned.pair is pair


def test_sixteen_bits_go_through_gain_control(calibrated):
    counts = np.random.default_rng(0).integers(7000, 8000, INFRARED[::-1], dtype=np.uint16)
    aligned = calibrated(both(Frame("infrared", counts, 0, 0, bits=14)))
    assert aligned.infrared.dtype == np.uint8
    assert aligned.gain["method"] == "plateau"
    assert 7000 <= aligned.gain["low"] < aligned.gain["high"] <= 8000


def test_without_a_calibration_the_picture_is_resized_and_says_so(uncalibrated):
    aligned = uncalibrated(both())
    assert aligned.infrared.shape == VISIBLE[::-1]
    assert not aligned.calibrated
    assert aligned.weight is None
    assert uncalibrated.overlap == 1


def test_without_a_calibration_equal_sizes_pass_unchanged(uncalibrated):
    image = np.random.default_rng(0).integers(0, 255, VISIBLE[::-1], dtype=np.uint8)
    assert np.array_equal(uncalibrated(both(infrared_frame(image))).infrared, image)


def test_a_lone_visible_frame_passes_alone(calibrated, uncalibrated):
    for register in (calibrated, uncalibrated):
        aligned = register(FramePair(None, visible_frame(), "vis_only"))
        assert aligned.infrared is None
        assert aligned.weight is None
        assert aligned.visible.shape == (*VISIBLE[::-1], 3)


def test_a_lone_infrared_frame_keeps_the_size_of_the_output(calibrated, uncalibrated):
    alone = FramePair(infrared_frame(), None, "ir_only")
    warped = calibrated(alone)
    assert warped.infrared.shape == VISIBLE[::-1]
    assert warped.visible is None
    assert warped.infrared[warped.weight == 0].min() == 0  # black where it sees nothing
    assert uncalibrated(alone).infrared.shape == INFRARED[::-1]  # nothing better is known yet
    uncalibrated(both())
    assert uncalibrated(alone).infrared.shape == VISIBLE[::-1]


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        (both(visible=visible_frame((640, 480))), "320x240.*visible.*640x480"),
        (both(infrared_frame(size=(160, 120))), "200x160.*infrared.*160x120"),
        (FramePair(infrared_frame(size=(160, 120)), None, "ir_only"), "200x160.*infrared.*160x120"),
        (both(infrared_frame(size=VISIBLE), visible_frame(INFRARED)), "swapped"),
    ],
)
def test_a_calibration_for_another_resolution_is_refused_with_both_sizes(calibrated, pair, says):
    with pytest.raises(ConfigError, match=says) as caught:
        calibrated(pair)
    assert "\n" not in str(caught.value)


def test_a_stream_that_changes_its_size_goes_on_uncalibrated_and_stops_calibrated(calibrated, uncalibrated):
    for register in (calibrated, uncalibrated):
        register(both())
    changed = both(infrared_frame(size=(100, 80)), visible_frame((160, 120)))
    assert uncalibrated(changed).infrared.shape == (120, 160)
    with pytest.raises(ConfigError, match="160x120"):
        calibrated(changed)
    assert calibrated(both()).calibrated  # and goes on when it has come back


def test_an_unusable_calibration_is_refused_at_the_start(tmp_path):
    with pytest.raises(CalibrationError, match="cannot read"):
        Register(RegistrationConfig(calibration=str(tmp_path / "none.yaml")), InfraredGain())


def test_a_calibration_with_which_infrared_sees_nothing_of_the_picture_is_refused():
    backwards = make_rig().infrared_from_visible @ np.diag([-1.0, 1.0, -1.0, 1.0])
    with pytest.raises(CalibrationError, match="sees nothing"):
        Register(RegistrationConfig(), InfraredGain(), replace(make_rig(), infrared_from_visible=backwards))


@pytest.mark.parametrize("plane_m", [5.0, 20.0])
def test_on_the_simulated_rig_the_map_follows_the_true_geometry(tmp_path, plane_m):
    truth = true_rig(SyntheticSource(width=320, height=256), SyntheticSource(width=640, height=480), plane_m)
    save_rig(truth, tmp_path / "rig.yaml")
    map_x, map_y, weight = infrared_map(load_rig(tmp_path / "rig.yaml"), feather_px=0)
    x, y = np.meshgrid(np.linspace(-0.7, 0.7, 60), np.linspace(-0.6, 0.6, 60))
    felt, seen = project(truth, np.stack([x.ravel(), y.ravel(), np.ones(x.size)], axis=1) * plane_m)
    column, row = seen.astype(np.float32).T
    found = np.stack([cv2.remap(plane, column, row, cv2.INTER_LINEAR).ravel() for plane in (map_x, map_y)], axis=1)
    common = np.array([inside(s, (640, 480), 1) and inside(f, (320, 256), 1) for s, f in zip(seen, felt, strict=True)])
    assert common.sum() > 500
    error = np.linalg.norm(found - felt, axis=1)[common]
    assert error.mean() <= 0.05  # pixels of the infrared camera
    assert weight.mean() > 0.3
