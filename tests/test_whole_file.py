"""Files that appear whole or not at all, also where two write to one place."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import av
import numpy as np
import pytest

from calibration.whole_file import write_text, written_whole
from pipeline.errors import ConfigError
from pipeline.record import VideoFile
from pipeline.telemetry import write_report


def test_of_two_that_write_to_one_place_the_last_one_to_finish_stays_whole(tmp_path: Path):
    target = tmp_path / "report.json"
    with written_whole(target) as first:
        first.write_text("first, ")
        with written_whole(target) as second:
            second.write_text("second")
        assert target.read_text() == "second"
        with first.open("a") as file:
            file.write("to its end")
    assert target.read_text() == "first, to its end"
    assert list(tmp_path.iterdir()) == [target]


def test_two_videos_with_one_name_do_not_mix(tmp_path: Path):
    files = [VideoFile(tmp_path / "fused.mkv") for _ in range(2)]
    for index in range(6):
        for number, file in enumerate(files):
            file.write(np.full((48, 64, 3), 40 + 120 * number, np.uint8), index * 40_000_000)
    for number, file in enumerate(files):
        file.close()
        with av.open(str(file.path)) as container:
            levels = [frame.to_ndarray(format="gray").mean() for frame in container.decode(video=0)]
        assert levels == pytest.approx([40 + 120 * number] * 6, abs=4)
    assert [path.name for path in tmp_path.iterdir()] == ["fused.mkv"]


@pytest.mark.parametrize("error", [OSError("no room"), KeyboardInterrupt()])
def test_after_a_failure_the_old_file_stays_and_nothing_else(tmp_path: Path, error: BaseException):
    target = tmp_path / "report.json"
    target.write_text("old")

    def fail() -> None:
        with written_whole(target) as part:
            part.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.json", "old")]


def test_a_text_makes_its_folder_and_a_writer_that_was_killed_is_not_in_the_way(tmp_path: Path):
    target = tmp_path / "new" / "rig.yaml"
    write_text(target, "one")
    (target.parent / "rig.yaml.part").mkdir()
    write_text(target, "two")
    assert target.read_text() == "two"
    assert sorted(path.name for path in target.parent.iterdir()) == ["rig.yaml", "rig.yaml.part"]


def test_a_report_follows_a_link_and_goes_into_a_pipe(tmp_path: Path):
    (tmp_path / "link.json").symlink_to(tmp_path / "report.json")
    write_report({"fused": 1}, str(tmp_path / "link.json"))
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "report.json").read_text()) == {"fused": 1}
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    write_report({"fused": 2}, str(tmp_path / "pipe"))
    reader.join(10)
    assert json.loads(read[0]) == {"fused": 2}
    assert (tmp_path / "pipe").is_fifo()


def test_a_report_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "report.json").mkdir()
    with pytest.raises(ConfigError, match=r"cannot write the report .*: choose another place"):
        write_report({}, str(tmp_path / "report.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
