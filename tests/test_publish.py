"""Publishing: what is sent, what is not encoded, what is refused, and how it ends."""

from __future__ import annotations

import socket
import struct
import threading
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import zmq
from rigs.publishing import LOOPBACK, feeding, fused_frame, publishing, wait_until

from engines.base import EngineDescription
from pipeline import messages
from pipeline.client import Client, ClientError
from pipeline.config import PublishConfig
from pipeline.errors import ConfigError, PublishError
from pipeline.publish import PublishContext, Publisher, UtcClock, create_keys, leaves_this_machine, patience_s

SECOND = 1_000_000_000


def settled(publisher: Publisher) -> int:
    """How many frames were published or replaced."""
    counts = publisher.statistics()
    return counts["published"] + counts["dropped"].get("replaced", 0)


# -- pictures and headers -----------------------------------------------------------------------------------------


def test_the_fused_the_infrared_and_the_visible_picture_arrive_bit_by_bit():
    frame = fused_frame(color=(200, 40, 60))
    expected = {"fused": frame.image, "ir": frame.aligned.infrared, "vis": frame.aligned.visible}
    with publishing() as publisher, feeding(publisher, lambda i: frame):
        for stream, image in expected.items():
            with Client(publisher.endpoint, "car", stream) as client:
                assert np.array_equal(client.latest(5).image, image)


def test_jpeg_pictures_look_like_the_raw_ones():
    frame = fused_frame(color=(200, 40, 60))
    with publishing() as publisher, feeding(publisher, lambda i: frame):
        for stream, image in (("fused", frame.image), ("ir", frame.aligned.infrared)):
            with Client(publisher.endpoint, "car", stream, "jpeg") as client:
                received = client.latest(5)
                assert received.image.shape == image.shape
                assert np.abs(received.image.astype(int) - image).max() <= 4
                assert received.header.quality == 85


def test_the_header_says_all_that_a_consumer_needs_to_trust_the_picture():
    engine = EngineDescription("openvino", "bf16", "nano", "fastest here", "ab" * 32)
    context = PublishContext(engine, drops={"capture": 2}, diffusion_steps=4, flags=("ffc",))
    with publishing() as publisher, feeding(publisher, lambda i: fused_frame(i, age_ms=25), context=context):
        with Client(publisher.endpoint, "car") as client:
            header = client.latest(5).header
        assert header.session == publisher.session
    assert (header.mode, header.calibrated, header.flag_names) == ("fused", True, ("ffc",))
    assert 25_000 <= header.visible_age_us < 1_000_000
    assert header.infrared_age_us - header.visible_age_us == 4000
    assert header.skew_us == -4000
    assert header.infrared_clock == messages.Clock(source="rtcp_ntp", error_us=1500)
    assert (header.model, header.runtime, header.precision) == ("nano", "openvino", "bf16")
    assert header.weights_sha == "ab" * 32
    assert header.degradation["visible"] == {"none": 0.25, "low_light": 0.75}
    assert header.latency_us.items() >= {"sync": 8000, "fuse": 17500}.items()
    assert header.latency_us.keys() >= {"publish_wait", "encode", "total"}
    assert header.drops == {"capture": 2, "publish": 0}
    assert abs(header.captured_ns - (time.time_ns() - 25_000_000)) < 5 * SECOND


def test_a_camera_that_is_gone_has_no_pictures_and_its_age_is_absent():
    with (
        publishing() as publisher,
        feeding(publisher, lambda i: fused_frame(i, mode="vis_only")),
        Client(publisher.endpoint, "car") as fused,
        Client(publisher.endpoint, "car", "ir") as infrared,
    ):
        header = fused.latest(5).header
        with pytest.raises(TimeoutError):
            infrared.latest(0.3)
    assert header.mode == "vis_only"
    assert header.infrared_age_us is None
    assert header.infrared_captured_ns is None
    assert header.flag_names == ("stale_ir",)


def test_a_recording_keeps_its_own_intervals_and_its_age_is_not_its_date():
    with publishing(lossless=True) as publisher, Client(publisher.endpoint, "car") as client:
        wait_until(lambda: any("fused" in prefix for prefix in publisher.statistics()["subscriptions"]))
        for index in range(3):
            publisher.publish(fused_frame(index, captured_ns=index * 40_000_000 + 5_000_000))
        received = [message for message, _ in zip(client.all(2), range(3), strict=False)]
    times = [message.header.captured_ns for message in received]
    assert [later - earlier for earlier, later in pairwise(times)] == [40_000_000] * 2


