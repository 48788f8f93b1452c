"""Calibration without a board, from ordinary scenes."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from calibration.residual import displacement_px
from calibration.rig import CalibrationError
from calibration.rig_file import load_rig
from calibration.selfcal import align
from pipeline.cli import app


def scene(seed: int) -> dict[str, np.ndarray]:
    """Blocks that both cameras see, of unrelated brightness in each; the infrared picture is half as large."""
    random = np.random.default_rng(seed)
    visible, infrared = np.full((240, 320), 90, np.uint8), np.full((240, 320), 60, np.uint8)
    for _ in range(28):
        x, y, w, h = random.integers(0, 300), random.integers(0, 220), random.integers(15, 70), random.integers(15, 70)
        for image in (visible, infrared):
            cv2.rectangle(image, (int(x), int(y)), (int(x + w), int(y + h)), int(random.integers(20, 230)), -1)
    noisy = [
        np.clip(image + random.normal(0, 3, image.shape), 0, 255).astype(np.uint8) for image in (visible, infrared)
    ]
    return {"visible": np.repeat(noisy[0][..., None], 3, axis=2), "infrared": noisy[1]}


# infrared pixel -> visible pixel
TRUTH = np.array([[1.72, -0.02, 12.0], [0.02, 1.72, -9.0], [0, 0, 1.0]])


def as_felt(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The picture of an infrared camera of another size and place."""
    return cv2.warpPerspective(picture, np.linalg.inv(TRUTH), size, flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT)


def test_scale_shift_and_roll_are_found_in_ordinary_scenes():
    scenes = []
    for seed in range(6):
        one = scene(seed)
        counts = as_felt(cv2.GaussianBlur(one["infrared"], (0, 0), 1.0), (176, 144)).astype(np.uint16) * 9 + 7000
        scenes.append({"visible": one["visible"], "infrared": counts})
    result = align(scenes)
    assert displacement_px(result.rig.homography @ np.linalg.inv(TRUTH), (320, 240)) < 1.5
    assert result.sigma_px < 3
    assert 0 < result.confidence < 1
    assert result.scale == pytest.approx(1.72, rel=0.02)
    assert any("no lens" in line for line in result.warnings)


def test_scenes_with_nothing_in_common_are_refused():
    random = np.random.default_rng(0)
    blank = [
        {"visible": scene(seed)["visible"], "infrared": random.integers(90, 110, (120, 160), np.uint8)}
        for seed in range(4)
    ]
    with pytest.raises(CalibrationError, match="different scenes"):
        align(blank)
    with pytest.raises(CalibrationError, match="2 of 2 scenes"):
        align([scene(0), scene(1)])


@pytest.mark.realdata
def test_real_pairs_that_are_aligned_come_out_aligned(data_dir, tmp_path):
    for camera, folder in (("ir", "ir"), ("vi", "vi")):
        (tmp_path / camera).mkdir()
        for file in sorted((data_dir / "eval" / "msrs" / folder).iterdir())[::5]:
            (tmp_path / camera / file.name).write_bytes(file.read_bytes())
    result = CliRunner().invoke(
        app, ["calibrate", "selfcal", str(tmp_path / "ir"), str(tmp_path / "vi"), "-o", str(tmp_path / "rig.yaml"),
              "--json", str(tmp_path / "said.json")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    said = json.loads((tmp_path / "said.json").read_text())
    homography = load_rig(tmp_path / "rig.yaml").homography
    # These pairs are off by 2.7 px on average themselves.
    assert displacement_px(homography, (640, 480)) < 4.5
    assert said["confidence"] > 0.3
