"""The rig and its file: what a calibration must be, and where the map of two cameras leads."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.rig import CalibrationError, CameraModel, Rig, infrared_map
from calibration.rig_file import load_rig, save_rig

EXAMPLE = Path(__file__).parents[1] / "configs" / "calibration_example.yaml"


def matrix(focal: float, width: int, height: int) -> np.ndarray:
    return np.array([[focal, 0, width / 2 - 3], [0, focal * 1.01, height / 2 + 2], [0, 0, 1]], float)


def pose(rotation_deg=(0.6, -0.8, 0.4), translation=(-0.06, 0.01, 0.004)) -> np.ndarray:
    result = np.eye(4)
    result[:3, :3] = cv2.Rodrigues(np.radians(rotation_deg))[0]
    result[:3, 3] = translation
    return result


def rig(plane_m: float = 20.0, **changes) -> Rig:
    parts = {
        "visible": CameraModel(320, 240, matrix(260, 320, 240), np.array([-0.21, 0.06, 0.001, -0.0008, -0.004])),
        "infrared": CameraModel(160, 128, matrix(150, 160, 128), np.array([-0.28, 0.09, -0.0006, 0.0011, 0.0])),
        "infrared_from_visible": pose(),
        "plane_distance_m": plane_m,
    }
    return Rig(**(parts | changes))


def truth(of: Rig, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Visible and infrared pixels of points in visible coordinates, by OpenCV's own projection."""
    rotation = cv2.Rodrigues(of.infrared_from_visible[:3, :3])[0]
    shift = of.infrared_from_visible[:3, 3]
    seen = cv2.projectPoints(points, np.zeros(3), np.zeros(3), of.visible.matrix, of.visible.distortion)[0]
    felt = cv2.projectPoints(points, rotation, shift, of.infrared.matrix, of.infrared.distortion)[0]
    return seen.reshape(-1, 2), felt.reshape(-1, 2)


def plane_points(distance_m: float, spread: float = 0.55) -> np.ndarray:
    x, y = np.meshgrid(np.linspace(-spread, spread, 40), np.linspace(-spread, spread, 40))
    return np.stack([x.ravel() * distance_m, y.ravel() * distance_m, np.full(x.size, distance_m)], axis=1)