# -- only what somebody wants -------------------------------------------------------------------------------------


def test_nothing_is_encoded_while_nobody_subscribes():
    with publishing() as publisher:
        for index in range(20):
            publisher.publish(fused_frame(index))
            time.sleep(0.005)
        wait_until(lambda: settled(publisher) == 20)
        assert publisher.statistics()["encoded"] == {}
        assert publisher.statistics()["sent"] == {}


def test_only_the_subscribed_stream_and_codec_are_encoded():
    with publishing() as publisher, feeding(publisher):
        with Client(publisher.endpoint, "car", "vis", "jpeg") as client:
            client.latest(5)
        wait_until(lambda: publisher.statistics()["sent"])  # it is counted a moment after it was sent
        assert {name for name in publisher.statistics()["sent"] if not name.endswith("/msg")} == {"vis/jpeg"}
        assert "raw" not in publisher.statistics()["encoded"]


def test_encoding_ends_with_the_last_subscriber():
    with publishing() as publisher, feeding(publisher):
        with Client(publisher.endpoint, "car") as client:
            client.latest(5)
        wait_until(lambda: not publisher.statistics()["subscriptions"])
        before = publisher.statistics()
        wait_until(lambda: publisher.statistics()["published"] >= before["published"] + 5)
        assert publisher.statistics()["sent"].get("fused/raw") == before["sent"]["fused/raw"]


def test_streams_that_the_configuration_leaves_out_are_not_published():
    config = PublishConfig(endpoint=LOOPBACK, streams=("fused",))
    with (
        publishing(config) as publisher,
        feeding(publisher),
        Client(publisher.endpoint, "car", "vis") as client,
        pytest.raises(TimeoutError, match="does it publish vis"),
    ):
        client.latest(0.3)


# -- counting -----------------------------------------------------------------------------------------------------


def test_every_frame_is_published_or_counted_as_dropped():
    blocked = threading.Event()
    with publishing(on_published=lambda fused, sent_ns: blocked.wait(30)) as publisher:
        publisher.publish(fused_frame(0))
        wait_until(lambda: publisher.statistics()["published"] == 1)  # and its thread is held in the callback
        for index in range(1, 10):
            publisher.publish(fused_frame(index))
        blocked.set()
        wait_until(lambda: publisher.statistics()["published"] == 2)
        counts = publisher.statistics()
    assert counts["dropped"] == {"replaced": 8}
    assert counts["accepted"] == 10


def test_a_dropped_frame_is_a_gap_in_the_sequence():
    with publishing() as publisher, Client(publisher.endpoint, "car") as client:
        wait_until(lambda: publisher.statistics()["subscriptions"])
        publisher.publish(fused_frame(0))
        client.latest(5)
        for index in range(1, 30):
            publisher.publish(fused_frame(index))
        wait_until(lambda: settled(publisher) == 30)

        def told() -> bool:
            if client.received + client.gaps == publisher.statistics()["accepted"]:
                return True
            publisher.publish(fused_frame(30))  # what was lost last shows in the message after it
            return False

        wait_until(told)
        assert client.gaps >= publisher.statistics()["dropped"].get("replaced", 0)


def test_the_hook_hears_of_every_published_frame_and_when_it_was_sent():
    heard: list[tuple[int, int]] = []
    with publishing(on_published=lambda fused, sent_ns: heard.append((fused.index, sent_ns))) as publisher:
        before_ns = time.monotonic_ns()
        publisher.publish(fused_frame(5))
        wait_until(lambda: heard)
    assert heard[0][0] == 5
    assert before_ns < heard[0][1] < time.monotonic_ns()


def test_an_empty_endpoint_publishes_nothing_and_counts_all_the_same():
    with publishing(PublishConfig(endpoint="")) as publisher:
        publisher.publish(fused_frame())
        wait_until(lambda: publisher.statistics()["published"] == 1)
        assert publisher.endpoint == ""


