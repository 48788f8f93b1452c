"""The client: fused video out of ZeroMQ and into another program, never older than it has to be.

    with Client("tcp://127.0.0.1:5560") as client:
        while True:
            try:
                picture = client.latest()        # the newest one, however long the last round took
            except TimeoutError:                 # none for a second: the rig starts, pauses or has stopped
                continue
            steer(picture.image, picture.age_ms)

A bare `recv` in a loop that is slower than the camera shows the past: 2 s of it, measured. So a thread of the client
receives all the time and keeps what the two ways of reading promise: `latest` the newest message, `all` each one.

Needs pyzmq, numpy, msgspec, crc32c and, for JPEG, simplejpeg. Neither torch nor OpenCV is loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import stat
import struct
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import zmq
import zmq.auth
from zmq.utils.monitor import recv_monitor_message

from pipeline import messages

KEPT = 8  # messages that wait for `all`
MAX_MESSAGE_BYTES = messages.MAX_PAYLOAD_BYTES + (128 << 10)
WATCHED = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
PICTURES = ("fused", "ir", "vis")
DATA = ("health", "event", "calib", "schema")
AGES_KEPT = 100_000  # of which `subscribe` tells percentiles: more than an hour at 25 Hz
DTYPES = {
    "rgb8": (np.uint8, 3),
    "bgr8": (np.uint8, 3),
    "mono8": (np.uint8, 1),
    "mono16": (np.uint16, 1),
    "16UC1": (np.uint16, 1),
    "32FC1": (np.float32, 1),
}


class ClientError(Exception):
    """A subscription that cannot work: says what, why and what to do."""


@dataclass(frozen=True, slots=True)
class Received:
    """One message, and when it came."""

    message: messages.Message
    received_ns: int  # UTC

    @property
    def topic(self) -> str:
        return self.message.topic

    @property
    def header(self) -> messages.Header:
        return self.message.header

    @property
    def payload(self) -> memoryview:
        return self.message.payload

    @property
    def age_ms(self) -> float:
        """How old the moment shown is now. Across machines it is as exact as their clocks agree."""
        return self.age_at_ms(time.time_ns())

    def age_at_ms(self, utc_ns: int) -> float:
        return (utc_ns - self.header.published_ns) / 1e6 + self.header.age_us / 1e3

    @property
    def image(self) -> np.ndarray:
        """The picture: uint8 RGB (H, W, 3), or (H, W) for one channel. Raw pictures are read-only views.

        Raises:
            messages.MessageError: the message has no picture, or one that this client cannot read.
        """
        return read_image(self.message)

    def data(self) -> Any:
        """The payload of health, event, calib and schema messages as dicts and lists."""
        return self.message.data()


def read_image(message: messages.Message) -> np.ndarray:
    """The picture in a message; see `Received.image`."""
    header = message.header
    if message.wire_flags & messages.WIRE_SHARED_MEMORY:
        raise messages.MessageError("the picture is in shared memory, which this client does not read")
    if header.codec == "jpeg":
        return _read_jpeg(header, message.payload)
    if header.codec != "raw" or header.encoding not in DTYPES:
        raise messages.MessageError(f"{message.topic} has no picture that can be read here ({header.encoding!r})")
    kind, channels = DTYPES[header.encoding]
    sample = np.dtype(kind).newbyteorder(">" if header.big_endian else "<")
    shape = (header.height, header.width, channels)
    strides = (header.step, channels * sample.itemsize, sample.itemsize)
    image = np.ndarray(shape, sample, message.payload, strides=strides)
    if channels == 1:
        image = image[..., 0]
    return image[..., ::-1] if header.encoding == "bgr8" else image


def _read_jpeg(header: messages.Header, payload: memoryview) -> np.ndarray:
    gray = header.encoding == "mono8"
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(payload)
        if (width, height) != (header.width, header.height):  # before anything of that size is allocated
            raise messages.MessageError(
                f"the JPEG has {width}x{height} pixels, its header says {header.width}x{header.height}"
            )
        image = simplejpeg.decode_jpeg(payload, colorspace="GRAY" if gray else "RGB")
    except ValueError as error:
        raise messages.MessageError(f"the JPEG cannot be read: {error}") from None
    return image[..., 0] if gray else image


class Transit:
    """How much longer than usual a message was on its way, whatever the two clocks say.

    The quickest message of the last 5 to 10 s is the measure. So a backlog, as after this process was stopped, shows
    even on another machine; and when a clock is set, the measure is right again within 10 s.
    """

    WINDOW_NS = 5_000_000_000

    def __init__(self) -> None:
        self._before: int | None = None
        self._now: int | None = None
        self._since_ns = 0

    def add(self, header: messages.Header, received_ns: int) -> None:
        if "clock_step" in header.flag_names:
            self._before = self._now = None
        if abs(received_ns - self._since_ns) > self.WINDOW_NS:
            self._before, self._now, self._since_ns = self._now, None, received_ns
        transit_ns = received_ns - header.published_ns
        self._now = transit_ns if self._now is None else min(self._now, transit_ns)

    def late_ns(self, header: messages.Header, now_ns: int) -> int:
        """Time since the message was sent, beyond the quickest transit."""
        known = [transit for transit in (self._before, self._now) if transit is not None]
        return now_ns - header.published_ns - min(known, default=0)


class Handshakes:
    """Says why a publisher does not take this client, from the events of the client's socket.

    A refused key shows in the handshake only: ZeroMQ itself tries again for ever, in silence.
    """

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._under_way = False
        self._hung_up = 0  # connections in a row that ended before the handshake did
        self.refusal: str | None = None  # why, for people; None while nothing speaks against this client

    def note(self, event: int) -> None:
        """Takes one of the WATCHED events in."""
        if event == zmq.EVENT_CONNECTED:
            self._under_way = True
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._under_way, self._hung_up, self.refusal = False, 0, None
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._under_way = False  # the hanging up that follows says nothing new
            self.refusal = (
                f"{self._endpoint} does not know this client's key: add its public key to authorized_keys_dir"
            )
        elif self._under_way:
            # A server with keys just hangs up on a client without; once may be a publisher that is restarting.
            self._under_way = False
            self._hung_up += 1
            if self._hung_up >= 2 or event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self.refusal = (
                    f"{self._endpoint} and this client do not agree on keys: check server_key, which is the "
                    "publisher's public key (none if it publishes without CURVE)"
                )


class Client:
    """Subscribes to one stream of one rig, in one codec."""

    def __init__(
        self,
        endpoint: str,
        rig: str | None = None,
        stream: str = "fused",
        codec: str = "raw",
        *,
        server_key: str | Path | None = None,
        secret_key: str | Path | None = None,
    ) -> None:
        """Connects; it does not matter whether the publisher runs already.

        Args:
            endpoint: e.g. tcp://127.0.0.1:5560.
            rig: None takes the first rig that is heard. Naming it spares the publisher a moment of encoding
                everything.
            stream: fused, ir, vis, health, event, calib or schema; the last four are read in codec msg.
            codec: raw or jpeg.
            server_key: the publisher's public key, 40 characters or a file; needed where it uses CURVE.
            secret_key: this client's own key file (.key_secret); the publisher must know its public half.

        Raises:
            ClientError: a stream, codec, endpoint or key that cannot be used.
        """
        if stream not in (*PICTURES, "mask", *DATA):
            raise ClientError(f"there is no stream {stream!r}: choose one of {', '.join((*PICTURES, *DATA))}")
        if stream not in DATA and codec not in ("raw", "jpeg"):
            raise ClientError(f"there is no codec {codec!r} of {stream}: choose raw or jpeg")
        self._stream = stream
        self._codec = "msg" if stream in DATA else codec
        self._rig = rig
        self._changed = threading.Condition()
        self._kept: deque[Received] = deque()
        self._all = False  # somebody reads with `all`: a full deque holds the receiver back
        self._draining = False
        self._taken = 0
        self._failure: str | None = None
        self._closing = threading.Event()
        self._last: tuple[int, int] | None = None  # session and sequence of the newest message
        self._transit = Transit()
        self.gaps = 0  # messages that were sent and will not be read here: `seq` tells
        self.errors = 0  # messages that could not be decoded
        self.received = 0
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = connect(self._zmq, endpoint, server_key, secret_key)
        self.endpoint = endpoint
        self._handshakes = Handshakes(endpoint)
        self._monitor = self._socket.get_monitor_socket(WATCHED)
        self._socket.setsockopt(zmq.SUBSCRIBE, wanted_prefix(rig, self._stream, self._codec))
        self._thread = threading.Thread(target=self._receive, name="client", daemon=True)
        self._thread.start()

    @property
    def rig(self) -> str | None:
        """The rig's name; None until the first message, where it was not given."""
        return self._rig

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def latest(self, timeout_s: float = 1.0, *, max_age_s: float = 0.5) -> Received:
        """The newest message, once. One that was sent more than `max_age_s` ago is skipped: it waited in a queue.

        Raises:
            TimeoutError: nothing new within `timeout_s`.
            ClientError: the publisher refuses this client's keys.
        """
        with self._changed:
            if self._all:
                self._all, self._draining = False, True
                self._forget()
                self._changed.notify_all()
            deadline = time.monotonic() + timeout_s
            while True:
                self._wait(deadline, timeout_s)
                newest = self._kept.pop()
                self._kept.clear()
                if self._transit.late_ns(newest.header, time.time_ns()) <= max_age_s * 1e9:
                    return newest

    def all(self, timeout_s: float = 5.0) -> Iterator[Received]:
        """Every message in order, until none comes for `timeout_s`. What was lost on the way is in `gaps`.

        A reader slower than the stream falls behind; the queues on the way are short and then the publisher drops
        (live) or waits (replay).

        Raises:
            ClientError: the publisher refuses this client's keys.
        """
        with self._changed:
            self._all = True
        while True:
            with self._changed:
                try:
                    self._wait(time.monotonic() + timeout_s, timeout_s)
                except TimeoutError:
                    return
                received = self._kept.popleft()
                self._changed.notify_all()
            yield received

    def end(self) -> None:
        """Ends a waiting `latest` or `all`, without waiting itself: for signal handlers and other threads."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()

    @property
    def ended(self) -> bool:
        return self._closing.is_set()

    def close(self) -> None:
        """Ends the subscription; a waiting `latest` or `all` ends too."""
        self.end()
        self._thread.join(timeout=2)
        if not self._zmq.closed:
            self._zmq.term()

    # -- the receiving thread ---------------------------------------------------------------------------------

    def _receive(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        drain_until = 0.0
        try:
            while not self._closing.is_set():
                if self._draining and not drain_until:
                    drain_until = time.monotonic() + 0.2
                ready = dict(poller.poll(5 if drain_until else 50))
                if drain_until and (self._socket not in ready or time.monotonic() > drain_until):
                    self._draining, drain_until = False, 0.0  # what comes from now on is new
                if self._monitor in ready:
                    self._read_monitor()
                if self._socket in ready:
                    self._take(self._socket.recv(copy=False))
        except (zmq.ZMQError, ClientError) as error:
            self._fail(f"the subscription to {self.endpoint} broke: {error}")
        finally:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=0)

    def _take(self, part: zmq.Frame) -> None:
        try:
            message = messages.decode(part.buffer)
        except messages.MessageError:
            self.errors += 1
            return
        if self._rig is None:
            self._rig = message.header.rig
            self._socket.setsockopt(zmq.SUBSCRIBE, wanted_prefix(self._rig, self._stream, self._codec))
            self._socket.setsockopt(zmq.UNSUBSCRIBE, wanted_prefix(None, self._stream, self._codec))
        header = message.header
        if (header.rig, header.stream, header.codec) != (self._rig, self._stream, self._codec):
            return  # still on its way from the time when the rig's name was unknown
        self._keep(Received(message, time.time_ns()))

    def _keep(self, received: Received) -> None:
        header = received.header
        with self._changed:
            while self._all and len(self._kept) >= KEPT and not self._closing.is_set():
                self._changed.wait(0.1)
            if self._last is not None and self._last[0] == header.session:
                if header.sequence <= self._last[1]:
                    return  # a message twice, or late: the order is never broken
                self.gaps += header.sequence - self._last[1] - 1
            if self._last is None or self._last[0] != header.session:
                self._transit = Transit()
            self._last = (header.session, header.sequence)
            self._transit.add(header, received.received_ns)
            self.received += 1
            if self._draining:
                return
            if len(self._kept) >= KEPT:
                self._kept.popleft()
            self._kept.append(received)
            self._changed.notify_all()

    def _read_monitor(self) -> None:
        self._handshakes.note(recv_monitor_message(self._monitor)["event"])
        self._fail(self._handshakes.refusal)

    def _fail(self, line: str | None) -> None:
        with self._changed:
            self._failure = line
            self._changed.notify_all()

    # -- the reading thread, with the lock held ---------------------------------------------------------------

    def _wait(self, deadline: float, timeout_s: float) -> None:
        def ready() -> bool:
            return bool(self._kept) or self._failure is not None or self._closing.is_set()

        self._changed.wait_for(ready, max(0.0, deadline - time.monotonic()))
        if self._kept:
            return
        if self._failure is not None:
            raise ClientError(self._failure)
        if self._closing.is_set():
            raise TimeoutError("the client was closed")
        raise TimeoutError(
            f"no new {self._stream} message from {self.endpoint} in {timeout_s} s: is the publisher running, "
            f"and does it publish {self._stream} as {self._codec}?"
        )

    def _forget(self) -> None:
        self._kept.clear()


def connect(
    context: zmq.Context[Any],
    endpoint: str,
    server_key: str | Path | None = None,
    secret_key: str | Path | None = None,
) -> zmq.Socket[Any]:
    """A subscriber's socket with the limits and heartbeats of this format, connected, subscribed to nothing yet."""
    socket = context.socket(zmq.SUB)
    try:
        socket.setsockopt(zmq.RCVHWM, 4)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        if server_key is not None:
            public, secret = _own_keys(secret_key)
            socket.setsockopt(zmq.CURVE_SERVERKEY, _public_key(server_key))
            socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
            socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        socket.connect(endpoint)
    except (zmq.ZMQError, ClientError) as error:
        socket.close(linger=0)
        context.term()
        if isinstance(error, ClientError):
            raise
        raise ClientError(
            f"cannot connect to {endpoint!r}: {error.strerror}: write for example tcp://127.0.0.1:5560"
        ) from None
    return socket


