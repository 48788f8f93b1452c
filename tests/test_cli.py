"""The command line: what it promises, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline import cli
from tests.rigs.engines import MaximumEngine
from tests.rigs.recordings import write_video

SYNTHETIC_RIG = """
version: 1
rig: test
infrared: {kind: synthetic, width: 160, height: 128}
visible: {kind: synthetic, width: 160, height: 120}
publish: {endpoint: "tcp://127.0.0.1:*"}
"""


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    """Runs `dspfusion ARGUMENTS` in this process: (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["dspfusion", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.live.engine_for", lambda _: MaximumEngine())
    monkeypatch.setattr("pipeline.replay.engine_for", lambda _: MaximumEngine())


def assert_one_clear_line(status: int, err: str, *parts: str) -> None:
    assert status == 2
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("dspfusion: error: ")
    for part in parts:
        assert part in lines[0]


@pytest.mark.usefixtures("stand_in")
def test_replay_writes_video_and_report(tmp_path: Path, monkeypatch, capsys):
    infrared = write_video(tmp_path / "ir.mkv", colour=False)
    visible = write_video(tmp_path / "vis.mkv")
    output = tmp_path / "fused.mp4"
    status, out, _ = call(
        monkeypatch, capsys, "replay", str(infrared), str(visible), "--output", str(output), "--report", "-"
    )
    assert status == 0
    assert json.loads(out)["fused"] == 12
    assert output.is_file()


@pytest.mark.usefixtures("stand_in")
def test_fuse_takes_two_images_or_two_folders(tmp_path: Path, monkeypatch, capsys):
    import cv2

    for folder in ("ir", "vis"):
        (tmp_path / folder).mkdir()
        for name in ("a", "b"):
            cv2.imwrite(str(tmp_path / folder / f"{name}.png"), np.full((40, 60, 3), 90, np.uint8))
    assert (
        call(
            monkeypatch,
            capsys,
            "fuse",
            str(tmp_path / "ir/a.png"),
            str(tmp_path / "vis/a.png"),
            str(tmp_path / "one.png"),
        )[0]
        == 0
    )
    assert cv2.imread(str(tmp_path / "one.png")).shape == (40, 60, 3)
    status, out, _ = call(
        monkeypatch, capsys, "fuse", str(tmp_path / "ir"), str(tmp_path / "vis"), str(tmp_path / "all"), "--json", "-"
    )
    assert status == 0
    assert [Path(row["output"]).name for row in json.loads(out)["rows"]] == ["a.png", "b.png"]


@pytest.mark.usefixtures("stand_in")
def test_folders_with_unmatched_names_are_refused_and_nothing_is_written(tmp_path: Path, monkeypatch, capsys):
    import cv2

    for folder, names in (("ir", "ab"), ("vis", "ac")):
        (tmp_path / folder).mkdir()
        for name in names:
            cv2.imwrite(str(tmp_path / folder / f"{name}.png"), np.zeros((8, 8, 3), np.uint8))
    status, _, err = call(
        monkeypatch, capsys, "fuse", str(tmp_path / "ir"), str(tmp_path / "vis"), str(tmp_path / "out")
    )
    assert_one_clear_line(status, err, "2 of the names have no partner", "first: b")
    assert not (tmp_path / "out").exists()


def test_a_missing_recording_is_one_line(tmp_path: Path, monkeypatch, capsys):
    status, _, err = call(monkeypatch, capsys, "replay", str(tmp_path / "ir.mkv"), str(tmp_path / "vis.mkv"))
    assert_one_clear_line(status, err, "ir.mkv does not exist")


def test_an_unknown_key_is_one_line(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "rig.yaml").write_text(SYNTHETIC_RIG + "speed: 3\n")
    for arguments in (["config", "check"], ["run"]):
        status, _, err = call(monkeypatch, capsys, *arguments, str(tmp_path / "rig.yaml"))
        assert_one_clear_line(status, err, "speed: unknown key")


@pytest.mark.usefixtures("stand_in")
def test_a_wrong_url_scheme_is_one_line_without_the_password(tmp_path: Path, monkeypatch, capsys):
    text = SYNTHETIC_RIG.replace(
        "{kind: synthetic, width: 160, height: 128}", '{kind: stream, url: "ftp://u:canary@h/ir"}'
    )
    (tmp_path / "rig.yaml").write_text(text)
    status, out, err = call(monkeypatch, capsys, "run", str(tmp_path / "rig.yaml"), "--duration", "1")
    assert_one_clear_line(status, err, "ftp")
    assert "canary" not in out + err


@pytest.mark.usefixtures("stand_in")
def test_a_port_in_use_is_one_line(tmp_path: Path, monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        (tmp_path / "rig.yaml").write_text(SYNTHETIC_RIG.replace("tcp://127.0.0.1:*", endpoint))
        status, _, err = call(monkeypatch, capsys, "run", str(tmp_path / "rig.yaml"), "--duration", "1")
    assert_one_clear_line(status, err, endpoint)


@pytest.mark.usefixtures("stand_in")
def test_a_public_endpoint_without_keys_is_refused(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "rig.yaml").write_text(SYNTHETIC_RIG.replace("127.0.0.1:*", "0.0.0.0:5599"))
    status, _, err = call(monkeypatch, capsys, "run", str(tmp_path / "rig.yaml"), "--duration", "1")
    assert_one_clear_line(status, err, "0.0.0.0")


@pytest.mark.usefixtures("stand_in")
def test_a_calibration_for_another_resolution_is_one_line(tmp_path: Path, monkeypatch, capsys):
    from calibration.rig_file import save_rig
    from pipeline.config import SyntheticSource
    from pipeline.sources.synthetic import true_rig

    save_rig(true_rig(SyntheticSource(), SyntheticSource()), tmp_path / "rig_calibration.yaml")
    (tmp_path / "rig.yaml").write_text(SYNTHETIC_RIG + "registration: {calibration: rig_calibration.yaml}\n")
    status, _, err = call(monkeypatch, capsys, "run", str(tmp_path / "rig.yaml"), "--duration", "3")
    assert_one_clear_line(status, err.strip().splitlines()[-1], "640x480", "160x1")


@pytest.mark.parametrize("rate", ["fast", "0", "-3", "nan"])
def test_a_rate_is_a_number_or_max(rate: str, monkeypatch, capsys):
    status, _, err = call(monkeypatch, capsys, "replay", "a", "b", f"--rate={rate}")
    assert_one_clear_line(status, err, "or max")


def test_an_unknown_engine_is_one_line(monkeypatch, capsys):
    status, _, err = call(monkeypatch, capsys, "replay", "a", "b", "--engine", "onnx")
    assert_one_clear_line(status, err, "--engine")


def test_the_schema_is_json(monkeypatch, capsys):
    status, out, _ = call(monkeypatch, capsys, "config", "schema")
    assert status == 0
    assert "infrared" in json.loads(out)["properties"]


def test_every_command_has_help(monkeypatch, capsys):
    commands = ["run", "replay", "fuse", "demo", "subscribe", "view", "doctor", "bench", "evaluate", "train", "config"]
    for command in commands:
        status, out, _ = call(monkeypatch, capsys, command, "--help")
        assert status == 0
        assert "Usage" in out


def test_view_and_subscribe_start_without_torch():
    modules = "sys, pipeline.cli, pipeline.client, pipeline.viewer.server"
    code = f"import {modules}; print([m for m in ('torch', 'cv2', 'openvino') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_within_two_seconds_with_report_and_status_0(tmp_path: Path, number: signal.Signals):
    (tmp_path / "rig.yaml").write_text(SYNTHETIC_RIG + "output: {video: fused.mp4, report: report.json}\n")
    script = (
        "import pipeline.live, pipeline.cli, sys; from tests.rigs.engines import MaximumEngine; "
        "pipeline.live.engine_for = lambda _: MaximumEngine(); "
        "sys.argv = ['dspfusion', 'run', 'rig.yaml']; pipeline.cli.main()"
    )
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        while "fused frames at" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(3)
        asked = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=10) == 0
        assert time.monotonic() - asked < 2
    finally:
        process.kill()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fused"] > 10
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fused.mp4", "report.json", "rig.yaml"]
