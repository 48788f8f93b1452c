"""The client: never stale, counts what is lost, and starts without the heavy libraries."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import zmq
from rigs.publishing import feeding, fused_frame, publishing, wait_until

from pipeline import messages
from pipeline.client import Client, ClientError, Received, read_image, subscribe
from pipeline.config import PublishConfig

ROOT = Path(__file__).resolve().parent.parent


class Sender:
    """A bare publisher that sends what a test tells it to."""

    def __enter__(self) -> Sender:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self.endpoint = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        return self

    def __exit__(self, *_) -> None:
        self._socket.close()
        self._context.term()

    def wait_for_subscriber(self) -> None:
        assert self._socket.poll(5000)
        self._socket.recv()

    def send(self, sequence: int, *, session: int = 1, **changes) -> None:
        now_ns = time.time_ns()
        fields = {
            "rig": "car",
            "stream": "fused",
            "codec": "raw",
            "session": session,
            "sequence": sequence,
            "captured_ns": now_ns - 5_000_000,
            "published_ns": now_ns,
            "mode": "fused",
            "flags": 0,
            "infrared_age_us": None,
            "visible_age_us": 5000,
            "calibrated": True,
            "width": 2,
            "height": 2,
            "step": 6,
            "encoding": "rgb8",
        }
        header = messages.Header(**(fields | changes))
        self.send_bytes(messages.encode("dspf1/car/fused/raw", header, bytes(12)))

    def send_bytes(self, data: bytes) -> None:
        self._socket.send(data)


def message(payload: bytes, codec: str = "raw", **changes) -> messages.Message:
    header = messages.Header(
        rig="car",
        stream="fused",
        codec=codec,
        session=1,
        sequence=0,
        captured_ns=0,
        published_ns=0,
        mode="fused",
        flags=0,
        infrared_age_us=None,
        visible_age_us=None,
        calibrated=False,
        **changes,
    )
    return messages.decode(messages.encode(f"dspf1/car/fused/{codec}", header, payload))


# -- the newest message -------------------------------------------------------------------------------------------


def test_a_slow_reader_always_sees_the_present():
    ages = []
    with (
        publishing() as publisher,
        feeding(publisher, lambda i: fused_frame(i, width=640, height=480), rate_hz=30),
        Client(publisher.endpoint, "car") as client,
    ):
        client.latest(5)
        for _ in range(15):
            time.sleep(0.1)  # 10 rounds a second, of 30 pictures
            ages.append(client.latest(5).age_ms)
    # A period is 33 ms; queues would have grown by 67 ms in every round, to 670 ms and more in the last five.
    assert min(ages[-5:]) < 400


def test_latest_returns_no_message_twice():
    with Sender() as sender, Client(sender.endpoint, "car") as client:
        sender.wait_for_subscriber()
        sender.send(0)
        assert client.latest(5).header.sequence == 0
        with pytest.raises(TimeoutError, match="is the publisher running"):
            client.latest(0.2)


def test_latest_skips_to_the_newest():
    with Sender() as sender, Client(sender.endpoint, "car") as client:
        sender.wait_for_subscriber()
        for sequence in range(5):
            sender.send(sequence)
        wait_until(lambda: client.received == 5)
        assert client.latest(1).header.sequence == 4
        assert client.gaps == 0  # skipped on purpose is not lost


def test_a_message_that_waited_for_too_long_is_not_the_present():
    with Sender() as sender, Client(sender.endpoint, "car") as client:
        sender.wait_for_subscriber()
        sender.send(0)
        wait_until(lambda: client.received == 1)
        time.sleep(0.15)
        with pytest.raises(TimeoutError):
            client.latest(0.1, max_age_s=0.1)


def test_a_backlog_is_skipped_even_when_the_clocks_of_the_machines_differ():
    hour_ns = 3600 * 1_000_000_000
    with Sender() as sender, Client(sender.endpoint, "car") as client:
        sender.wait_for_subscriber()
        sender.send(0, published_ns=time.time_ns() - hour_ns)  # the publisher's clock is an hour behind
        assert client.latest(5).header.sequence == 0
        sender.send(1, published_ns=time.time_ns() - hour_ns - 2_000_000_000)  # two seconds on its way
        with pytest.raises(TimeoutError):
            client.latest(0.2)
        sender.send(2, published_ns=time.time_ns() - hour_ns)
        assert client.latest(5).header.sequence == 2


def test_a_clock_that_was_set_does_not_make_messages_late():
    with Sender() as sender, Client(sender.endpoint, "car") as client:
        sender.wait_for_subscriber()
        sender.send(0)
        client.latest(5)
        clock_step = 1 << messages.STATE_FLAGS.index("clock_step")
        sender.send(1, published_ns=time.time_ns() - 60_000_000_000, flags=clock_step)
        assert client.latest(5).header.sequence == 1


def test_latest_after_all_starts_from_the_present():
    with publishing() as publisher, feeding(publisher, rate_hz=60), Client(publisher.endpoint, "car") as client:
        for _, _ in zip(client.all(5), range(3), strict=False):
            pass
        time.sleep(1.5)  # the queues on the way fill up
        assert client.latest(5).age_ms < 1000


# -- every message ------------------------------------------------------------------------------------------------


def test_all_yields_every_message_in_order_and_ends_with_silence():
    with Sender() as sender, Client(sender.endpoint, "car") as client:
        sender.wait_for_subscriber()
        for sequence in range(6):
            sender.send(sequence)
        wait_until(lambda: client.received == 6)
        assert [received.header.sequence for received in client.all(0.3)] == list(range(6))


def test_gaps_are_counted_by_sequence_and_a_restart_is_none():
    with Sender() as sender, Client(sender.endpoint, "car") as client:
        sender.wait_for_subscriber()
        for session, sequence in ((1, 0), (1, 1), (1, 4), (1, 5), (2, 0), (2, 2)):
            sender.send(sequence, session=session)
        wait_until(lambda: client.received == 6)
        assert len(list(client.all(0.3))) == 6
        assert client.gaps == 3  # 2 and 3 of the first session, 1 of the second


def test_bytes_that_are_no_message_are_counted_and_skipped():
    with Sender() as sender, Client(sender.endpoint, "car") as client:
        sender.wait_for_subscriber()
        sender.send_bytes(b"dspf1/car/fused/raw\0rubbish")
        sender.send(0)
        assert client.latest(5).header.sequence == 0
        assert client.errors == 1


def test_closing_ends_a_waiting_reader():
    with Sender() as sender:
        client = Client(sender.endpoint, "car")
        threading.Timer(0.1, client.close).start()
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            client.latest(10)
        assert time.monotonic() - started < 5


def test_a_client_that_comes_first_finds_the_publisher_that_comes_later(tmp_path):
    endpoint = f"ipc://{tmp_path / 'car'}"
    with Client(endpoint, "car") as client:  # nobody is there now
        with pytest.raises(TimeoutError):
            client.latest(0.2)
        with publishing(PublishConfig(endpoint=endpoint)) as publisher, feeding(publisher):
            assert client.latest(20).header.rig == "car"


def test_the_rig_can_be_found_by_itself_and_then_only_one_stream_is_asked_for():
    with publishing() as publisher, feeding(publisher), Client(publisher.endpoint) as client:
        assert client.latest(5).header.stream == "fused"
        assert client.rig == "car"
        wait_until(lambda: publisher.statistics()["subscriptions"] == ["dspf1/car/fused/raw\0"])


# -- pictures -----------------------------------------------------------------------------------------------------


def test_raw_pictures_are_read_with_their_step_and_byte_order():
    rows = np.arange(24, dtype=np.uint8).reshape(2, 12)
    padded = message(rows.tobytes(), width=3, height=2, step=12, encoding="rgb8")
    assert np.array_equal(read_image(padded), rows[:, :9].reshape(2, 3, 3))
    counts = np.array([[1, 300], [9000, 16383]], ">u2")
    infrared = message(counts.tobytes(), width=2, height=2, step=4, encoding="mono16", big_endian=True)
    assert np.array_equal(read_image(infrared), counts)
    swapped = message(bytes([1, 2, 3]), width=1, height=1, step=3, encoding="bgr8")
    assert read_image(swapped).tolist() == [[[3, 2, 1]]]


def test_a_jpeg_of_another_size_than_its_header_says_is_refused_before_it_is_decoded():
    jpeg = simplejpeg.encode_jpeg(np.zeros((480, 640, 3), np.uint8))
    for bad in (message(jpeg, "jpeg", width=8, height=8), message(b"no jpeg", "jpeg", width=8, height=8)):
        with pytest.raises(messages.MessageError, match="JPEG"):
            read_image(bad)


def test_a_picture_in_an_unknown_encoding_or_in_shared_memory_is_refused():
    with pytest.raises(messages.MessageError, match="bayer"):
        read_image(message(bytes(4), width=2, height=2, step=2, encoding="bayer_rggb8"))
    header = message(bytes(12), width=2, height=2, step=6, encoding="rgb8").header
    shared = messages.encode("dspf1/car/fused/raw", header, b"", wire_flags=messages.WIRE_SHARED_MEMORY)
    with pytest.raises(messages.MessageError, match="shared memory"):
        read_image(messages.decode(shared))


def test_the_age_counts_from_the_capture():
    received = Received(message(bytes(12), width=2, height=2, step=6, encoding="rgb8"), 0)
    header = messages.msgspec.structs.replace(received.header, published_ns=1_000_000_000, visible_age_us=30_000)
    picture = Received(messages.Message("dspf1/car/fused/raw", header, received.payload), 0)
    assert picture.age_at_ms(1_012_000_000) == 42


# -- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["nonsense", "http://127.0.0.1", "tcp://127.0.0.1", "tcp://127.0.0.1:word"])
def test_what_is_no_endpoint_is_refused_with_an_example(endpoint):
    with pytest.raises(ClientError, match=r"write for example tcp://127\.0\.0\.1:5560"):
        Client(endpoint, "car")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rig": "no such/name"}, "cannot be part of a topic"),
        ({"rig": "car", "server_key": "short"}, "neither a key of 40 characters nor a key file"),
        ({"rig": "car", "server_key": "x" * 40, "secret_key": "missing.key_secret"}, "cannot read the key file"),
    ],
)
def test_names_and_keys_that_cannot_be_used_are_refused(options, why):
    with pytest.raises(ClientError, match=why):
        Client("tcp://127.0.0.1:5560", **options)


def read_png(path: Path) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    return image if image.ndim == 2 else image[..., ::-1]


# -- what the command does ----------------------------------------------------------------------------------------


def test_subscribe_tells_one_line_a_message_and_sums_up():
    lines: list[str] = []
    with publishing(lossless=True, timeline="monotonic") as publisher, feeding(publisher):
        summary = subscribe(publisher.endpoint, 10, echo=lines.append)
    assert len(lines) == summary["messages"] == 10
    assert lines[0].startswith("car/fused #")
    assert "64x48" in lines[0]
    assert (summary["gaps"], summary["modes"], summary["ended"], summary["rig"]) == (0, {"fused": 10}, "count", "car")
    assert summary["fps"] > 0
    assert 0 <= summary["age_ms"]["p50"] <= summary["age_ms"]["p99"] < 20_000
    assert json.loads(json.dumps(summary)) == summary


def test_subscribe_saves_pictures_lossless_or_as_they_came(tmp_path):
    frame = fused_frame(color=(10, 200, 30))
    with publishing() as publisher, feeding(publisher, lambda i: frame):
        for stream, codec in (("fused", "raw"), ("ir", "raw"), ("fused", "jpeg"), ("health", "msg")):
            folder = tmp_path / f"{stream}_{codec}"
            summary = subscribe(publisher.endpoint, 1, folder, rig="car", stream=stream, codec=codec, echo=None)
            assert summary["saved"] == len(list(folder.iterdir())) == 1
    assert np.array_equal(read_png(next((tmp_path / "fused_raw").iterdir())), frame.image)
    assert np.array_equal(read_png(next((tmp_path / "ir_raw").iterdir())), frame.aligned.infrared)
    assert json.loads(next((tmp_path / "health_msg").iterdir()).read_text())["mode"] == "fused"
    assert next((tmp_path / "fused_jpeg").iterdir()).suffix == ".jpg"


def test_pictures_of_a_publisher_that_restarts_are_all_kept(tmp_path):
    """Each run counts from 0: the session tells its pictures from those of the run before."""
    with Sender() as sender:
        summaries: list[dict] = []
        reading = threading.Thread(
            target=lambda: summaries.append(subscribe(sender.endpoint, 4, tmp_path, rig="car", echo=None))
        )
        reading.start()
        sender.wait_for_subscriber()
        for session in (255, 256):
            for sequence in (0, 1):
                sender.send(sequence, session=session)
        reading.join(20)
    assert summaries[0]["saved"] == 4
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"car_fused_{session}_{sequence}.png"
        for session in ("000000000000ff", "00000000000100")
        for sequence in ("00000000", "00000001")
    ]


def test_subscribe_ends_after_its_duration():
    with publishing() as publisher, feeding(publisher):
        assert subscribe(publisher.endpoint, duration_s=2, echo=None)["ended"] == "duration"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_subscribe_with_its_summary(number):
    with publishing() as publisher, feeding(publisher):
        summary = subscribe(publisher.endpoint, echo=lambda _: os.kill(os.getpid(), number), timeout_s=30)
    assert summary["ended"] == "signal"
    assert summary["messages"] > 0


def test_subscribe_to_silence_is_one_clear_line():
    with Sender() as sender, pytest.raises(ClientError, match=r"no fused message from .* is the publisher running"):
        subscribe(sender.endpoint, 1, timeout_s=0.2, echo=None)


def test_the_example_of_the_readme_outlives_a_rig_that_pauses():
    """Nothing comes for longer than `latest` waits by itself, then one picture."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    printed: list[tuple] = []
    silence_s = 1.5

    def told(*values: object) -> None:
        printed.append(values)
        raise KeyboardInterrupt

    with Sender() as sender:
        later = threading.Timer(silence_s, lambda: (sender.wait_for_subscriber(), sender.send(0)))
        later.start()
        with pytest.raises(KeyboardInterrupt):
            exec(code.replace("tcp://127.0.0.1:5560", sender.endpoint), {"print": told})
        later.join()
    mode, age_ms, shape = printed[0]
    assert (mode, shape) == ("fused", (2, 2, 3))
    assert age_ms > 0


@pytest.mark.parametrize("module", ["pipeline.client", "pipeline.viewer.server"])
def test_consumers_start_without_the_heavy_libraries(module):
    code = f"import sys, {module}; print(sorted(set(sys.modules) & {{'torch', 'cv2', 'openvino', 'av', 'pydantic'}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