def wanted_prefix(rig: str | None, stream: str, codec: str) -> bytes:
    """What to subscribe to; while the rig's name is unknown, everything."""
    if rig is None:
        return f"{messages.TOPIC_PREFIX}/".encode()
    try:
        return messages.subscription(rig, stream, codec)
    except messages.MessageError as error:
        raise ClientError(str(error)) from None


def _public_key(key: str | Path) -> bytes:
    """A Z85 key, given as such or as a file."""
    text = str(key)
    if len(text) == 40 and not Path(text).exists():
        return text.encode("ascii", "replace")
    try:
        public, _ = zmq.auth.load_certificate(text)
    except (OSError, ValueError) as error:
        raise ClientError(f"server_key {text!r} is neither a key of 40 characters nor a key file: {error}") from None
    return public


def _own_keys(secret_key: str | Path | None) -> tuple[bytes, bytes]:
    if secret_key is None:
        return zmq.curve_keypair()  # encrypts, but only a publisher that knows it lets it in
    try:
        public, secret = zmq.auth.load_certificate(str(secret_key))
        mode = os.stat(secret_key).st_mode
    except (OSError, ValueError) as error:
        raise ClientError(f"cannot read the key file {secret_key}: {error}") from None
    if secret is None:
        raise ClientError(f"{secret_key} has no secret key: give the file that ends in .key_secret")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ClientError(f"{secret_key} can be read by other users: chmod 600 it")
    return public, secret


