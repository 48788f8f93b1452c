"""The command line: what it promises, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline import cli
from pipeline.client import Client
from pipeline.publish import create_keys
from tests.rigs.command import call
from tests.rigs.engines import MaximumEngine
from tests.rigs.recordings import write_video

SYNTHETIC_RIG = """
version: 1
rig: test
infrared: {kind: synthetic, width: 160, height: 128}
visible: {kind: synthetic, width: 160, height: 120}
publish: {endpoint: "tcp://127.0.0.1:*"}
"""


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


def write_images(folder: Path, *names: str, image: np.ndarray | None = None) -> Path:
    import cv2

    folder.mkdir(exist_ok=True)
    for name in names:
        cv2.imwrite(str(folder / name), np.full((40, 60), 90, np.uint8) if image is None else image)
    return folder


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("infrared", "visible", "refused"),
    [
        (("f0.png", "f1.png", "f2.png"), ("f0.png", "f2.png"), True),  # f1 has no partner: f2 would be shown with f1
        (("a.png", "b.png"), ("c.png",), True),
        (("a.png", "b.png"), ("c.png", "d.png"), False),  # each camera counts by itself
        (("f10.png", "f9.PNG"), ("f9.jpg", "f10.JPG"), False),
    ],
)
def test_replay_refuses_folders_whose_names_do_not_match(
    tmp_path: Path, infrared, visible, refused, monkeypatch, capsys
):
    folders = write_images(tmp_path / "ir", *infrared), write_images(tmp_path / "vis", *visible)
    status, out, err = call(monkeypatch, capsys, "replay", *map(str, folders), "--report", "-")
    if refused:
        assert_one_clear_line(status, err, "no partner")
    else:
        assert json.loads(out)["frames_in"] == {"ir": 2, "vis": 2}


@pytest.mark.usefixtures("stand_in")
def test_what_a_mac_leaves_beside_pictures_is_no_picture(tmp_path: Path, monkeypatch, capsys):
    infrared, visible = write_images(tmp_path / "ir", "a.png"), write_images(tmp_path / "vis", "a.png")
    (infrared / "._a.png").write_bytes(b"resource fork")
    (visible / "sub.png").mkdir()
    for arguments in (("replay",), ("fuse", str(tmp_path / "out"))):
        status, _, err = call(monkeypatch, capsys, arguments[0], str(infrared), str(visible), *arguments[1:])
        assert status == 0, err


@pytest.mark.usefixtures("stand_in")
def test_fuse_takes_sixteen_bit_infrared_that_was_saved_with_three_channels(tmp_path: Path, monkeypatch, capsys):
    counts = np.arange(2400, dtype=np.uint16).reshape(40, 60) + 8000
    infrared = write_images(tmp_path / "ir", "a.png", image=np.dstack([counts] * 3)) / "a.png"
    visible = write_images(tmp_path / "vis", "a.png") / "a.png"
    status, _, err = call(monkeypatch, capsys, "fuse", str(infrared), str(visible), str(tmp_path / "out.png"))
    assert status == 0, err


@pytest.mark.usefixtures("stand_in")
def test_fuse_refuses_two_pictures_of_one_name(tmp_path: Path, monkeypatch, capsys):
    folders = write_images(tmp_path / "ir", "a.png"), write_images(tmp_path / "vis", "a.png", "a.jpg")
    status, _, err = call(monkeypatch, capsys, "fuse", *map(str, folders), str(tmp_path / "out"))
    assert_one_clear_line(status, err, "a.jpg", "a.png", "one name")


@pytest.mark.usefixtures("stand_in")
def test_no_command_replaces_its_own_input(tmp_path: Path, monkeypatch, capsys):
    folder = write_images(tmp_path / "pictures", "ir.png", "vis.png")
    infrared, visible = write_video(tmp_path / "ir.mkv", colour=False), write_video(tmp_path / "vis.mkv")
    stills = [str(folder / "ir.png"), str(folder / "vis.png"), str(folder / ".." / "pictures" / "vis.png")]
    before = visible.read_bytes(), (folder / "vis.png").read_bytes()
    for arguments in (["fuse", *stills], ["replay", str(infrared), str(visible), "--output", str(visible)]):
        status, _, err = call(monkeypatch, capsys, *arguments)
        assert_one_clear_line(status, err, "input", "choose another place")
    assert before == (visible.read_bytes(), (folder / "vis.png").read_bytes())


def test_what_is_neither_file_nor_folder_is_one_line_and_does_not_wait(tmp_path: Path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "pipe")
    address = "rtsp://admin:s3cret@camera/ir"
    for given, said in ((tmp_path / "pipe", "neither a file nor a folder"), (address, "is an address")):
        status, _, err = call(monkeypatch, capsys, "replay", str(given), str(given))
        assert_one_clear_line(status, err, said)
        assert "s3cret" not in err


@pytest.mark.usefixtures("stand_in")
def test_a_picture_that_cannot_be_read_is_one_line(tmp_path: Path, capfd, monkeypatch):
    import cv2

    folder = write_images(tmp_path / "vis", "a.png")
    (tmp_path / "ir").mkdir()
    cv2.imwrite(str(tmp_path / "ir" / "a.tiff"), np.zeros((8, 8), np.float32))
    for arguments in (("replay",), ("fuse", str(tmp_path / "out"))):
        monkeypatch.setattr(sys, "argv", ["dspfusion", arguments[0], str(tmp_path / "ir"), str(folder), *arguments[1:]])
        with pytest.raises(SystemExit):
            cli.main()
        assert_one_clear_line(2, capfd.readouterr().err, "a.tiff")  # OpenCV writes to the descriptor itself


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
    status, _, err = call(monkeypatch, capsys, "run", str(tmp_path / "rig.yaml"), "--duration", "60")
    assert_one_clear_line(status, err.strip().splitlines()[-1], "640x480", "160x1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["replay", "a"], "Missing argument 'VIS': see `dspfusion replay --help`"),
        (["replay", "a", "b", "--speed", "3"], "No such option"),
        (["demo", "--duration", "0"], "--duration 0: give a number above 0"),
        (["demo", "--duration=nan"], "--duration nan"),
        (["run", "rig.yaml", "--duration=-1"], "--duration -1"),
        (["subscribe", "tcp://127.0.0.1:9", "--count", "0"], "--count 0"),
        (["subscribe", "tcp://127.0.0.1:9", "--timeout=-1"], "--timeout -1"),
        (["subscribe", "tcp://127.0.0.1:9", "--timeout", "inf"], "--timeout inf: give a number above 0 and at most"),
        (["subscribe", "tcp://127.0.0.1:9", "--timeout", "1e12"], "--timeout 1e+12"),
        (["calibrate", "time", "a", "b", "--longest", "inf"], "'--longest': "),
        (["calibrate", "time", "a", "b", "--longest", "nan"], "'--longest': "),
        (["calibrate", "time", "a", "b", "--max-offset", "nan"], "'--max-offset': "),
        (["calibrate", "selfcal", "a", "b", "--every", "nan"], "'--every': "),
        (["calibrate", "selfcal", "a", "b", "--every", "inf"], "'--every': "),
        (["subscribe", "tcp://127.0.0.1:9", "--save", "/proc/nothing"], "/proc/nothing"),
        (["subscribe", "tcp://127.0.0.1:9", "--stream", "depth"], "fused, ir, vis"),
        (["subscribe", "tcp://127.0.0.1:9", "--codec", "png"], "raw or jpeg"),
        (["view", "--port", "99999"], "port 99999"),
    ],
)
def test_a_wrong_option_is_one_line(arguments: list[str], said: str, monkeypatch, capsys):
    status, _, err = call(monkeypatch, capsys, *arguments)
    assert_one_clear_line(status, err, said)


@pytest.mark.parametrize("arguments", [[], ["replay", "a", "b"], ["run"], ["config", "check"], ["view"], ["subscribe"]])
def test_a_password_in_an_argument_is_in_no_error(arguments: list[str], monkeypatch, capsys):
    status, out, err = call(monkeypatch, capsys, *arguments, "rtsp://admin:s3cret@camera/ir")
    assert status == 2
    assert "s3cret" not in out + err
    assert "***" in err


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("command", ["run", "replay", "fuse", "doctor"])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, command: str, monkeypatch, capsys):
    folder = write_images(tmp_path / "pictures", "a.png")
    (tmp_path / "rig.yaml").write_text(SYNTHETIC_RIG)
    monkeypatch.setattr("pipeline.doctor.examine", lambda: pytest.fail("the work was begun"))
    given = {"run": [str(tmp_path / "rig.yaml")], "replay": [str(folder)] * 2, "fuse": [str(folder)] * 2 + ["out"]}
    given["doctor"] = []
    option = "--json" if command in ("fuse", "doctor") else "--report"
    before = sorted(tmp_path.rglob("*"))
    for target in (tmp_path, folder / "a.png" / "report.json"):
        status, _, err = call(monkeypatch, capsys, command, *given[command], option, str(target))
        assert_one_clear_line(status, err, "cannot write the report")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("stand_in")
def test_one_file_is_not_both_the_video_and_the_report(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rig.yaml").write_text(SYNTHETIC_RIG + "output: {video: fused.mp4}\n")
    inputs = [str(write_video(tmp_path / "ir.mkv", colour=False)), str(write_video(tmp_path / "vis.mkv"))]
    given = (["run", "rig.yaml", "--duration", "1"], ["replay", *inputs, "--output", "fused.mp4"])
    for arguments in given:
        status, _, err = call(monkeypatch, capsys, *arguments, "--report", str(tmp_path / "fused.mp4"))
        assert_one_clear_line(status, err, "is named for two results")
    assert not (tmp_path / "fused.mp4").exists()


@pytest.mark.usefixtures("stand_in")
def test_a_video_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch, capsys):
    inputs = [str(write_video(tmp_path / "ir.mkv", colour=False)), str(write_video(tmp_path / "vis.mkv"))]
    (tmp_path / "folder.mp4").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for target in (tmp_path / "folder.mp4", tmp_path / "missing" / "a.mp4", Path("/proc/a.mp4")):
        status, _, err = call(monkeypatch, capsys, "replay", *inputs, "--output", str(target))
        assert_one_clear_line(status, err, str(target.parent))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_ends_the_video_with_one_clear_error(tmp_path: Path):
    """A limit on the file's size fails as a full disk does."""
    script = """
import resource, signal, sys
import numpy as np
from pipeline.errors import ConfigError
from pipeline.record import BackgroundVideo, VideoFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
pictures = np.random.default_rng(0).integers(0, 255, (100, 64, 96, 3), np.uint8)
file = VideoFile("a.mp4")
try:
    for number, picture in enumerate(pictures):
        file.write(picture, number * 40_000_000)
    file.close()
except ConfigError as error:
    print(error)
    file.discard()
video = BackgroundVideo("b.mkv", 25.0)
for number, picture in enumerate(pictures):
    video.write(picture, number * 40_000_000)
video.close()
print(video.failure)
"""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("cannot write a.mp4: ")
    assert "b.mkv was given up after" in second
    assert not list(tmp_path.glob("*.part"))


