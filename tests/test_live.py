"""The live pipeline: real threads, real sockets, simulated cameras. Every frame is accounted for."""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibration.rig_file import save_rig
from engines.base import EngineError
from pipeline.cli import run_rig
from pipeline.client import Client
from pipeline.config import RegistrationConfig, RigConfig, StreamSource
from pipeline.errors import PublishError, SourceError
from pipeline.frame import FusedFrame
from pipeline.gain import InfraredGain
from pipeline.live import LivePipeline, expected_size
from pipeline.record import BackgroundVideo
from pipeline.register import Register
from pipeline.sources.opening import open_source
from pipeline.sources.synthetic import true_rig
from pipeline.telemetry import Distribution, Telemetry, write_report
from tests.rigs.engines import CountingEngine, MaximumEngine, RegisteringMaximumEngine
from tests.rigs.publishing import wait_until
from tests.rigs.recordings import write_video


def rig_config(**changes) -> RigConfig:
    camera = {"kind": "synthetic", "width": 320, "height": 240, "rate_hz": 25}
    sections = {
        "rig": "test",
        "infrared": camera | {"width": 320, "height": 256} | changes.pop("infrared", {}),
        "visible": camera | changes.pop("visible", {}),
        "publish": {"endpoint": "tcp://127.0.0.1:*"},
    }
    return RigConfig.model_validate(sections | changes)


def run_until(
    enough: Callable[[Counter], bool],
    config: RigConfig | None = None,
    engine: MaximumEngine | None = None,
    on_fused: Callable[[FusedFrame], None] = lambda _: None,
) -> dict:
    """Runs a rig until its fused frames, counted by mode, are enough: how long that takes depends on the machine."""
    modes: Counter = Counter()

    def note(fused: FusedFrame) -> None:
        on_fused(fused)
        modes[fused.mode] += 1
        if enough(modes):
            pipeline.stop()

    pipeline = LivePipeline(config or rig_config(), engine=engine or MaximumEngine(), on_fused=note)
    return pipeline.run(duration_s=90)


@contextmanager
def running(config: RigConfig | None = None, engine: MaximumEngine | None = None) -> Iterator[LivePipeline]:
    """A rig that runs in a thread of its own until the block ends."""
    pipeline = LivePipeline(config or rig_config(), engine=engine or MaximumEngine())
    thread = threading.Thread(target=pipeline.run, args=(90,))
    thread.start()
    try:
        yield pipeline
    finally:
        pipeline.stop()
        thread.join(timeout=30)


def first_told(client: Client, enough: Callable[[dict], bool]) -> dict:
    """The first health of a rig that is enough."""
    for message in client.all(timeout_s=30):
        if enough(message.data()):
            return message.data()
    raise AssertionError("the rig fell silent")


def spare_engine(monkeypatch: pytest.MonkeyPatch) -> MaximumEngine:
    """What serves after an engine that has failed."""
    spare = MaximumEngine()
    spare.description = replace(spare.description, runtime="pytorch")
    monkeypatch.setattr("pipeline.live.engine_for", lambda _: spare)
    return spare


def assert_every_frame_is_accounted_for(report: dict) -> None:
    for camera, account in report["accounting"].items():
        assert account["captured"] == account["used"] + sum(account["dropped"].values()), (camera, account)
        assert account["captured"] == report["frames_in"][camera]


def test_two_cameras_become_fused_messages_for_a_subscriber(tmp_path: Path):
    endpoint = f"ipc://{tmp_path / 'test'}"
    received = []

    def consume() -> None:
        with Client(endpoint, rig="test") as client:
            while len(received) < 10:
                message = client.latest(timeout_s=60)
                if message.header.mode in ("fused", "held"):  # while a camera still opens, the other one is alone
                    received.append(message)

    consumer = threading.Thread(target=consume)
    consumer.start()
    config = rig_config(publish={"endpoint": endpoint})
    report = run_until(lambda modes: modes["fused"] > 40 and len(received) == 10, config)
    consumer.join(timeout=10)
    assert len(received) == 10
    assert received[-1].image.shape == (240, 320, 3)
    assert len(received[-1].header.engine_sha) == len(received[-1].header.weights_sha) == 64
    assert report["modes"]["fused"] > 40
    assert report["pairs"] == report["fused"] + sum(report["dropped"].get("fuse", {}).values())
    assert_every_frame_is_accounted_for(report)


