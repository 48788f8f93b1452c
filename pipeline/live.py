"""The live pipeline: wires the stages, from two capture threads to the publisher, and accounts for every frame.

    capture ─┐
             ├─► inbox ─► sync ─► register ─► fuse ─► publish (own thread)
    capture ─┘            one flow thread  └► network (own threads) └─► video file (own thread)

Where the machine is too slow, the oldest frame is dropped and counted by reason; latency stays bounded.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Condition, Event, Thread
from typing import Any

import numpy as np

from engines.base import NOISE_SEED, EngineError, FusionEngine, RegisteringEngine, fallbacks_of
from engines.openvino_engine import usable_cores
from engines.selection import create_engine
from pipeline.capture import RECYCLE_S, Capture
from pipeline.clock import ClockWatch
from pipeline.config import EngineConfig, RigConfig, Source, SyncConfig
from pipeline.errors import PublishError, SourceError
from pipeline.frame import AlignedPair, Camera, Frame, FramePair, FusedFrame
from pipeline.fuse import Begun, Fuse
from pipeline.gain import InfraredGain
from pipeline.publish import PublishContext, Publisher
from pipeline.record import BackgroundVideo
from pipeline.recording import inputs_of, path_of, picture_size, refuse_overwriting
from pipeline.redaction import redact
from pipeline.register import Register
from pipeline.sources.opening import open_source
from pipeline.sync import Sync
from pipeline.telemetry import Telemetry

log = logging.getLogger("dspfusion.live")

INBOX_FRAMES = 8  # per camera: about a third of a second; more would only be late
WAITING_PAIRS = 2  # one that is due and one behind it: a hiccup is caught up with, and latency stays bounded
STANDING_NS = 100_000_000  # where pairs wait all this time, it is no hiccup: they would only make all others late
LAST_PICTURE_S = 0.5  # at the end, what is in the network may still be published
VISIBLE_PATIENCE_NS = 3_000_000_000  # at the start: longer than a camera takes to send its first key frame
IDLE_S = 0.05  # how often the flow looks up when no frame comes
HUNG_S = 10.0  # without an answer, or five times as long as the picture before took: the engine hangs
HUNG_TIMES = 5.0
CLOSE_ENGINE_S = 3.0  # for an engine that is replaced: one that hangs may never return from its `close`
CAMERAS: tuple[Camera, Camera] = ("infrared", "visible")


class Inbox:
    """Where both capture threads leave their frames for the flow thread; bounded per camera, drops the oldest."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._frames: dict[Camera, deque[Frame]] = {camera: deque() for camera in CAMERAS}
        self._woken = False

    def wake(self) -> None:
        """Has the flow look up: the network has done a picture."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def put(self, frame: Frame) -> int:
        """Never waits. Returns how many older frames were pushed out."""
        with self._changed:
            frames = self._frames[frame.camera]
            pushed_out = int(len(frames) == INBOX_FRAMES)
            if pushed_out:
                frames.popleft()
            frames.append(frame)
            self._changed.notify()
            return pushed_out

    def take(self, timeout_s: float) -> list[Frame]:
        """All frames that wait, in capture order; empty after `timeout_s` without one, or when woken."""
        with self._changed:
            self._changed.wait_for(lambda: self._woken or any(self._frames.values()), timeout_s)
            self._woken = False
            frames = [frame for camera in CAMERAS for frame in self._frames[camera]]
            for camera in CAMERAS:
                self._frames[camera].clear()
        return sorted(frames, key=lambda frame: frame.captured_ns)


@dataclass
class _Running:
    """A pair that the network has, and when it got it."""

    pair: FramePair
    aligned: AlignedPair
    started_ns: int
    registered_ns: int
    begun: Begun = field(init=False)


class FrameLedger:
    """Says of every source frame that left synchronisation whether a fused picture shows it."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._last: dict[Camera, tuple[Frame, str | None]] = {}  # only the newest frame can come again, as held

    def settle(self, pair: FramePair, dropped_because: str | None) -> None:
        """Books the frames of a pair that was fused (None), or dropped in the fuse stage for a reason."""
        for frame in (pair.infrared, pair.visible):
            if frame is None:
                continue
            last = self._last.get(frame.camera)
            again = last is not None and last[0] is frame
            if again and (dropped_because is not None or last[1] is None):  # type: ignore[index]
                continue
            if again:  # dropped with an earlier pair, but shown after all
                self._telemetry.frame_dropped(frame.camera, "fuse", last[1] or "", -1)  # type: ignore[index]
            if dropped_because is None:
                self._telemetry.frame_used(frame.camera)
            else:
                self._telemetry.frame_dropped(frame.camera, "fuse", dropped_because)
            self._last[frame.camera] = (frame, dropped_because)

    def withdraw(self, begun: list[FramePair], finished: FramePair | None) -> None:
        """Books the frames of pairs as dropped that were settled as fused, but came too late to be published.

        Args:
            begun: these pairs, the last ones that were settled as fused.
            finished: the pair before them, which may show the same frame of one camera.
        """
        shown = () if finished is None else (finished.infrared, finished.visible)
        late = {id(frame): frame for pair in begun for frame in (pair.infrared, pair.visible) if frame is not None}
        for frame in late.values():
            if not any(frame is other for other in shown):
                self._telemetry.frame_used(frame.camera, -1)
                self._telemetry.frame_dropped(frame.camera, "fuse", "stopping")