def test_config_check_finds_what_a_run_would_refuse(tmp_path: Path, monkeypatch, capsys):
    from calibration.rig_file import save_rig
    from pipeline.config import SyntheticSource
    from pipeline.sources.synthetic import true_rig

    save_rig(true_rig(SyntheticSource(), SyntheticSource()), tmp_path / "other_size.yaml")
    infrared = "{kind: synthetic, width: 160, height: 128}"
    for name in ("secret.key_secret", "weights.safetensors"):
        (tmp_path / name).write_text("neither a key nor weights")
    (tmp_path / "key").mkdir()
    create_keys(tmp_path / "key", "rig")
    (tmp_path / "key" / "rig.key_secret").chmod(0o644)
    monkeypatch.chdir(tmp_path)

    def keys(secret: str, known: str) -> str:
        given = f'"tcp://127.0.0.1:*", curve_secret_key_file: {secret}, authorized_keys_dir: {known}'
        return SYNTHETIC_RIG.replace('"tcp://127.0.0.1:*"', given)

    wrong = {
        "cannot read a key from": keys("secret.key_secret", "key"),
        "chmod 600": keys("key/rig.key_secret", "key"),
        "does not say who may subscribe": keys("later.key_secret", "null"),
        "is no folder of public keys": keys("later.key_secret", "rig.yaml"),
        "weights.safetensors is not a safetensors file": SYNTHETIC_RIG + "engine: {weights: weights.safetensors}\n",
        "there are no weights base.safetensors": SYNTHETIC_RIG + "engine: {variant: base}\n",
        "a video ends in .mp4 or .mkv": SYNTHETIC_RIG + "output: {video: fused.avi}\n",
        "nowhere does not exist": SYNTHETIC_RIG + "output: {video: nowhere/fused.mp4}\n",
        "cannot write the report key": SYNTHETIC_RIG + "output: {report: key}\n",
        "viewer: host can be reached": SYNTHETIC_RIG + "viewer: {enabled: true, host: 0.0.0.0}\n",
        "is not read": SYNTHETIC_RIG.replace(infrared, '{kind: stream, url: "ftp://u:s3cret@h/ir"}'),
        "other machines": SYNTHETIC_RIG.replace("127.0.0.1:*", "0.0.0.0:5599"),
        "is none": SYNTHETIC_RIG.replace("tcp://127.0.0.1:*", "nonsense"),
        "160x128": SYNTHETIC_RIG + "registration: {calibration: other_size.yaml}\n",
    }
    for said, text in wrong.items():
        (tmp_path / "rig.yaml").write_text(text)
        status, _, err = call(monkeypatch, capsys, "config", "check", str(tmp_path / "rig.yaml"))
        assert_one_clear_line(status, err, said)
        assert "s3cret" not in err
    later = (
        "registration: {calibration: later.yaml}\nengine: {weights: later.safetensors}\noutput: {video: fused.mp4}\n"
    )
    (tmp_path / "rig.yaml").write_text(keys("later.key_secret", "later_keys") + later)
    before = sorted(tmp_path.rglob("*"))
    status, _, err = call(monkeypatch, capsys, "config", "check", str(tmp_path / "rig.yaml"))
    assert status == 0, err
    for name in ("later.yaml", "later.safetensors", "later.key_secret", "later_keys"):
        assert f"{name} is not there yet" in " ".join(err.split())
    assert sorted(tmp_path.rglob("*")) == before  # it looks, and leaves nothing behind