def test_the_report_has_the_promised_keys(tmp_path: Path):
    report = run_until(lambda modes: modes["fused"] > 5)
    write_report(report, str(tmp_path / "report.json"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) >= {
        "frames_in", "pairs", "fused", "published", "dropped", "modes", "fps", "latency_ms", "skew_ms", "engine",
        "priors", "registration", "fallbacks",
    }  # fmt: skip
    assert set(report["modes"]) == {"fused", "ir_only", "vis_only", "held"}
    assert set(report["latency_ms"]["capture_to_publish"]) == {"p50", "p95", "p99"}
    assert set(report["engine"]) >= {"runtime", "precision", "variant", "why"}
    assert report["registration"]["state"] == "uncalibrated"


def test_an_engine_slower_than_the_cameras_drops_the_oldest_and_stays_current():
    report = run_until(lambda modes: modes.total() == 40, engine=MaximumEngine(fuse_s=0.1))
    assert report["dropped"]["fuse"]["overload"] > 20
    assert report["fps"] <= 10.5
    # Two runs of the model, a frame period, the wait for a partner: 300 ms. A growing queue would be 2 s.
    assert report["latency_ms"]["capture_to_publish"]["p95"] < 1000
    assert_every_frame_is_accounted_for(report)


def test_overload_is_told_while_the_rig_runs():
    """The network takes 100 ms of the 40 ms between two frames: the headers and the health say what that costs."""
    with running(engine=MaximumEngine(fuse_s=0.1)) as rig, Client(rig.endpoint, "test") as pictures:
        for message in pictures.all(timeout_s=30):
            header = message.header
            if "overload" in header.flag_names and header.drops["fuse"] > 10:
                break
        assert header.drops.keys() == {"infrared", "visible", "sync", "fuse", "publish"}
        with Client(rig.endpoint, "test", "health") as health:
            told = first_told(health, lambda told: told["details"]["dropped"]["fuse"].get("overload", 0) > 10)
        assert 0 < told["details"]["fps"] <= 10.5


def test_a_picture_before_which_nothing_was_dropped_is_not_called_overloaded():
    with running() as rig, Client(rig.endpoint, "test") as pictures:
        headers = [message.header for _, message in zip(range(30), pictures.all(30), strict=False)]
    for before, header in itertools.pairwise(headers):
        lost = {stage for stage, count in header.drops.items() if count > before.drops[stage]} - {"sync"}
        assert lost or "overload" not in header.flag_names


def test_when_both_cameras_lose_power_health_says_that_no_pictures_come(monkeypatch: pytest.MonkeyPatch):
    lost = threading.Event()

    def opened(section, camera):
        source = open_source(section, camera)
        grab = source.grab

        def until_lost():
            if lost.is_set():
                raise SourceError("the camera does not answer")
            return grab()

        source.grab = until_lost
        return source

    monkeypatch.setattr("pipeline.live.open_source", opened)
    monkeypatch.setattr("pipeline.telemetry.RECENT_NS", 10**9)
    with (
        running() as rig,
        Client(rig.endpoint, "test", "health") as health,
        Client(rig.endpoint, "test", "event") as events,
    ):
        told = first_told(health, lambda told: told["mode"] == "fused")
        assert told["details"]["fps"] > 5
        lost.set()
        told = first_told(health, lambda told: told["mode"] == "stub" and told["details"]["fps"] == 0)
        assert told["details"]["fused"] > 0
        for message in events.all(timeout_s=30):
            if message.data()["details"].get("after") == "stub":
                assert message.header.mode == "stub"
                break


def test_two_pictures_at_once_double_the_rate_and_keep_their_order():
    """Each takes 100 ms of the 40 ms between two frames."""
    engine = CountingEngine(fuse_s=0.1, at_once=2)
    indices: list[int] = []
    captured: list[int] = []

    def note(fused) -> None:
        indices.append(fused.index)
        captured.append(fused.aligned.pair.captured_ns)

    report = run_until(lambda modes: modes.total() == 60, engine=engine, on_fused=note)
    assert engine.most == 2
    assert report["fps"] <= 20.5
    assert indices == list(range(len(indices)))
    assert captured == sorted(captured)
    assert_every_frame_is_accounted_for(report)


def test_pictures_that_were_in_a_failed_engine_are_fused_by_its_successor_in_order(monkeypatch: pytest.MonkeyPatch):
    spare = MaximumEngine()
    spare.description = replace(spare.description, runtime="pytorch")
    monkeypatch.setattr("pipeline.live.engine_for", lambda _: spare)
    indices: list[int] = []
    engine = MaximumEngine(fuse_s=0.05, fails_at=20, at_once=2)
    report = run_until(lambda modes: modes.total() > 30, engine=engine, on_fused=lambda f: indices.append(f.index))
    assert report["engine"]["runtime"] == "pytorch"
    assert indices == list(range(len(indices)))
    assert_every_frame_is_accounted_for(report)


def test_an_engine_that_fails_at_the_first_priors_is_replaced(monkeypatch: pytest.MonkeyPatch):
    """Network video: the first pair is the first that the runtime sees."""

    class NoMemory(MaximumEngine):
        def estimate_priors(self, infrared, visible):
            raise EngineError("the GPU has no memory left")

    spare = MaximumEngine()
    spare.description = replace(spare.description, runtime="pytorch")
    monkeypatch.setattr("pipeline.live.engine_for", lambda _: spare)
    monkeypatch.setattr("pipeline.live.expected_size", lambda *_: None)
    report = run_until(lambda modes: modes.total() > 10, engine=NoMemory())
    assert report["engine"]["runtime"] == "pytorch"
    assert any("no memory left" in line for line in report["fallbacks"])
    assert report["fused"] > 10
    assert_every_frame_is_accounted_for(report)


def test_a_failure_with_pictures_in_the_network_leaves_nothing_open(tmp_path: Path):
    def refuse(fused) -> None:
        if fused.index == 8:
            raise RuntimeError("the consumer broke")

    engine, before = MaximumEngine(fuse_s=0.05, at_once=2), set(threading.enumerate())
    config = rig_config(output={"video": str(tmp_path / "fused.mp4")})
    with pytest.raises(RuntimeError, match="the consumer broke"):
        LivePipeline(config, engine=engine, on_fused=refuse).run(duration_s=90)
    assert engine.closed
    assert [file.name for file in tmp_path.iterdir()] == ["fused.mp4"]
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith(("fuse-", "priors"))]