def subscribe(
    endpoint: str,
    count: int | None = None,
    save_dir: str | Path | None = None,
    *,
    rig: str | None = None,
    stream: str = "fused",
    codec: str = "raw",
    server_key: str | Path | None = None,
    secret_key: str | Path | None = None,
    duration_s: float | None = None,
    timeout_s: float = 5.0,
    echo: Callable[[str], None] | None = print,
) -> dict[str, Any]:
    """Reads a stream and tells about each message: what `dspfusion subscribe` does.

    Args:
        count: ends after so many messages; None goes on.
        save_dir: each picture is saved there, as it came (.jpg) or lossless (.png); other messages as .json.
        duration_s: ends after so long.
        timeout_s: ends when no message comes for so long.
        echo: gets one line a message; None is silent.

    Returns:
        `messages`, `gaps`, `errors`, `fps`, `age_ms` {p50, p95, p99}, `modes` {mode: messages}, `bytes`,
        `saved`, `rig`, `ended` (count, duration, silence, or signal: SIGINT and SIGTERM end it in order).
        The ages are those of the newest 100,000 messages.

    Raises:
        ClientError: not one message came, the publisher refuses this client's keys, or a picture cannot be saved.
    """
    folder = Path(save_dir) if save_dir is not None else None
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_save(folder, error) from None
    ages: deque[float] = deque(maxlen=AGES_KEPT)
    arrivals: deque[int] = deque(maxlen=31)
    modes: Counter[str] = Counter()
    number = size = first_ns = last_ns = saved = 0
    ended = "silence"
    started = time.monotonic()
    with (
        Client(endpoint, rig, stream, codec, server_key=server_key, secret_key=secret_key) as client,
        _on_signals(client.end),
    ):
        for received in client.all(timeout_s if duration_s is None else min(timeout_s, duration_s)):
            header = received.header
            age_ms = received.age_at_ms(received.received_ns)
            ages.append(age_ms)
            number += 1
            arrivals.append(received.received_ns)
            first_ns, last_ns = first_ns or received.received_ns, received.received_ns
            modes[header.mode] += 1
            size += len(received.payload)
            if folder is not None:
                try:
                    saved += _save(received, folder)
                except OSError as error:
                    raise _cannot_save(folder, error) from None
            if echo is not None:
                echo(_line(received, age_ms, _rate(arrivals)))
            if client.ended:
                break
            if count is not None and number >= count:
                ended = "count"
                break
            if duration_s is not None and time.monotonic() - started >= duration_s:
                ended = "duration"
                break
        if not ages:
            raise ClientError(
                f"no {stream} message from {endpoint} in {time.monotonic() - started:.1f} s: is the publisher "
                "running, and is the endpoint right?"
            )
        if client.ended:
            ended = "signal"
        p50, p95, p99 = np.percentile(np.asarray(ages), (50, 95, 99))
        span_s = (last_ns - first_ns) / 1e9
        return {
            "messages": number,
            "gaps": client.gaps,
            "errors": client.errors,
            "fps": round((number - 1) / span_s, 2) if span_s > 0 else 0.0,
            "age_ms": {"p50": round(float(p50), 2), "p95": round(float(p95), 2), "p99": round(float(p99), 2)},
            "modes": dict(modes),
            "bytes": size,
            "saved": saved,
            "rig": client.rig,
            "ended": ended,
        }


