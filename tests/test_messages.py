"""The wire format, version 1: written and read, the committed golden bytes, and everything that is refused."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import crc32c
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import messages
from pipeline.messages import Clock, Header, MessageError, decode, encode

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
TOPIC = "dspf1/car/fused/raw"


def header(**changes) -> Header:
    """A raw 4x2 rgb8 picture."""
    fields = {
        "rig": "car",
        "stream": "fused",
        "codec": "raw",
        "session": 1,
        "sequence": 7,
        "captured_ns": 1_700_000_000_000_000_000,
        "published_ns": 1_700_000_000_025_000_000,
        "mode": "fused",
        "flags": 0,
        "infrared_age_us": 29_000,
        "visible_age_us": 25_000,
        "calibrated": True,
        "width": 4,
        "height": 2,
        "step": 12,
        "encoding": "rgb8",
    }
    return Header(**(fields | changes))


def small_message() -> bytes:
    return encode(TOPIC, header(), bytes(range(24)))


def fixed_part(message: bytes) -> tuple:
    return struct.unpack_from("<4sHHIII", message, message.index(b"\0") + 1)


# -- layout -------------------------------------------------------------------------------------------------------


def test_a_message_comes_back_as_it_was_written():
    message = decode(small_message())
    assert message.topic == TOPIC
    assert message.header == header()
    assert bytes(message.payload) == bytes(range(24))


def test_the_layout_is_the_documented_one_byte_by_byte():
    data = small_message()
    assert data.startswith(b"dspf1/car/fused/raw\0DSPF\x01\x00\x01\x00")
    magic, version, flags, header_bytes, payload_bytes, checksum = fixed_part(data)
    assert (magic, version, flags, payload_bytes) == (b"DSPF", 1, messages.WIRE_CRC, 24)
    start = len(TOPIC) + 1 + 20
    packed, payload = data[start : start + header_bytes], data[-24:]
    assert checksum == crc32c.crc32c(packed + payload)
    assert msgspec.msgpack.decode(packed)["t"] == 1_700_000_000_000_000_000


def test_the_payload_starts_at_a_multiple_of_64_from_the_start_of_the_message():
    for name in ("a", "ab" * 7, "c" * 32):  # other topic lengths, other paddings
        data = encode(f"dspf1/{name}/fused/raw", header(rig=name), bytes(24))
        assert (len(data) - 24) % 64 == 0


def test_the_payload_is_a_view_and_not_a_copy():
    data = bytearray(small_message())
    payload = decode(data).payload
    data[-1] = 99
    assert payload[-1] == 99


def test_the_state_of_every_message_is_on_the_wire_even_where_it_is_a_default():
    data = encode(TOPIC, header(calibrated=False, visible_age_us=None), bytes(24))
    packed = data[len(TOPIC) + 21 :][: fixed_part(data)[3]]
    assert {"mode", "flags", "age_ir_us", "age_vis_us", "calibrated"} <= msgspec.msgpack.decode(packed).keys()


def test_a_reader_ignores_fields_that_it_does_not_know():
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(header())) | {"from_the_future": [1, {"x": None}]}
    packed = msgspec.msgpack.encode(fields)
    assert decode(assembled(packed, bytes(24))).header == header()


def test_a_mode_and_an_encoding_of_a_later_version_can_be_read():
    later = header(mode="stereo", encoding="bayer_rggb8", width=4, step=4, height=6)
    assert decode(encode(TOPIC, later, bytes(24))).header.mode == "stereo"


def test_flags_have_names():
    assert header(flags=0b1000001).flag_names == ("stale_ir", "uncalibrated")


def test_the_age_is_that_of_the_moment_shown():
    assert header().age_us == 25_000  # the visible picture's
    assert header(visible_age_us=None).age_us == 29_000
    assert header(infrared_age_us=None, visible_age_us=None).age_us == 25_000  # from the times


# -- topics -------------------------------------------------------------------------------------------------------


def test_topics_name_rig_stream_and_codec():
    assert messages.topic("car", "ir", "jpeg") == "dspf1/car/ir/jpeg"
    assert messages.parse_topic("dspf1/car/ir/jpeg") == ("car", "ir", "jpeg")


def test_a_subscription_to_one_name_never_matches_a_longer_one():
    assert not messages.topic("cam10", "fused", "raw").encode().startswith(messages.subscription("cam1"))
    assert not b"dspf1/car/fused/raw16\0".startswith(messages.subscription("car", "fused", "raw"))
    assert b"dspf1/car/fused/raw\0".startswith(messages.subscription("car", "fused"))


@pytest.mark.parametrize("bad", ["", "a/b", "a b", "é", "x" * 33, "a\0"])
def test_a_name_that_cannot_be_a_topic_is_refused(bad):
    with pytest.raises(MessageError, match="cannot be part of a topic"):
        messages.topic(bad, "fused", "raw")


# -- golden files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fused_raw", "fused_jpeg", "health"])
def test_golden_files_of_version_1_are_read_and_written_byte_by_byte(name):
    golden = (GOLDEN / f"v1_{name}.bin").read_bytes()
    message = decode(golden)
    assert encode(message.topic, message.header, message.payload, wire_flags=message.wire_flags) == golden


def test_the_golden_picture_says_what_was_put_into_it():
    message = decode((GOLDEN / "v1_fused_raw.bin").read_bytes())
    seen = message.header
    assert message.topic == "dspf1/golden/fused/raw"
    assert (seen.width, seen.height, seen.step, seen.encoding) == (8, 6, 24, "rgb8")
    assert bytes(message.payload) == bytes(i % 251 for i in range(8 * 6 * 3))
    assert seen.infrared_clock == Clock(source="rtcp_ntp", error_us=1500, offset_ns=-2_000_000, drift_ppm=12.5)
    assert (seen.captured_ns, seen.skew_us, seen.mode) == (1_790_000_000_123_456_789, -4000, "held")
    assert seen.flag_names == ("stale_ir", "suspect")
    assert seen.degradation["visible"] == {"none": 0.25, "low_light": 0.75}
    assert seen.latency_us == {"sync": 8000, "register": 900, "fuse": 17500, "encode": 10, "total": 31000}


def test_the_golden_health_message_can_be_read_as_plain_data():
    health = decode((GOLDEN / "v1_health.bin").read_bytes()).data()
    assert health["cameras"] == {"infrared": {"state": "live"}, "visible": {"state": "stalled"}}
    assert msgspec.convert(health, messages.Health).published == 1234


# -- what is refused ----------------------------------------------------------------------------------------------


def assembled(packed: bytes, payload: bytes, *, topic: bytes = TOPIC.encode(), version: int = 1, **lengths) -> bytes:
    """A message put together without our own writer, with a right checksum."""
    checksum = crc32c.crc32c(packed + payload)
    header_bytes, payload_bytes = lengths.get("header_bytes", len(packed)), lengths.get("payload_bytes", len(payload))
    head = topic + b"\0" + struct.pack("<4sHHIII", b"DSPF", version, 1, header_bytes, payload_bytes, checksum) + packed
    return head + bytes(-len(head) % 64) + payload


def test_every_shortened_message_is_refused():
    data = small_message()
    for length in range(len(data)):
        with pytest.raises(MessageError):
            decode(data[:length])


def test_a_message_with_something_behind_it_is_refused():
    with pytest.raises(MessageError, match="its lengths say"):
        decode(small_message() + b"\0")


def test_every_damaged_byte_behind_the_topic_is_noticed():
    data = small_message()
    for place in range(len(TOPIC) + 1, len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x40
        if place - len(TOPIC) - 1 in (6, 7):  # flags that are free for later versions
            continue
        with pytest.raises(MessageError):
            decode(damaged)


def test_the_checksum_can_be_left_unchecked():
    damaged = bytearray(small_message())
    damaged[-1] ^= 1
    with pytest.raises(MessageError, match="checksum"):
        decode(damaged)
    assert decode(damaged, verify=False).payload[-1] == 23 ^ 1


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no topic"),
        (b"x" * 500, "no topic"),
        (b"\xff\0" + bytes(64), "ASCII"),
        (b"dspf2/car/fused/raw\0" + bytes(64), "no topic"),
        (TOPIC.encode() + b"\0DSP2" + bytes(64), "magic"),
    ],
)
def test_other_bytes_are_told_apart_from_messages(data, why):
    with pytest.raises(MessageError, match=why):
        decode(data)


def test_another_version_is_named():
    with pytest.raises(MessageError, match="wire version 2 is unknown here"):
        decode(assembled(msgspec.msgpack.encode(header()), bytes(24), version=2))


def test_lengths_are_checked_before_they_are_used():
    packed = msgspec.msgpack.encode(header())
    with pytest.raises(MessageError, match="over the limit"):
        decode(assembled(packed, bytes(24), header_bytes=70_000))
    with pytest.raises(MessageError, match="over the limit"):
        decode(assembled(packed, bytes(24), payload_bytes=0xFFFFFFFF))
    with pytest.raises(MessageError, match="over the limit"):
        decode(small_message(), max_payload_bytes=23)


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xc1",
        b"\x80",  # an empty map: the state is missing
        b"\x91" * 60_000,  # nested lists
        b"\x81\xa1x" * 15_000,  # nested maps
        b"\x81\xa4warp\xdd\xff\xff\xff\xff",  # a list that claims four billion entries
        b"\x81\xa3rig\xa2\xff\xff",  # no UTF-8
    ],
)
def test_hostile_headers_are_refused(packed):
    with pytest.raises(MessageError, match="header cannot be read"):
        decode(assembled(packed, bytes(24)))


@pytest.mark.parametrize(
    "changes",
    [{"width": 5}, {"height": 3}, {"step": 11}, {"width": -4}, {"encoding": "32FC1"}],
)
def test_a_raw_picture_that_does_not_fill_its_payload_is_refused(changes):
    packed = msgspec.msgpack.encode(header(**changes))
    with pytest.raises(MessageError):
        decode(assembled(packed, bytes(24)))


def test_a_topic_that_contradicts_its_header_is_refused():
    with pytest.raises(MessageError, match="differ"):
        encode("dspf1/car/vis/raw", header(), bytes(24))
    with pytest.raises(MessageError, match="differ"):
        decode(assembled(msgspec.msgpack.encode(header()), bytes(24), topic=b"dspf1/bus/fused/raw"))


def test_a_header_that_is_too_large_is_not_written():
    with pytest.raises(MessageError, match="at most 65536 bytes"):
        encode(TOPIC, header(engine_sha="x" * 70_000), bytes(24))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused_and_nothing_else_happens(data):
    with pytest.raises(MessageError):
        decode(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.binary(max_size=100))
def test_random_headers_are_refused_and_nothing_else_happens(packed, payload):
    with pytest.raises(MessageError):
        decode(assembled(packed, payload))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(Header.__struct_encode_fields__)), VALUES, max_size=4))
def test_headers_with_any_values_are_read_or_refused(changes):
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(header())) | changes
    try:
        message = decode(assembled(msgspec.msgpack.encode(fields), bytes(24)))
    except MessageError:
        return
    assert message.header.age_us is not None
    assert message.header.flag_names is not None


# -- schema and documentation -------------------------------------------------------------------------------------


def test_the_json_schema_describes_the_wire_names():
    schema = messages.json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert {"t", "t_pub", "mode", "age_ir_us", "calibrated"} <= set(schema["$defs"]["Header"]["required"])
    assert schema["$defs"].keys() >= {"Header", "Clock", "Health", "Event"}


def test_the_documentation_names_every_field_of_the_header():
    text = (ROOT / "docs" / "messages.md").read_text()
    for struct_type in (Header, Clock, messages.GainControl, messages.Health, messages.Event):
        for field in struct_type.__struct_encode_fields__:
            assert f"`{field}`" in text, f"docs/messages.md does not tell what {struct_type.__name__}.{field} is"


def test_the_python_reader_in_the_documentation_reads_the_golden_files(tmp_path):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "messages.md").read_text(), re.DOTALL)[-1]
    read: dict = {}
    exec(code, read)
    topic, fields, payload = read["read_message"]((GOLDEN / "v1_fused_raw.bin").read_bytes())
    assert (topic, fields["mode"], len(payload)) == ("dspf1/golden/fused/raw", "held", 144)


def test_messages_need_msgspec_and_crc32c_only():
    code = (
        "import sys; import pipeline.messages;"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'numpy', 'zmq', 'cv2', 'torch', 'simplejpeg'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