class LivePipeline:
    """One rig, running. Build it, `run` it, read the report.

    Args:
        config: the rig.
        engine: serves instead of the one that the configuration asks for.
        on_fused: called with every fused frame in the flow thread.
        keep_earlier: the video of an earlier run is kept under another name, not replaced.

    Raises:
        DspfusionError, EngineError, CalibrationError: the configuration cannot be run; nothing is left open.
    """

    def __init__(
        self,
        config: RigConfig,
        engine: FusionEngine | None = None,
        on_fused: Callable[[FusedFrame], None] | None = None,
        keep_earlier: bool = True,
    ) -> None:
        refuse_overwriting(config.output.video, *inputs_of(config))
        self.config = config
        self.telemetry = Telemetry()
        self._stop = Event()
        self._on_fused = on_fused
        self._warm = False
        self.compiling = False  # the flow waits for the runtime, for seconds; nothing has been fused yet
        self._shutting_down = False
        self._started_ns = self._first_fused_ns = 0
        self._ended: dict[str, dict[str, Any]] = {}  # what `_cameras` told once all had ended
        self._earlier_updates = self._earlier_failures = 0  # of the priors, with engines that were replaced
        self._inbox = Inbox()
        self._waiting: deque[FramePair] = deque()
        self._waiting_since_ns: int | None = None  # that there always was one
        self._running: deque[_Running] = deque()  # in the network, oldest first
        self._finished_pair: FramePair | None = None  # the newest
        self._unanswered_s = 0.0  # how long the network has been silent
        self._last_answer_s = 0.0  # how long the newest picture took
        self._turned_ns = 0
        self._overloaded = 0  # drops for want of time, as the last header told
        self._replaced = False  # the engine failed while it ran
        self._ledger = FrameLedger(self.telemetry)
        self._gain = InfraredGain(config.gain)
        with ExitStack() as undo:
            self._register = Register(config.registration, self._gain, background=True)
            undo.callback(self._register.close)
            sync = with_rig_offset(config.sync, self._register)
            self._sync = Sync(sync)
            self._clock: ClockWatch | None = None
            if config.sync.track_offset:
                self._clock = ClockWatch(sync.infrared_offset_ms, sync.visible_offset_ms)
            sources = {
                "infrared": open_source(config.infrared, "infrared"),
                "visible": open_source(config.visible, "visible"),
            }
            sections = {"infrared": config.infrared, "visible": config.visible}
            self._captures = {
                camera: Capture(sources[camera], self._inbox.put, config.capture, recycle_s(sections[camera]))
                for camera in CAMERAS
            }
            self._publisher = Publisher(
                config.publish,
                config.rig,
                health=self._health,
                on_published=self._published,
                on_failure=self._note_logged,
            )
            undo.callback(self._publisher.close)
            self._video: BackgroundVideo | None = None
            if config.output.video:
                rate_hz = getattr(config.visible, "rate_hz", None) or 25.0
                self._video = BackgroundVideo(config.output.video, rate_hz, self.telemetry.fallback, keep_earlier)
                undo.callback(self._video.close)
            self._engine = engine or engine_for(for_frames(config.engine))
            self._engine_sha = engine_sha256(self._engine)
            self._fuse = self._new_fuse(0)
            undo.pop_all()
        self._note_fallbacks()

    @property
    def endpoint(self) -> str:
        """Where the fused frames are published, as bound."""
        return self._publisher.endpoint

    def invite(self, folder: Path) -> tuple[str, Path] | None:
        """See `Publisher.invite`."""
        return self._publisher.invite(folder)

    def stop(self) -> None:
        """Asks the run to end; may be called from any thread or a signal handler."""
        self._stop.set()

    def run(self, duration_s: float | None = None) -> dict[str, Any]:
        """Runs until `stop`, the end of both recordings, or `duration_s`, and returns the report.

        Raises:
            SourceError: a recording could not be read to its end. `report` still tells of all that was done.
            PublishError: the publisher failed for good, so the run was ended. The same holds.
            EngineError: the last runtime failed.
        """
        self._started_ns = time.monotonic_ns()
        try:
            self._warm_up()
            if self._clock is not None:
                self._clock.start()
            deadline = None if duration_s is None else time.monotonic() + duration_s
            for capture in self._captures.values():
                capture.start()
            while not self._stop.is_set() and (deadline is None or time.monotonic() < deadline):
                self._turn()
                if all(capture.state == "ended" or capture.failure for capture in self._captures.values()):
                    break
                if self._publisher.failure is not None:
                    break
        finally:
            self._shut_down()
        for camera, capture in self._captures.items():
            if capture.failure is not None:  # of a recording; a camera is called back for ever
                raise SourceError(f"{camera}: {capture.failure}")
        if self._publisher.failure is not None:
            raise PublishError(self._publisher.failure)
        return self.report()

    def report(self) -> dict[str, Any]:
        """The report of the run so far; exact once the run has ended."""
        self._note_fallbacks()
        cameras = self._ended or self._cameras()
        return self.telemetry.report(
            {camera: counters["captured"] for camera, counters in cameras.items()},
            engine=describe_engine(self._engine, self._fuse.psnr_db),
            priors={
                "updates": self._earlier_updates + self._fuse.keeper.updates,
                "failures": self._earlier_failures + self._fuse.keeper.failures,
                "steps": self.config.engine.diffusion_steps,
            },
            registration=self._register.report(),
            clock=self._clock.report() if self._clock is not None else {"state": "off"},
            cameras=cameras,
            start_up_ms=round((self._first_fused_ns - self._started_ns) / 1e6, 1) if self._first_fused_ns else None,
        )

    # The flow

    def _warm_up(self) -> None:
        """Has the runtime compiled before the cameras start, where the size of the picture is known in advance."""
        size = expected_size(self.config, self._register)
        if size is not None:
            infrared = np.zeros((size[1], size[0]), np.uint8)
            visible = np.zeros((size[1], size[0], 3), np.uint8)
            with self._marked_as_compiling():
                while not self._warm:
                    try:
                        self._engine.fuse(infrared, visible, self._engine.estimate_priors(infrared, visible))
                        self._warm = True
                    except Exception as error:
                        self._replace_engine(error)

    @contextmanager
    def _marked_as_compiling(self) -> Iterator[None]:
        self.compiling = True
        try:
            yield
        finally:
            self.compiling = False

    def _turn(self) -> None:
        """One turn of the flow: what came in, what is due, and what the network has done."""
        for frame in self._inbox.take(self._patience_s()):
            if self._clock is not None:
                self._clock.offer(frame)
            self._sync.add(frame, time.monotonic_ns())
        self._captures["infrared"].hanging = self._sync.infrared_hangs
        if self._clock is not None:
            self._sync.shift_infrared(self._clock.slew(time.monotonic_ns()))
        self._waiting.extend(self._sync.poll(time.monotonic_ns()))
        while len(self._waiting) > WAITING_PAIRS:
            self._drop(self._waiting.popleft(), "overload")
        # The network gets its next pair before the last picture is published: both take time.
        if self._waiting and self._may_begin and not self._stop.is_set():  # a first picture of a size takes seconds
            pair = self._waiting.popleft()
            if self._warm:
                self._begin(pair)
            elif pair.visible is None and time.monotonic_ns() - self._started_ns < VISIBLE_PATIENCE_NS:
                self._drop(pair, "starting")  # the network is compiled for the size of the visible picture
            else:
                self._warm_up_with(pair)
        self._drop_standing()
        while self._running and self._running[0].begun.done:
            self._finish(self._running.popleft())
        self._judge_engine()
        self._note_fallbacks()

    def _judge_engine(self) -> None:
        """Replaces an engine that hangs. A pause of this very process is not held against it, nor is a compilation."""
        now_ns = time.monotonic_ns()
        turn_s, self._turned_ns = (now_ns - self._turned_ns) / 1e9, now_ns
        if not self._running or not self._fuse.served(self._running[0].begun):
            self._unanswered_s = 0.0
            return
        self._unanswered_s += min(turn_s, 2 * IDLE_S)
        if self._unanswered_s > max(HUNG_S, HUNG_TIMES * self._last_answer_s):
            error = EngineError(f"the engine hangs: no picture in {self._unanswered_s:.0f} s")
            self._unanswered_s = 0.0
            self._recover(error, list(self._running), self._running[0].begun.index)

    def _drop_standing(self) -> None:
        """Drops all but the newest pair that waits, where they have become a queue that stands.

        A machine that is too slow for a second drops as many pairs either way, but the others are on time.
        """
        now_ns = time.monotonic_ns()
        if not self._waiting:
            self._waiting_since_ns = None
        elif self._waiting_since_ns is None:
            self._waiting_since_ns = now_ns
        elif now_ns - self._waiting_since_ns > STANDING_NS:
            self._waiting_since_ns = None
            while len(self._waiting) > 1:
                self._drop(self._waiting.popleft(), "overload")

    @property
    def _may_begin(self) -> bool:
        at_once = self._engine.description.at_once  # beside them, one may be finished or wait for its turn
        return len(self._running) <= at_once and sum(not running.begun.computed for running in self._running) < at_once

    def _patience_s(self) -> float:
        if self._waiting and self._may_begin:
            return 0.0
        deadline = self._sync.next_deadline_ns
        if deadline is None:
            return IDLE_S
        return min(IDLE_S, max(0.0, (deadline - time.monotonic_ns()) / 1e9))

    def _warm_up_with(self, pair: FramePair) -> None:
        """The first pair has the runtime compiled for its size. It and what came in meanwhile are late."""
        self._warm = True
        with self._marked_as_compiling():
            aligned, now_ns = self._register(pair), time.monotonic_ns()
            self._finished(self._begun(_Running(pair, aligned, now_ns, now_ns)))
        self._fuse.index = 0  # this picture is not published
        for frame in self._inbox.take(0):
            self._sync.add(frame, time.monotonic_ns())
        for late in [pair, *self._waiting, *self._sync.poll(time.monotonic_ns())]:
            self._drop(late, "starting")
        self._waiting.clear()

    def _drop(self, pair: FramePair, reason: str) -> None:
        self.telemetry.pair(pair.mode, pair.skew_ms)
        self.telemetry.drop("fuse", reason)
        self._ledger.settle(pair, reason)

    def _begin(self, paired: FramePair) -> None:
        """Registers a pair and hands it to the network."""
        pair = self._fitting(paired)
        if pair is None:
            return
        self.telemetry.pair(pair.mode, pair.skew_ms)
        self._ledger.settle(pair, None)  # now, because pairs are settled in their order
        started_ns = time.monotonic_ns()
        aligned = self._register(pair)
        self._running.append(self._begun(_Running(pair, aligned, started_ns, time.monotonic_ns())))
        if not self.telemetry.fused:  # a lone picture's size may be new
            with self._marked_as_compiling():
                self._finish(self._running.popleft())

    def _finish(self, running: _Running) -> None:
        """Publishes what the network made of a pair, and books it."""
        pair = running.pair
        fused = self._finished(running)
        now_ns = time.monotonic_ns()
        self._unanswered_s, self._last_answer_s = 0.0, (now_ns - running.registered_ns) / 1e9
        reference = pair.visible or pair.infrared
        assert reference is not None
        times = {
            "capture": max(0.0, (reference.arrived_ns - reference.captured_ns) / 1e6),
            "sync": max(0.0, (running.started_ns - reference.arrived_ns) / 1e6),
            "register": (running.registered_ns - running.started_ns) / 1e6,
            "fuse": (now_ns - running.registered_ns) / 1e6,
        }
        for stage, milliseconds in times.items():
            self.telemetry.stage(stage, milliseconds)
        for step, milliseconds in step_times(running.aligned).items():
            self.telemetry.stage(step, milliseconds)
        fused = replace(fused, latency_ms=times)
        self._finished_pair = pair
        self.telemetry.fused_frame(fused.mode, now_ns)
        self._first_fused_ns = self._first_fused_ns or now_ns
        self._publisher.publish(fused, self._context(fused))
        if self._video is not None:
            self._video.write(fused.image, pair.captured_ns)
        if self._on_fused is not None:
            self._on_fused(fused)

    def _begun(self, running: _Running) -> _Running:
        try:
            running.begun = self._fuse.begin(running.aligned)
        except Exception as error:
            self._recover(error, [*self._running, running], self._fuse.index - len(self._running))
        return running

    def _finished(self, running: _Running) -> FusedFrame:
        """The frame of a pair; an engine that fails in flight is replaced by a slower one, and that is reported."""
        while True:
            try:
                return self._fuse.finish(running.begun)
            except Exception as error:
                if self._shutting_down:
                    raise
                self._recover(error, [running, *self._running], running.begun.index)

    def _recover(self, error: Exception, lost: list[_Running], first_index: int) -> None:
        """Replaces the engine, and begins again with what was in it. Raises the error where no runtime is left."""
        while True:
            self._replace_engine(error)
            self._fuse.index = first_index
            try:
                for running in lost:
                    running.begun = self._fuse.begin(running.aligned)
                return
            except Exception as another:
                error = another

    def _fitting(self, pair: FramePair) -> FramePair | None:
        """What is of use of a pair when a camera comes back with another picture size: the rig stays on air.

        A size that never fitted is the user's mistake, and registration refuses it.
        """
        misfits = self._register.misfits(pair) if self.telemetry.fused else {}
        for line in misfits.values():
            self.telemetry.fallback(f"frames that do not fit are dropped: {line}")
        if not misfits:
            return pair
        unfit = {frame.camera: frame for frame in (pair.infrared, pair.visible) if frame and frame.camera in misfits}
        infrared = None if "infrared" in unfit else pair.infrared
        visible = None if "visible" in unfit else pair.visible
        for frame in unfit.values():
            lone = frame.camera == "infrared"
            self._ledger.settle(
                FramePair(frame if lone else None, None if lone else frame, "ir_only" if lone else "vis_only"),
                "unfit_size",
            )
        if infrared is None and visible is None:
            self.telemetry.pair(pair.mode, pair.skew_ms)
            self.telemetry.drop("fuse", "unfit_size")
            return None
        return replace(pair, infrared=infrared, visible=visible, mode="vis_only" if infrared is None else "ir_only")

    def _replace_engine(self, error: Exception) -> None:
        """Puts a runtime that needs less in the place of the one that failed. Raises the error where none is left."""
        failed = self._engine.description.runtime
        if failed == "pytorch":
            raise error
        self._note_fallbacks()
        reason = " ".join(str(error).split()) or type(error).__name__
        self._fuse.close()
        self._earlier_updates += self._fuse.keeper.updates
        self._earlier_failures += self._fuse.keeper.failures
        _close_within(self._engine, CLOSE_ENGINE_S)
        for runtime in ("openvino", "pytorch") if failed in ("tensorrt", "compile") else ("pytorch",):
            config = self.config.engine.model_copy(update={"runtime": runtime, "precision": "auto"})
            try:
                self._engine = engine_for(for_frames(config))
            except EngineError as refusal:
                self.telemetry.fallback(f"{runtime}: {refusal}")
                if runtime == "pytorch":
                    raise
                continue
            break
        line = f"{failed} failed while running ({reason}): {self._engine.description.runtime} serves from now on"
        self.telemetry.fallback(line)
        self._replaced = True
        self._engine_sha = engine_sha256(self._engine)
        self._fuse = self._new_fuse(self._fuse.index)

    def _new_fuse(self, first_index: int) -> Fuse:
        self._register.leaves_warp = isinstance(self._engine, RegisteringEngine)
        return Fuse(
            self._engine,
            self.config.priors,
            background=True,
            steady=self.config.steady,
            on_done=self._inbox.wake,
            first_index=first_index,
        )

    def _note_logged(self, line: str) -> None:
        self.telemetry.fallback(line, logged=True)

    def _note_fallbacks(self) -> None:
        for line in [*fallbacks_of(self._engine), self._fuse.keeper.first_failure]:
            if line is not None:
                self._note_logged(line)

    def _note_faults(self) -> None:
        for camera, capture in self._captures.items():
            if capture.fault is not None:
                self._note_logged(capture.fault)
            if capture.failure is not None:
                self._note_logged(f"the {camera} recording cannot be read to its end: {redact(str(capture.failure))}")

    def _context(self, fused: FusedFrame) -> PublishContext:
        captured = {camera: sum(capture.dropped.values()) for camera, capture in self._captures.items()}
        in_fuse = self.telemetry.dropped("fuse")
        overloaded = in_fuse.get("overload", 0) + sum(captured.values())
        flags = {
            "overload": overloaded > self._overloaded,
            "ffc": fused.mode in ("held", "vis_only") and self._infrared_state == "shutter",
            "degraded_model": self._replaced,
        }
        self._overloaded = overloaded
        return publish_context(
            self._engine,
            self._engine_sha,
            self.config.engine,
            self._register,
            clock_offset_ns=self._sync.offset_ns,
            clock_drift_ppm=self._clock.drift_ppm if self._clock is not None else {},
            drops={**captured, "sync": total_of(self._sync.dropped), "fuse": sum(in_fuse.values())},
            flags=tuple(name for name, it_is in flags.items() if it_is),
        )

    def _published(self, fused: FusedFrame, sent_ns: int) -> None:
        self.telemetry.published_frame()
        self.telemetry.stage("capture_to_publish", (sent_ns - fused.aligned.pair.captured_ns) / 1e6)

    def _cameras(self) -> dict[str, dict[str, Any]]:
        cameras: dict[str, dict[str, Any]] = {camera: capture.counters() for camera, capture in self._captures.items()}
        cameras["infrared"] |= {"resting": self._sync.account.resting, "state": self._infrared_state}
        return cameras

    @property
    def _infrared_state(self) -> str:
        """As both cameras tell: a picture that repeats may also be a view at rest."""
        state = self._captures["infrared"].state
        if state not in ("live", "shutter"):
            return state
        return "shutter" if self._sync.infrared_frozen else "live"

    def _health(self) -> dict[str, Any]:
        return {
            "cameras": self._cameras(),
            "fused": self.telemetry.fused,
            "fps": self.telemetry.recent_fps(time.monotonic_ns()),
            "dropped": {
                "sync": {
                    f"{camera}_{reason}": count
                    for camera, reasons in self._sync.dropped.items()
                    for reason, count in dict(reasons).items()
                },
                "fuse": self.telemetry.dropped("fuse"),
            },
            "registration": self._register.report(),
            "fallbacks": list(self.telemetry.fallbacks),
        }

    # The end

    def _shut_down(self) -> None:
        for capture in self._captures.values():
            capture.stop(timeout_s=0.6)
        for frame in self._inbox.take(0):
            self._sync.add(frame, time.monotonic_ns())
        self._shutting_down = True
        try:
            while self._running and self._running[0].begun.wait(LAST_PICTURE_S):
                self._finish(self._running[0])
                self._running.popleft()
        except Exception as error:
            log.warning("the last picture is lost (%s)", error)
        self._ledger.withdraw([running.pair for running in self._running], self._finished_pair)
        self.telemetry.drop("fuse", "stopping", len(self._running))
        for pair in [*self._waiting, *self._sync.flush()]:
            self._drop(pair, "stopping")
        self._register.close()
        self._fuse.close()
        if self._clock is not None:
            self._clock.close()
        self._publisher.close()
        if self._video is not None:
            self._video.close()
            self.telemetry.drop("video", "too_slow", self._video.dropped)
        self._engine.close()
        self._note_faults()
        self._settle_counters()

    def _settle_counters(self) -> None:
        self._ended = self._cameras()
        book_publisher(self.telemetry, self._publisher)
        for camera in CAMERAS:
            for stage, reasons in (("capture", self._ended[camera]["dropped"]), ("sync", self._sync.dropped[camera])):
                for reason, count in reasons.items():
                    self.telemetry.drop(stage, f"{camera}_{reason}", count)
                    self.telemetry.frame_dropped(camera, stage, reason, count)


