"""Calibrations of other programs: Kalibr camchains and ROS camera_info, accepted wherever a calibration file is."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import yaml

from calibration.rig import CalibrationError
from calibration.rig_file import load_quality, load_rig
from tests.rigs.boards import synthetic_rig

TRUTH = synthetic_rig()


def kalibr(model, topic: str, **more) -> dict:
    matrix = model.matrix
    return {
        "camera_model": "pinhole",
        "intrinsics": [float(v) for v in (matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2])],
        "distortion_model": "radtan",
        "distortion_coeffs": model.distortion[:4].tolist(),
        "resolution": [model.width, model.height],
        "rostopic": topic,
        "cam_overlaps": [1],
        **more,
    }


def write(path, document):
    path.write_text(yaml.safe_dump(document))
    return path


def same(rig) -> bool:
    return (
        np.allclose(rig.infrared_from_visible, TRUTH.infrared_from_visible, atol=1e-9)
        and np.allclose(rig.visible.matrix, TRUTH.visible.matrix)
        and np.allclose(rig.infrared.matrix, TRUTH.infrared.matrix)
        and np.allclose(rig.infrared.distortion, TRUTH.infrared.distortion)
    )


def test_a_kalibr_camchain_is_a_calibration_in_either_order(tmp_path):
    pose = TRUTH.infrared_from_visible
    chain = {
        "cam0": kalibr(TRUTH.visible, "/rgb/image_raw"),
        "cam1": kalibr(TRUTH.infrared, "/thermal/image_raw", T_cn_cnm1=pose.tolist()),
    }
    assert same(load_rig(write(tmp_path / "chain.yaml", chain)))
    turned = {
        "cam0": kalibr(TRUTH.infrared, "/flir_boson/image"),
        "cam1": kalibr(TRUTH.visible, "/cam/image", T_cn_cnm1=np.linalg.inv(pose).tolist()),
    }
    assert same(load_rig(write(tmp_path / "turned.yaml", turned)))
    assert load_quality(tmp_path / "turned.yaml") == {}


def test_a_camchain_with_an_imu_gives_pose_and_clock_offset(tmp_path):
    visible_from_imu = np.eye(4)
    visible_from_imu[:3, :3] = cv2.Rodrigues(np.array([0.3, -1.2, 0.4]))[0]
    visible_from_imu[:3, 3] = 0.1, 0.2, -0.05
    infrared_from_imu = TRUTH.infrared_from_visible @ visible_from_imu
    chain = {
        "cam0": kalibr(TRUTH.visible, "/rgb", T_cam_imu=visible_from_imu.tolist(), timeshift_cam_imu=0.004),
        "cam1": kalibr(TRUTH.infrared, "/ir", T_cam_imu=infrared_from_imu.tolist(), timeshift_cam_imu=-0.010),
    }
    rig = load_rig(write(tmp_path / "chain.yaml", chain))
    assert np.allclose(rig.infrared_from_visible, TRUTH.infrared_from_visible, atol=1e-9)
    assert rig.time_offset_ms == pytest.approx(14.0)  # t_imu = t_cam + shift for both


def camera_info(model, name: str, **more) -> dict:
    return {
        "image_width": model.width,
        "image_height": model.height,
        "camera_name": name,
        "camera_matrix": {"rows": 3, "cols": 3, "data": model.matrix.ravel().tolist()},
        "distortion_model": "plumb_bob",
        "distortion_coefficients": {"rows": 1, "cols": 5, "data": model.distortion.tolist()},
        **more,
    }


def test_fisheye_and_rational_lenses_of_kalibr_and_ros_are_taken_over(tmp_path):
    bent = [-0.02, 0.01, -0.004, 0.0006]
    chain = changed(distortion_model="equidistant", distortion_coeffs=bent)
    infrared = load_rig(write(tmp_path / "chain.yaml", chain)).infrared
    assert (infrared.lens, infrared.distortion.tolist()) == ("equidistant", bent)
    eight = {"rows": 1, "cols": 8, "data": [0.9, 0.3, 0.0, 0.0, 0.02, 1.2, 0.45, 0.06]}
    document = {
        "visible": camera_info(TRUTH.visible, "v", distortion_model="rational_polynomial",
                               distortion_coefficients=eight),
        "thermal": camera_info(TRUTH.infrared, "t"),
        "T_thermal_visible": TRUTH.infrared_from_visible.tolist(),
    }  # fmt: skip
    visible = load_rig(write(tmp_path / "pair.yaml", document)).visible
    assert (visible.lens, visible.distortion.tolist()) == ("rational_polynomial", eight["data"])


def test_two_camera_info_with_their_pose_are_a_calibration(tmp_path):
    write(tmp_path / "left.yaml", camera_info(TRUTH.visible, "rgb"))
    document = {
        "visible": "left.yaml",
        "thermal": camera_info(TRUTH.infrared, "thermal"),
        "T_thermal_visible": TRUTH.infrared_from_visible.tolist(),
    }
    assert same(load_rig(write(tmp_path / "pair.yaml", document)))


def test_a_key_that_a_camera_info_says_twice_is_told_with_file_and_line(tmp_path):
    lines = write(tmp_path / "left.yaml", camera_info(TRUTH.visible, "rgb")).read_text().splitlines(keepends=True)
    (tmp_path / "left.yaml").write_text("".join([*lines, "image_width: 320\n"]))
    document = {"visible": "left.yaml", "thermal": camera_info(TRUTH.infrared, "thermal")}
    with pytest.raises(
        CalibrationError, match=rf"left\.yaml line {len(lines) + 1}: the key image_width is there twice"
    ):
        load_rig(write(tmp_path / "pair.yaml", document))


def test_a_folder_with_the_camera_info_of_a_stereo_pair_is_a_calibration(tmp_path):
    rotation, shift = TRUTH.infrared_from_visible[:3, :3], TRUTH.infrared_from_visible[:3, 3]
    left, right, left_projection, right_projection, *_ = cv2.stereoRectify(
        TRUTH.visible.matrix, TRUTH.visible.distortion, TRUTH.infrared.matrix, TRUTH.infrared.distortion,
        (640, 480), rotation, shift.reshape(3, 1),
    )  # fmt: skip
    for name, model, turn, projection in (
        ("visible", TRUTH.visible, left, left_projection),
        ("thermal", TRUTH.infrared, right, right_projection),
    ):
        info = camera_info(
            model,
            name,
            rectification_matrix={"rows": 3, "cols": 3, "data": turn.ravel().tolist()},
            projection_matrix={"rows": 3, "cols": 4, "data": projection.ravel().tolist()},
        )
        write(tmp_path / f"{name}.yaml", info)
    assert same(load_rig(tmp_path))


def changed(**changes) -> dict:
    second = kalibr(TRUTH.infrared, "/thermal/image", T_cn_cnm1=TRUTH.infrared_from_visible.tolist()) | changes
    return {"cam0": kalibr(TRUTH.visible, "/rgb/image"), "cam1": second}


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (changed(distortion_model="fov", distortion_coeffs=[0.9]), "pinhole-equi"),
        (changed(camera_model="omni"), "pinhole-radtan"),
        (changed(intrinsics=[1.0, float("nan"), 3, 4]), "not finite"),
        (changed(intrinsics=None), "intrinsics is missing"),
        (changed(T_cn_cnm1=None), "T_cn_cnm1 is missing"),
        (changed(T_cn_cnm1=np.diag([2.0, 2, 2, 1]).tolist()), "orthonormal"),
        (changed(T_cn_cnm1=np.diag([-1.0, 1, 1, 1]).tolist()), "mirrors"),
        (changed(resolution=[640.5, 480]), "whole number"),
        (changed(rostopic="/other"), "infrared one|"),
        ({"cam0": kalibr(TRUTH.visible, "/rgb")}, "1 cameras"),
        ({"cam0": kalibr(TRUTH.visible, "/a"), "cam1": changed(rostopic="/b")["cam1"]}, "which camera is the infrared"),
        (camera_info(TRUTH.visible, "rgb"), "of one camera"),
        ({"visible": "gone.yaml", "thermal": camera_info(TRUTH.infrared, "t")}, "gone.yaml"),
        ({"visible": camera_info(TRUTH.visible, "v"), "thermal": camera_info(TRUTH.infrared, "t")}, "T_thermal"),
        ({"visible": camera_info(TRUTH.visible, "v", distortion_model="thin_prism"),
          "thermal": camera_info(TRUTH.infrared, "t")}, "plumb_bob"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_rig_gets_one_line(tmp_path, document, says):
    if says.endswith("|"):  # one topic that says nothing is enough where the other one does
        assert same(load_rig(write(tmp_path / "chain.yaml", document)))
        return
    with pytest.raises(CalibrationError, match=says) as caught:
        load_rig(write(tmp_path / "chain.yaml", document))
    assert "chain.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
