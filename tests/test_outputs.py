"""What a command writes destroys nothing: no input, no other result, and no recording of an earlier drive."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline import cli
from pipeline.config import load_config
from pipeline.record import BackgroundVideo
from pipeline.telemetry import check_targets, write_report
from tests.rigs.command import call
from tests.rigs.engines import MaximumEngine
from tests.rigs.recordings import write_video

RIG = """
rig: test
infrared: {kind: stream, url: ir.mkv}
visible: {kind: stream, url: vis.mkv}
publish: {endpoint: "tcp://127.0.0.1:*"}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of somebody who has one of everything: pictures, recordings, a rig, a calibration, a key."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(1)
    for camera, shape in (("ir", (120, 160)), ("vis", (120, 160, 3))):
        Path(f"{camera}s").mkdir()
        for place in (f"{camera}s/a.png", f"{camera}s/b.png", f"{camera}.png"):
            cv2.imwrite(place, random.integers(0, 255, shape, np.uint8))
    write_video(tmp_path / "ir.mkv", colour=False)
    write_video(tmp_path / "vis.mkv")
    Path("rig.yaml").write_text(RIG)
    Path("train.yaml").write_text("data: pairs\noutput: trained\n")
    for name in ("calibration.yaml", "seen.json", "guest.key"):
        Path(name).write_text(f"the content of {name}")
    return tmp_path


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for work in (
        "engines.selection.create_engine",
        "engines.training.train.train",
        "pipeline.board_views.pair_up",
        "pipeline.client.subscribe",
        "pipeline.commands.evaluate.engine_of",
        "pipeline.live.engine_for",
        "pipeline.recording.probe",
        "calibration.rig_file.load_rig",
        "calibration.views.load_detections",
    ):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("the work was begun"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def refusal_of(command: str, folder: Path, monkeypatch, capsys) -> str:
    """What a command says that is refused, and that leaves everything as it was."""
    before = contents(folder)
    status, _, err = call(monkeypatch, capsys, *command.split())
    assert status == 2
    assert contents(folder) == before
    return err


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    "command",
    [
        "fuse ir.png vis.png z.png --json vis.png",
        "fuse irs viss out --json viss/b.png",
        "fuse irs viss viss",
        "replay ir.mkv vis.mkv --report vis.mkv",
        "run rig.yaml --report rig.yaml",
        "run rig.yaml --report ir.mkv",
        "build-engine rig.yaml --json rig.yaml",
        "build-engine --pair ir.png vis.png --json ir.png",
        "subscribe tcp://127.0.0.1:9 --server-key guest.key --json guest.key",
        "train train.yaml --json train.yaml",
        "evaluate --infrared irs --visible viss --json irs/x.png",
        "evaluate --infrared irs --visible viss --markdown viss/x.png",
        "evaluate --infrared irs --visible viss --sheets irs",
        "calibrate check irs viss --pictures irs",
        "calibrate check irs viss --pictures irs/../viss",
        "calibrate check ir.png vis.png --pictures .",
        "calibrate check ir.png vis.png --json ir.png",
        "calibrate check irs viss --calibration calibration.yaml --json calibration.yaml",
        "calibrate detect ir.png vis.png --size 9x6 -o ir.png",
        "calibrate detect irs viss --size 9x6 --json irs/a.png",
        "calibrate selfcal irs viss -o viss/a.png",
        "calibrate selfcal ir.mkv vis.mkv --json vis.mkv",
        "calibrate time ir.mkv vis.mkv --json ir.mkv",
        "calibrate time ir.mkv vis.mkv --into calibration.yaml --json calibration.yaml",
        "calibrate solve seen.json -o seen.json",
        "calibrate solve seen.json --report seen.json",
        "calibrate solve seen.json --json ./seen.json",
        "calibrate report calibration.yaml seen.json -o calibration.yaml",
        "calibrate report calibration.yaml seen.json -o seen.json",
        "calibrate report calibration.yaml seen.json --json calibration.yaml",
    ],
)
def test_no_result_replaces_an_input(folder: Path, command: str, monkeypatch, capsys):
    err = refusal_of(command, folder, monkeypatch, capsys)
    assert "would replace or mix with the input" in err
    assert len(err.splitlines()) == 1


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    "command",
    [
        "fuse ir.png vis.png z.png --json z.png",
        "fuse irs viss out --json out/a.png",
        "replay ir.mkv vis.mkv --output z.mp4 --report z.mp4",
        "train train.yaml --json trained/nano.safetensors",
        "evaluate --infrared irs --visible viss --json z --markdown ./z",
        "calibrate check irs viss --pictures drawn --json drawn/sheet.png",
        "calibrate detect irs viss --size 9x6 -o z --json z",
        "calibrate selfcal irs viss -o z --json z",
        "calibrate solve seen.json -o z --report z",
        "calibrate solve seen.json --report z --json z",
        "calibrate report calibration.yaml seen.json -o z --json z",
    ],
)
def test_no_result_replaces_another_one(folder: Path, command: str, monkeypatch, capsys):
    assert "is named for two results: give each its own file" in refusal_of(command, folder, monkeypatch, capsys)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", [["run"], ["config", "check"]])
