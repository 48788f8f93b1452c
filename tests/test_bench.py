"""`dspfusion bench` and `build-engine`: rows with stable keys, a fair comparison, one line for every mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engines import bench as bench_module
from engines.bench import bench, side_by_side
from engines.dspfusion.variants import VARIANTS
from pipeline.errors import ConfigError
from tests.rigs.command import call
from tests.rigs.engines import CountingEngine, MaximumEngine
from tests.rigs.networks import MINI, save_random_weights

STABLE = {
    "engine", "precision", "variant", "width", "height", "what", "median_ms", "p99_ms", "cpu_ms", "fps", "rss_mb",
    "threads",
}  # fmt: skip


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.live.engine_for", lambda _: MaximumEngine(fuse_s=0.002))


def test_a_row_has_the_stable_keys_and_measures_what_a_frame_takes():
    (row,) = bench([MaximumEngine(fuse_s=0.01)], [(64, 48)], repeats=5, warm_up=1)
    assert set(row) >= STABLE
    assert (row["engine"], row["width"], row["height"], row["what"]) == ("openvino", 64, 48, "network")
    assert row["fps"] == pytest.approx(1000 / row["median_ms"])
    assert row["p99_ms"] >= row["p95_ms"] >= row["median_ms"] >= 10
    assert row["cpu_ms"] < row["median_ms"]  # it slept
    assert row["rss_mb"] > 10


def test_time_runs_out_after_three_frames_at_the_earliest():
    (row,) = bench([MaximumEngine(fuse_s=0.05)], [(64, 48)], repeats=1000, warm_up=1, seconds=0.1)
    assert 3 <= row["frames"] <= 4


def test_throughput_is_measured_with_as_many_callers_as_the_engine_takes():
    engines = [CountingEngine(fuse_s=0.05, at_once=number) for number in (1, 2)]
    one, two = bench(engines, [(64, 48)], repeats=10)
    assert [engine.most for engine in engines] == [1, 2]
    assert 0 < one["throughput_fps"] < 20.5  # each sleeps for 50 ms
    assert 0 < two["throughput_fps"] < 41  # and two side by side
    assert (one["at_once"], two["at_once"]) == (1, 2)


def test_the_warm_up_is_not_counted():
    engine = MaximumEngine()
    (row,) = bench([engine], [(64, 48)], repeats=4, warm_up=7)
    assert (engine.calls, row["frames"]) == (11, 4)


def test_side_by_side_runs_in_turns_and_gives_the_ratio_of_the_medians(monkeypatch):
    order, clock = [], [0.0]
    now = SimpleNamespace(perf_counter=lambda: clock[0], process_time=lambda: clock[0] / 2)
    monkeypatch.setattr(bench_module, "time", now)

    def fuser(name: str, seconds: float):
        def fuse(infrared, visible):
            order.append(name)
            assert infrared.shape == (48, 64)
            assert visible.shape == (48, 64, 3)
            clock[0] += seconds

        return fuse

    result = side_by_side({"ours": fuser("ours", 0.01), "theirs": fuser("theirs", 0.03)}, (64, 48), 6, warm_up=1)
    assert order == ["ours", "theirs"] + ["ours", "theirs", "theirs", "ours"] * 3
    assert result["ours"] == pytest.approx({"median_ms": 10, "p95_ms": 10, "p99_ms": 10, "cpu_ms": 5, "ratio": 1})
    assert result["theirs"] == pytest.approx({"median_ms": 30, "p95_ms": 30, "p99_ms": 30, "cpu_ms": 15, "ratio": 3})


@pytest.mark.usefixtures("stand_in")
def test_the_command_gives_json_for_engines_variants_and_sizes(monkeypatch, capsys):
    sizes = ["--size", "64x48", "--size", "96x64"]
    arguments = ["bench", "--engine", "openvino", "--engine", "pytorch:fp32", *sizes, "--frames", "3", "--json", "-"]
    status, out, err = call(monkeypatch, capsys, *arguments)
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert [(row["width"], row["height"]) for row in result["rows"]] == [(64, 48), (96, 64)] * 2
    assert all(set(row) >= STABLE for row in result["rows"])
    assert result["machine"]["cores"] >= 1


@pytest.mark.usefixtures("stand_in")
def test_the_table_names_what_was_measured(monkeypatch, capsys):
    status, out, err = call(monkeypatch, capsys, "bench", "--engine", "openvino", "--size", "64x48", "--frames", "3")
    assert (status, out) == (0, "")
    for word in ("engine", "median_ms", "64x48", "network"):
        assert word in err


@pytest.mark.usefixtures("stand_in")
def test_the_pipeline_row_is_the_live_pipeline_with_its_stages(monkeypatch, capsys):
    times = ["--seconds", "10", "--rate", "10"]
    arguments = ["bench", "--engine", "openvino", "--size", "128x96", "--what", "pipeline", *times, "--json", "-"]
    status, out, _ = call(monkeypatch, capsys, *arguments)
    assert status == 0
    (row,) = json.loads(out)["rows"]
    assert set(row) >= STABLE
    assert row["what"] == "pipeline"
    assert row["frames"] > 5
    assert 0 < row["fps"] <= 11
    assert {"sync", "register", "fuse", "capture_to_publish"} <= set(row["stages"])
    assert row["stages"]["fuse"] <= row["median_ms"] <= row["p95_ms"] <= row["p99_ms"]
    assert row["cpu_ms"] > 0


@pytest.mark.usefixtures("stand_in")
def test_another_fuser_is_timed_against_ours(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "their_fuser.py").write_text(
        "import time\ndef fuse(infrared, visible):\n    time.sleep(0.1)\n    return visible\nnumber = 4\n"
        "def broken(infrared, visible):\n    raise RuntimeError('no weights')\n"
    )
    monkeypatch.chdir(tmp_path)
    common = ["bench", "--engine", "openvino", "--size", "64x48", "--frames", "4"]
    status, out, _ = call(monkeypatch, capsys, *common, "--against", "their_fuser:fuse", "--json", "-")
    assert status == 0
    (entry,) = json.loads(out)["side_by_side"]
    assert entry["contenders"]["their_fuser:fuse"]["ratio"] > 1.5
    for text, says in (
        ("their_fuser:number", "is no function"),
        ("their_fuser:missing", "missing"),
        ("no_such_module:fuse", "no_such_module"),
        ("their_fuser:broken", "no weights"),
        ("nonsense", "module:function"),
    ):
        status, _, err = call(monkeypatch, capsys, *common, "--against", text)
        assert status == 2, text
        assert len(err.strip().splitlines()) == 1
        assert says in err
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--size", "640"], "WIDTHxHEIGHT"),
        (["--size", "640x0"], "WIDTHxHEIGHT"),
        (["--size", "99999x99999"], "32 to 8192"),
        (["--what", "everything"], "network, pipeline or both"),
        (["--engine", "abacus"], "--engine"),
        (["--engine", "openvino:fp7"], "--precision"),
        (["--variant", "giga"], "--variant"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, arguments, says):
    status, _, err = call(monkeypatch, capsys, "bench", *arguments)
    assert status == 2
    assert len(err.strip().splitlines()) == 1, err
    assert says in err


@pytest.mark.parametrize("command", ["bench", "build-engine"])
def test_a_result_that_could_not_be_written_is_refused_before_the_work(command, tmp_path: Path, monkeypatch, capsys):
    for work in ("pipeline.live.engine_for", "engines.selection.create_engine"):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("the work was begun"))
    status, _, err = call(monkeypatch, capsys, command, "--size", "64x48", "--json", str(tmp_path))
    assert status == 2
    assert len(err.strip().splitlines()) == 1, err
    assert "cannot write the report" in err


@pytest.mark.usefixtures("stand_in")
def test_the_table_is_shown_even_if_the_disk_fills_up_meanwhile(tmp_path: Path, monkeypatch, capsys):
    def full(*_):
        raise ConfigError("cannot write the report: No space left on device: choose another place")

    monkeypatch.setattr("pipeline.telemetry.write_report", full)
    arguments = ["--engine", "openvino", "--size", "64x48", "--frames", "3", "--json", str(tmp_path / "rows.json")]
    status, _, err = call(monkeypatch, capsys, "bench", *arguments)
    assert status == 2
    assert "median_ms" in err
    assert "No space left" in err.splitlines()[-1]


def test_a_variant_without_shipped_weights_is_timed_with_random_ones(tmp_path, monkeypatch):
    from engines.dspfusion.loading import load
    from pipeline.commands.bench import section_of

    monkeypatch.setattr("engines.dspfusion.variants.default_weights", lambda name: tmp_path / "none.safetensors")
    with section_of("pytorch:fp32", "nano") as (section, weights):
        assert weights == "random"
        network, _ = load("nano", Path(section.weights))
        assert sum(value.numel() for value in network.parameters()) > 1e5
        assert (section.runtime, section.precision) == ("pytorch", "fp32")
    assert not Path(section.weights).exists()


def test_build_engine_builds_for_a_rig_and_compares_with_pytorch(tmp_path: Path, monkeypatch, capsys):
    """At the size of the rig's visible camera; PyTorch against itself is equal."""
    monkeypatch.setitem(VARIANTS, "nano", MINI)
    weights = save_random_weights(MINI, tmp_path / "nano.safetensors")
    rig = tmp_path / "rig.yaml"
    rig.write_text(
        "version: 1\nrig: test\ninfrared: {kind: synthetic, width: 64, height: 64}\n"
        "visible: {kind: synthetic, width: 96, height: 64}\n"
        f"engine: {{precision: fp32, diffusion_steps: 1, threads: 1, weights: '{weights}'}}\n"
    )
    status, out, err = call(monkeypatch, capsys, "build-engine", str(rig), "--engine", "pytorch", "--json", "-")
    assert (status, err) == (0, "")
    (row,) = json.loads(out)["rows"]
    assert (row["engine"], row["precision"], row["width"], row["height"]) == ("pytorch", "fp32", 96, 64)
    assert (row["psnr_db"], row["fallbacks"]) == (999.0, [])
    assert "builds nothing" in row["cache"]
    assert row["build_s"] > 0