def with_rig_offset(config: SyncConfig, register: Register) -> SyncConfig:
    """The synchronisation with the offset and drift that the calibration measured added to the configured ones."""
    rig = register.rig
    if rig is None:
        return config
    clocks = {
        "infrared_offset_ms": config.infrared_offset_ms + rig.time_offset_ms,
        "infrared_drift_ppm": config.infrared_drift_ppm + rig.drift_ppm,
    }
    return config.model_copy(update=clocks)


def publish_context(
    engine: FusionEngine, engine_sha: str, config: EngineConfig, register: Register, **more: Any
) -> PublishContext:
    """What a header says beyond its frame, in a live run and in a replay."""
    return PublishContext(
        engine=engine.description,
        engine_sha=engine_sha,
        diffusion_steps=config.diffusion_steps,
        seed=NOISE_SEED,
        calibration_sha=register.calibration_sha256,
        warp=register.correction,
        **more,
    )


def book_publisher(telemetry: Telemetry, publisher: Publisher) -> None:
    """Books what was not published by a publisher that has closed."""
    statistics = publisher.statistics()
    for reason, count in statistics["dropped"].items():
        telemetry.drop("publish", reason, count)
    # These are messages, not frames: other subscribers may have got the same frame.
    telemetry.drop("messages", "slow_subscriber", statistics["slow_subscriber"])
    for stream, count in statistics["unsent"].items():
        telemetry.drop("messages", stream, count)


