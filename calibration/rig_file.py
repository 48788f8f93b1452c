"""Reads and writes the calibration file, YAML `dspfusion-calibration/1`. configs/calibration_example.yaml shows one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from calibration.foreign import folder_rig, foreign_rig, is_foreign
from calibration.rig import COEFFICIENTS, CalibrationError, CameraModel, Lens, Rig
from calibration.strict_yaml import KeyTwice, load_yaml
from calibration.whole_file import write_text

FORMAT = "dspfusion-calibration/1"
MAX_BYTES = 1 << 20


def load_rig(path: str | Path) -> Rig:
    """Reads a calibration file, a Kalibr camchain, or a folder with the ROS camera_info of both cameras.

    Without `extrinsics`, `reference.homography` (infrared pixel -> visible pixel) takes its place, and the cameras need
    no more than their resolution.

    Raises:
        CalibrationError: one line that says what is wrong in which file and what to do.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return folder_rig(path)
    except CalibrationError as error:
        raise CalibrationError(f"cannot read the calibration {path}: {error}") from None
    content = _content(path)
    try:
        document = _yaml_mapping(content)
        if is_foreign(document):
            return foreign_rig(document, path)
        return _rig(_checked(document))
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from None


def load_quality(path: str | Path) -> dict[str, Any]:
    """What the file says about its own error (`quality`); empty where it says nothing, or is of another program.

    Raises:
        CalibrationError: it cannot be read.
    """
    if Path(path).is_dir():
        return {}
    document = _yaml_mapping(_content(Path(path)))
    quality = document.get("quality")
    return quality if isinstance(quality, dict) else {}


def save_timing(path: str | Path, timing: dict[str, Any]) -> None:
    """Puts what has been measured about the clocks into a calibration file; all else in it stays.

    Args:
        path: a file of this program.
        timing: `offset_ms` and `drift_ppm`, and what else is known about them.

    Raises:
        CalibrationError: no such file, or one of another program or version.
    """
    rig = load_rig(path)
    try:
        if Path(path).is_dir() or is_foreign(document := _yaml_mapping(_content(Path(path)))):
            raise CalibrationError("it was written by another program: solve the rig here, or put the offset into sync")
        rig = replace(rig, time_offset_ms=timing["offset_ms"], drift_ppm=timing["drift_ppm"])
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from None
    save_rig(rig, path, {**document, "timing": timing})


def save_rig(rig: Rig, path: str | Path, extra: dict[str, Any] | None = None) -> None:
    """Writes a calibration file; the old one stays until the new one is complete.

    Args:
        rig: what to write.
        path: a .yaml file.
        extra: further keys, such as `created` and `quality`, or `cameras: {thermal: {rms_px: ...}}`; plain YAML
            values. What the rig itself says stays.
    """
    path = Path(path)
    document = _merged(_document(rig), {key: value for key, value in (extra or {}).items() if key != "format"})
    text = yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=110)
    try:
        write_text(path, text)
    except OSError as error:
        raise CalibrationError(f"cannot write the calibration {path}: {error.strerror}: choose another place") from None