def test_one_bad_frame_does_not_end_the_stream():
    def fail_on_the_first(fused, sent_ns):
        if fused.index == 0:
            raise RuntimeError("a consumer's mistake")

    with publishing(on_published=fail_on_the_first) as publisher:
        publisher.publish(fused_frame(0))
        wait_until(lambda: publisher.statistics()["dropped"] == {"error": 1})
        with feeding(publisher, lambda i: fused_frame(i + 1)), Client(publisher.endpoint, "car") as client:
            assert client.latest(5).header.mode == "fused"
        assert publisher.statistics()["dropped"]["error"] == 1


def test_what_cannot_be_packed_costs_that_message_and_not_the_stream():
    told: list[str] = []
    with publishing(health=lambda: {"state": object()}, on_failure=told.append) as publisher:
        with Client(publisher.endpoint, "car", "health") as health, pytest.raises(TimeoutError):
            health.latest(1.5)
        with feeding(publisher), Client(publisher.endpoint, "car") as client:
            assert client.latest(5).header.mode == "fused"
        assert publisher.statistics()["unsent"]["health"] >= 2
        assert publisher.failure is None
    assert len(told) == 1
    assert told[0].startswith("health could not be published: ")


@pytest.mark.parametrize("lossless", [False, True])
def test_a_publisher_that_dies_lets_go_of_who_waits_for_it_and_says_so(monkeypatch, lossless: bool):
    told: list[str] = []

    def dies(publisher: Publisher) -> None:
        if publisher.statistics()["accepted"]:
            raise OSError("too many open files")

    monkeypatch.setattr(Publisher, "_read_subscriptions", dies)
    with publishing(lossless=lossless, on_failure=told.append) as publisher:
        feeder = threading.Thread(
            target=lambda: [publisher.publish(fused_frame(index)) for index in range(20)], daemon=True
        )
        feeder.start()
        feeder.join(timeout=10)
        assert not feeder.is_alive()
        wait_until(lambda: publisher.failure)
    assert told == ["nothing is published any more: the publisher failed (OSError: too many open files)"]
    counts = publisher.statistics()
    assert counts["accepted"] == 20
    assert counts["published"] + sum(counts["dropped"].values()) == 20


def test_a_replay_waits_and_sends_every_frame_to_a_slow_reader():
    with publishing(lossless=True) as publisher, Client(publisher.endpoint, "car") as client:
        wait_until(lambda: publisher.statistics()["subscriptions"])

        def replay():
            for index in range(60):
                publisher.publish(fused_frame(index, captured_ns=index * 40_000_000, width=320, height=240))

        thread = threading.Thread(target=replay)
        thread.start()
        received = []
        for message in client.all(10):
            received.append(message.header.sequence)
            time.sleep(0.01)
            if len(received) == 60:
                break
        thread.join(timeout=5)
        assert received == list(range(60))
        assert client.gaps == 0
        wait_until(lambda: publisher.statistics()["published"] == 60)


def test_the_end_of_a_replay_reaches_a_slow_reader_and_waits_no_longer_than_for_it(monkeypatch):
    monkeypatch.setattr("pipeline.publish.LAST_READ_S", 60.0)
    with publishing(lossless=True) as publisher, Client(publisher.endpoint, "car") as client:
        wait_until(lambda: publisher.statistics()["subscriptions"])

        def replay():
            for index in range(30):
                publisher.publish(fused_frame(index, captured_ns=index * 40_000_000, width=640, height=480))
            publisher.close()

        thread = threading.Thread(target=replay)
        thread.start()
        received = []
        for _, message in zip(range(30), client.all(10), strict=False):
            received.append(message.header.sequence)
            time.sleep(0.1)
        client.close()
        thread.join(timeout=10)
        assert not thread.is_alive()
        assert received == list(range(30))


# -- health and events --------------------------------------------------------------------------------------------


def test_health_comes_every_second_even_without_frames():
    state = {"cameras": {"infrared": {"state": "stalled"}}, "config_sha": "12ab"}
    with publishing(health=lambda: state) as publisher, Client(publisher.endpoint, "car", "health") as client:
        first, second = (client.latest(10) for _ in range(2))
        assert second.header.published_ns - first.header.published_ns < 3 * SECOND  # 1, and some for a busy machine
        told = second.data()
    assert told["cameras"] == {"infrared": {"state": "stalled"}}
    assert told["details"] == {"config_sha": "12ab"}
    assert told["mode"] == "stub"