def test_build_engine_needs_a_size_where_the_camera_alone_knows_it(tmp_path: Path, monkeypatch, capsys):
    rig = tmp_path / "rig.yaml"
    rig.write_text(
        "version: 1\nrig: test\ninfrared: {kind: stream, url: 'rtsp://a/1'}\nvisible: {kind: stream, url: 'rtsp://a/2'}\n"
    )
    for arguments, says in (
        ([str(rig)], "give it with --size"),
        (["--sizes", "64x64-32x32"], "SMALLEST-USUAL-LARGEST"),
        (["--sizes", "64x64-32x32-128x128"], "are no range"),
        (["--precision", "int2"], "--precision"),
        (["--engine", "tensorrt"], "NVIDIA GPU"),
    ):
        monkeypatch.setattr("engines.gpu_probe.nvidia_driver_present", lambda: False)
        status, _, err = call(monkeypatch, capsys, "build-engine", *arguments)
        assert status == 2, arguments
        assert len(err.strip().splitlines()) == 1, err
        assert says in err


def test_a_real_pair_is_brought_to_size(tmp_path: Path):
    import cv2

    from pipeline.commands.build_engine import pictures

    cv2.imwrite(str(tmp_path / "ir.png"), np.random.default_rng(0).integers(7000, 9000, (48, 64)).astype(np.uint16))
    cv2.imwrite(str(tmp_path / "vis.png"), np.full((96, 128, 3), (10, 20, 200), np.uint8))
    infrared, visible = pictures((tmp_path / "ir.png", tmp_path / "vis.png"), (80, 60))
    assert (infrared.shape, infrared.dtype, visible.shape) == ((60, 80), np.uint8, (60, 80, 3))
    assert infrared.max() > 200  # 16 bits went through the gain
    assert visible[0, 0].tolist() == [200, 20, 10]
    from pipeline.errors import DspfusionError

    with pytest.raises(DspfusionError, match="cannot be read"):
        pictures((tmp_path / "none.png", tmp_path / "vis.png"), (80, 60))