def look_up(plane: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    return cv2.remap(plane, pixels[:, :1].astype(np.float32), pixels[:, 1:].astype(np.float32), cv2.INTER_LINEAR)[:, 0]


def inside(pixels: np.ndarray, size: tuple[int, int], margin: float = 1.0) -> np.ndarray:
    return ((pixels >= margin) & (pixels <= np.array(size) - 1 - margin)).all(axis=1)


# The map


@pytest.mark.parametrize("plane_m", [2.0, 20.0, 1e6])
def test_the_map_agrees_with_the_projection_of_both_cameras(plane_m):
    one = rig(plane_m)
    map_x, map_y, weight = infrared_map(one, feather_px=0)
    seen, felt = truth(one, plane_points(plane_m))
    common = inside(seen, one.visible.size) & inside(felt, one.infrared.size)
    assert common.sum() > 300
    found = np.stack([look_up(map_x, seen[common]), look_up(map_y, seen[common])], axis=1)
    error = np.linalg.norm(found - felt[common], axis=1)
    assert error.mean() <= 0.05
    assert error.max() <= 0.2
    assert map_x.dtype == map_y.dtype == weight.dtype == np.float32
    assert map_x.shape == weight.shape == (240, 320)


WIDE = {
    "equidistant": CameraModel(320, 240, matrix(105, 320, 240), np.array([-0.02, 0.01, -0.004, 0.0006]), "equidistant"),
    "rational_polynomial": CameraModel(
        320, 240, matrix(170, 320, 240),
        np.array([0.9, 0.3, 0.0007, -0.0004, 0.02, 1.2, 0.45, 0.06]), "rational_polynomial",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lens", WIDE)
@pytest.mark.parametrize("of", ["visible", "infrared"])
def test_wide_lenses_map_as_opencv_projects_through_them(lens, of):
    one = rig(2.0, **{of: WIDE[lens]}) if of == "visible" else rig(2.0, infrared=WIDE[lens])
    points = plane_points(2.0, spread=1.5 if of == "visible" else 0.55)
    rotation = cv2.Rodrigues(one.infrared_from_visible[:3, :3])[0]

    def pixels(model, turned, shift):
        if model.lens == "equidistant":
            return cv2.fisheye.projectPoints(points[None], turned, shift, model.matrix, model.distortion)[0][0]
        return cv2.projectPoints(points, turned, shift, model.matrix, model.distortion)[0].reshape(-1, 2)

    seen = pixels(one.visible, np.zeros((3, 1)), np.zeros((3, 1)))
    felt = pixels(one.infrared, rotation, one.infrared_from_visible[:3, 3:].copy())
    map_x, map_y, weight = infrared_map(one, feather_px=0)
    common = inside(seen, one.visible.size) & inside(felt, one.infrared.size)
    common &= look_up(weight, seen) == 1
    assert common.sum() > 80
    found = np.stack([look_up(map_x, seen[common]), look_up(map_y, seen[common])], axis=1)
    assert np.linalg.norm(found - felt[common], axis=1).max() <= 0.2


def test_a_fisheye_sees_to_its_edge_and_no_farther_than_a_plane_can_be_seen():
    fisheye = WIDE["equidistant"]
    row, column = np.mgrid[0:240, 0:320].astype(float)
    x, y, valid = fisheye.rays(column, row)
    assert valid[120, :310].all()  # 105 px/rad: 85 degrees to the left, and 89 at column 312 or so
    assert np.degrees(np.arctan(np.hypot(x, y)[120, 2])) > 80
    again = fisheye.project(x[valid], y[valid])
    assert np.hypot(again[0] - column[valid], again[1] - row[valid]).max() < 0.01
    wider = replace(fisheye, matrix=matrix(80, 320, 240))
    assert not wider.rays(column, row)[2][120, 0]  # 114 degrees off the axis: behind the camera


@pytest.mark.parametrize("lens", WIDE)
def test_wide_lenses_survive_the_file(lens, tmp_path):
    save_rig(rig(visible=WIDE[lens]), tmp_path / "rig.yaml")
    again = load_rig(tmp_path / "rig.yaml").visible
    assert again.lens == lens
    assert np.array_equal(again.distortion, WIDE[lens].distortion)


def test_coefficients_of_another_lens_are_refused():
    with pytest.raises(CalibrationError, match="k1, k2, k3, k4"):
        CameraModel(320, 240, np.eye(3), np.zeros(5), "equidistant")


def test_a_plane_at_infinity_is_the_limit_of_far_planes():
    far, infinite = infrared_map(rig(1e9)), infrared_map(rig(float("inf")))
    assert all(np.allclose(one, other, atol=1e-4) for one, other in zip(far, infinite, strict=True))


def test_another_plane_moves_the_map_by_the_parallax():
    one = rig(20.0, infrared_from_visible=pose(rotation_deg=(0, 0, 0), translation=(-0.06, 0, 0)))
    at_20_m, at_5_m = infrared_map(one)[0], infrared_map(one, plane_distance_m=5.0)[0]
    shift = at_20_m[120, 160] - at_5_m[120, 160]
    assert shift == pytest.approx(150 * 0.06 * (1 / 5 - 1 / 20), rel=0.03)  # focal * baseline * |1/Z - 1/Z0|


def test_the_weight_is_one_where_infrared_sees_and_zero_where_not():
    one = rig()
    _, _, weight = infrared_map(one, feather_px=0)
    seen, felt = truth(one, plane_points(20.0, spread=0.8))
    on_picture = inside(seen, one.visible.size, margin=0)
    columns, rows = np.round(seen[on_picture]).astype(int).T
    well_inside = inside(felt[on_picture], one.infrared.size, margin=3)
    well_outside = ~inside(felt[on_picture], one.infrared.size, margin=-3)
    assert well_inside.any()
    assert (weight[rows[well_inside], columns[well_inside]] == 1).all()
    assert (weight[rows[well_outside], columns[well_outside]] == 0).all()


def test_the_weight_falls_off_over_the_feather():
    narrow = CameraModel(80, 60, matrix(150, 80, 60))
    _, _, weight = infrared_map(rig(infrared=narrow), feather_px=16)
    assert weight.min() == 0
    assert weight.max() == 1
    row = weight[120]
    rising = row[np.argmax(row > 0) : np.argmax(row == 1)]
    assert 14 <= len(rising) <= 18
    assert (np.diff(rising) > 0).all()


def test_an_infrared_picture_that_covers_everything_has_full_weight_up_to_the_border():
    wide = CameraModel(640, 512, matrix(150, 640, 512))
    assert (infrared_map(rig(infrared=wide), feather_px=16)[2] == 1).all()


def test_a_strongly_distorted_lens_does_not_see_what_is_beside_it():
    # This polynomial turns back at 0.82: without a guard, rays from far outside would fold into the picture.
    barrel = CameraModel(160, 128, matrix(90, 160, 128), np.array([-0.5, 0, 0, 0, 0]))
    visible = CameraModel(320, 240, matrix(90, 320, 240))
    assert barrel.widest_radius == pytest.approx(np.sqrt(1 / 1.5))
    one = rig(visible=visible, infrared=barrel, infrared_from_visible=np.eye(4))
    _, _, weight = infrared_map(one, feather_px=0)
    row, column = np.mgrid[0:240, 0:320]
    radius = np.hypot((column - 157) / 90, (row - 122) / 90.9)
    assert (weight[radius > 0.83] == 0).all()
    assert (weight[radius < 0.3] == 1).all()


def test_an_infrared_camera_that_looks_backwards_sees_nothing():
    assert infrared_map(rig(infrared_from_visible=pose(rotation_deg=(0, 180, 0))))[2].max() == 0


def test_the_map_holds_finite_numbers_near_the_picture_whatever_the_rig():
    for one in (
        rig(),
        rig(infrared_from_visible=pose((0, 90, 0))),
        rig(0.05),
        rig(infrared_from_visible=pose((0, 180, 0))),
    ):
        map_x, map_y, weight = infrared_map(one)
        assert np.isfinite(map_x).all()
        assert np.isfinite(map_y).all()
        assert np.abs(map_x).max() <= 2 * 160
        assert np.abs(map_y).max() <= 2 * 128
        assert weight.min() >= 0
        assert weight.max() <= 1


def test_a_homography_alone_gives_a_map():
    visible_from_infrared = np.array([[2.1, 0.02, -6], [-0.01, 1.9, 4], [1e-5, -2e-5, 1]])
    one = rig(infrared_from_visible=np.eye(4), homography=visible_from_infrared)
    map_x, map_y, weight = infrared_map(one, feather_px=0)
    corners = np.array([[[20.0, 20.0]], [[140.0, 20.0]], [[140.0, 110.0]], [[20.0, 110.0]]])
    seen = cv2.perspectiveTransform(corners, visible_from_infrared)[:, 0]
    found = np.stack([look_up(map_x, seen), look_up(map_y, seen)], axis=1)
    assert np.allclose(found, corners[:, 0], atol=0.01)
    assert weight[tuple(np.round(seen[0][::-1]).astype(int))] == 1


def test_rays_and_projection_undo_each_other():
    camera = rig().visible
    row, column = np.mgrid[0:240, 0:320].astype(float)
    x, y, valid = camera.rays(column, row)
    again_column, again_row = camera.project(x, y)
    assert valid.all()
    assert np.abs(again_column - column).max() < 1e-3
    assert np.abs(again_row - row).max() < 1e-3


# What is refused


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: CameraModel(0, 240, np.eye(3)), "width"),
        (lambda: CameraModel(320, 240.5, np.eye(3)), "height"),
        (lambda: CameraModel(320, 10**6, np.eye(3)), "height"),
        (lambda: CameraModel(320, 240, np.diag([0, 1, 1])), "focal"),
        (lambda: CameraModel(320, 240, np.diag([1, -5, 1])), "focal"),
        (lambda: CameraModel(320, 240, np.diag([1, np.nan, 1])), "not finite"),
        (lambda: CameraModel(320, 240, np.eye(4)), "shape"),
        (lambda: CameraModel(320, 240, np.diag([5, 5, 2])), "camera matrix"),
        (lambda: CameraModel(320, 240, np.eye(3), np.zeros(9)), "shape"),
        (lambda: CameraModel(320, 240, np.eye(3), np.full(5, np.inf)), "not finite"),
        (lambda: rig(infrared_from_visible=np.full((4, 4), np.nan)), "not finite"),
        (lambda: rig(infrared_from_visible=np.eye(3)), "shape"),
        (lambda: rig(infrared_from_visible=np.diag([1.1, 1, 1, 1])), "orthonormal"),
        (lambda: rig(infrared_from_visible=np.diag([-1.0, 1, 1, 1])), "mirrors"),
        (lambda: rig(infrared_from_visible=np.diag([1.0, 1, 1, 2])), "last row"),
        (lambda: rig(plane_m=0), "in front"),
        (lambda: rig(plane_m=float("nan")), "in front"),
        (lambda: rig(time_offset_ms=float("inf")), "time offset"),
        (lambda: rig(homography=np.ones((3, 3))), "inverted"),
        (lambda: infrared_map(rig(), plane_distance_m=-1), "in front"),
    ],
)
def test_numbers_that_no_rig_has_are_refused_with_one_line(make, says):
    with pytest.raises(CalibrationError, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_rig_cannot_be_changed_from_outside():
    values = np.array(matrix(260, 320, 240))
    camera = CameraModel(320, 240, values)
    values[0, 0] = 1
    assert camera.matrix[0, 0] == 260
    with pytest.raises(ValueError, match="read-only"):
        camera.matrix[0, 0] = 1


def test_four_distortion_numbers_leave_k3_at_zero():
    assert CameraModel(320, 240, np.eye(3), np.array([0.1, 0.2, 0.3, 0.4])).distortion.tolist() == [
        0.1,
        0.2,
        0.3,
        0.4,
        0,
    ]


# The file


def test_the_example_can_be_loaded():
    one = load_rig(EXAMPLE)
    assert one.visible.size == (1280, 720)
    assert one.infrared.size == (640, 512)
    assert one.baseline_m == pytest.approx(0.06)
    assert one.plane_distance_m == 30


def test_what_is_saved_is_loaded_again_bit_by_bit(tmp_path):
    one = rig(17.25, time_offset_ms=-12.5)
    save_rig(one, tmp_path / "rig.yaml", extra={"created": "2026-01-01", "quality": {"views": 34}})
    again = load_rig(tmp_path / "rig.yaml")
    for camera in ("visible", "infrared"):
        before, after = getattr(one, camera), getattr(again, camera)
        assert before.size == after.size
        assert np.array_equal(before.matrix, after.matrix)
        assert np.array_equal(before.distortion, after.distortion)
    assert np.array_equal(one.infrared_from_visible, again.infrared_from_visible)
    assert (again.plane_distance_m, again.time_offset_ms) == (17.25, -12.5)
    assert yaml.safe_load((tmp_path / "rig.yaml").read_text())["quality"] == {"views": 34}


def test_a_homography_survives_the_file(tmp_path):
    one = rig(infrared_from_visible=np.eye(4), homography=np.diag([2.0, 2.0, 1.0]))
    save_rig(one, tmp_path / "rig.yaml")
    assert np.array_equal(load_rig(tmp_path / "rig.yaml").homography, one.homography)


def test_a_file_with_only_a_homography_needs_no_lenses(tmp_path):
    (tmp_path / "rig.yaml").write_text(
        "format: dspfusion-calibration/1\n"
        "cameras: {visible: {resolution: [320, 240]}, thermal: {resolution: [160, 120]}}\n"
        "reference: {homography: [[2, 0, 0.5], [0, 2, 0.5], [0, 0, 1]]}\n"
    )
    map_x, _, _ = infrared_map(load_rig(tmp_path / "rig.yaml"))
    assert map_x[100, 200] == pytest.approx((200 - 0.5) / 2)


def test_saving_replaces_the_old_file_at_once_and_leaves_no_other(tmp_path, monkeypatch):
    save_rig(rig(10.0), tmp_path / "rig.yaml")
    save_rig(rig(11.0), tmp_path / "rig.yaml")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(CalibrationError, match="No space left"):
        save_rig(rig(12.0), tmp_path / "rig.yaml")
    assert load_rig(tmp_path / "rig.yaml").plane_distance_m == 11.0
    assert [path.name for path in tmp_path.iterdir()] == ["rig.yaml"]


def document(**changes) -> dict:
    """The example, with values put in by their path, e.g. `cameras__thermal__resolution`; None removes the key."""
    result = yaml.safe_load(EXAMPLE.read_text())
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = result
        for name in sections:
            section = section[name]
        if value is None:
            del section[key]
        else:
            section[key] = value
    return result


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "dspfusion-calibration/2"}, "dspfusion-calibration/1"),
        ({"format": None}, "format"),
        ({"cameras": None}, "cameras is missing"),
        ({"cameras__thermal": None}, "cameras.thermal is missing"),
        ({"cameras__thermal": [1, 2]}, "mapping"),
        ({"cameras__thermal__resolution": None}, "resolution"),
        ({"cameras__thermal__resolution": [640]}, "resolution"),
        ({"cameras__thermal__resolution": [640, 512.5]}, "resolution"),
        ({"cameras__thermal__resolution": [640, -512]}, "height"),
        ({"cameras__visible__intrinsics": None}, "intrinsics"),
        ({"cameras__visible__intrinsics": [1, 2, 3, "four"]}, "intrinsics"),
        ({"cameras__visible__intrinsics": [1, 2, 3, float("nan")]}, "not finite"),
        ({"cameras__visible__intrinsics": [1, 10**400, 3, 4]}, "too large"),
        ({"cameras__visible__intrinsics": [0, 2, 3, 4]}, "cameras.visible: focal"),
        ({"cameras__visible__camera_model": "omni"}, "camera_model"),
        ({"cameras__visible__distortion_model": "thin_prism"}, "distortion_model"),
        ({"cameras__visible__distortion_coeffs": [1, 2]}, "distortion_coeffs"),
        ({"extrinsics": None}, "T_thermal_visible is missing"),
        ({"extrinsics__T_thermal_visible": [[1, 0], [0, 1]]}, "4 rows"),
        ({"extrinsics__T_thermal_visible": np.diag([2.0, 2, 2, 1]).tolist()}, "orthonormal"),
        ({"reference__plane_distance_m": "far"}, "plane_distance_m"),
        ({"reference__plane_distance_m": -3}, "in front"),
        ({"timing__offset_ms": float("nan")}, "offset_ms"),
        ({"residual_field": {"file": "field.npz"}}, "residual_field"),
    ],
)
def test_a_wrong_file_gets_one_line_with_its_name_and_the_key(tmp_path, changes, says):
    path = tmp_path / "my_rig.yaml"
    path.write_text(yaml.safe_dump(document(**changes)))
    with pytest.raises(CalibrationError, match=says) as caught:
        load_rig(path)
    assert "my_rig.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "mapping"),
        (b"- 1\n- 2\n", "mapping"),
        (b"a: [1, 2\nb: 3", "not YAML in line"),
        (b"\xff\xd8\xff\xe0 a photograph", "not a text file"),
        (b"!!python/object/apply:os.system ['true']", "not YAML"),
        (b"[" * 20000, "not YAML"),
        (b"format: a\ncameras: {}\nformat: b\n", "other.yaml: line 3: the key format is there twice: keep one"),
        (b"format: " + b"x" * (1 << 20), "larger"),
    ],
)
def test_a_file_that_is_no_calibration_gets_one_line(tmp_path, content, says):
    path = tmp_path / "other.yaml"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=says) as caught:
        load_rig(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_a_folder_gets_one_line(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(CalibrationError, match="cannot read"):
            load_rig(path)
    (tmp_path / "file").touch()
    with pytest.raises(CalibrationError, match=r"cannot write.*choose another place"):
        save_rig(rig(), tmp_path / "file" / "rig.yaml")


yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
PATHS = [
    "cameras", "cameras__visible", "cameras__visible__resolution", "cameras__visible__intrinsics", "extrinsics",
    "cameras__visible__distortion_coeffs", "cameras__visible__distortion_model", "cameras__thermal__camera_model",
    "extrinsics__T_thermal_visible", "reference", "reference__plane_distance_m", "timing", "timing__offset_ms",
]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(path=st.sampled_from(PATHS), value=yaml_values)
def test_any_value_at_any_key_is_loaded_or_refused(tmp_path_factory, path, value):
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_text(yaml.safe_dump(document(**{path: value})), encoding="utf-8")
    with contextlib.suppress(CalibrationError):  # and nothing else
        load_rig(file)