def test_health_goes_on_when_the_cameras_cannot_tell_how_they_are():
    def broken():
        raise RuntimeError("no idea")

    with publishing(health=broken) as publisher, Client(publisher.endpoint, "car", "health") as client:
        assert client.latest(10).data()["details"] == {"error": "no idea"}


def test_a_change_of_mode_is_an_event_and_so_is_the_end():
    with publishing() as publisher, Client(publisher.endpoint, "car", "event") as client:
        wait_until(lambda: publisher.statistics()["subscriptions"])
        publisher.publish(fused_frame(0))
        publisher.publish(fused_frame(1, mode="vis_only"))
        wait_until(lambda: publisher.statistics()["sent"].get("event/msg", 0) >= 1)
        publisher.close()
        events = []
        for message in client.all(10):
            events.append(message.data())
            if events[-1]["kind"] == "stopping":
                break
    told = [(event["kind"], event["text"]) for event in events if event["kind"] != "started"]
    assert told == [("mode", "fused -> vis_only"), ("stopping", "rig car stops publishing")]


def test_when_pictures_stop_the_mode_is_stub_and_that_is_an_event_as_is_their_return():
    with (
        publishing() as publisher,
        Client(publisher.endpoint, "car", "event") as client,
        Client(publisher.endpoint, "car", "health") as health,
    ):
        wait_until(lambda: len(publisher.statistics()["subscriptions"]) == 2)
        with feeding(publisher):
            wait_until(lambda: publisher.statistics()["published"] > 5)
        modes = [message.data()["mode"] for _, message in zip(range(4), health.all(10), strict=False)]
        assert modes[-1] == "stub"
        publisher.publish(fused_frame(100))
        changes = (message.data() for message in client.all(10) if message.data()["kind"] == "mode")
        assert next(changes)["text"] == "fused -> stub"
        back = next(changes)
        assert (back["text"], back["details"]["frame"]) == ("stub -> fused", 100)


@pytest.mark.parametrize(
    ("period_s", "patience"),
    [(0.04, 1.0), (0.5, 1.0), (2.0, 4.0), (3600.0, 10.0)],
    ids=["25 a second", "two a second", "one in two seconds", "the first after an outage"],
)
def test_a_slow_rig_is_not_taken_for_one_without_pictures(period_s: float, patience: float):
    assert patience_s(period_s) == patience


def test_a_repeated_infrared_picture_is_told_as_a_closed_shutter():
    frame = fused_frame(mode="held")
    pair = replace(frame.aligned.pair, infrared=replace(frame.aligned.pair.infrared, repeats=2))
    frame = replace(frame, aligned=replace(frame.aligned, pair=pair))
    with publishing() as publisher, feeding(publisher, lambda i: frame), Client(publisher.endpoint, "car") as client:
        assert client.latest(5).header.flag_names == ("stale_ir", "ffc")


def test_the_schema_is_published():
    with publishing() as publisher, Client(publisher.endpoint, "car", "schema") as client:
        assert client.latest(10).data() == messages.json_schema()


# -- endpoints and keys -------------------------------------------------------------------------------------------


def test_a_port_in_use_is_one_clear_line():
    with publishing() as publisher, pytest.raises(PublishError, match=r"is in use.*publish\.endpoint") as caught:
        Publisher(PublishConfig(endpoint=publisher.endpoint), "car")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://192.168.1.5:5560", "tcp://eth0:5560"])
def test_an_endpoint_that_others_can_reach_is_refused_without_keys(endpoint):
    with pytest.raises(ConfigError, match="other machines"):
        Publisher(PublishConfig(endpoint=endpoint), "car")


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:80", "127.0.0.1:5560", "tcp://", "udp://127.0.0.1:5", "tcp://127.0.0.1:99999"]
)
def test_what_is_no_endpoint_is_refused(endpoint):
    with pytest.raises(ConfigError, match=r"publish\.endpoint"):
        Publisher(PublishConfig(endpoint=endpoint), "car")


@pytest.mark.parametrize("endpoint", ["ipc:///nowhere/at/all"])
def test_an_endpoint_that_cannot_be_opened_is_one_clear_line(endpoint):
    with pytest.raises(PublishError, match="cannot publish on"):
        Publisher(PublishConfig(endpoint=endpoint), "car")


