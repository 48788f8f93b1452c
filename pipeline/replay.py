"""Replay: two recordings through the same stages as live, in step, dropping nothing, bit-identical run to run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engines.base import FusionEngine, fallbacks_of
from pipeline.config import (
    EngineConfig,
    FolderSource,
    GainConfig,
    PriorsConfig,
    PublishConfig,
    RegistrationConfig,
    SteadyConfig,
    StreamSource,
    SyncConfig,
)
from pipeline.errors import SourceEnded, SourceError
from pipeline.frame import Camera, Frame, FusedFrame
from pipeline.fuse import Fuse
from pipeline.gain import InfraredGain
from pipeline.live import (
    FrameLedger,
    book_publisher,
    describe_engine,
    engine_for,
    engine_sha256,
    publish_context,
    step_times,
    total_of,
    with_rig_offset,
)
from pipeline.publish import Publisher
from pipeline.record import VideoFile
from pipeline.recording import doubts, probe, refuse_other_size, refuse_overwriting, refuse_unlikely
from pipeline.register import Register
from pipeline.shutter import Shutter
from pipeline.sources.base import Source
from pipeline.sources.opening import open_source
from pipeline.sync import Account, pair_recordings
from pipeline.telemetry import Telemetry

DEFAULT_RATE_HZ = 25.0  # of image folders, which have none of their own


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """What to replay and where the result goes."""

    infrared: str
    visible: str
    calibration: str | None = None
    refine: bool = True  # in step, so that equal input gives equal output
    rate_hz: float | None = None  # None: as fast as the machine can
    output: str | None = None
    publish: PublishConfig | None = None
    rig: str = "replay"
    engine: EngineConfig = EngineConfig()
    priors: PriorsConfig = PriorsConfig()
    steady: SteadyConfig = SteadyConfig()
    gain: GainConfig = GainConfig()
    sync: SyncConfig = SyncConfig()


def replay(
    config: ReplayConfig,
    engine: FusionEngine | None = None,
    on_start: Callable[[int], None] | None = None,
    on_fused: Callable[[FusedFrame], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Replays two recordings and returns the report.

    Args:
        config: inputs and outputs.
        engine: serves instead of the one that the configuration asks for.
        on_start: told how many visible frames there are, before the first one.
        on_fused: called with every fused frame.
        stopped: asked before every pair; True ends the replay early, and the output then holds what was fused so far.

    Raises:
        DspfusionError, EngineError, CalibrationError: bad input; nothing is left half-written.
    """
    refuse_overwriting(config.output, *(path for path in (config.infrared, config.visible, config.calibration) if path))
    infos = probe(config.infrared), probe(config.visible)
    refuse_unlikely(*infos)
    rate_hz = infos[1].rate_hz or infos[0].rate_hz or DEFAULT_RATE_HZ
    telemetry, account = Telemetry(), Account()
    for line in doubts(*infos, calibrated=config.calibration is not None):
        telemetry.fallback(line)
    with ExitStack() as stack:
        video = VideoFile(config.output, rate_hz) if config.output else None
        if video is not None:
            stack.callback(video.discard)  # does nothing to a file that was closed in order
        registration = RegistrationConfig(calibration=config.calibration, refine=config.refine)
        register = Register(registration, InfraredGain(config.gain))
        refuse_other_size(register.rig, *infos)
        publisher = Publisher(
            config.publish or PublishConfig(endpoint=""),
            config.rig,
            lossless=True,
            on_published=lambda *_: telemetry.published_frame(),
            on_failure=lambda line: telemetry.fallback(line, logged=True),
        )
        stack.callback(publisher.close)
        engine = engine or engine_for(config.engine)
        stack.callback(engine.close)
        engine_sha = engine_sha256(engine)
        fuse = Fuse(engine, config.priors, background=False, steady=config.steady)
        ledger = FrameLedger(telemetry)
        if on_start is not None:
            on_start(infos[1].frames)
        sources = source_of(config.infrared, "infrared", rate_hz), source_of(config.visible, "visible", rate_hz)
        started_ns = time.monotonic_ns()
        infrared, visible = (grab_all(source) for source in sources)
        sync = with_rig_offset(config.sync, register)
        offset_ns = {"infrared": round(sync.infrared_offset_ms * 1e6), "visible": round(sync.visible_offset_ms * 1e6)}
        pairs = pair_recordings(infrared, visible, sync, account)
        for pair in pairs:
            if stopped():
                telemetry.pair(pair.mode, pair.skew_ms)
                telemetry.drop("fuse", "stopping")
                ledger.settle(pair, "stopping")
                pairs.close()
                break
            if config.rate_hz:
                _wait_until(started_ns + round(telemetry.pairs / config.rate_hz * 1e9))
            telemetry.pair(pair.mode, pair.skew_ms)
            before = time.perf_counter()
            aligned = register(pair)
            registered = time.perf_counter()
            fused = fuse(aligned)
            times = {"register": (registered - before) * 1e3, "fuse": (time.perf_counter() - registered) * 1e3}
            fused = replace(fused, latency_ms=times)
            for stage, milliseconds in times.items():
                telemetry.stage(stage, milliseconds)
            for step, milliseconds in step_times(aligned).items():
                telemetry.stage(step, milliseconds)
            ledger.settle(pair, None)
            telemetry.fused_frame(fused.mode, time.monotonic_ns())
            if video is not None:
                video.write(fused.image, pair.captured_ns)
            context = publish_context(
                engine,
                engine_sha,
                config.engine,
                register,
                clock_offset_ns=offset_ns,
                clock_drift_ppm={"infrared": sync.infrared_drift_ppm},
                drops={"sync": total_of(account.dropped)},
            )
            publisher.publish(fused, context)
            if on_fused is not None:
                on_fused(fused)
        if video is not None:
            video.close()
        publisher.close(patient=not stopped())
        book_publisher(telemetry, publisher)
        for camera, reasons in account.dropped.items():
            for reason, count in reasons.items():
                telemetry.drop("sync", f"{camera}_{reason}", count)
                telemetry.frame_dropped(camera, "sync", reason, count)
        faults = [fault for source in sources if (fault := getattr(source, "fault", None))]
        for line in [*fallbacks_of(engine), *faults]:
            telemetry.fallback(line, logged=True)
        return telemetry.report(
            {"infrared": account.captured["infrared"], "visible": account.captured["visible"]},
            engine=describe_engine(engine, fuse.psnr_db),
            priors={"updates": fuse.keeper.updates, "steps": config.engine.diffusion_steps},
            registration=register.report(),
            cameras={
                source.camera: {"unreadable": getattr(source, "unreadable", 0)}
                | ({"resting": account.resting} if source.camera == "infrared" else {})
                for source in sources
            },
        )


def source_of(path: str, camera: Camera, rate_hz: float) -> Source:
    """A recording as a source that waits for nobody, not yet open."""
    if Path(path).is_dir():
        return open_source(FolderSource(path=path, rate_hz=rate_hz, realtime=False), camera)
    return open_source(StreamSource(url=str(Path(path)), realtime=False), camera)


def frames_of(path: str, camera: Camera, rate_hz: float) -> Iterator[Frame]:
    """All frames of a recording, from first to last."""
    return grab_all(source_of(path, camera, rate_hz))


def grab_all(source: Source) -> Iterator[Frame]:
    """Opens a recording, and gives all its frames."""
    shutter = Shutter()
    source.open()
    try:
        while True:
            try:
                yield shutter.judged(source.grab())
            except SourceEnded:
                return
            except SourceError as error:
                raise SourceError(f"{source.camera}: {error}") from None
    finally:
        source.close()


def _wait_until(when_ns: int) -> None:
    remaining_s = (when_ns - time.monotonic_ns()) / 1e9
    if remaining_s > 0:
        time.sleep(remaining_s)
