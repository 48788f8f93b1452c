"""What is found out about recordings before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.config import load_config
from pipeline.errors import ConfigError, SourceError
from pipeline.recording import check_recordings, inputs_of, probe, refuse_overwriting, refuse_unlikely
from tests.rigs.command import call
from tests.rigs.engines import MaximumEngine
from tests.rigs.recordings import write_video


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_video(tmp_path / "ir.mkv", colour=False)
    write_video(tmp_path / "vis.mkv")
    (tmp_path / "irs").mkdir()
    for name in "ab":
        cv2.imwrite(str(tmp_path / "irs" / f"{name}.png"), np.full((64, 96), 90, np.uint8))
    return tmp_path


def rig(folder: Path, infrared: str, more: str = ""):
    path = folder / "rig.yaml"
    path.write_text(f"infrared: {infrared}\nvisible: {{kind: stream, url: vis.mkv}}\n{more}")
    return load_config(path)


def test_a_rig_of_recordings_that_fit_is_taken(folder: Path):
    assert check_recordings(rig(folder, "{kind: stream, url: ir.mkv}")) == []
    assert check_recordings(rig(folder, "{kind: folder, path: irs}")) == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{kind: stream, url: irs}", "infrared: .*irs is a folder: write kind: folder, and path: in place of url:"),
        ("{kind: stream, url: .}", "infrared: .* is a folder: write kind: folder"),
        (
            "{kind: folder, path: ir.mkv}",
            r"infrared: .*ir\.mkv is a file: write kind: stream, and url: in place of path",
        ),
    ],
)
def test_a_source_of_another_kind_than_its_path_is_refused(folder: Path, source: str, said: str):
    with pytest.raises(ConfigError, match=said):
        check_recordings(rig(folder, source))


@pytest.mark.parametrize("name", ["vis.mkv", "link.mkv", "irs"])
def test_one_recording_is_not_what_both_cameras_saw(folder: Path, name: str):
    (folder / "link.mkv").symlink_to(folder / "vis.mkv")
    visible = "irs" if name == "irs" else "vis.mkv"
    with pytest.raises(SourceError, match=r"infrared and visible are the same, .*: give each camera its own"):
        refuse_unlikely(probe(folder / name), probe(folder / visible))


@pytest.mark.parametrize(
    ("command", "inputs"),
    [
        ("replay", ("vis.mkv", "irs")),
        ("fuse", ("irs", "irs/a.png")),
        ("calibrate check", ("vis.mkv", "irs", "irs/a.png")),
        ("calibrate time", ("vis.mkv", "irs")),
        ("calibrate selfcal", ("vis.mkv", "irs", "irs/a.png")),
        ("calibrate detect", ("vis.mkv", "irs", "irs/a.png", "counts.png")),
    ],
)
def test_no_command_takes_one_recording_for_both_cameras(folder: Path, monkeypatch, capsys, command: str, inputs):
    monkeypatch.setattr("pipeline.live.engine_for", lambda _: MaximumEngine())
    monkeypatch.chdir(folder)
    (folder / "out").mkdir()
    cv2.imwrite("counts.png", np.full((96, 96), 3000, np.uint16))
    more = {"fuse": ["out"], "calibrate detect": ["--size", "9x6"]}.get(command, [])
    for given in inputs:
        status, _, err = call(monkeypatch, capsys, *command.split(), given, given, *more)
        assert status == 2
        assert f"infrared and visible are the same, {given}: give each camera its own" in err


def test_what_is_strange_about_stills_is_in_the_result_of_fuse(folder: Path, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.live.engine_for", lambda _: MaximumEngine())
    monkeypatch.chdir(folder)
    cv2.imwrite("turned.png", np.zeros((96, 64), np.uint8))
    cv2.imwrite("street.png", np.zeros((64, 96, 3), np.uint8))
    status, out, _ = call(monkeypatch, capsys, "fuse", "turned.png", "street.png", "fused.png", "--json", "-")
    assert status == 0
    (line,) = json.loads(out)["fallbacks"]
    assert "turned.png of 64x96 is stretched to the shape of the visible one, 96x64" in line


def test_a_rig_without_a_calibration_is_told_of_a_picture_of_another_shape(folder: Path):
    write_video(folder / "turned.mkv", size=(64, 96), colour=False)
    (line,) = check_recordings(rig(folder, "{kind: stream, url: turned.mkv}"))
    assert "turned.mkv of 64x96 is stretched to the shape of the visible one, 96x64: calibrate the cameras" in line


def test_nothing_that_a_rig_reads_is_replaced_by_what_it_writes(folder: Path):
    (folder / "keys").mkdir()
    for name in ("w.safetensors", "c.yaml", "secret.key", "keys/guest.key"):
        (folder / name).touch()
    config = rig(
        folder,
        "{kind: folder, path: irs}",
        "registration: {calibration: c.yaml}\nengine: {weights: w.safetensors}\n"
        "publish: {curve_secret_key_file: secret.key, authorized_keys_dir: keys}\n",
    )
    inputs = inputs_of(config)
    assert set(inputs) == {
        str(folder / name) for name in ("irs", "vis.mkv", "c.yaml", "w.safetensors", "secret.key", "keys")
    }
    for output in ("irs/b.png", "vis.mkv", "c.yaml", "w.safetensors", "secret.key", "keys/report.json"):
        with pytest.raises(ConfigError, match="choose another place"):
            refuse_overwriting(folder / output, *inputs)
    refuse_overwriting(folder / "fused.mp4", *inputs)