def test_addresses_of_this_machine_only_are_known():
    assert not leaves_this_machine("tcp://127.0.0.1:5560")
    assert not leaves_this_machine("tcp://[::1]:5560")
    assert not leaves_this_machine("tcp://localhost:5560")
    assert not leaves_this_machine("ipc:///run/dspfusion/car")
    assert leaves_this_machine("tcp://[::]:5560")


def test_an_ipc_endpoint_is_for_its_owner_only(tmp_path):
    path = tmp_path / "car"
    with publishing(PublishConfig(endpoint=f"ipc://{path}")) as publisher, feeding(publisher):
        assert path.stat().st_mode & 0o777 == 0o600
        with Client(publisher.endpoint, "car") as client:
            assert client.latest(5).header.mode == "fused"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Keys of the publisher, of a friend whom it knows, and of a stranger."""
    folder = tmp_path_factory.mktemp("keys")
    made = {name: create_keys(folder / name, name) for name in ("server", "friend", "stranger")}
    known = folder / "known"
    known.mkdir()
    (known / "friend.key").write_bytes(made["friend"][0].read_bytes())
    return made, known


def curve_config(keys, endpoint="tcp://0.0.0.0:0"):
    made, known = keys
    return PublishConfig(
        endpoint=endpoint, curve_secret_key_file=str(made["server"][1]), authorized_keys_dir=str(known)
    )


def local(endpoint: str) -> str:
    return endpoint.replace("0.0.0.0", "127.0.0.1")


def test_with_keys_a_friend_reads_the_video_from_a_public_endpoint(keys):
    made, _ = keys
    with (
        publishing(curve_config(keys)) as publisher,
        feeding(publisher),
        Client(local(publisher.endpoint), "car", server_key=made["server"][0], secret_key=made["friend"][1]) as client,
    ):
        assert client.latest(5).header.mode == "fused"


def test_a_stranger_is_refused_and_told_so(keys):
    made, _ = keys
    with publishing(curve_config(keys)) as publisher, feeding(publisher):
        with (
            Client(
                local(publisher.endpoint), "car", server_key=made["server"][0], secret_key=made["stranger"][1]
            ) as client,
            pytest.raises(ClientError, match="does not know this client's key"),
        ):
            client.latest(5)
        assert publisher.statistics()["subscriptions"] == []


def test_a_wrong_server_key_and_a_client_without_keys_get_nothing(keys):
    made, _ = keys
    wrong = {"server_key": made["stranger"][0], "secret_key": made["friend"][1]}
    with publishing(curve_config(keys)) as publisher, feeding(publisher):
        for options in (wrong, {}):
            with (
                Client(local(publisher.endpoint), "car", **options) as client,
                pytest.raises(ClientError, match="do not agree on keys"),
            ):
                client.latest(5)


def test_keys_that_cannot_be_used_are_refused(keys, tmp_path):
    made, known = keys
    readable = tmp_path / "readable.key_secret"
    readable.write_bytes(made["server"][1].read_bytes())
    readable.chmod(0o644)
    (tmp_path / "nonsense").mkdir()
    (tmp_path / "nonsense" / "a.key").write_text("no key")
    for secret, folder, why in (
        (str(tmp_path / "missing"), str(known), "cannot read a key"),
        (str(made["server"][0]), str(known), "no secret key"),
        (str(readable), str(known), "chmod 600"),
        (str(made["server"][1]), str(tmp_path / "missing"), "is no folder"),
        (str(made["server"][1]), str(tmp_path / "nonsense"), "leave nothing but them"),
    ):
        config = PublishConfig(endpoint=LOOPBACK, curve_secret_key_file=secret, authorized_keys_dir=folder)
        with pytest.raises(ConfigError, match=why):
            Publisher(config, "car")


def zmtp_subscriber(endpoint: str) -> socket.socket:
    """A bare TCP connection that has shaken hands as a subscriber (ZMTP 3.0, no library that would protect us)."""
    host, port = endpoint.removeprefix("tcp://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=5)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 3) + b"SUB"
    connection.sendall(greeting + bytes([4, len(ready)]) + ready)
    return connection


@pytest.mark.parametrize("length", [60_000, 200_000])
def test_a_hostile_subscription_harms_nobody_else(length):
    with publishing() as publisher, feeding(publisher), Client(publisher.endpoint, "car") as client:
        with zmtp_subscriber(publisher.endpoint) as hostile:
            subscription = b"\1" + b"x" * length
            hostile.sendall(b"\x02" + struct.pack(">Q", len(subscription)) + subscription)
            time.sleep(0.2)
        assert client.latest(5).header.mode == "fused"
        wait_until(lambda: all(len(prefix) < 100 for prefix in publisher.statistics()["subscriptions"]))  # it is gone


# -- the end ------------------------------------------------------------------------------------------------------


def test_closing_is_quick_and_frees_the_port_even_with_a_reader_that_stopped_reading():
    with zmq.Context() as context, context.socket(zmq.SUB) as stopped:
        stopped.setsockopt(zmq.SUBSCRIBE, b"")
        stopped.setsockopt(zmq.RCVHWM, 1)
        stopped.setsockopt(zmq.LINGER, 0)
        with publishing() as publisher:
            stopped.connect(publisher.endpoint)
            with feeding(publisher, lambda i: fused_frame(i, width=640, height=480), rate_hz=60):
                wait_until(lambda: publisher.statistics()["sent"].get("fused/raw", 0) > 20)
            started = time.monotonic()
            publisher.close()
            assert time.monotonic() - started < 5.0  # 0.5 s on a machine that does nothing else
        with publishing(PublishConfig(endpoint=publisher.endpoint)):
            pass


def test_what_there_was_no_time_for_at_the_end_is_counted_and_the_end_is_told():
    with publishing(on_published=lambda fused, sent_ns: time.sleep(0.5)) as publisher:
        with Client(publisher.endpoint, "car", "event") as client:
            wait_until(lambda: publisher.statistics()["subscriptions"])
            publisher.publish(fused_frame(0))
            wait_until(lambda: publisher.statistics()["published"] == 1)  # and its thread is held in the callback
            publisher.publish(fused_frame(1))
            publisher.close()
            assert any(message.data()["kind"] == "stopping" for message in client.all(2))
        counts = publisher.statistics()
    assert (counts["accepted"], counts["published"], counts["dropped"]) == (2, 1, {"closed": 1})


def test_a_thread_that_is_stuck_does_not_hold_the_end_up_and_that_is_told(monkeypatch):
    told: list[str] = []
    ended = threading.Event()
    publisher = Publisher(
        PublishConfig(endpoint=LOOPBACK), "car", on_published=lambda *_: ended.wait(60), on_failure=told.append
    )
    try:
        publisher.publish(fused_frame())
        wait_until(lambda: publisher.statistics()["published"] == 1)  # and its thread is held in the callback
        started = time.monotonic()
        publisher.close()
        assert 1.0 < time.monotonic() - started < 1.2 + 4  # and some for a busy machine
    finally:
        ended.set()
    assert told == ["the publisher is stuck: it is left behind at the end"]


def test_a_frame_after_the_end_is_counted_and_does_no_harm():
    with publishing() as publisher:
        publisher.close()
        publisher.close()
        publisher.publish(fused_frame())
        assert publisher.statistics()["dropped"] == {"closed": 1}


# -- the clock ----------------------------------------------------------------------------------------------------


class Clocks:
    """A monotonic clock, and a system clock that may drift away from it or be set."""

    def __init__(self) -> None:
        self.monotonic_ns = 10 * SECOND
        self.utc_minus_monotonic_ns = 1_700_000_000 * SECOND

    def make(self) -> UtcClock:
        return UtcClock(lambda: self.monotonic_ns + self.utc_minus_monotonic_ns, lambda: self.monotonic_ns)


def test_utc_follows_a_clock_that_is_disciplined_without_a_jump():
    clocks = Clocks()
    clock = clocks.make()
    clocks.utc_minus_monotonic_ns += 3_500_000
    offsets = []
    for _ in range(6):
        clocks.monotonic_ns += SECOND
        assert clock.follow() == 0
        offsets.append(clock.utc(0) - 1_700_000_000 * SECOND)
    assert offsets == [1_000_000, 2_000_000, 3_000_000, 3_500_000, 3_500_000, 3_500_000]


def test_a_system_clock_that_was_set_is_followed_at_once_and_told():
    clocks = Clocks()
    clock = clocks.make()
    clocks.utc_minus_monotonic_ns -= 2 * SECOND
    assert clock.follow() == 0  # not a second since the last look
    clocks.monotonic_ns += SECOND
    assert clock.follow() == -2 * SECOND
    assert clock.utc(0) == 1_699_999_998 * SECOND