@pytest.mark.parametrize(
    "output", ["report: rig.yaml", "report: weights.safetensors", "report: guests/a.key", "video: ir.mkv"]
)
def test_a_rig_does_not_write_over_what_it_reads(folder: Path, command, output: str, monkeypatch, capsys):
    (folder / "guests").mkdir()
    (folder / "guests" / "a.key").write_text("a key")
    (folder / "weights.safetensors").write_text("weights")
    keys = "curve_secret_key_file: guest.key, authorized_keys_dir: guests"
    more = f"engine: {{weights: weights.safetensors}}\noutput: {{{output}}}\n"
    (folder / "rig.yaml").write_text(RIG.replace(':*"', f':*", {keys}') + more)
    for check in ("check_keys", "check_weights"):  # which would refuse these first
        monkeypatch.setattr(cli, check, lambda _: None)
    before = contents(folder)
    status, _, err = call(monkeypatch, capsys, *command, "rig.yaml")
    assert status == 2
    assert f"{output.split()[1]} would replace or mix with the input" in err
    assert contents(folder) == before


@pytest.mark.usefixtures("no_work", "folder")
def test_train_refuses_a_folder_for_its_report_before_it_trains(monkeypatch, capsys):
    status, _, err = call(monkeypatch, capsys, "train", "train.yaml", "--json", "irs")
    assert status == 2
    assert "cannot write the report irs: it is a folder" in err


def test_the_terminal_and_a_device_take_several_results():
    check_targets("-", "-", inputs=("-",))
    check_targets(os.devnull, os.devnull)


