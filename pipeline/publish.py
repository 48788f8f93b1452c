"""Publish: fused frames out over ZeroMQ, from one thread that nobody waits for.

The fuse thread hands each frame over and goes on. The publisher's own thread encodes what somebody subscribes to,
and nothing else, sends it in one part, and says every second how it is. A slow subscriber loses frames at its own
edge; it slows nobody down. In a replay (`lossless`) the hand-over blocks instead, and a subscriber that reads
everything gets everything.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import stat
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import simplejpeg
import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from engines.base import EngineDescription
from pipeline import messages
from pipeline.config import PublishConfig, is_loopback
from pipeline.errors import ConfigError, PublishError
from pipeline.frame import Frame, FusedFrame, Mode
from pipeline.handover import HandoverClosed, Latest, Queue

log = logging.getLogger(__name__)

HEALTH_PERIOD_S = 1.0
STUB_AFTER_S = 1.0  # without a new picture, or after two periods of a slower rig: the last mode is no longer true
STUB_LATEST_S = 10.0
POLL_S = 0.02  # how long a new subscription may wait for the thread to notice it
SLOW_SUBSCRIBER_S = 2.0  # lossless: how long a full subscriber may hold the replay or its end back, then it has gaps
FLUSH_S = 0.2  # at an orderly end, for the last messages; a stopped subscriber costs us this and no more
LAST_READ_S = 2.0  # lossless: at the end, for subscribers to read what is under way, or until the last one has gone
LOSSLESS_BUFFER_BYTES = 256 << 10  # the system's own choice of 4 MB holds seconds that a slow reader is behind
COPY_BELOW_BYTES = 64 << 10  # below, handing ZeroMQ a reference costs more than the copy (pyzmq issue 1032)
CLOSE_S = 0.2  # live: for what waits at the end
STUCK_S = 1.0  # for the thread to come back, where it does not
MAX_SUBSCRIPTIONS = 4096  # prefixes remembered; beyond, somebody is playing


@dataclass(frozen=True, slots=True)
class PublishContext:
    """What a header says beyond its frame."""

    engine: EngineDescription | None = None
    engine_sha: str = ""
    diffusion_steps: int = 0
    seed: int = 0
    calibration_sha: str = ""
    warp: tuple[float, ...] | None = None  # 3x3, row by row
    drops: Mapping[str, int] = field(default_factory=dict)  # lost since the start, by stage; "publish" is added
    clock_offset_ns: Mapping[str, int] = field(default_factory=dict)  # camera -> what was taken off its capture times
    clock_drift_ppm: Mapping[str, float] = field(default_factory=dict)  # camera -> estimated, where one is known
    flags: tuple[str, ...] = ()  # of messages.STATE_FLAGS, beyond those that the frame itself tells


class UtcClock:
    """Turns monotonic times into UTC by an anchor that follows the system clock.

    Re-measured each second. A difference of up to 50 ms is the system clock being disciplined: the anchor follows
    by at most 1 ms a second, so times published one after another never jump. A larger one is a clock that was set:
    the anchor follows at once, and `stepped_ns` tells the caller so that consumers hear of it.
    """

    FOLLOW_NS = 1_000_000
    STEP_NS = 50_000_000

    def __init__(
        self, utc_ns: Callable[[], int] = time.time_ns, monotonic_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._utc_ns = utc_ns
        self._monotonic_ns = monotonic_ns
        self._offset_ns = self._measure()
        self._measured_at_ns = monotonic_ns()

    def utc(self, monotonic_ns: int) -> int:
        return monotonic_ns + self._offset_ns

    def follow(self) -> int:
        """Looks at the system clock when a second has passed. Returns the step in ns, 0 for none."""
        now_ns = self._monotonic_ns()
        elapsed_ns = now_ns - self._measured_at_ns
        if elapsed_ns < 1_000_000_000:
            return 0
        self._measured_at_ns = now_ns
        difference_ns = self._measure() - self._offset_ns
        if abs(difference_ns) > self.STEP_NS:
            self._offset_ns += difference_ns
            return difference_ns
        limit_ns = self.FOLLOW_NS * elapsed_ns // 1_000_000_000
        self._offset_ns += max(-limit_ns, min(limit_ns, difference_ns))
        return 0

    def _measure(self) -> int:
        """UTC minus monotonic, from the quickest of three readings (a thread switch in between spoils one)."""
        readings = []
        for _ in range(3):
            before_ns = self._monotonic_ns()
            utc_ns = self._utc_ns()
            after_ns = self._monotonic_ns()
            readings.append((after_ns - before_ns, utc_ns - (before_ns + after_ns) // 2))
        return min(readings)[1]


@dataclass(frozen=True, slots=True)
class _Work:
    """One frame on its way from the fuse thread to the publisher's thread."""

    fused: FusedFrame
    context: PublishContext
    sequences: dict[str, int]  # stream -> sequence number, for the pictures that there are
    handed_over_ns: int


