"""Calibrations of other programs: Kalibr camchains, and ROS camera_info.

Which camera is the infrared one is read from its topic, camera name or file name (thermal, infrared, ir, lwir, flir,
boson, ...); else it is the one with the clearly smaller picture; where that says nothing either, the file is refused
rather than guessed at.

ROS keeps one camera a file, so for a rig a folder with both files is given. The pose between them follows from
rectification (R and P) where they were calibrated as a stereo pair. Where not, one file holds both and the pose:

    visible: visible.yaml        # a camera_info file beside this one, or its content
    thermal: thermal.yaml
    T_thermal_visible: [[...], [...], [...], [...]]
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from calibration.rig import COEFFICIENTS, CalibrationError, CameraModel, Lens, Rig
from calibration.strict_yaml import KeyTwice, load_yaml

MAX_BYTES = 1 << 20
_THERMAL = re.compile(
    r"(?:^|[^a-z])(thermal|therm|infrared|infra|ir|lwir|mwir|flir|boson|tau|lepton|seek|tir)(?:[^a-z]|$)"
)
_VISIBLE = re.compile(r"(?:^|[^a-z])(visible|vis|rgb|colou?r|bgr|mono|gr[ae]y|eo|vi)(?:[^a-z]|$)")
_PLANE_M = 30.0
_ROS_LENSES: dict[str, Lens] = {
    "plumb_bob": "plumb_bob",
    "none": "plumb_bob",
    "": "plumb_bob",
    "rational_polynomial": "rational_polynomial",
    "equidistant": "equidistant",
    "fisheye": "equidistant",
}


def is_foreign(document: dict[str, Any]) -> bool:
    """Whether a parsed file is a calibration of another program that is known here."""
    if "format" in document:
        return False
    return _is_camchain(document) or _is_camera_info(document) or _is_pair(document)


def foreign_rig(document: dict[str, Any], path: Path) -> Rig:
    """The rig of a document for which `is_foreign` is true.

    Raises:
        CalibrationError: one camera only, an unsupported lens, or it cannot be told which camera is which.
    """
    if _is_camchain(document):
        return _of_camchain(document)
    if _is_camera_info(document):
        raise CalibrationError(
            "this is the ROS camera_info of one camera: give the folder that holds those of both, or a file with "
            "'visible: FILE', 'thermal: FILE' and 'T_thermal_visible' (4x4)"
        )
    return _of_pair(document, path.parent)


def folder_rig(folder: Path) -> Rig:
    """The rig of a folder that holds the camera_info files of both cameras, calibrated as a stereo pair.

    Raises:
        CalibrationError: not two of them, or it cannot be told which is which.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    for file in sorted((*folder.glob("*.yaml"), *folder.glob("*.yml"))):
        try:
            document = _info_of(file.name, folder, file.name)
        except CalibrationError:
            continue
        if _is_camera_info(document):
            found.append((f"{file.stem} {document.get('camera_name', '')}".lower(), document))
    if len(found) != 2:
        raise CalibrationError(
            f"it is a folder with {len(found)} camera_info files: give a calibration file, or a folder with the "
            "camera_info of both cameras"
        )
    areas = [math.prod(camera_info(document).size) for _, document in found]
    infrared = _which_is_infrared([text for text, _ in found], areas)
    return _of_pair({"thermal": found[infrared][1], "visible": found[1 - infrared][1]}, folder)


def camera_info(document: dict[str, Any]) -> CameraModel:
    """The lens of a ROS camera_info (as camera_calibration writes it, or as `ros2 topic echo` prints it).

    Raises:
        CalibrationError: a field is missing, has the wrong size, or is of a lens that is not supported.
    """
    width, height = (_whole(document.get(key, document.get(key[6:])), key) for key in ("image_width", "image_height"))
    matrix = _array(_either(document, "camera_matrix", "K", "k"), (3, 3), "camera_matrix")
    model = document.get("distortion_model", "plumb_bob")
    values = _array(
        _either(document, "distortion_coefficients", "D", "d") or [0.0] * 5, None, "distortion_coefficients"
    )
    lens = _ROS_LENSES.get(str(model))
    if lens is None and np.any(values):
        raise CalibrationError(f"distortion_model {model!r} is not supported: calibrate with plumb_bob or equidistant")
    lens = lens or "plumb_bob"
    names = COEFFICIENTS[lens]
    distortion = np.zeros(len(names))
    if np.any(values.ravel()[distortion.size :]):
        raise CalibrationError(f"distortion_coefficients of {lens} are {', '.join(names)}, got {values.size} numbers")
    distortion[: values.size] = values.ravel()[: distortion.size]
    if not matrix[0, 0] > 0:
        raise CalibrationError("camera_matrix is empty: this camera_info is of a camera that was not calibrated")
    return CameraModel(width, height, matrix, distortion, lens)