def test_doctor_says_why_tensorrt_cannot_be_used_and_which_versions_fit(monkeypatch):
    from engines import gpu_probe
    from pipeline import doctor

    found = {finding.what: finding for finding in doctor._gpu()}
    assert {"nvidia gpu", "tensorrt"} <= set(found)
    monkeypatch.setattr(gpu_probe, "nvidia_driver_present", lambda: True)
    seen = gpu_probe.Probe(gpu="Imaginary 9000", memory_mb=8192, cuda="13.0")
    monkeypatch.setattr(gpu_probe, "probe", lambda tensorrt: seen)
    monkeypatch.setattr(
        gpu_probe,
        "partner_versions",
        lambda: {"torch": "2.13.0", "torch-tensorrt": "2.12.0", "tensorrt": "10.16.1"},
    )
    monkeypatch.setattr(gpu_probe, "refusal", {"tensorrt": "needs torch 2.12", "compile": None}.get)
    found = {finding.what: finding for finding in doctor._gpu()}
    assert "Imaginary 9000, 8192 MB, CUDA 13.0" in found["nvidia gpu"].found
    assert found["tensorrt"].state == "note"
    for text in ("needs torch 2.12", "torch-tensorrt 2.12.0", "tensorrt >=11.0,<11.1"):
        assert text in found["tensorrt"].found
    assert found["compile"].state == "ok"


def test_the_doctor_loads_openvino_without_its_telemetry():
    from pipeline import doctor

    finding = doctor._openvino()
    assert finding.state == "ok"
    assert "threads" in finding.found


def test_a_share_of_a_containers_time_limits_the_threads(monkeypatch, tmp_path):
    from engines import openvino_engine

    monkeypatch.setattr(openvino_engine.os, "sched_getaffinity", lambda pid: set(range(16)))
    limits = {"200000 100000": 2, "150000 100000": 2, "50000 100000": 1, "max 100000": 16, "": 16}
    for text, cores in limits.items():
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text)
        assert openvino_engine.usable_cores() == cores
    monkeypatch.setattr(openvino_engine, "usable_cores", lambda: 6)
    assert openvino_engine.default_threads() == 4


def test_memory_is_told_where_the_system_tells_it():
    assert bench_module.resident_mb() > 10


def test_a_size_that_is_none_is_refused():
    from pipeline.commands.bench import size_of

    assert size_of("640x480") == (640, 480)
    for text in ("", "x", "640", "-1x5", "640x480x3", "²²²x480"):
        with pytest.raises(ConfigError, match="WIDTHxHEIGHT"):
            size_of(text)