def total_of(dropped: Mapping[Camera, Counter[str]]) -> int:
    """Frames of both cameras."""
    return sum(reasons.total() for reasons in dropped.values())


def _close_within(engine: FusionEngine, patience_s: float) -> None:
    def close() -> None:
        with suppress(Exception):
            engine.close()

    closing = Thread(target=close, name="engine-closer", daemon=True)
    closing.start()
    closing.join(patience_s)


def expected_size(config: RigConfig, register: Register) -> tuple[int, int] | None:
    """(width, height) of the visible picture as calibration, recording or configuration tell; None of network video."""
    if register.rig is not None:
        return register.rig.visible.size
    if (path := path_of(config.visible)) is not None:
        return picture_size(path)
    width, height = getattr(config.visible, "width", None), getattr(config.visible, "height", None)
    return (width, height) if width and height else None


def step_times(aligned: AlignedPair) -> dict[str, float]:
    """Milliseconds that each step of the infrared conditioning took; a held frame was conditioned before."""
    times_ms: dict[str, float] = {} if aligned.pair.mode == "held" else aligned.gain.get("times_ms", {})
    return {f"infrared_{step}": milliseconds for step, milliseconds in times_ms.items()}


def recycle_s(source: Source) -> float:
    """How long a connection may be silent before it is closed from outside: longer than the source's own patience."""
    return max(RECYCLE_S, getattr(source, "read_timeout_s", 0.0) + 0.5)