def test_a_log_line_says_when_and_an_error_of_the_command_line_stays_one_bare_line():
    """The viewer's warning comes before the endpoint is found to be none."""
    arguments = ["view", "nonsense", "--host", "0.0.0.0", "--port", "0"]
    script = f"import sys, pipeline.cli; sys.argv = ['dspfusion', *{arguments}]; pipeline.cli.main()"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    logged, error = done.stderr.splitlines()
    moment = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    assert re.fullmatch(rf"{moment} WARNING pipeline\.viewer\.server: the viewer on 0\.0\.0\.0 shows .*", logged)
    assert error.startswith("dspfusion: error: cannot connect to 'nonsense'")


def test_a_camera_that_is_still_opening_does_not_abort_the_process(tmp_path: Path):
    """The simulated cameras take seconds to draw a large street; the run is over before."""
    (tmp_path / "rig.yaml").write_text(SYNTHETIC_RIG.replace("width: 160, height: 1", "width: 1280, height: 10"))
    script = (
        "import pipeline.live, pipeline.cli, sys; from tests.rigs.engines import MaximumEngine; "
        "pipeline.live.engine_for = lambda _: MaximumEngine(); "
        "sys.argv = ['dspfusion', 'run', 'rig.yaml', '--duration', '0.1', '--report', '-']; pipeline.cli.main()"
    )
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fused"] == 0


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
        while "fused frames at" not in (line := process.stderr.readline()):
            assert process.poll() is None
        with Client(line.split()[-1]) as client:
            for received in client.all(timeout_s=60):
                if received.header.sequence > 10:
                    break
        asked = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=30) == 0
        assert time.monotonic() - asked < 2 + 4  # and some for a busy machine
    finally:
        process.kill()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fused"] > 10
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fused.mp4", "report.json", "rig.yaml"]