def _is_camchain(document: dict[str, Any]) -> bool:
    return any(re.fullmatch(r"cam\d+", str(key)) and isinstance(value, dict) for key, value in document.items())


def _is_camera_info(document: dict[str, Any]) -> bool:
    return ("camera_matrix" in document or "K" in document or "k" in document) and (
        "image_width" in document or "width" in document
    )


def _is_pair(document: dict[str, Any]) -> bool:
    return {"visible", "thermal"} <= document.keys()


# --- Kalibr ---


def _of_camchain(document: dict[str, Any]) -> Rig:
    names = sorted((key for key in document if re.fullmatch(r"cam\d+", str(key))), key=lambda key: int(key[3:]))
    if len(names) != 2:
        raise CalibrationError(f"the camchain has {len(names)} cameras: leave the visible and the infrared one in it")
    first, second = (document[name] for name in names)
    if not isinstance(first, dict) or not isinstance(second, dict):
        raise CalibrationError("a camera of the camchain is no mapping: is the file complete?")
    models = [_kalibr_camera(section, name) for section, name in zip((first, second), names, strict=True)]
    infrared = _which_is_infrared([_described(first), _described(second)], [math.prod(model.size) for model in models])
    if "T_cn_cnm1" not in second and "T_cam_imu" in first and "T_cam_imu" in second:
        from_imu = [
            _pose(one["T_cam_imu"], f"{name}.T_cam_imu") for one, name in zip((first, second), names, strict=True)
        ]
        second_from_first = from_imu[1] @ _inverse(from_imu[0])
        second_from_first[3] = 0, 0, 0, 1
    else:
        # Takes a point from the camera before to this one.
        second_from_first = _pose(second.get("T_cn_cnm1"), f"{names[1]}.T_cn_cnm1")
    pose = second_from_first if infrared == 1 else _inverse(second_from_first)
    # t_imu = t_cam + shift, for each camera.
    shifts_s = [_number(one.get("timeshift_cam_imu", 0.0), "timeshift_cam_imu") for one in (first, second)]
    offset_ms = 1000 * (shifts_s[1 - infrared] - shifts_s[infrared])
    return Rig(models[1 - infrared], models[infrared], pose, _PLANE_M, time_offset_ms=offset_ms)


def _described(section: dict[str, Any]) -> str:
    return " ".join(str(section.get(key, "")) for key in ("rostopic", "label", "name")).lower()


def _which_is_infrared(described: list[str], areas_px: list[int]) -> int:
    thermal = [bool(_THERMAL.search(text)) for text in described]
    if thermal == [True, False] or thermal == [False, True]:
        return thermal.index(True)
    visible = [bool(_VISIBLE.search(text)) for text in described]
    if visible == [True, False] or visible == [False, True]:
        return visible.index(False)
    if max(areas_px) > 1.5 * min(areas_px):
        return areas_px.index(min(areas_px))  # a wrong guess is refused when the pictures come, by their sizes
    raise CalibrationError(
        "it cannot be told which camera is the infrared one: write 'thermal' into its rostopic, camera_name or file"
    )


def _kalibr_camera(section: dict[str, Any], name: str) -> CameraModel:
    model = section.get("camera_model", "pinhole")
    if model != "pinhole":
        raise CalibrationError(
            f"{name}.camera_model {model!r} is not supported: calibrate with --models pinhole-radtan or pinhole-equi"
        )
    lens = section.get("distortion_model", "radtan")
    values = _array(section.get("distortion_coeffs", [0.0] * 4), None, f"{name}.distortion_coeffs").ravel()
    if lens not in ("radtan", "equidistant", "none") and np.any(values):
        raise CalibrationError(
            f"{name}.distortion_model {lens!r} is not supported: calibrate with --models pinhole-radtan or pinhole-equi"
        )
    if values.size not in (0, 4, 5):
        raise CalibrationError(f"{name}.distortion_coeffs has {values.size} numbers: {lens} has 4")
    ours: Lens = "equidistant" if lens == "equidistant" else "plumb_bob"
    distortion = np.zeros(4 if ours == "equidistant" else 5)
    distortion[: values.size] = values[: distortion.size]
    fx, fy, cx, cy = _array(section.get("intrinsics"), (4,), f"{name}.intrinsics")
    resolution = section.get("resolution")
    if not isinstance(resolution, list) or len(resolution) != 2:
        raise CalibrationError(f"{name}.resolution is [width, height] in pixels")
    width, height = (_whole(side, f"{name}.resolution") for side in resolution)
    return CameraModel(width, height, np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]]), distortion, ours)


