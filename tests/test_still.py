"""Stills are fused under the same checks as recordings."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.errors import SourceError
from pipeline.still import fuse_stills, list_pairs, read_pair
from tests.rigs.engines import MaximumEngine


def grey(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    return cv2.GaussianBlur(np.random.default_rng(seed).integers(0, 255, (height, width), np.uint8), (0, 0), 2)


def palette(seed: int = 0) -> np.ndarray:
    """Temperature in false colours."""
    return cv2.applyColorMap(cv2.normalize(grey(seed=seed), None, 0, 255, cv2.NORM_MINMAX), cv2.COLORMAP_INFERNO)


def scene(height: int = 48, width: int = 64) -> np.ndarray:
    return np.dstack([grey(height, width, seed) for seed in (1, 2, 3)])


def saved(path: Path, picture: np.ndarray) -> Path:
    path.parent.mkdir(exist_ok=True)
    assert cv2.imwrite(str(path), picture)
    return path


def fused(infrared: Path, visible: Path, output: Path, calibration: str | None = None) -> list[str]:
    """What is said of the pictures that are fused."""
    said: list[str] = []
    fuse_stills(MaximumEngine(), list_pairs(infrared, visible, output), calibration, on_doubt=said.append)
    return said


def test_two_pictures_about_which_nothing_is_strange(tmp_path: Path, caplog):
    infrared, visible = saved(tmp_path / "ir.png", grey()), saved(tmp_path / "vis.png", scene())
    assert fused(infrared, visible, tmp_path / "out.png") == []
    assert not caplog.records
    assert cv2.imread(str(tmp_path / "out.png")).shape == (48, 64, 3)


@pytest.mark.parametrize("other", ["same", "symbolic link", "hard link"])
def test_one_picture_is_not_what_both_cameras_saw(tmp_path: Path, other: str):
    infrared = saved(tmp_path / "ir.png", grey())
    visible = infrared if other == "same" else tmp_path / "vis.png"
    if other == "symbolic link":
        visible.symlink_to(infrared)
    elif other == "hard link":
        visible.hardlink_to(infrared)
    with pytest.raises(SourceError, match=r"infrared and visible are the same, .*: give each camera its own"):
        fused(infrared, visible, tmp_path / "out.png")
    with pytest.raises(SourceError, match="infrared and visible are the same"):
        read_pair(infrared, visible)
    assert not (tmp_path / "out.png").exists()


def test_one_folder_is_not_what_both_cameras_saw(tmp_path: Path):
    saved(tmp_path / "both" / "a.png", grey())
    saved(tmp_path / "both" / "b.png", grey())
    with pytest.raises(SourceError, match="infrared and visible are the same"):
        fused(tmp_path / "both", tmp_path / "both", tmp_path / "out")


@pytest.mark.parametrize("small", ["ir", "vis"])
def test_a_picture_that_is_too_small_is_one_line(tmp_path: Path, small: str):
    size = {"ir": (48, 64), "vis": (48, 64)} | {small: (1, 1)}
    infrared, visible = (
        saved(tmp_path / "ir.png", grey(*size["ir"])),
        saved(tmp_path / "vis.png", scene(*size["vis"])),
    )
    with pytest.raises(SourceError, match=rf"{small}\.png is 1x1: give pictures of at least 32 pixels a side"):
        fused(infrared, visible, tmp_path / "out.png")


def test_a_small_picture_in_the_middle_of_a_folder_is_one_line(tmp_path: Path):
    for number in range(12):
        saved(tmp_path / "ir" / f"{number:02}.png", grey(*((9, 9) if number == 4 else (48, 64))))
        saved(tmp_path / "vis" / f"{number:02}.png", scene())
    with pytest.raises(SourceError, match=r"04\.png is 9x9: give pictures of at least 32 pixels a side"):
        fused(tmp_path / "ir", tmp_path / "vis", tmp_path / "out")


def test_infrared_in_false_colours_is_told_once_for_a_whole_folder(tmp_path: Path, caplog):
    for name in ("a", "b", "c"):
        saved(tmp_path / "ir" / f"{name}.png", palette())
        saved(tmp_path / "vis" / f"{name}.png", scene())
    (line,) = fused(tmp_path / "ir", tmp_path / "vis", tmp_path / "out")
    assert line.startswith("the infrared recording ir is in colour, of which only the brightness is used")
    assert [record.getMessage() for record in caplog.records] == [line]


def test_a_turned_picture_is_told_of_unless_a_calibration_brings_it_into_place(tmp_path: Path):
    infrared, visible = saved(tmp_path / "ir.png", grey(64, 48)), saved(tmp_path / "vis.png", scene(48, 64))
    (line,) = fused(infrared, visible, tmp_path / "out.png")
    assert line.startswith("the infrared recording ir.png of 48x64 is stretched to the shape of the visible one, 64x48")
    calibration = tmp_path / "rig.yaml"
    calibration.write_text(
        "format: dspfusion-calibration/1\n"
        "cameras: {visible: {resolution: [64, 48]}, thermal: {resolution: [48, 64]}}\n"
        "reference: {homography: [[0, -1, 63], [1, 0, 0], [0, 0, 1]]}\n"
    )
    assert fused(infrared, visible, tmp_path / "out.png", str(calibration)) == []


@pytest.mark.parametrize(("width", "told"), [(640, False), (600, False), (480, True), (853, True)])
def test_shapes_that_differ_as_those_of_usual_cameras_do_are_not_told_of(tmp_path: Path, width: int, told: bool):
    """640x512 beside 640x480 is no more off than the mount."""
    infrared, visible = saved(tmp_path / "ir.png", grey(480, 640)), saved(tmp_path / "vis.png", scene(480, width))
    assert bool(fused(infrared, visible, tmp_path / "out.png")) == told


@pytest.mark.parametrize("camera", ["ir", "vis"])
@pytest.mark.parametrize("samples", [np.float32, np.float64, np.int32])
def test_a_radiometric_picture_is_told_by_its_samples(tmp_path: Path, camera: str, samples: type):
    pictures = {"ir": grey(), "vis": grey(seed=1)}
    pictures[camera] = pictures[camera].astype(samples) + 273
    infrared, visible = (saved(tmp_path / f"{name}.tif", picture) for name, picture in pictures.items())
    said = rf"{camera}\.tif has samples of {np.dtype(samples)}: save it with 8 or 16 bits a sample"
    with pytest.raises(SourceError, match=said):
        fused(infrared, visible, tmp_path / "out.png")