def _merged(document: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    result = dict(document)
    for key, value in extra.items():
        if key not in result:
            result[key] = value
        elif isinstance(result[key], dict) and isinstance(value, dict):
            result[key] = _merged(result[key], value)
    return result


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CalibrationError(
            f"cannot read the calibration {path}: {reason}: check the path, or make one with `dspfusion calibrate`"
        ) from None
    if len(content) > MAX_BYTES:
        raise CalibrationError(f"{path} is larger than {MAX_BYTES >> 20} MiB: that is no calibration file")
    return content


def _yaml_mapping(content: bytes) -> dict[str, Any]:
    try:
        document = load_yaml(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise CalibrationError("this is not a text file in UTF-8: give a calibration in YAML") from None
    except KeyTwice as error:
        raise CalibrationError(str(error)) from None
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise CalibrationError(f"this is not YAML{line}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError):
        raise CalibrationError("this is not YAML that can be read") from None
    if not isinstance(document, dict):
        raise CalibrationError(f"a calibration file is a mapping that begins with 'format: {FORMAT}'")
    return document


def _checked(document: dict[str, Any]) -> dict[str, Any]:
    """A document of the right version."""
    version = document.get("format")
    if version != FORMAT:
        raise CalibrationError(f"the format is {_short(version)}, but this version reads '{FORMAT}': write it again")
    if document.get("residual_field") is not None:
        raise CalibrationError("residual_field is not supported by this version: remove it to use the plain geometry")
    return document


def _rig(document: dict[str, Any]) -> Rig:
    cameras = _section(document, "cameras")
    reference = _section(document, "reference", {})
    timing = _section(document, "timing", {})
    extrinsics = _section(document, "extrinsics", {})
    pose, homography = extrinsics.get("T_thermal_visible"), reference.get("homography")
    if pose is None and homography is None:
        raise CalibrationError("extrinsics.T_thermal_visible is missing (or reference.homography in its place)")
    only_homography = pose is None
    return Rig(
        visible=_camera(cameras, "visible", only_homography),
        infrared=_camera(cameras, "thermal", only_homography),
        infrared_from_visible=np.eye(4) if only_homography else _matrix(pose, 4, "extrinsics.T_thermal_visible"),
        plane_distance_m=_number(reference, "plane_distance_m", "reference", 30.0),
        time_offset_ms=_number(timing, "offset_ms", "timing", 0.0),
        drift_ppm=_number(timing, "drift_ppm", "timing", 0.0),
        homography=_matrix(homography, 3, "reference.homography") if only_homography else None,
    )


def _camera(cameras: dict[str, Any], name: str, only_homography: bool) -> CameraModel:
    where = f"cameras.{name}"
    section = _section(cameras, name, within="cameras.")
    resolution: Any = section.get("resolution")
    if not _is_list(resolution, 2) or not all(isinstance(side, int) for side in resolution):
        raise CalibrationError(f"{where}.resolution is [width, height] in pixels, got {_short(resolution)}")
    width, height = resolution
    if only_homography and "intrinsics" not in section:
        # Never used for projection then; a focal length of one picture's width is as good as any.
        matrix = np.array([[width, 0, (width - 1) / 2], [0, width, (height - 1) / 2], [0, 0, 1]])
        return CameraModel(width, height, matrix)
    model = section.get("camera_model", "pinhole")
    if model != "pinhole":
        raise CalibrationError(
            f"{where}.camera_model is 'pinhole', got {_short(model)}: other lenses are not supported"
        )
    intrinsics: Any = section.get("intrinsics")
    if not _is_list(intrinsics, 4):
        raise CalibrationError(f"{where}.intrinsics is [fx, fy, cx, cy] in pixels, got {_short(intrinsics)}")
    fx, fy, cx, cy = intrinsics
    distortion_model = section.get("distortion_model", "plumb_bob")
    if distortion_model not in (*COEFFICIENTS, "none"):
        known = ", ".join((*COEFFICIENTS, "none"))
        raise CalibrationError(f"{where}.distortion_model is one of {known}, got {_short(distortion_model)}")
    lens: Lens = "plumb_bob" if distortion_model == "none" else distortion_model
    names = COEFFICIENTS[lens]
    count = len(names)
    distortion = section.get("distortion_coeffs") or [0.0] * count
    if not (_is_list(distortion, count) or (lens == "plumb_bob" and _is_list(distortion, 4))):
        raise CalibrationError(f"{where}.distortion_coeffs is [{', '.join(names)}], got {_short(distortion)}")
    try:
        matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], float)
        return CameraModel(width, height, matrix, np.array(distortion), lens)
    except CalibrationError as error:
        raise CalibrationError(f"{where}: {error}") from None
    except (OverflowError, ValueError):
        raise CalibrationError(f"{where}: a number is too large") from None


def _document(rig: Rig) -> dict[str, Any]:
    document: dict[str, Any] = {
        "format": FORMAT,
        "cameras": {"visible": _camera_document(rig.visible), "thermal": _camera_document(rig.infrared)},
    }
    reference: dict[str, Any] = {"plane_distance_m": float(rig.plane_distance_m)}
    if rig.homography is None:
        pose = rig.infrared_from_visible
        document["extrinsics"] = {"T_thermal_visible": pose.tolist(), "baseline_m": round(rig.baseline_m, 6)}
    else:
        reference["homography"] = rig.homography.tolist()
    document["reference"] = reference
    document["timing"] = {"offset_ms": float(rig.time_offset_ms)}
    if rig.drift_ppm:  # optional: files without it stay as they are
        document["timing"]["drift_ppm"] = float(rig.drift_ppm)
    return document


def _camera_document(camera: CameraModel) -> dict[str, Any]:
    if camera.matrix[0, 1]:
        raise CalibrationError("the calibration file has no place for a skewed camera matrix")
    matrix = camera.matrix
    return {
        "resolution": [camera.width, camera.height],
        "camera_model": "pinhole",
        "intrinsics": [float(value) for value in (matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2])],
        "distortion_model": camera.lens,
        "distortion_coeffs": camera.distortion.tolist(),
    }


def _section(document: dict[str, Any], key: str, default: Any = None, within: str = "") -> dict[str, Any]:
    value = document.get(key)
    value = default if value is None else value
    if value is None:
        raise CalibrationError(f"{within}{key} is missing")
    if not isinstance(value, dict):
        raise CalibrationError(f"{within}{key} is a mapping, got {_short(value)}")
    return value


def _matrix(value: Any, size: int, name: str) -> np.ndarray:
    if not isinstance(value, list) or len(value) != size or not all(_is_list(row, size) for row in value):
        raise CalibrationError(f"{name} is a list of {size} rows with {size} numbers each, got {_short(value)}")
    try:
        return np.array(value, dtype=np.float64)
    except OverflowError:
        raise CalibrationError(f"{name}: a number is too large") from None


def _number(section: dict[str, Any], key: str, within: str, default: float) -> float:
    value = section.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise CalibrationError(f"{within}.{key} is a number, got {_short(value)}")
    try:
        return float(value)
    except OverflowError:
        raise CalibrationError(f"{within}.{key}: the number is too large") from None


def _is_list(value: Any, length: int) -> bool:
    """Whether this is a list of so many plain numbers."""
    return (
        isinstance(value, list)
        and len(value) == length
        and all(isinstance(item, int | float) and not isinstance(item, bool) for item in value)
    )


def _short(value: Any) -> str:
    """Shows a wrong value without flooding the line."""
    if isinstance(value, dict | list):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