def test_what_is_still_in_the_network_long_after_the_end_is_dropped_and_accounted_for():
    class Stuck(MaximumEngine):
        def fuse(self, infrared, visible, priors):
            if self.calls == 12:
                pipeline.stop()
                ended.wait(60)
            return super().fuse(infrared, visible, priors)

    ended = threading.Event()
    pipeline = LivePipeline(rig_config(), engine=Stuck())
    report = pipeline.run(duration_s=90)
    ended.set()
    assert report["dropped"]["fuse"]["stopping"] >= 1
    assert report["pairs"] == report["fused"] + sum(report["dropped"]["fuse"].values())
    assert_every_frame_is_accounted_for(report)


def test_an_engine_that_fails_in_flight_is_replaced_and_reported(monkeypatch: pytest.MonkeyPatch):
    spare = MaximumEngine()
    spare.description = replace(spare.description, runtime="pytorch")
    monkeypatch.setattr("pipeline.live.engine_for", lambda _: spare)
    report = run_until(lambda modes: modes.total() > 30, engine=MaximumEngine(fails_at=20))
    assert report["engine"]["runtime"] == "pytorch"
    assert any("the runtime gave up" in line for line in report["fallbacks"])
    assert report["fused"] > 20


def test_an_engine_whose_first_real_picture_is_not_pytorchs_is_replaced_and_reported(monkeypatch: pytest.MonkeyPatch):
    class Unproven(MaximumEngine):
        def prove(self, infrared, visible, priors, fused):
            assert fused.shape == visible.shape
            raise EngineError("openvino fp32 does not compute what PyTorch computes on this machine (20.0 dB)")

    spare = MaximumEngine()
    spare.description = replace(spare.description, runtime="pytorch")
    monkeypatch.setattr("pipeline.live.engine_for", lambda _: spare)
    report = run_until(lambda modes: modes.total() > 10, engine=Unproven())
    assert report["engine"]["runtime"] == "pytorch"
    assert any("20.0 dB" in line for line in report["fallbacks"])
    assert report["fused"] > 10