RECORDED_RIG = """
rig: test
infrared: {{kind: {kind}, {key}: {infrared}}}
visible: {{kind: {kind}, {key}: {visible}}}
publish: {{endpoint: "tcp://127.0.0.1:*"}}
output: {{video: fused.mp4, report: report.json}}
"""


@pytest.mark.parametrize(
    ("infrared", "visible", "said"),
    [
        ("absent.mkv", "vis.mkv", "absent.mkv does not exist"),
        ("ir.mkv", "text.mkv", "text.mkv cannot be read as a video"),
        ("vis.mkv", "ir.mkv", "look swapped"),
        ("slow.mkv", "vis.mkv", "one of the rates is wrong"),
        ("none", "pictures", "none has no frames"),
        ("others", "pictures", "no partner"),
    ],
)
def test_run_refuses_recordings_before_it_starts_anything(
    tmp_path: Path, infrared: str, visible: str, said: str, monkeypatch, capsys
):
    write_video(tmp_path / "ir.mkv", colour=False)
    write_video(tmp_path / "slow.mkv", rate=10, colour=False)
    write_video(tmp_path / "vis.mkv")
    (tmp_path / "text.mkv").write_text("no video " * 100)
    (tmp_path / "none").mkdir()
    write_images(tmp_path / "pictures", "a.png", "b.png")
    write_images(tmp_path / "others", "a.png", "c.png")
    kind = {"kind": "stream", "key": "url"} if visible.endswith("mkv") else {"kind": "folder", "key": "path"}
    (tmp_path / "rig.yaml").write_text(RECORDED_RIG.format(**kind, infrared=infrared, visible=visible))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.live.engine_for", lambda _: pytest.fail("the engine was built"))
    before = sorted(tmp_path.rglob("*"))
    status, _, err = call(monkeypatch, capsys, "run", "rig.yaml")
    assert_one_clear_line(status, err, said)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("stand_in")