def test_pictures_of_a_check_appear_whole_or_not_at_all(folder: Path, monkeypatch, capsys):
    """A disk that is full after the first picture's first bytes."""
    (folder / "drawn").mkdir()
    (folder / "drawn" / "vis.png").write_bytes(b"the picture of an earlier check")

    def cut_off(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", cut_off)
    status, _, err = call(monkeypatch, capsys, "calibrate", "check", "ir.png", "vis.png", "--pictures", "drawn")
    assert status == 2
    assert "cannot write drawn/vis.png: No space left on device" in err
    assert contents(folder / "drawn") == {folder / "drawn" / "vis.png": b"the picture of an earlier check"}


# --- detections ---

DETECT = ("calibrate", "detect", "irs", "viss", "--size", "9x6")


def test_a_search_that_finds_no_board_leaves_earlier_detections_as_they_were(folder: Path, monkeypatch, capsys):
    (folder / "detections.json").write_text("good views")
    status, out, err = call(monkeypatch, capsys, *DETECT, "--json", "-")
    assert status == 2
    assert "no view shows the board to both cameras" in err
    assert (folder / "detections.json").read_text() == "good views"
    assert json.loads(out)["saved"] is False
    _, _, err = call(monkeypatch, capsys, *DETECT)
    assert "detections.json stays as it was" in err


def test_a_search_that_finds_no_board_says_why_in_a_file_where_there_is_none(folder: Path, monkeypatch, capsys):
    status, out, _ = call(monkeypatch, capsys, *DETECT, "--json", "-")
    assert status == 2
    assert json.loads(out)["saved"] is True
    assert len(json.loads((folder / "detections.json").read_text())["views"]) == 2


# --- what an earlier run left ---


def record(path: Path, level: int) -> bytes:
    video = BackgroundVideo(path, 25.0)
    for index in range(3):
        video.write(np.full((48, 64, 3), level, np.uint8), index * 40_000_000)
    video.close()
    assert video.failure is None
    return path.read_bytes()


def test_the_recordings_of_earlier_drives_are_kept_and_that_is_logged(tmp_path: Path, caplog):
    path = tmp_path / "fused.mp4"
    drives = [record(path, level) for level in (10, 120, 240)]
    kept = [(tmp_path / f"fused.{name}.mp4").read_bytes() for name in ("previous", "previous2")]
    assert [*kept, path.read_bytes()] == drives
    logged = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert logged == [
        f"{path} was there already: it is kept as fused.previous.mp4",
        f"{path} was there already: it is kept as fused.previous2.mp4",
    ]


def test_a_drive_without_a_frame_leaves_the_recording_before_in_its_place(tmp_path: Path):
    before = record(tmp_path / "fused.mp4", 10)
    BackgroundVideo(tmp_path / "fused.mp4", 25.0).close()
    assert contents(tmp_path) == {tmp_path / "fused.mp4": before}


def test_a_link_goes_on_pointing_to_its_place_when_its_report_is_kept(tmp_path: Path):
    """And an empty file, as mktemp makes it, is nothing to keep."""
    (tmp_path / "day").mkdir()
    (tmp_path / "day" / "report.json").touch()
    (tmp_path / "report.json").symlink_to(tmp_path / "day" / "report.json")
    for fused in (1, 2):
        write_report({"fused": fused}, str(tmp_path / "report.json"), keep_earlier=True)
    assert (tmp_path / "report.json").is_symlink()
    assert json.loads((tmp_path / "report.json").read_text()) == {"fused": 2}
    assert json.loads((tmp_path / "day" / "report.previous.json").read_text()) == {"fused": 1}
    assert len(list((tmp_path / "day").iterdir())) == 2


@pytest.fixture
def recording_rig(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("pipeline.live.engine_for", lambda _: MaximumEngine())
    (folder / "rig.yaml").write_text(RIG + "output: {video: out/fused.mp4, report: out/report.json}\n")
    (folder / "out").mkdir()
    return folder / "out"


def test_a_rig_that_starts_again_keeps_what_the_drive_before_recorded(recording_rig: Path, monkeypatch, capsys):
    assert call(monkeypatch, capsys, "run", "rig.yaml")[0] == 0
    before = contents(recording_rig)
    # One report, though it is asked for twice.
    assert call(monkeypatch, capsys, "run", "rig.yaml", "--report", "out/report.json")[0] == 0
    names = ["fused.mp4", "fused.previous.mp4", "report.json", "report.previous.json"]
    assert sorted(path.name for path in recording_rig.iterdir()) == names
    for name in ("fused.mp4", "report.json"):
        kept = recording_rig / name.replace(".", ".previous.")
        assert kept.read_bytes() == before[recording_rig / name]


def test_the_demo_replaces_its_own_video_and_report(recording_rig: Path, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.demo.demo_config", lambda *_: load_config(Path("rig.yaml")))
    for _ in range(2):
        assert call(monkeypatch, capsys, "demo")[0] == 0
    assert sorted(path.name for path in recording_rig.iterdir()) == ["fused.mp4", "report.json"]


# --- config check ---


def test_config_check_refuses_recordings_that_are_there_as_run_does(folder: Path, monkeypatch, capsys):
    (folder / "empty.mkv").touch()
    (folder / "none").mkdir()
    for infrared, visible, said in (
        ("{kind: stream, url: empty.mkv}", "{kind: stream, url: vis.mkv}", "empty.mkv cannot be read as a video"),
        ("{kind: stream, url: vis.mkv}", "{kind: stream, url: ir.mkv}", "look swapped"),
        ("{kind: folder, path: none}", "{kind: folder, path: viss}", "none has no frames"),
        ("{kind: folder, path: irs}", "{kind: device, path: /dev/video99}", None),
        ("{kind: stream, url: absent.mkv}", "{kind: stream, url: empty.mkv}", None),
    ):
        (folder / "rig.yaml").write_text(f"infrared: {infrared}\nvisible: {visible}\n")
        status, _, err = call(monkeypatch, capsys, "config", "check", "rig.yaml")
        assert status == (2 if said else 0), err
        assert (said or "is valid") in " ".join(err.split())
