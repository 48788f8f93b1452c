"""The wire format, version 1: one ZeroMQ part per message, described by one tree of msgspec structs.

    offset  size  field                                             integers are little endian
    0       T     topic, ASCII, ends with 0x00: dspf1/<rig>/<stream>/<codec>
    T       4     magic "DSPF"
    T+4     2     u16 wire version, 1
    T+6     2     u16 flags: bit 0 crc present, bit 1 payload in shared memory, bit 2 keyframe
    T+8     4     u32 header length H, at most 64 KiB
    T+12    4     u32 payload length P
    T+16    4     u32 CRC-32C of the header bytes followed by the payload bytes; 0 if absent
    T+20    H     header: a msgpack map, see `Header`
    ...           zeros up to the next multiple of 64, counted from the start of the message
    ...     P     payload; the message ends here

One part, because ZeroMQ's conflate option silently destroys messages of several parts. The topic comes first,
so prefix subscriptions work; its slashes and the NUL end each level, so "cam1" never matches "cam10".

Fields may be added at any time and readers ignore those they do not know. A field never changes its meaning or
unit. Removing one, or another layout, is a new magic and a new topic prefix.

This file needs msgspec and crc32c only, so a consumer can copy it into a project of its own.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import crc32c
import msgspec

MAGIC = b"DSPF"
WIRE_VERSION = 1
TOPIC_PREFIX = "dspf1"
ALIGNMENT = 64  # of the payload, counted from the start of the message
MAX_TOPIC_BYTES = 128  # with its NUL
MAX_HEADER_BYTES = 64 << 10
MAX_PAYLOAD_BYTES = 64 << 20

STREAMS = ("fused", "ir", "vis", "mask", "calib", "health", "event", "schema")
CODECS = ("raw", "jpeg", "jxl", "msg")
MODES = ("fused", "ir_only", "vis_only", "held", "stub")  # stub: no picture; of health and events: none comes

WIRE_CRC = 1 << 0
WIRE_SHARED_MEMORY = 1 << 1
WIRE_KEYFRAME = 1 << 2

# The bits of Header.flags, in the order of the wire.
STATE_FLAGS = (
    "stale_ir",
    "stale_vis",
    "ffc",  # flat field correction: the infrared camera's shutter is closed
    "corrupt",  # reserved
    "suspect",
    "unsynced",  # reserved
    "uncalibrated",
    "degraded_model",  # the engine failed while it ran, and another one serves
    "overload",
    "clock_step",
)
SAMPLE_BYTES = {"rgb8": 3, "bgr8": 3, "mono8": 1, "mono16": 2, "16UC1": 2, "32FC1": 4}  # a pixel, by ROS name

_FIXED = struct.Struct("<4sHHIII")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")


class MessageError(ValueError):
    """Bytes that are not a message of this format, or a message that cannot be written."""


class Clock(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a capture time comes from, and how far it can be trusted."""

    source: str = msgspec.field(name="src")  # ptp, rtcp_ntp, driver, arrival, file, synthetic
    error_us: int = msgspec.field(name="err_us")  # one sigma
    offset_ns: int = 0  # already applied
    drift_ppm: float = 0.0


class GainControl(msgspec.Struct, frozen=True, omit_defaults=True):
    """How infrared counts became 8 bits: `low` is black, `high` is white."""

    method: str
    low: float = msgspec.field(name="lo")
    high: float = msgspec.field(name="hi")
    gamma: float = 1.0


class Radiometric(msgspec.Struct, frozen=True):
    """value = count * scale + offset, in `unit`."""

    unit: str
    scale: float
    offset: float


class SharedMemory(msgspec.Struct, frozen=True):
    """Where the payload is when it is not in the message."""

    service: str
    slot: int