@contextlib.contextmanager
def _on_signals(end: Callable[[], None]) -> Iterator[None]:
    """Has SIGINT and SIGTERM call `end`, where this is the thread that hears them."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda *_: end())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cannot_save(folder: Path, error: OSError) -> ClientError:
    return ClientError(f"cannot save in {folder}: {error.strerror or error}: choose another place")


def _rate(arrivals: deque[int]) -> float:
    span_ns = arrivals[-1] - arrivals[0]
    return (len(arrivals) - 1) * 1e9 / span_ns if span_ns > 0 else 0.0


def _line(received: Received, age_ms: float, fps: float) -> str:
    header = received.header
    what = f"{header.width}x{header.height}" if header.width else json.dumps(received.data(), default=str)
    return (
        f"{header.rig}/{header.stream} #{header.sequence} {header.mode} age {age_ms:.1f} ms, {fps:.1f} fps, "
        f"{len(received.payload)} bytes {header.codec}, {what}"
    )


def _save(received: Received, folder: Path) -> int:
    header = received.header
    # The publisher counts from 0 again when it starts anew: its session keeps the pictures of both runs.
    name = f"{header.rig}_{header.stream}_{header.session:014x}_{header.sequence:08d}"
    if header.codec == "jpeg":
        _write_whole(folder / f"{name}.jpg", received.payload)
    elif header.codec == "raw":
        _write_whole(folder / f"{name}.png", _png(received.image))
    else:
        _write_whole(folder / f"{name}.json", json.dumps(received.data(), indent=2, default=str).encode())
    return 1


def _write_whole(path: Path, content: bytes | memoryview) -> None:
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # two clients may save into one folder
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _png(image: np.ndarray) -> bytes:
    """A lossless PNG of an 8- or 16-bit picture, without an image library. Reference: RFC 2083."""
    if image.dtype.itemsize == 2:
        image = image.astype(">u2")
    height, width = image.shape[:2]
    depth, color = image.dtype.itemsize * 8, 2 if image.ndim == 3 else 0
    rows = np.ascontiguousarray(image).view(np.uint8).reshape(height, -1)
    unfiltered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()  # filter 0 in each row

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = zlib.compress(unfiltered, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