def test_an_engine_that_hangs_is_replaced_as_one_that_fails(monkeypatch: pytest.MonkeyPatch, caplog):
    class Hangs(MaximumEngine):
        def fuse(self, infrared, visible, priors):
            if self.calls >= 20:
                ended.wait(80)
            return super().fuse(infrared, visible, priors)

        def close(self):
            ended.wait(80)

    ended = threading.Event()
    spare_engine(monkeypatch)
    monkeypatch.setattr("pipeline.live.HUNG_S", 1.0)
    monkeypatch.setattr("pipeline.live.CLOSE_ENGINE_S", 0.1)
    indices: list[int] = []
    try:
        report = run_until(lambda modes: modes.total() > 30, engine=Hangs(), on_fused=lambda f: indices.append(f.index))
    finally:
        ended.set()
    assert report["engine"]["runtime"] == "pytorch"
    (line,) = report["fallbacks"]
    assert line == "openvino failed while running (the engine hangs: no picture in 1 s): pytorch serves from now on"
    assert [record.getMessage() for record in caplog.records].count(line) == 1
    assert indices == list(range(len(indices)))
    assert_every_frame_is_accounted_for(report)


@pytest.mark.parametrize("at", ["the first picture", "any picture"])
def test_an_engine_that_is_slow_or_has_to_compile_does_not_pass_for_one_that_hangs(monkeypatch, at: str):
    """A second for the first picture of a size, or for each, where an engine hangs after 0.3 s without an answer."""

    class Slow(MaximumEngine):
        def fuse(self, infrared, visible, priors):
            lone = not visible.any() or not infrared.any()
            if at == "any picture" or (not lone and not seen):
                time.sleep(1)
                seen.append(True)
            return super().fuse(infrared, visible, priors)

    seen: list[bool] = []
    monkeypatch.setattr("pipeline.live.HUNG_S", 0.3)
    monkeypatch.setattr("pipeline.live.expected_size", lambda *_: None)
    report = run_until(lambda modes: modes.total() > 4, engine=Slow())
    assert report["engine"]["runtime"] == "openvino"
    assert report["fallbacks"] == []


def test_pictures_of_an_engine_that_took_the_place_of_a_failed_one_say_so(monkeypatch: pytest.MonkeyPatch):
    spare_engine(monkeypatch)
    with running(engine=MaximumEngine(fails_at=20)) as rig, Client(rig.endpoint, "test") as pictures:
        for message in pictures.all(timeout_s=30):
            assert ("degraded_model" in message.header.flag_names) == (message.header.runtime == "pytorch")
            if message.header.runtime == "pytorch":
                break


