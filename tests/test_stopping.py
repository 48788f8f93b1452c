"""A signal ends every command promptly, whatever it is doing, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.client import Client
from pipeline.stopping import Stopped, asked, stopping_on_signals
from tests.rigs.recordings import write_video

# The engine stands for a compiler: it locks a mutex that is locked already, in C, where no signal handler of Python's
# is run until it returns, which it never does. Like a real one it lets other threads of Python go on.
HUNG_COMMAND = """
import ctypes, sys, pipeline.live, pipeline.replay, pipeline.cli
from tests.rigs.engines import MaximumEngine

where, arguments = sys.argv[1], sys.argv[2:]

def hang(name):
    if name == where:
        print("hangs", file=sys.stderr, flush=True)
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)

class Engine(MaximumEngine):
    def fuse(self, *arguments):
        hang("fuse")
        return super().fuse(*arguments)

    def close(self):
        hang("close")

def engine_for(_):
    hang("build")
    return Engine()

pipeline.live.engine_for = pipeline.replay.engine_for = engine_for
sys.argv = ["dspfusion", *arguments]
pipeline.cli.main()
"""
RIG = """
rig: test
infrared: {infrared}
visible: {visible}
publish: {{endpoint: "ipc://endpoint"}}
output: {{video: fused.mp4, report: report.json}}
"""
COMMANDS = {
    "run": ["run", "rig.yaml"],
    "run of recordings": ["run", "recordings.yaml"],
    "replay": ["replay", "ir.mkv", "vis.mkv", "--output", "fused.mp4", "--report", "report.json"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cameras = [f"{{kind: synthetic, width: 160, height: {height}}}" for height in (128, 120)]
    (tmp_path / "rig.yaml").write_text(RIG.format(infrared=cameras[0], visible=cameras[1]))
    files = [f"{{kind: stream, url: {name}.mkv, loop: true}}" for name in ("ir", "vis")]
    (tmp_path / "recordings.yaml").write_text(RIG.format(infrared=files[0], visible=files[1]))
    write_video(tmp_path / "ir.mkv", colour=False)
    write_video(tmp_path / "vis.mkv")
    return tmp_path


@contextmanager
def hung(folder: Path, where: str, arguments: list[str]) -> Iterator[subprocess.Popen]:
    """A command whose engine hangs: in "build", in its first "fuse", in "close", or nowhere."""
    process = subprocess.Popen(
        [sys.executable, "-c", HUNG_COMMAND, where, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def wait_for(process: subprocess.Popen, text: str) -> None:
    assert process.stderr is not None
    said = []
    while not said or text not in said[-1]:
        said.append(process.stderr.readline())
        assert said[-1], "".join(said)


@pytest.mark.parametrize(
    ("command", "where", "number"),
    [
        ("run", "build", signal.SIGINT),
        ("run", "fuse", signal.SIGTERM),
        ("run of recordings", "fuse", signal.SIGINT),  # its first pair has the network compiled
        ("replay", "build", signal.SIGTERM),
        ("replay", "fuse", signal.SIGINT),
    ],
)
def test_a_signal_ends_the_start_within_two_seconds_though_the_compiler_never_returns(folder, command, where, number):
    before = sorted(path.name for path in folder.iterdir())
    with hung(folder, where, COMMANDS[command]) as process:
        wait_for(process, "hangs")
        asked = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=30) == 128 + number
        assert time.monotonic() - asked < 2 + 4  # and some for a busy machine
        assert "Traceback" not in process.stderr.read()
    left = {path.name for path in folder.iterdir()} - set(before)
    assert left <= {"endpoint"}  # the name of a socket that nobody listens at; the next run takes it over


def test_a_second_signal_ends_a_run_at_once_that_hangs_in_its_orderly_end(folder):
    with hung(folder, "close", COMMANDS["run"]) as process:
        wait_for(process, "fused frames at")
        with Client(f"ipc://{folder / 'endpoint'}") as client:
            client.latest(60)
        process.send_signal(signal.SIGINT)
        wait_for(process, "hangs")
        time.sleep(1.3)
        assert process.poll() is None  # it is not cut short by itself: there may be a video to finish
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) in (-signal.SIGINT, 128 + signal.SIGINT)


def test_a_second_signal_ends_a_start_at_once(folder):
    with hung(folder, "build", COMMANDS["run"]) as process:
        wait_for(process, "hangs")
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        # By the first one where this test was held up for longer than its grace.
        assert process.wait(timeout=20) in (128 + signal.SIGINT, 128 + signal.SIGTERM)
        assert time.monotonic() - asked < 1 + 4  # and some for a busy machine


def test_a_library_that_makes_another_error_of_a_signal_is_not_believed(monkeypatch):
    monkeypatch.setattr("pipeline.stopping.GRACE_S", 60.0)  # a test that is held up for longer would end all tests

    def convert() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2)
        except Stopped:
            raise RuntimeError("conversion failed") from None

    try:
        with pytest.raises(Stopped), stopping_on_signals():
            convert()
    finally:
        asked.clear()


def test_a_replay_that_is_stopped_in_the_middle_ends_in_order(folder):
    with hung(folder, "nowhere", [*COMMANDS["replay"], "--rate", "1", "--publish", "ipc://endpoint"]) as process:
        with Client(f"ipc://{folder / 'endpoint'}") as client:
            while client.latest(60).header.sequence == 0:  # the second picture comes after all that a start does
                pass
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    report = json.loads((folder / "report.json").read_text())
    assert 0 < report["fused"] < 12
    assert (folder / "fused.mp4").is_file()


def test_a_signal_while_the_command_line_is_imported_is_one_line():
    stop = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    importing = f"""
import importlib.abc, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "typer":  # as if Ctrl-C came at this very moment
            {stop}

from pipeline.entry import main
sys.meta_path.insert(0, Finder())
main()
"""
    ended = subprocess.run([sys.executable, "-c", importing], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (130, "dspfusion: stopped\n")


def test_a_signal_while_a_command_imports_its_libraries_is_one_line():
    importing = """
import os, signal, sys
from pipeline import cli, config

signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts the tests in the background has it ignored
config.load_config = lambda path: os.kill(os.getpid(), signal.SIGINT)
sys.argv = ["dspfusion", "run", "rig.yaml"]
cli.main()
"""
    ended = subprocess.run([sys.executable, "-c", importing], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (130, "dspfusion: stopped\n")