def for_frames(config: EngineConfig) -> EngineConfig:
    """The engine section for frames that come at a rate: on two cores, two at once with a thread each.

    Two threads that share a frame wait for each other at every step of the network, and for whoever took a core from
    one of them: capture, decoding, encoding. Alone, one frame takes longer (26 instead of 16 ms), but two take less.
    """
    if config.threads == 0 and config.at_once == 0 and usable_cores() == 2:
        return config.model_copy(update={"threads": 1, "at_once": 2})
    return config


def engine_for(config: EngineConfig) -> FusionEngine:
    """The engine that a configuration asks for."""
    return create_engine(**config.model_dump())


def engine_sha256(engine: FusionEngine) -> str:
    """Of all that decides what an engine computes: network, weights, runtime and its version, precision."""
    told = engine.description
    library = {"openvino": "openvino", "tensorrt": "torch-tensorrt"}.get(told.runtime, "torch")
    try:
        version = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    parts = (told.variant, told.weights_sha256, told.runtime, told.precision, version)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def describe_engine(engine: FusionEngine, psnr_db: float | None = None) -> dict[str, Any]:
    """The report's account of which engine serves, why, and how close to PyTorch it was on a real pair."""
    description = asdict(engine.description) | {"psnr_db": psnr_db}
    description.pop("fallbacks")  # the report lists all fallbacks of the run in one place
    return description