def test_priors_that_cannot_be_estimated_are_told_once_while_the_frames_go_on(caplog):
    class Forgetful(MaximumEngine):
        def estimate_priors(self, infrared, visible):
            if self.estimates >= 2:
                raise EngineError("no memory left")
            return super().estimate_priors(infrared, visible)

    config = rig_config(priors={"every_frames": 2})
    with running(config, Forgetful()) as rig:
        wait_until(lambda: rig.telemetry.fallbacks and rig.report()["priors"]["failures"] > 2)
        line = "priors could not be estimated (no memory left): the frames go on with older ones"
        assert rig.telemetry.fallbacks == [line]
        assert [record.getMessage() for record in caplog.records].count(line) == 1


def test_held_pictures_of_a_closed_shutter_say_so():
    config = rig_config(infrared={"shutter_every_s": 2.0, "shutter_s": 0.6})
    with running(config) as rig, Client(rig.endpoint, "test") as pictures:
        for message in pictures.all(timeout_s=60):
            closed = "ffc" in message.header.flag_names
            assert not closed or message.header.mode in ("held", "vis_only")
            if closed:
                break


def test_an_infrared_camera_that_hangs_while_the_visible_view_moves_is_called_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.capture.HANGING_S", 0.5)
    with running(rig_config(infrared={"shutter_every_s": 2.0, "shutter_s": 9.0})) as rig:
        until = time.monotonic() + 60
        while rig.report()["cameras"]["infrared"]["reconnects"] == 0 and time.monotonic() < until:
            time.sleep(0.1)
        assert rig.report()["cameras"]["infrared"]["reconnects"] >= 1
        assert rig.report()["cameras"]["visible"]["reconnects"] == 0


def test_a_shutter_freeze_is_never_published_as_fused():
    config = rig_config(infrared={"shutter_every_s": 2.0, "shutter_s": 0.6})
    ages = []

    def note(fused) -> None:
        if fused.mode == "fused":
            ages.append(abs(fused.aligned.pair.skew_ms))

    report = run_until(
        lambda modes: modes["fused"] > 60 and modes["held"] + modes["vis_only"] > 20, config, on_fused=note
    )
    assert max(ages) <= 1.5 * 40
    assert report["modes"]["held"] + report["modes"]["vis_only"] > 5
    assert_every_frame_is_accounted_for(report)


def test_a_video_that_fails_is_told_at_once_and_fusion_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog):
    def full(file, image, time_ns):
        if file.frames == 5:
            raise RuntimeError("the encoder broke")
        write(file, image, time_ns)

    write = BackgroundVideo.__init__.__globals__["VideoFile"].write
    monkeypatch.setattr("pipeline.record.VideoFile.write", full)
    with running(rig_config(output={"video": str(tmp_path / "fused.mp4")})) as rig:
        wait_until(lambda: rig.telemetry.fallbacks)
        fused = rig.telemetry.fused
        wait_until(lambda: rig.telemetry.fused > fused + 5)
        line = "the video fused.mp4 was given up after 5 frames: RuntimeError: the encoder broke"
        assert rig.telemetry.fallbacks == [line]
        assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING].count(line) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["fused.mp4"]


def test_a_video_without_an_encoder_is_told_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("av.container.OutputContainer.add_stream", None, raising=False)
    told: list[str] = []
    video = BackgroundVideo(tmp_path / "fused.mp4", 25.0, told.append)
    video.write(np.zeros((48, 64, 3), np.uint8), 0)
    wait_until(lambda: told)
    video.close()
    assert told == [video.failure]
    assert "given up after 0 frames" in told[0]
    assert list(tmp_path.iterdir()) == []


def recordings_of_which_one_fails(monkeypatch: pytest.MonkeyPatch, folder: Path, dies: str) -> RigConfig:
    """Two recordings of twelve frames, one of which cannot be read past its eighth."""

    def opened(section, camera):
        source = open_source(section, camera)
        grab = source.grab

        def until_it_fails():
            frame = grab()
            if camera == dies and frame.index == 8:
                raise SourceError("the disk does not answer")
            return frame

        source.grab = until_it_fails
        return source

    monkeypatch.setattr("pipeline.live.open_source", opened)
    names = {"infrared": write_video(folder / "ir.mkv", colour=False), "visible": write_video(folder / "vis.mkv")}
    return RigConfig.model_validate(
        {camera: {"kind": "stream", "url": str(path)} for camera, path in names.items()} | {"publish": {"endpoint": ""}}
    )