# --- ROS ---


def _of_pair(document: dict[str, Any], folder: Path) -> Rig:
    sections = {name: _info_of(document[name], folder, name) for name in ("visible", "thermal")}
    models = {}
    for name, section in sections.items():
        try:
            models[name] = camera_info(section)
        except CalibrationError as error:
            raise CalibrationError(f"{name}: {error}") from None
    given = document.get("T_thermal_visible")
    pose = _pose(given, "T_thermal_visible") if given is not None else _stereo_pose(sections)
    plane_m = _number(document.get("plane_distance_m", _PLANE_M), "plane_distance_m")
    return Rig(models["visible"], models["thermal"], pose, plane_m)


def _info_of(value: Any, folder: Path, name: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        raise CalibrationError(f"{name} is a camera_info, or the name of its file")
    path = folder / value
    try:
        content = path.read_bytes() if path.stat().st_size <= MAX_BYTES else b""
        document = load_yaml(content.decode("utf-8"))
    except KeyTwice as error:
        raise CalibrationError(f"{name}: {value} {error}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError):
        raise CalibrationError(f"{name}: {value} cannot be read as the camera_info file of a camera") from None
    if not isinstance(document, dict):
        raise CalibrationError(f"{name}: {value} is no camera_info: it has no keys")
    return document


def _stereo_pose(sections: dict[str, dict[str, Any]]) -> np.ndarray:
    """From rectification: x_rect = R x for each camera, and P[0, 3] = -fx * baseline of the second one."""
    rotations, shifts = {}, {}
    for name, section in sections.items():
        rotation = _either(section, "rectification_matrix", "R", "r")
        projection = _either(section, "projection_matrix", "P", "p")
        if rotation is None or projection is None:
            raise CalibrationError(_NO_POSE)
        rotations[name] = _array(rotation, (3, 3), f"{name}.rectification_matrix")
        matrix = _array(projection, (3, 4), f"{name}.projection_matrix")
        if not matrix[0, 0] > 0:
            raise CalibrationError(f"{name}.projection_matrix has no focal length: the pair was not calibrated")
        shifts[name] = np.array([matrix[0, 3] / matrix[0, 0], matrix[1, 3] / matrix[1, 1], 0.0])
    shift = shifts["thermal"] - shifts["visible"]
    if not np.any(shift):
        raise CalibrationError(_NO_POSE)
    pose = np.eye(4)
    pose[:3, :3] = rotations["thermal"].T @ rotations["visible"]
    pose[:3, 3] = rotations["thermal"].T @ shift
    return pose


_NO_POSE = (
    "the two camera_info are not of a stereo calibration, so the pose between the cameras is not known: give "
    "T_thermal_visible (4x4), or run `dspfusion calibrate solve`"
)


# --- numbers ---


def _either(document: dict[str, Any], *keys: str) -> Any:
    return next((document[key] for key in keys if document.get(key) is not None), None)


def _array(value: Any, shape: tuple[int, ...] | None, name: str) -> np.ndarray:
    """From a plain list, or ROS's {rows, cols, data}."""
    if isinstance(value, dict):
        value = value.get("data")
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise CalibrationError(f"{name} holds something that is not a number") from None
    wanted = array.size if shape is None else math.prod(shape)
    if value is None or array.size != wanted:
        raise CalibrationError(f"{name} is missing or has {array.size} numbers instead of {wanted}")
    if not np.isfinite(array).all():
        raise CalibrationError(f"{name} has values that are not finite: calibrate again")
    return array.ravel() if shape is None else array.reshape(shape)


def _pose(value: Any, name: str) -> np.ndarray:
    if value is None:
        raise CalibrationError(f"{name} is missing: it is the pose between the cameras, 4 rows of 4 numbers")
    pose = _array(value, (4, 4), name)
    # Files are written with six or so digits.
    pose[3] = np.where(np.abs(pose[3] - (0, 0, 0, 1)) < 1e-9, (0, 0, 0, 1), pose[3])
    return pose


def _inverse(pose: np.ndarray) -> np.ndarray:
    result = np.eye(4)
    result[:3, :3] = pose[:3, :3].T
    result[:3, 3] = -pose[:3, :3].T @ pose[:3, 3]
    return result


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise CalibrationError(f"{name} is a whole number of pixels")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise CalibrationError(f"{name} is a number")
    try:
        return float(value)
    except OverflowError:
        raise CalibrationError(f"{name}: the number is too large") from None