class Header(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What every message says about itself. Times are int64 UTC ns, durations int microseconds."""

    # identity
    version: int = msgspec.field(name="v", default=WIRE_VERSION)
    rig: str
    stream: str
    codec: str
    session: int  # random, new at every start of the publisher
    sequence: int = msgspec.field(name="seq")  # counts up by one per stream; a gap is a loss
    frame_id: str = ""  # optical frame of the pixel grid, e.g. rig_vis_optical

    # time
    captured_ns: int = msgspec.field(name="t")  # the moment shown: visible, else infrared; health and events: now
    published_ns: int = msgspec.field(name="t_pub")  # just before the message was sent
    monotonic_ns: int = msgspec.field(name="t_mono", default=0)  # captured_ns on the publisher's monotonic clock
    infrared_captured_ns: int | None = msgspec.field(name="t_ir", default=None)
    visible_captured_ns: int | None = msgspec.field(name="t_vis", default=None)
    skew_us: int | None = msgspec.field(name="pair_dt", default=None)  # infrared minus visible
    infrared_clock: Clock | None = msgspec.field(name="clk_ir", default=None)
    visible_clock: Clock | None = msgspec.field(name="clk_vis", default=None)

    # image; zero where the payload is none
    width: int = msgspec.field(name="w", default=0)
    height: int = msgspec.field(name="h", default=0)
    step: int = 0  # bytes from one row to the next, raw only
    encoding: str = msgspec.field(name="enc", default="")  # ROS name: rgb8, mono8, ...
    big_endian: bool = msgspec.field(name="be", default=False)
    quality: int = msgspec.field(name="q", default=0)  # JPEG, 1 to 100

    # state: written even where it is a default, because consumers decide by it
    mode: str  # one of MODES; treat a name you do not know as "stub"
    flags: int  # bits, see STATE_FLAGS
    infrared_age_us: int | None = msgspec.field(name="age_ir_us")  # at t_pub; None: no such picture inside
    visible_age_us: int | None = msgspec.field(name="age_vis_us")
    calibrated: bool  # False: the pictures were only resized onto each other

    # infrared
    raw_bits: int = 8
    gain_control: GainControl | None = msgspec.field(name="agc", default=None)
    radiometric: Radiometric | None = None
    gain: str = ""  # of the sensor: high, low

    # model
    model: str = ""  # the variant
    runtime: str = ""
    precision: str = ""
    weights_sha: str = ""
    engine_sha: str = ""
    steps: int = 0  # of the diffusion
    seed: int = 0
    priors_age_frames: int = 0

    # calibration
    calibration_sha: str = msgspec.field(name="calib_sha", default="")
    warp: tuple[float, ...] | None = None  # 3x3, row by row
    reprojection_px: float | None = msgspec.field(name="reproj_px", default=None)

    # quality
    degradation: dict[str, dict[str, float]] = {}  # what the model perceives: camera -> kind -> probability
    degradation_strength: dict[str, float] = {}  # camera -> 0 (just visible) to 1 (the strongest that was trained)
    infrared_share: float | None = msgspec.field(name="ir_share", default=None)
    visible_share: float | None = msgspec.field(name="vis_share", default=None)
    flicker: float | None = None

    # performance
    latency_us: dict[str, int] = msgspec.field(name="lat", default_factory=dict)  # by stage, and "total"
    drops: dict[str, int] = {}  # lost since the start: infrared, visible, sync (camera frames), fuse (pairs), publish

    shared_memory: SharedMemory | None = msgspec.field(name="shm", default=None)

    @property
    def age_us(self) -> int:
        """How old the moment shown was when the message was sent."""
        for age in (self.visible_age_us, self.infrared_age_us):
            if age is not None:
                return age
        return (self.published_ns - self.captured_ns) // 1000

    @property
    def flag_names(self) -> tuple[str, ...]:
        return tuple(name for bit, name in enumerate(STATE_FLAGS) if self.flags >> bit & 1)


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The payload of `health`, at least once a second even without cameras: silence means a dead process."""

    uptime_us: int
    mode: str  # of the newest picture; "stub" where none has come for a second
    published: int  # fused frames since the start
    sent: dict[str, int]  # messages by stream/codec
    dropped: dict[str, int]  # fused frames not published, by reason
    subscriptions: list[str]  # topic prefixes that somebody asks for
    cameras: dict[str, Any] = {}  # as the pipeline tells it, camera -> state
    details: dict[str, Any] = {}  # whatever else the pipeline tells: fps of the last 5 s, dropped, fallbacks, ...


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """The payload of `event`: something that happened once."""

    kind: str  # started, stopping, mode, clock_step, error, ...
    text: str
    details: dict[str, Any] = {}


class TopicParts(NamedTuple):
    rig: str
    stream: str
    codec: str


@dataclass(frozen=True, slots=True)
class Message:
    """One decoded message. `payload` looks into the received bytes: nothing was copied."""

    topic: str
    header: Header
    payload: memoryview
    wire_flags: int = WIRE_CRC

    def data(self) -> Any:
        """The payload of a `msg` message (health, event, calib, schema) as plain dicts and lists."""
        if not self.topic.endswith("/msg"):
            raise MessageError(f"{self.topic} carries a picture, not data: look at the payload")
        try:
            return msgspec.msgpack.decode(self.payload)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise MessageError(f"the payload of {self.topic} is no msgpack: {error}") from None


_header_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(Header)


def topic(rig: str, stream: str, codec: str) -> str:
    """The topic of one stream in one codec, e.g. dspf1/car/fused/jpeg (without its NUL)."""
    for part in (rig, stream, codec):
        if not _NAME.fullmatch(part):
            raise MessageError(f"{part!r} cannot be part of a topic: use 1 to 32 of A-Z, a-z, 0-9, _ and -")
    return f"{TOPIC_PREFIX}/{rig}/{stream}/{codec}"


def subscription(rig: str, stream: str | None = None, codec: str | None = None) -> bytes:
    """The prefix that subscribes to a rig, one of its streams, or one codec of it, and to nothing else."""
    if stream is None:
        return topic(rig, "x", "x").rsplit("/", 2)[0].encode() + b"/"
    if codec is None:
        return topic(rig, stream, "x").rsplit("/", 1)[0].encode() + b"/"
    return topic(rig, stream, codec).encode() + b"\0"


def parse_topic(text: str) -> TopicParts:
    """Splits a topic into rig, stream and codec."""
    prefix, *parts = text.split("/")
    if prefix != TOPIC_PREFIX or len(parts) != 3 or not all(_NAME.fullmatch(part) for part in parts):
        raise MessageError(f"{text!r} is no topic: expected {TOPIC_PREFIX}/<rig>/<stream>/<codec>")
    return TopicParts(*parts)


def pack(data: Any) -> bytes:
    """Packs the payload of a `msg` message: a struct of this file, or plain dicts, lists, numbers and strings."""
    return msgspec.msgpack.encode(data)


def encode(topic: str, header: Header, payload: bytes | bytearray | memoryview, *, wire_flags: int = 0) -> bytes:
    """Writes one message, checksum included.

    Args:
        payload: contiguous bytes, at most 64 MiB; copied once.
        wire_flags: WIRE_SHARED_MEMORY or WIRE_KEYFRAME; the checksum's bit is always set.

    Raises:
        MessageError: if the topic and the header contradict each other, or a part is too large.
    """
    _check_agreement(topic, header)
    body = memoryview(payload).cast("B")
    packed = _header_encoder.encode(header)
    name = topic.encode("ascii") + b"\0"
    if len(packed) > MAX_HEADER_BYTES:
        raise MessageError(f"a header has at most {MAX_HEADER_BYTES} bytes, this one has {len(packed)}")
    if len(body) > MAX_PAYLOAD_BYTES:
        raise MessageError(f"a payload has at most {MAX_PAYLOAD_BYTES} bytes, this one has {len(body)}")
    _check_picture(header, len(body), wire_flags)
    checksum = crc32c.crc32c(body, crc32c.crc32c(packed))
    fixed = _FIXED.pack(MAGIC, WIRE_VERSION, wire_flags | WIRE_CRC, len(packed), len(body), checksum)
    padding = bytes(-(len(name) + len(fixed) + len(packed)) % ALIGNMENT)
    return b"".join((name, fixed, packed, padding, body))


def decode(
    message: bytes | bytearray | memoryview, *, max_payload_bytes: int = MAX_PAYLOAD_BYTES, verify: bool = True
) -> Message:
    """Reads one message and checks every length before it is used.

    Args:
        message: one ZeroMQ part.
        max_payload_bytes: a larger payload is refused.
        verify: compare the checksum, about 0.1 ms a megabyte.

    Raises:
        MessageError: for anything that is not exactly one message of this version.
    """
    view = memoryview(message).cast("B")
    name, start = _read_topic(view)
    if len(view) < start + _FIXED.size:
        raise MessageError(f"the message is cut short: {len(view)} bytes")
    magic, version, flags, header_bytes, payload_bytes, checksum = _FIXED.unpack_from(view, start)
    if magic != MAGIC:
        raise MessageError(f"magic {magic!r} is not {MAGIC!r}: this is no dspfusion message")
    if version != WIRE_VERSION:
        raise MessageError(f"wire version {version} is unknown here (this reader knows {WIRE_VERSION}): update it")
    if header_bytes > MAX_HEADER_BYTES or payload_bytes > max_payload_bytes:
        raise MessageError(f"header of {header_bytes} or payload of {payload_bytes} bytes is over the limit")
    header_start = start + _FIXED.size
    header_end = header_start + header_bytes
    payload_start = header_end + -header_end % ALIGNMENT
    if len(view) != payload_start + payload_bytes:
        raise MessageError(f"the message has {len(view)} bytes, its lengths say {payload_start + payload_bytes}")
    packed, padding, payload = view[header_start:header_end], view[header_end:payload_start], view[payload_start:]
    if any(padding):
        raise MessageError("the padding before the payload is not zero")
    if verify and flags & WIRE_CRC and crc32c.crc32c(payload, crc32c.crc32c(packed)) != checksum:
        raise MessageError("the checksum does not match: the message was damaged on its way")
    header = _read_header(packed)
    _check_agreement(name, header)
    _check_picture(header, payload_bytes, flags)
    return Message(name, header, payload, flags)


def json_schema() -> dict[str, Any]:
    """JSON Schema of the header and of the `health` and `event` payloads, under their wire names."""
    _, components = msgspec.json.schema_components((Header, Health, Event), ref_template="#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"dspfusion wire v{WIRE_VERSION}",
        "$ref": "#/$defs/Header",
        "$defs": components,
    }


def _read_topic(view: memoryview) -> tuple[str, int]:
    """The topic, and the offset of the first byte behind its NUL."""
    head = bytes(view[:MAX_TOPIC_BYTES])
    end = head.find(b"\0")
    if end < 0:
        raise MessageError("no topic ends within the first bytes: this is no dspfusion message")
    try:
        name = head[:end].decode("ascii")
    except UnicodeDecodeError:
        raise MessageError("the topic is not ASCII: this is no dspfusion message") from None
    parse_topic(name)
    return name, end + 1


def _read_header(packed: memoryview) -> Header:
    try:
        return _header_decoder.decode(packed)
    except (msgspec.DecodeError, ValueError, RecursionError, OverflowError, MemoryError) as error:
        raise MessageError(f"the header cannot be read: {error}") from None


def _check_agreement(name: str, header: Header) -> None:
    if parse_topic(name) != (header.rig, header.stream, header.codec):
        raise MessageError(f"topic {name} and header {header.rig}/{header.stream}/{header.codec} differ")


def _check_picture(header: Header, payload_bytes: int, wire_flags: int) -> None:
    """A raw picture fills its payload exactly, so that a reader can index by width, height and step."""
    if min(header.width, header.height, header.step, header.sequence, header.flags) < 0:
        raise MessageError("width, height, step, seq and flags are never negative")
    if header.codec != "raw" or wire_flags & WIRE_SHARED_MEMORY:
        return
    sample = SAMPLE_BYTES.get(header.encoding, 1)
    if header.step < header.width * sample or header.step * header.height != payload_bytes:
        raise MessageError(
            f"{header.width}x{header.height} {header.encoding} with a step of {header.step} "
            f"does not fit a payload of {payload_bytes} bytes"
        )