@pytest.mark.parametrize("dies", ["infrared", "visible"])
def test_a_recording_that_fails_on_the_way_ends_the_run_with_an_error_and_its_report_is_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dies: str
):
    config = recordings_of_which_one_fails(monkeypatch, tmp_path, dies)
    pipeline = LivePipeline(config, engine=MaximumEngine())
    with pytest.raises(SourceError, match=f"{dies}: the disk does not answer"):
        pipeline.run(30)
    report = pipeline.report()
    assert report["fallbacks"] == [f"the {dies} recording cannot be read to its end: the disk does not answer"]
    assert report["frames_in"] == {"ir": 8 if dies == "infrared" else 12, "vis": 8 if dies == "visible" else 12}
    assert report["fused"] > 0
    assert_every_frame_is_accounted_for(report)


def test_the_report_of_a_run_that_ends_with_an_error_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("pipeline.live.engine_for", lambda _: MaximumEngine())
    config = recordings_of_which_one_fails(monkeypatch, tmp_path, "visible")
    with pytest.raises(SourceError, match="the disk does not answer"):
        run_rig(config, 30, str(tmp_path / "report.json"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fused"] > 0
    assert "the disk does not answer" in report["fallbacks"][0]


def test_a_rig_whose_publisher_dies_ends_with_an_error_instead_of_going_on_mute(monkeypatch: pytest.MonkeyPatch):
    def dies() -> None:
        if pipeline.telemetry.published > 10:
            raise RuntimeError("out of descriptors")

    pipeline = LivePipeline(rig_config(), engine=MaximumEngine())
    monkeypatch.setattr(pipeline._publisher, "_read_subscriptions", dies)
    with pytest.raises(PublishError, match=r"nothing is published any more.*out of descriptors"):
        pipeline.run(90)
    report = pipeline.report()
    assert any("out of descriptors" in line for line in report["fallbacks"])
    assert report["fused"] == report["published"] + sum(report["dropped"].get("publish", {}).values())
    assert_every_frame_is_accounted_for(report)


def test_stop_ends_the_run_within_two_seconds_and_leaves_a_whole_video(tmp_path: Path):
    import av

    config = rig_config(output={"video": str(tmp_path / "fused.mp4")})
    begun = threading.Event()
    pipeline = LivePipeline(config, engine=MaximumEngine(), on_fused=lambda fused: fused.index > 20 and begun.set())
    reports = []
    thread = threading.Thread(target=lambda: reports.append(pipeline.run()))
    thread.start()
    assert begun.wait(60)
    asked = time.monotonic()
    pipeline.stop()
    thread.join(timeout=30)
    assert time.monotonic() - asked < 2 + 4  # and some for a busy machine
    skipped = reports[0]["dropped"].get("video", {}).get("too_slow", 0)
    with av.open(str(tmp_path / "fused.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == reports[0]["fused"] - skipped
    assert [file.name for file in tmp_path.iterdir()] == ["fused.mp4"]


def test_pairing_error_against_the_true_capture_time_is_below_half_a_period(monkeypatch: pytest.MonkeyPatch):
    """Clocks with jitter, drops and unlike phases; the truth is the simulated exposure, not the reported time."""
    cameras, phase_ns = {}, {"infrared": 12_000_000, "visible": 0}

    def open_and_keep(section, camera):
        source = cameras[camera] = open_source(section, camera)
        begin = source.open

        def in_phase() -> None:  # by itself it is chance: half a period apart, both partners are equally wrong
            begin()
            source._start_ns += (phase_ns[camera] - source._start_ns) % source.period_ns

        source.open = in_phase
        return source

    monkeypatch.setattr("pipeline.live.open_source", open_and_keep)
    faults = {"jitter_ms": 2.0, "drop_share": 0.02}
    errors_ms = []

    def note(fused) -> None:
        pair = fused.aligned.pair
        if fused.mode == "fused":
            times = [cameras[f.camera].true_capture_ns(f.index) for f in (pair.infrared, pair.visible)]
            errors_ms.append(abs(times[0] - times[1]) / 1e6)

    config = rig_config(infrared=faults, visible=faults)
    run_until(lambda modes: modes["fused"] > 80, config, on_fused=note)
    assert np.percentile(errors_ms, 90) <= 20  # where the partner was lost, the next one is 28 ms away


def test_a_calibrated_rig_is_reported_as_such(tmp_path: Path):
    config = rig_config()
    save_rig(true_rig(config.infrared, config.visible), tmp_path / "rig.yaml")  # type: ignore[arg-type]
    calibrated = config.model_copy(
        update={"registration": config.registration.model_copy(update={"calibration": str(tmp_path / "rig.yaml")})}
    )
    report = run_until(lambda modes: modes.total() > 10, calibrated)
    assert report["registration"]["state"] == "calibrated"
    assert report["fused"] > 10


def test_an_engine_that_registers_gets_the_infrared_picture_as_it_came_and_the_one_after_it_a_registered_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    config = rig_config()
    save_rig(true_rig(config.infrared, config.visible), tmp_path / "rig.yaml")  # type: ignore[arg-type]
    config = config.model_copy(update={"registration": RegistrationConfig(calibration=str(tmp_path / "rig.yaml"))})
    first, spare = RegisteringMaximumEngine(fails_at=20), MaximumEngine()
    spare.description = replace(spare.description, runtime="pytorch")
    monkeypatch.setattr("pipeline.live.engine_for", lambda _: spare)
    shapes = set()

    def note(fused: FusedFrame) -> None:
        if fused.mode == "fused":
            assert fused.aligned.infrared is not None
            shapes.add((fused.aligned.warp is None, fused.aligned.infrared.shape, fused.image.shape))

    report = run_until(lambda modes: modes["fused"] > 40, config, first, note)
    assert first.registered >= 15
    # As the camera sent it, 320 x 256, and then on the visible pixels.
    assert shapes == {(False, (256, 320), (240, 320, 3)), (True, (240, 320), (240, 320, 3))}
    assert report["registration"]["failures"] == 0
    assert_every_frame_is_accounted_for(report)


def test_a_camera_that_comes_back_with_another_size_leaves_the_other_one_on_air(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    config = rig_config()
    save_rig(true_rig(config.infrared, config.visible), tmp_path / "rig.yaml")
    config = config.model_copy(update={"registration": RegistrationConfig(calibration=str(tmp_path / "rig.yaml"))})

    def opened(section, camera):
        source = open_source(section, camera)
        grab, count = source.grab, iter(range(10**6))

        def smaller_later():
            frame = grab()
            return frame if camera == "visible" or next(count) < 50 else replace(frame, image=frame.image[:200])

        source.grab = smaller_later
        return source

    monkeypatch.setattr("pipeline.live.open_source", opened)
    grown: list[int] = []  # frames after the first pair of both, that show the visible picture alone

    def note(fused: FusedFrame) -> None:
        if grown or fused.mode == "fused":
            grown.append(fused.mode == "vis_only")

    report = run_until(lambda modes: modes["fused"] > 10 and sum(grown) > 20, config, on_fused=note)
    assert any("the infrared camera sends 320x200" in line for line in report["fallbacks"])
    assert report["accounting"]["ir"]["dropped"]["fuse.unfit_size"] > 10
    assert_every_frame_is_accounted_for(report)


def test_the_engine_is_compiled_before_the_cameras_start_where_the_size_is_known():
    class CompilesAtFirst(MaximumEngine):
        def fuse(self, infrared, visible, priors):
            if not self.calls:
                assert visible.shape == (240, 320, 3)
                time.sleep(1)
            return super().fuse(infrared, visible, priors)

    report = run_until(lambda modes: modes.total() > 20, engine=CompilesAtFirst())
    assert "starting" not in report["dropped"].get("fuse", {})
    # A camera that ran while the network was compiled would have lost 17; a busy machine may lose some.
    assert report["accounting"]["vis"]["dropped"].get("capture.handover", 0) < 10


def test_the_size_of_a_recording_is_known_before_it_is_played(tmp_path: Path):
    write_video(tmp_path / "vis.mkv", 5, size=(96, 64))
    config = rig_config().model_copy(update={"visible": StreamSource(url=str(tmp_path / "vis.mkv"))})
    assert expected_size(config, Register(config.registration, InfraredGain(config.gain))) == (96, 64)


def test_a_lone_infrared_frame_at_the_start_does_not_have_the_network_compiled_for_its_own_size(
    monkeypatch: pytest.MonkeyPatch,
):
    """An uncalibrated rig shows pictures of the visible camera's size, and that one sends a moment later."""
    sizes = []

    class Compiles(MaximumEngine):
        def fuse(self, infrared, visible, priors):
            sizes.append(visible.shape)
            return super().fuse(infrared, visible, priors)

    def late(section, camera):
        source = open_source(section, camera)
        if camera == "visible":
            begin = source.open
            monkeypatch.setattr(source, "open", lambda: (time.sleep(1), begin())[1])
        return source

    monkeypatch.setattr("pipeline.live.open_source", late)
    monkeypatch.setattr("pipeline.live.expected_size", lambda *_: None)
    monkeypatch.setattr("pipeline.live.VISIBLE_PATIENCE_NS", 80 * 10**9)
    report = run_until(
        lambda modes: modes.total() > 3, rig_config(infrared={"width": 160, "height": 128}), engine=Compiles()
    )
    assert set(sizes) == {(240, 320, 3)}
    assert report["dropped"]["fuse"]["starting"] > 3
    assert_every_frame_is_accounted_for(report)


def test_a_port_in_use_is_one_clear_line_and_leaves_nothing_open():
    first = LivePipeline(rig_config(), engine=MaximumEngine())
    config = rig_config(publish={"endpoint": first.endpoint})
    with pytest.raises(PublishError, match="in use"):
        LivePipeline(config, engine=MaximumEngine())
    first.run(duration_s=0.2)


def test_percentiles_are_exact_to_one_percent():
    distribution = Distribution()
    for value in range(1, 1001):
        distribution.add(value)
    assert distribution.percentile(0.5) == pytest.approx(500, rel=0.011)
    assert distribution.percentile(0.99) == pytest.approx(990, rel=0.011)


def test_the_rate_of_the_last_seconds_forgets_what_was_before(monkeypatch: pytest.MonkeyPatch):
    second, telemetry = 10**9, Telemetry()
    for number in range(250):  # 25 a second for ten seconds
        telemetry.fused_frame("fused", number * second // 25)
    assert telemetry.recent_fps(10 * second) == pytest.approx(25, rel=0.02)
    assert telemetry.recent_fps(12 * second) == pytest.approx(15, rel=0.02)  # three of the last five seconds
    assert telemetry.recent_fps(3600 * second) == 0
    assert telemetry.fps() == pytest.approx(25, rel=0.01)  # of the run


def test_a_fallback_is_logged_once_when_it_is_new(caplog):
    telemetry = Telemetry()
    for _ in range(3):
        telemetry.fallback("the video was given up")
        telemetry.fallback("its origin has logged this", logged=True)
    assert [record.getMessage() for record in caplog.records] == ["the video was given up"]
    assert telemetry.fallbacks == ["the video was given up", "its origin has logged this"]


def test_an_empty_run_has_no_percentiles_and_no_rate():
    report = Telemetry().report({"infrared": 0, "visible": 0})
    assert report["fps"] == 0.0
    assert report["skew_ms"] == {"p50": None, "p95": None}