def test_a_calibration_for_another_resolution_is_refused_before_the_engine_is_built(
    tmp_path: Path, monkeypatch, capsys
):
    from calibration.rig_file import save_rig
    from pipeline.config import SyntheticSource
    from pipeline.sources.synthetic import true_rig

    save_rig(true_rig(SyntheticSource(), SyntheticSource()), tmp_path / "rig.yaml")
    monkeypatch.setattr("pipeline.replay.engine_for", lambda _: pytest.fail("the engine was built"))
    monkeypatch.setattr("pipeline.live.engine_for", lambda _: pytest.fail("the engine was built"))
    inputs = [str(write_video(tmp_path / "ir.mkv", colour=False)), str(write_video(tmp_path / "vis.mkv"))]
    recorded = RECORDED_RIG.format(kind="stream", key="url", infrared="ir.mkv", visible="vis.mkv")
    (tmp_path / "recorded.yaml").write_text(recorded + "registration: {calibration: rig.yaml}\n")
    for arguments in (
        ["replay", *inputs, "--calibration", str(tmp_path / "rig.yaml")],
        ["run", str(tmp_path / "recorded.yaml")],
    ):
        status, _, err = call(monkeypatch, capsys, *arguments)
        assert_one_clear_line(status, err, "640x480", "96x64")


def test_a_bug_of_ours_is_told_with_its_traceback_but_without_a_password(tmp_path: Path, monkeypatch, capsys):
    def fail(_: Path) -> None:
        thread = threading.Thread(target=lambda: {}["rtsp://admin:s3cret@camera/vis"])
        thread.start()
        thread.join()
        raise RuntimeError("cannot handle rtsp://admin:s3cret@camera/ir")

    monkeypatch.setattr("pipeline.config.load_config", fail)
    status, out, err = call(monkeypatch, capsys, "run", "rig.yaml")
    assert status == 1
    assert "RuntimeError: cannot handle rtsp://***@camera/ir" in err
    assert "KeyError: 'rtsp://***@camera/vis'" in err
    assert "s3cret" not in out + err