class GuestList:
    """Who may subscribe to an encrypted publisher, by their public keys."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()  # Z85

    def callback(self, domain: str, key: bytes) -> bool:
        """What ZeroMQ's authenticator asks, from its own thread."""
        return key in self.keys


class Publisher:
    """Owns the socket and its thread. Open from construction until `close`."""

    def __init__(
        self,
        config: PublishConfig,
        rig: str,
        *,
        lossless: bool = False,
        timeline: Literal["monotonic", "recording"] | None = None,
        health: Callable[[], dict[str, Any]] | None = None,
        on_published: Callable[[FusedFrame, int], None] | None = None,
        on_failure: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Opens the endpoint and starts publishing health.

        Args:
            config: endpoint "" publishes nothing, but counts and calls back all the same.
            rig: the name in every topic.
            lossless: `publish` waits instead of replacing, and full subscribers are waited for.
            timeline: what Frame.captured_ns counts from: this machine's monotonic clock, or the first frame of a
                recording, which is then laid at the moment of construction. None: recording if lossless.
            health: asked once a second for the state of the cameras; its "cameras" entry and all others are sent.
            on_published: called in the publisher's thread as (fused, time.monotonic_ns() after its last message).
            on_failure: called with one line, already logged, the first time that frames or data cannot be published.

        Raises:
            ConfigError: an endpoint that leaves this machine without keys, or keys that cannot be used.
            PublishError: an endpoint that cannot be opened.
        """
        self._config = config
        self._rig = rig
        self._lossless = lossless
        self._recording = (timeline or ("recording" if lossless else "monotonic")) == "recording"
        self._health = health
        self._on_published = on_published
        self._on_failure = on_failure
        self.failure: str | None = None  # why nothing is published any more
        self.session = random.SystemRandom().getrandbits(53)  # 53 bits are exact in JavaScript too
        self._clock = UtcClock()
        self._started_ns = time.monotonic_ns()
        self._recording_start_utc_ns = self._clock.utc(self._started_ns)
        self._stepped_at_ns: int | None = None

        self._handover: Latest[_Work] | Queue[_Work] = Queue(4) if lossless else Latest()
        self._events: deque[messages.Event] = deque(maxlen=64)
        self._lock = threading.Lock()
        self._sequences: Counter[str] = Counter()
        self._mode: Mode | Literal["stub"] | None = None  # None before the first picture
        self._newest_ns = 0  # when the newest picture came, or was sent
        self._stub_after_s = STUB_AFTER_S
        self._stopping = threading.Event()
        self._closed = False
        self._patient = True

        self._accepted = 0
        self._published = 0
        self._sent: Counter[str] = Counter()
        self._sent_bytes = 0
        self._encoded: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._unsent: Counter[str] = Counter()
        self._seen_replaced = 0
        self._slow = False
        self._stages: dict[str, deque[float]] = {
            name: deque(maxlen=2048) for name in ("publish_wait", "encode", "publish")
        }
        self._subscriptions: set[bytes] = set()
        self._fresh_subscriptions: list[bytes] = []

        self._zmq: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._authenticator: ThreadAuthenticator | None = None
        self._public_key = ""  # of ours, Z85; "" without encryption
        self._guests = GuestList()
        self.endpoint = ""  # as bound: a port of 0 is replaced by the one that was given
        if config.endpoint:
            self._open()
        self.event("started", f"rig {rig} publishes {', '.join(config.streams)}")
        self._thread = threading.Thread(target=self._run, name="publish", daemon=True)
        self._thread.start()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- called by other threads ------------------------------------------------------------------------------

    def publish(self, fused: FusedFrame, context: PublishContext | None = None) -> None:
        """Hands one fused frame over. Live: returns at once, and replaces a frame that still waits, which is counted.
        Lossless: waits until there is room. The frame's pixels must not be changed afterwards.
        """
        with self._lock:
            self._accepted += 1
            if self._closed:
                self._dropped["closed"] += 1
                return
            sequences = {}
            for stream in self._streams(fused):
                sequences[stream] = self._sequences[stream]
                self._sequences[stream] += 1
            now_ns = time.monotonic_ns()
            self._stub_after_s = patience_s((now_ns - (self._newest_ns or now_ns)) / 1e9)
            self._newest_ns = now_ns
            self._change_mode(fused.mode, frame=fused.index)
        work = _Work(fused, context or PublishContext(), sequences, now_ns)
        try:
            self._handover.put(work)
        except HandoverClosed:
            self._count_closed()

    def _change_mode(self, mode: Mode | Literal["stub"], **details: Any) -> None:
        """Notes the mode, and tells of a change; called with the lock held, so that the events keep their order."""
        before, self._mode = self._mode, mode
        if before is not None and before != mode:
            self.event("mode", f"{before} -> {mode}", before=before, after=mode, **details)

    def event(self, kind: str, text: str, **details: Any) -> None:
        """Tells subscribers of `event` that something happened. Never waits."""
        self._events.append(messages.Event(kind=kind, text=text, details=details))

    def invite(self, folder: Path) -> tuple[str, Path] | None:
        """Makes keys for one more subscriber, such as the viewer of this rig, and lets it in while we run.

        Returns:
            Our public key, and the file in `folder` with the subscriber's secret one; None where nothing is encrypted.
        """
        if not self._public_key:
            return None
        public, secret = create_keys(folder, "guest")
        self._guests.keys.add(zmq.auth.load_certificate(public)[0])
        return self._public_key, secret

    def statistics(self) -> dict[str, Any]:
        """Counts since the start, and percentiles of the newest 2048 frames.

        `accepted = published + sum(dropped) + waiting`; `dropped` is by reason: replaced (live: the thread was
        busy), closed, error. `slow_subscriber` counts messages, not frames, and lossless only; `unsent` counts
        messages of health, event and schema that could not be made, by stream.
        """
        with self._lock:
            dropped = dict(self._dropped)
            if self._handover.dropped:
                dropped["replaced"] = self._handover.dropped
            slow = dropped.pop("slow_subscriber", 0)
            return {
                "accepted": self._accepted,
                "published": self._published,
                "dropped": dropped,
                "slow_subscriber": slow,
                "unsent": dict(self._unsent),
                "sent": dict(self._sent),
                "sent_bytes": self._sent_bytes,
                "encoded": dict(self._encoded),
                "subscriptions": sorted(prefix.decode("ascii", "replace") for prefix in self._subscriptions),
                "latency_ms": {name: _percentiles(values) for name, values in self._stages.items() if values},
            }

    def close(self, patient: bool = True) -> None:
        """Sends `stopping`, and closes; what waits for longer than 0.2 s is counted as dropped.

        The frame that is being sent is finished, and subscribers that do not read have 0.2 s more. A thread that has
        not ended after 1.2 s is stuck: it is left behind with its socket, and that is told.
        Lossless: what waits is sent, for at most 5 s instead of 0.2, and subscribers have 2 s to read it if `patient`.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._patient = patient
        self.event("stopping", f"rig {self._rig} stops publishing")
        self._handover.close()  # what waits is still sent
        self._thread.join(timeout=5.0 if self._lossless else CLOSE_S)
        self._stopping.set()
        self._thread.join(timeout=STUCK_S)
        with suppress(HandoverClosed, TimeoutError):
            while self._handover.take(0) is not None:  # there was no time for it
                self._count_closed()
        if self._authenticator is not None:
            self._authenticator.stop()
        if self._thread.is_alive():
            self._fail("the publisher is stuck: it is left behind at the end")
        elif self._zmq is not None:
            self._zmq.term()  # waits for a socket that is open, and only its own thread may close that

    def _fail(self, line: str) -> None:
        log.error("%s", line, exc_info=sys.exception())
        self._on_failure(line)

    def _count_closed(self) -> None:
        with self._lock:
            self._dropped["closed"] += 1

    # -- the publisher's thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
            self._read_subscriptions()
            self._send_events()  # the last one says that this is the end
            if self._lossless and self._patient:
                self._let_subscribers_read()
        except Exception as error:
            self.failure = f"nothing is published any more: the publisher failed ({type(error).__name__}: {error})"
            self._fail(self.failure)
        finally:
            self._handover.close()  # who waits for room is let go
            if self._socket is not None:
                flush_s = SLOW_SUBSCRIBER_S if self._lossless and self._patient else FLUSH_S
                self._socket.close(linger=round(1000 * flush_s))

    def _serve(self) -> None:
        """Until the hand-over is closed and empty, or there is no time left for what waits."""
        next_health = time.monotonic()
        with suppress(HandoverClosed):
            while not self._stopping.is_set():
                work = self._next_work()
                try:
                    self._read_subscriptions()
                    self._follow_clock()
                    self._send_events()
                except Exception:
                    if work is not None:  # this is the end, and the frame in our hands is lost with it
                        self._count_closed()
                    raise
                if work is not None:
                    self._publish_safely(work)
                else:
                    self._judge_mode()
                now = time.monotonic()
                if now >= next_health:
                    next_health = now + HEALTH_PERIOD_S
                    self._send_health()
                    self._send_schema()
                elif self._fresh_subscriptions:
                    self._welcome()
                self._fresh_subscriptions.clear()

    def _let_subscribers_read(self) -> None:
        """What lies in the system's buffers is lost where a subscriber speaks to a connection that we have closed."""
        deadline = time.monotonic() + LAST_READ_S
        while self._subscriptions and time.monotonic() < deadline and not self._stopping.wait(POLL_S):
            self._read_subscriptions()

    def _next_work(self) -> _Work | None:
        try:
            return self._handover.take(timeout_s=POLL_S)
        except TimeoutError:
            return None

    def _publish_safely(self, work: _Work) -> None:
        """One bad frame is counted and told, and does not end the stream."""
        try:
            self._publish(work)
        except Exception as error:
            with self._lock:
                self._dropped["error"] += 1
            if self._dropped["error"] == 1:
                self._fail(f"a frame could not be published: {type(error).__name__}: {error}")
                self.event("error", f"a frame could not be published: {error}")

    def _publish(self, work: _Work) -> None:
        taken_ns = time.monotonic_ns()
        encode_ns = 0
        for stream in self._streams(work.fused):
            topics = {codec: messages.topic(self._rig, stream, codec) for codec in ("raw", "jpeg")}
            wanted = [codec for codec, topic in topics.items() if self._wanted(topic)]
            if not wanted:
                continue
            image = stream_picture(work.fused, stream)
            for codec in wanted:
                started_ns = time.monotonic_ns()
                payload = self._encode(image, codec)
                spent_ns = time.monotonic_ns() - started_ns
                encode_ns += spent_ns
                stages = {"publish_wait": (taken_ns - work.handed_over_ns) // 1000, "encode": spent_ns // 1000}
                self._send(topics[codec], self._frame_header(work, stream, codec, image, stages), payload)
        sent_ns = time.monotonic_ns()
        with self._lock:
            self._published += 1
            self._newest_ns = sent_ns
            self._seen_replaced = self._handover.dropped
            self._stages["publish_wait"].append((taken_ns - work.handed_over_ns) / 1e6)
            self._stages["encode"].append(encode_ns / 1e6)
            self._stages["publish"].append((sent_ns - work.handed_over_ns) / 1e6)
        if self._on_published is not None:
            self._on_published(work.fused, sent_ns)

    def _streams(self, fused: FusedFrame) -> list[str]:
        """The pictures of a frame that this rig publishes; a camera that is gone has none."""
        gone = {"ir": fused.aligned.infrared is None, "vis": fused.aligned.visible is None}
        return [stream for stream in self._config.streams if not gone.get(stream, False)]

    def _encode(self, image: np.ndarray, codec: str) -> bytes | memoryview:
        image = np.ascontiguousarray(image)
        self._encoded[codec] += 1
        if codec == "raw":
            return image.data.cast("B")
        gray = image.ndim == 2
        return simplejpeg.encode_jpeg(
            image[..., None] if gray else image,
            quality=self._config.jpeg_quality,
            colorspace="GRAY" if gray else "RGB",
            colorsubsampling="Gray" if gray else "420",
            fastdct=True,
        )

    def _frame_header(
        self, work: _Work, stream: str, codec: str, image: np.ndarray, stages: dict[str, int]
    ) -> messages.Header:
        fused, context = work.fused, work.context
        pair, gain, engine = fused.aligned.pair, fused.aligned.gain, context.engine
        now_ns = time.monotonic_ns()
        latency = {name: round(value * 1000) for name, value in fused.latency_ms.items()} | stages
        age_us = self._age_us(pair.visible or pair.infrared, now_ns)
        channels = 1 if image.ndim == 2 else image.shape[2]
        return messages.Header(
            rig=self._rig,
            stream=stream,
            codec=codec,
            session=self.session,
            sequence=work.sequences[stream],
            frame_id=f"{self._rig}_vis_optical",
            captured_ns=self._utc(pair.captured_ns),
            published_ns=self._clock.utc(now_ns),
            monotonic_ns=0 if self._recording else pair.captured_ns,
            infrared_captured_ns=self._utc(pair.infrared.captured_ns) if pair.infrared else None,
            visible_captured_ns=self._utc(pair.visible.captured_ns) if pair.visible else None,
            skew_us=None if pair.skew_ms is None else round(pair.skew_ms * 1000),
            infrared_clock=_clock(pair.infrared, context),
            visible_clock=_clock(pair.visible, context),
            width=image.shape[1],
            height=image.shape[0],
            step=image.shape[1] * channels if codec == "raw" else 0,
            encoding="mono8" if channels == 1 else "rgb8",
            quality=self._config.jpeg_quality if codec == "jpeg" else 0,
            mode=fused.mode,
            flags=self._flags(fused, context, now_ns),
            infrared_age_us=self._age_us(pair.infrared, now_ns),
            visible_age_us=self._age_us(pair.visible, now_ns),
            calibrated=fused.aligned.calibrated,
            raw_bits=pair.infrared.bits if pair.infrared else 8,
            gain_control=_gain_control(gain),
            model=engine.variant if engine else "",
            runtime=engine.runtime if engine else "",
            precision=engine.precision if engine else "",
            weights_sha=engine.weights_sha256 if engine else "",
            engine_sha=context.engine_sha,
            steps=context.diffusion_steps,
            seed=context.seed,
            priors_age_frames=fused.priors_age_frames,
            calibration_sha=context.calibration_sha,
            warp=context.warp,
            degradation={
                camera: {kind: float(share) for kind, share in kinds.items()}
                for camera, kinds in fused.degradation.items()
            },
            degradation_strength=dict(fused.degradation_strength),
            latency_us=latency | {"total": age_us or 0},
            drops=dict(context.drops) | {"publish": self._handover.dropped},
        )

    def _flags(self, fused: FusedFrame, context: PublishContext, now_ns: int) -> int:
        pair = fused.aligned.pair
        stepped = self._stepped_at_ns is not None and now_ns - self._stepped_at_ns < 1_000_000_000
        state = {
            "stale_ir": fused.mode in ("held", "vis_only"),
            "stale_vis": fused.mode == "ir_only",
            "ffc": pair.infrared is not None and pair.infrared.frozen,
            "suspect": any(frame is not None and frame.suspect for frame in (pair.infrared, pair.visible)),
            "uncalibrated": not fused.aligned.calibrated,
            "overload": self._handover.dropped > self._seen_replaced,
            "clock_step": stepped,
        }
        return sum(
            1 << bit for bit, name in enumerate(messages.STATE_FLAGS) if state.get(name, False) or name in context.flags
        )

    def _utc(self, captured_ns: int) -> int:
        return self._recording_start_utc_ns + captured_ns if self._recording else self._clock.utc(captured_ns)

    def _age_us(self, frame: Frame | None, now_ns: int) -> int | None:
        """Live: since the capture. A recording is not captured now: since the frame was read, where that is known."""
        if frame is None:
            return None
        since_ns = (frame.arrived_ns or now_ns) if self._recording else frame.captured_ns
        return (now_ns - since_ns) // 1000

    def _judge_mode(self) -> None:
        """Tells that no pictures come any more."""
        with self._lock:
            silent_s = (time.monotonic_ns() - self._newest_ns) / 1e9
            if self._mode is not None and silent_s > self._stub_after_s:
                self._change_mode("stub")

    def _follow_clock(self) -> None:
        stepped_ns = self._clock.follow()
        if stepped_ns:
            self._stepped_at_ns = time.monotonic_ns()
            milliseconds = stepped_ns / 1e6
            self.event("clock_step", f"the system clock was set by {milliseconds:+.0f} ms", step_ms=milliseconds)

    # -- data messages ----------------------------------------------------------------------------------------

    def _send_health(self) -> None:
        if not self._wanted(messages.topic(self._rig, "health", "msg")):
            return
        told: dict[str, Any] = {}
        try:
            told = dict(self._health()) if self._health is not None else {}
        except Exception as error:  # health must not end because one camera's state cannot be told
            told = {"error": str(error)}
        statistics = self.statistics()
        self._send_data(
            "health",
            messages.Health(
                uptime_us=(time.monotonic_ns() - self._started_ns) // 1000,
                mode=self._mode or "stub",
                published=statistics["published"],
                sent=statistics["sent"],
                dropped=statistics["dropped"],
                subscriptions=statistics["subscriptions"],
                cameras=told.pop("cameras", {}),
                details=told,
            ),
        )

    def _send_schema(self) -> None:
        if self._wanted(messages.topic(self._rig, "schema", "msg")):
            self._send_data("schema", messages.json_schema())

    def _welcome(self) -> None:
        """PUB has no latching: whoever subscribes anew hears at once how we are, and what the fields mean."""
        for stream, send in (("health", self._send_health), ("schema", self._send_schema)):
            topic = messages.topic(self._rig, stream, "msg").encode() + b"\0"
            if any(topic.startswith(prefix) for prefix in self._fresh_subscriptions):
                send()

    def _send_events(self) -> None:
        while self._events:
            event = self._events.popleft()
            if self._wanted(messages.topic(self._rig, "event", "msg")):
                self._send_data("event", event)

    def _send_data(self, stream: str, data: Any) -> None:
        """Sends one message; one that cannot be made is counted and told, and the pictures go on."""
        try:
            self._send_packed(stream, data)
        except zmq.ZMQError:
            raise  # the socket is of no more use
        except Exception as error:
            with self._lock:
                self._unsent[stream] += 1
            if self._unsent[stream] == 1:
                self._fail(f"{stream} could not be published: {type(error).__name__}: {error}")

    def _send_packed(self, stream: str, data: Any) -> None:
        now_ns = self._clock.utc(time.monotonic_ns())
        header = messages.Header(
            rig=self._rig,
            stream=stream,
            codec="msg",
            session=self.session,
            sequence=self._sequences[stream],
            captured_ns=now_ns,
            published_ns=now_ns,
            mode=self._mode or "stub",
            flags=0,
            infrared_age_us=None,
            visible_age_us=None,
            calibrated=False,
        )
        self._sequences[stream] += 1
        self._send(messages.topic(self._rig, stream, "msg"), header, messages.pack(data))

    # -- the socket -------------------------------------------------------------------------------------------

    def _send(self, topic: str, header: messages.Header, payload: bytes | memoryview) -> None:
        assert self._socket is not None  # somebody is subscribed
        message = messages.encode(topic, header, payload)
        deadline = time.monotonic() + (0 if self._slow else SLOW_SUBSCRIBER_S)
        while True:
            try:
                self._socket.send(message, zmq.DONTWAIT, copy=len(message) < COPY_BELOW_BYTES)
                break
            except zmq.Again:  # lossless only: a subscriber is full
                if self._stopping.is_set() or time.monotonic() >= deadline:
                    self._dropped["slow_subscriber"] += 1
                    if not self._slow:
                        self.event("slow_subscriber", f"a subscriber of {topic} was full for {SLOW_SUBSCRIBER_S} s")
                    self._slow = True
                    return
                time.sleep(0.001)
        self._slow = False
        with self._lock:
            self._sent[f"{header.stream}/{header.codec}"] += 1
            self._sent_bytes += len(message)

    def _wanted(self, topic: str) -> bool:
        full = topic.encode() + b"\0"
        return any(full.startswith(prefix) for prefix in self._subscriptions)

    def _read_subscriptions(self) -> None:
        if self._socket is None:
            return
        while int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            notice = self._socket.recv(zmq.DONTWAIT)
            kind, prefix = notice[:1], notice[1:]
            with self._lock:
                if kind == b"\1" and len(self._subscriptions) < MAX_SUBSCRIPTIONS:
                    self._subscriptions.add(prefix)
                    self._fresh_subscriptions.append(prefix)
                elif kind == b"\0":
                    self._subscriptions.discard(prefix)

    def _open(self) -> None:
        endpoint, config = self._config.endpoint, self._config
        refuse_open_endpoint(config)
        self._zmq = zmq.Context()
        try:
            self._socket = self._zmq.socket(zmq.XPUB)
            self._set_options(self._socket)
            if config.curve_secret_key_file:
                self._secure(self._zmq, self._socket)
            self._socket.bind(endpoint)
            self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
            if endpoint.startswith("ipc://"):
                os.chmod(endpoint.removeprefix("ipc://"), 0o600)
        except (zmq.ZMQError, OSError) as error:
            self._abandon()
            raise PublishError(_why_not_bound(endpoint, error)) from None
        except ConfigError:
            self._abandon()
            raise

    def _abandon(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
        if self._socket is not None:
            self._socket.close(linger=0)
        if self._zmq is not None:
            self._zmq.term()

    def _set_options(self, socket: zmq.Socket[bytes]) -> None:
        socket.setsockopt(zmq.XPUB_VERBOSE, 1)  # so that a second subscriber to the same topic is welcomed too
        socket.setsockopt(zmq.SNDHWM, 4)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, 64 << 10)  # only subscriptions come in
        socket.setsockopt(zmq.IPV6, int("[" in self._config.endpoint))
        if self._lossless:
            socket.setsockopt(zmq.XPUB_NODROP, 1)
            socket.setsockopt(zmq.SNDBUF, LOSSLESS_BUFFER_BYTES)

    def _secure(self, context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes]) -> None:
        assert self._config.curve_secret_key_file
        keys = self._config.authorized_keys_dir
        if not keys or not Path(keys).is_dir():
            raise ConfigError(
                f"publish.authorized_keys_dir {keys!r} is no folder: without the public keys of those who may "
                "subscribe, ZeroMQ would accept any key"
            )
        secret = read_secret_key(Path(self._config.curve_secret_key_file))
        self._guests.keys.update(read_guest_keys(Path(keys)))
        self._public_key = zmq.curve_public(secret).decode()
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", credentials_provider=self._guests)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        socket.setsockopt(zmq.CURVE_SERVER, 1)


def patience_s(period_s: float) -> float:
    """How long after a picture the next one may come before there are none, where the last two were so far apart."""
    return max(STUB_AFTER_S, min(2 * period_s, STUB_LATEST_S))


def stream_picture(fused: FusedFrame, stream: str) -> np.ndarray:
    """The picture of a stream: "fused", "ir" (registered) or "vis"."""
    if stream == "fused":
        return fused.image
    image = fused.aligned.registered() if stream == "ir" else fused.aligned.visible
    assert image is not None
    return image


def refuse_open_endpoint(config: PublishConfig) -> None:
    """Raises ConfigError for an endpoint that other machines can reach without a key, or that is none at all."""
    if leaves_this_machine(config.endpoint) and not (config.curve_secret_key_file and config.authorized_keys_dir):
        raise ConfigError(
            f"{config.endpoint} can be reached from other machines, and thermal video of people is not for everybody: "
            "set publish.curve_secret_key_file and publish.authorized_keys_dir, or publish on tcp://127.0.0.1"
        )


def leaves_this_machine(endpoint: str) -> bool:
    """Whether others can reach what is bound there: any tcp address that is not a loopback one."""
    scheme, _, address = endpoint.partition("://")
    if scheme in ("ipc", "inproc"):
        return False
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    # ZeroMQ itself takes port 99999 and listens on another one.
    if scheme != "tcp" or not host or not (port == "*" or (port.isdecimal() and int(port) <= 65535)):
        raise ConfigError(f"publish.endpoint {endpoint!r} is none: write tcp://127.0.0.1:5560 or ipc:///path/to/socket")
    return not is_loopback(host)


def read_guest_keys(folder: Path) -> dict[bytes, bool]:
    """The public keys of those who may subscribe.

    Raises:
        ConfigError: it is no folder, or has a file that is no key.
    """
    try:
        return zmq.auth.load_certificates(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"publish.authorized_keys_dir {folder} is no folder of public keys ({error}): leave nothing but them in it"
        ) from None


def read_secret_key(path: Path) -> bytes:
    """The Z85 secret key in a file that only its owner may read.

    Raises:
        ConfigError: no such file, no key inside, or readable by others.
    """
    try:
        mode = path.stat().st_mode
        _, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read a key from {path}: {error}: make one with create_keys") from None
    if secret is None:
        raise ConfigError(f"{path} has no secret key: give the file that ends in .key_secret")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{path} can be read by other users: chmod 600 it")
    return secret


def create_keys(directory: Path, name: str) -> tuple[Path, Path]:
    """Makes a CURVE key pair. Returns the paths of the public key and of the secret one, which only we may read."""
    directory.mkdir(parents=True, exist_ok=True)
    before = os.umask(0o077)
    try:
        public, secret = zmq.auth.create_certificates(directory, name)
    finally:
        os.umask(before)
    return Path(public), Path(secret)


def _why_not_bound(endpoint: str, error: OSError | zmq.ZMQError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{endpoint} is in use, perhaps by another dspfusion: stop it, or choose another publish.endpoint"
    if error.errno in (errno.ENODEV, errno.EADDRNOTAVAIL):
        return f"{endpoint} is no address of this machine: publish on tcp://127.0.0.1 or on one that it has"
    return f"cannot publish on {endpoint}: {error.strerror}: check publish.endpoint"


def _clock(frame: Frame | None, context: PublishContext) -> messages.Clock | None:
    if frame is None:
        return None
    return messages.Clock(
        source=frame.clock,
        error_us=frame.clock_error_ns // 1000,
        offset_ns=context.clock_offset_ns.get(frame.camera, 0),
        drift_ppm=context.clock_drift_ppm.get(frame.camera, 0.0),
    )


def _gain_control(gain: dict[str, Any]) -> messages.GainControl | None:
    if not gain:
        return None
    return messages.GainControl(
        method=str(gain.get("method", "")),
        low=float(gain.get("low", 0.0)),
        high=float(gain.get("high", 0.0)),
        gamma=float(gain.get("gamma", 1.0)),
    )


def _percentiles(values: deque[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(list(values), (50, 95, 99))
    return {"p50": round(float(p50), 3), "p95": round(float(p95), 3), "p99": round(float(p99), 3)}
