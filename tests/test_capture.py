"""Capture: a camera that blocks, fails or ends is noticed, called back and let go. Real threads, simulated cameras."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from pipeline.capture import Capture
from pipeline.config import CaptureConfig, SyncConfig, SyntheticSource
from pipeline.errors import SourceEnded, SourceError
from pipeline.frame import Camera, Frame
from pipeline.handover import HandoverClosed, Latest, Queue
from pipeline.sources.synthetic import SyntheticCamera
from pipeline.sync import Sync

QUICK = CaptureConfig(stall_ms=60, backoff_s=0.002, max_backoff_s=0.004)
CANARY = "rtsp://admin:canary-7391@10.0.0.5/main"


def picture(camera: Camera, content: int) -> np.ndarray:
    return np.full((16, 16) if camera == "infrared" else (16, 16, 3), content % 251, np.uint8)


class FakeCamera:
    """A source that follows a script: what each call of `open` and `grab` does."""

    def __init__(self, camera: Camera = "visible", live: bool = True, period_s: float = 0.002) -> None:
        self.camera: Camera = camera
        self.live = live
        self.period_ns: int | None = round(period_s * 1e9)
        self.opened = self.closed = self.index = 0
        self.on_open: Callable[[], None] = lambda: None
        self.on_grab: Callable[[], None] = lambda: None
        self.content: Callable[[int], int] = lambda index: index
        self.unblock = threading.Event()
        self.close_unblocks = True

    def open(self) -> None:
        self.opened += 1
        self.unblock.clear()
        self.on_open()

    def grab(self) -> Frame:
        time.sleep((self.period_ns or 0) / 1e9)
        self.on_grab()
        index, self.index = self.index, self.index + 1
        return Frame(self.camera, picture(self.camera, self.content(index)), time.monotonic_ns(), index)

    def close(self) -> None:
        self.closed += 1
        if self.close_unblocks:
            self.unblock.set()

    def block(self) -> None:
        """A driver that hangs until it is closed."""
        self.unblock.wait(20)
        raise SourceError("the device was closed")


@pytest.fixture
def run():
    """Starts captures, and stops them when the test is over."""
    captures: list[Capture] = []
    sources: list[FakeCamera] = []

    def start(source: FakeCamera, sink=lambda frame: 0, config: CaptureConfig = QUICK, **options) -> Capture:
        captures.append(Capture(source, sink, config, **options))
        sources.append(source)
        return captures[-1].start()

    yield start
    for source in sources:
        source.unblock.set()
    for capture in captures:
        assert capture.stop(timeout_s=10)


def until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.002)


def raise_(error: Exception) -> None:
    raise error


# Hand-over


def test_latest_keeps_the_newest_and_counts_what_it_pushed_out():
    slot: Latest[int] = Latest()
    assert [slot.put(number) for number in (1, 2, 3)] == [0, 1, 1]
    assert slot.take(0) == 3
    assert slot.dropped == 2


def test_latest_with_several_slots_keeps_the_order():
    slots: Latest[int] = Latest(2)
    for number in (1, 2, 3):
        slots.put(number)
    assert [slots.take(0), slots.take(0)] == [2, 3]


@pytest.mark.parametrize("handover", [Latest, Queue])
def test_taking_from_an_empty_hand_over_gives_up_in_time(handover):
    with pytest.raises(TimeoutError):
        handover().take(0.01)


def test_a_queue_waits_for_a_free_slot_and_drops_nothing():
    queue: Queue[int] = Queue(2)
    producer = threading.Thread(target=lambda: [queue.put(number) for number in range(100)], daemon=True)
    producer.start()
    assert [queue.take(5) for _ in range(100)] == list(range(100))
    producer.join(5)
    assert queue.dropped == 0


def test_a_full_queue_gives_up_in_time():
    queue: Queue[int] = Queue(1)
    queue.put(1)
    with pytest.raises(TimeoutError):
        queue.put(2, timeout_s=0.01)


@pytest.mark.parametrize("handover", [Latest, Queue])
def test_a_closed_hand_over_gives_out_what_it_has_and_then_says_so(handover):
    items = handover()
    items.put(1)
    items.close()
    assert items.take(1) == 1
    with pytest.raises(HandoverClosed):
        items.take(1)
    with pytest.raises(HandoverClosed):
        items.put(2)


def test_closing_wakes_whoever_waits():
    queue: Queue[int] = Queue(1)
    errors: list[Exception] = []

    def wait() -> None:
        try:
            queue.take(10)
        except HandoverClosed as error:
            errors.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    queue.close()
    thread.join(10)
    assert len(errors) == 1


# A camera that works


def test_hands_every_frame_on_in_order(run):
    frames: list[Frame] = []
    capture = run(FakeCamera(), lambda frame: frames.append(frame))
    until(lambda: len(frames) >= 20)
    until(lambda: capture.state == "live")
    assert capture.stop(timeout_s=10)
    assert [frame.index for frame in frames] == list(range(len(frames)))
    assert capture.captured == len(frames) + capture.dropped.total()


def test_counts_what_a_slow_consumer_never_saw(run):
    slot: Latest[Frame] = Latest()
    capture = run(FakeCamera(), slot.put)
    until(lambda: capture.captured >= 20)
    assert capture.stop(timeout_s=10)
    assert capture.dropped["handover"] == slot.dropped
    assert capture.captured == len(slot) + capture.dropped.total()


def test_no_report_shows_a_frame_without_the_one_that_it_pushed_out():
    slot: Latest[Frame] = Latest()
    reports: list[dict] = []

    def put(frame: Frame) -> int:
        reader = threading.Thread(target=lambda: reports.append(capture.counters()), daemon=True)
        reader.start()
        reader.join(0.02)  # time enough for a report between the frame and its drop
        return slot.put(frame)

    capture = Capture(FakeCamera(), put, QUICK)
    capture.start()
    until(lambda: len(reports) >= 5)
    assert capture.stop(timeout_s=10)
    assert all(report["captured"] - sum(report["dropped"].values()) in (0, 1) for report in reports)


def test_nothing_is_handed_on_once_stop_has_returned():
    frames: list[Frame] = []
    begun = threading.Event()

    def take_long(frame: Frame) -> None:
        begun.set()
        time.sleep(0.2)
        frames.append(frame)

    capture = Capture(FakeCamera(), take_long, QUICK).start()
    assert begun.wait(10)
    capture.stop(timeout_s=0.01)
    count = len(frames)
    assert capture.join(10)
    assert len(frames) == count >= 1


def test_counts_frames_that_the_driver_lost(run):
    source = FakeCamera()

    def lose_two() -> None:
        if source.index == 5:
            source.index += 2

    source.on_grab = lose_two
    capture = run(source)
    until(lambda: capture.captured >= 10)
    assert capture.missed == 2


def test_a_slow_consumer_is_no_stall(run):
    taken, done = threading.Event(), threading.Event()

    def consume(_: Frame) -> None:
        taken.set()
        done.wait(10)

    capture = run(FakeCamera(), consume)
    assert taken.wait(10)
    time.sleep(0.15)  # longer than a grab may take
    assert capture.state == "live"
    done.set()


def test_a_closed_shutter_is_a_state_of_its_own(run):
    source, closed = FakeCamera("infrared", period_s=0.005), threading.Event()
    closed.set()
    source.content = lambda index: min(index, 3) if closed.is_set() else index
    capture = run(source)
    until(lambda: capture.state == "shutter")
    closed.clear()
    until(lambda: capture.state == "live")


def test_every_frame_that_is_handed_on_tells_how_often_its_picture_came_before(run):
    frames: dict[Camera, list[Frame]] = {"infrared": [], "visible": []}
    for camera, taken in frames.items():
        source = FakeCamera(camera)
        source.content = lambda index: min(index, 3) if index < 8 else index
        run(source, taken.append)
    until(lambda: min(map(len, frames.values())) >= 10)
    assert [frame.repeats for frame in frames["infrared"][:10]] == [0, 0, 0, 0, 1, 2, 3, 4, 0, 0]
    assert not any(frame.repeats for frame in frames["visible"])  # which has no shutter


# A camera that hangs, and goes on sending its last picture


def test_a_camera_that_is_known_to_hang_is_called_back_ever_more_seldom_until_it_recovers(run, monkeypatch, caplog):
    monkeypatch.setattr("pipeline.capture.HANGING_S", 0.1)
    source, renewed = FakeCamera("infrared"), []
    source.on_open = lambda: renewed.append(time.monotonic())
    capture = run(source)
    capture.hanging = True
    until(lambda: source.opened == 4)
    waits = np.diff(renewed)
    assert waits[0] >= 0.1
    assert waits[1] >= 0.2
    assert waits[2] >= 0.4
    capture.hanging = False
    time.sleep(0.3)
    assert source.opened == 4
    assert capture.reconnects == 3
    assert "the infrared camera is lost, calling it back: it hangs: it repeats one picture" in caplog.text


@pytest.mark.parametrize(("live", "hanging"), [(True, False), (False, True)])
def test_a_still_picture_is_no_reason_to_call_a_camera_back_and_no_recording_is(run, monkeypatch, live, hanging):
    monkeypatch.setattr("pipeline.capture.HANGING_S", 0.1)
    source = FakeCamera("infrared", live=live)
    source.content = lambda index: 7
    capture = run(source)
    capture.hanging = hanging
    until(lambda: capture.captured >= 10)
    time.sleep(0.4)
    assert source.opened == 1


def test_a_visible_camera_that_repeats_its_picture_is_counted_and_told_of_once(run, monkeypatch, caplog):
    monkeypatch.setattr("pipeline.capture.SAME_PICTURE_S", 0.05)
    source, hangs = FakeCamera("visible"), threading.Event()
    hangs.set()
    source.content = lambda index: min(index, 3) if hangs.is_set() else index
    capture = run(source)
    until(lambda: "has sent one picture" in caplog.text)
    until(lambda: capture.captured >= 100)
    assert 0 <= capture.captured - 4 - capture.counters()["repeated"] <= 1
    assert capture.state == "live"
    hangs.clear()
    until(lambda: "changes again" in caplog.text)
    lines = [record.getMessage() for record in caplog.records if "picture" in record.getMessage()]
    assert lines == [
        "the visible camera has sent one picture for 0.05 s: it hangs, or its codec skips what does not move",
        "the visible picture changes again",
    ]


# A camera that blocks


def test_a_stall_is_seen_while_the_grab_still_blocks(run):
    source = FakeCamera(period_s=0.01)
    source.on_grab = lambda: source.block() if source.index == 5 else None
    capture = run(source)
    until(lambda: capture.captured == 5)
    until(lambda: capture.state == "stalled")  # it blocks for 20 s
    until(lambda: capture.stalls == 1)


def test_whoever_reads_that_a_camera_stalled_reads_that_it_delivers_again(run, caplog):
    caplog.set_level(logging.WARNING)
    source = FakeCamera(period_s=0.01)
    source.on_grab = lambda: source.unblock.wait(20) if source.index == 5 else None
    run(source, recycle_s=20)
    until(lambda: "the visible camera stalled" in caplog.text)
    source.unblock.set()
    until(lambda: "the visible camera delivers again" in caplog.text)


def test_a_slow_camera_is_granted_three_periods():
    source = FakeCamera(period_s=0.111)
    assert Capture(source, lambda frame: 0, CaptureConfig(stall_ms=250)).stall_limit_ns == 333_000_000
    source.period_ns = None
    assert Capture(source, lambda frame: 0, CaptureConfig(stall_ms=250)).stall_limit_ns == 250_000_000


def test_a_connection_that_stays_silent_is_closed_from_outside_and_renewed(run):
    source = FakeCamera()
    source.on_grab = lambda: source.block() if source.opened == 1 and source.index == 5 else None
    capture = run(source, recycle_s=0.5)
    until(lambda: capture.captured >= 10)
    assert source.opened == 2
    assert capture.reconnects == 1
    until(lambda: capture.state == "live")


@pytest.mark.parametrize("close_unblocks", [True, False])
def test_stopping_takes_less_than_a_second_even_when_the_driver_hangs(close_unblocks):
    source = FakeCamera()
    source.close_unblocks = close_unblocks
    source.on_grab = source.block
    capture = Capture(source, lambda frame: 0, QUICK).start()
    until(lambda: source.opened == 1)
    started = time.monotonic()
    ended = capture.stop()
    assert time.monotonic() - started <= 5  # one second, and some for a busy machine
    assert ended == close_unblocks
    assert source.closed >= 1
    source.unblock.set()
    assert capture.join(2)


def test_stopping_interrupts_a_hanging_close_and_a_long_backoff():
    source = FakeCamera()
    source.on_open = lambda: raise_(SourceError("nobody there"))
    capture = Capture(source, lambda frame: 0, CaptureConfig(backoff_s=30, max_backoff_s=60)).start()
    until(lambda: capture.failures == 2)
    assert capture.state == "backoff"
    started = time.monotonic()
    assert capture.stop()
    assert time.monotonic() - started < 5


def test_a_frame_that_comes_after_the_stop_is_not_handed_on():
    source, frames = FakeCamera(), []
    source.close_unblocks = False
    source.on_grab = lambda: source.unblock.wait(20) and None
    capture = Capture(source, frames.append, QUICK).start()
    until(lambda: source.opened == 1)
    capture.stop(timeout_s=0.1)
    source.unblock.set()
    assert capture.join(2)
    assert frames == []
    assert capture.captured == capture.dropped["stopping"]


# A camera that fails


def test_a_lost_camera_is_called_back(run):
    source = FakeCamera()
    source.on_grab = lambda: raise_(SourceError("connection reset")) if source.index == 10 * source.opened else None
    capture = run(source)
    until(lambda: capture.reconnects >= 5)
    assert capture.captured >= 50


def test_a_connection_that_was_cut_is_called_back_within_100_ms(run):
    source = FakeCamera()
    calls: list[float] = []
    source.on_open = lambda: calls.append(time.monotonic())
    source.on_grab = lambda: raise_(SourceError("cut")) if source.opened == 1 and source.index == 3 else None
    capture = run(source, config=CaptureConfig())
    until(lambda: capture.reconnects == 1)
    assert calls[1] - calls[0] <= 0.1 + 2  # and some for a busy machine


def test_the_waits_double_up_to_the_cap_with_a_random_part():
    capture = Capture(FakeCamera(), lambda frame: 0, CaptureConfig(backoff_s=0.2, max_backoff_s=10))
    longest = {}
    for failures in (1, 2, 3, 4, 5, 6, 7, 100):
        capture._failures_in_a_row = failures
        waits = [capture._backoff_s() for _ in range(300)]
        longest[failures] = max(waits)
        assert min(waits) >= 0.49 * longest[failures]
        assert min(waits) < 0.7 * longest[failures]
    assert longest[1] <= 0.1
    for failures, cap_s in ((2, 0.4), (3, 0.8), (4, 1.6), (5, 3.2), (6, 6.4), (7, 10), (100, 10)):
        assert 0.9 * cap_s <= longest[failures] <= cap_s


def test_a_driver_that_raises_anything_does_not_end_the_capture(run):
    source = FakeCamera()
    errors = itertools.cycle([OSError("gone"), RuntimeError("driver bug"), MemoryError(), ValueError("bad frame")])
    source.on_grab = lambda: raise_(next(errors)) if source.index % 5 == 4 and source.opened < 6 else None
    source.on_open = lambda: setattr(source, "index", source.index + 1)
    capture = run(source)
    until(lambda: capture.captured >= 30)
    assert capture.failures == 5


def test_200_reconnects_leak_no_thread(run):
    source = FakeCamera(period_s=0)
    source.on_open = lambda: raise_(SourceError("refused")) if source.opened % 2 else None
    source.on_grab = lambda: raise_(SourceError("cut")) if source.index % 3 == 2 else None
    source.content = lambda index: setattr(source, "index", index + 1) or index
    before = threading.active_count()
    capture = run(source)
    until(lambda: capture.failures >= 200, timeout_s=15)
    assert threading.active_count() <= before + 2
    assert capture.stop(timeout_s=10)
    assert threading.active_count() <= before
    assert source.closed >= 100


@pytest.mark.parametrize("level", [logging.DEBUG, logging.WARNING])
def test_an_outage_and_its_end_are_logged_once_and_without_the_password(run, caplog, level):
    caplog.set_level(level)
    source = FakeCamera()
    source.on_open = lambda: raise_(SourceError(f"cannot open {CANARY}: refused")) if 1 < source.opened < 30 else None
    source.on_grab = lambda: (
        raise_(RuntimeError(f"lost {CANARY}")) if source.opened == 1 and source.index == 3 else None
    )
    capture = run(source)
    until(lambda: capture.reconnects == 1)
    lines = [record.getMessage() for record in caplog.records if record.name == "dspfusion.capture"]
    assert len([line for line in lines if "lost" in line]) == 1
    assert len([line for line in lines if "back" in line and "calling" not in line]) == 1
    assert "canary" not in caplog.text


# A recording


def test_a_recording_ends_and_nothing_is_lost(run):
    source, frames = FakeCamera(live=False, period_s=0), []
    source.on_grab = lambda: raise_(SourceEnded("over")) if source.index == 50 else None
    capture = run(source, frames.append)
    until(lambda: capture.state == "ended")
    assert [frame.index for frame in frames] == list(range(50))
    assert capture.captured == 50
    assert capture.dropped.total() == 0
    assert source.closed == 1


def test_a_recording_that_cannot_be_read_is_not_tried_again(run):
    source = FakeCamera(live=False)
    source.on_grab = lambda: raise_(SourceError("damaged at frame 3")) if source.index == 3 else None
    capture = run(source)
    assert capture.join(5)
    assert source.opened == 1
    assert str(capture.failure) == "damaged at frame 3"
    assert capture.state == "lost"


def test_a_consumer_that_closes_ends_the_capture(run):
    slot: Latest[Frame] = Latest()
    capture = run(FakeCamera(live=False), slot.put)
    until(lambda: capture.captured >= 2)
    slot.close()
    assert capture.join(2)
    assert capture.dropped["stopping"] == 1
    assert capture.captured == len(slot) + capture.dropped.total()


# Both simulated cameras, live, through synchronisation


def test_two_live_cameras_are_paired_and_every_frame_is_accounted_for():
    size = {"width": 96, "height": 64, "drop_share": 0.03, "jitter_ms": 1.0}
    sources = [
        SyntheticCamera(SyntheticSource(rate_hz=rate_hz, **size), camera)
        for camera, rate_hz in (("infrared", 25), ("visible", 30))
    ]
    inbox: Latest[Frame] = Latest(16)
    captures = [Capture(source, inbox.put, CaptureConfig()).start() for source in sources]
    sync, pairs, taken = Sync(SyncConfig()), [], {"infrared": 0, "visible": 0}

    def add(frame: Frame) -> None:
        taken[frame.camera] += 1
        sync.add(frame, time.monotonic_ns())

    end = time.monotonic() + 20.0  # a busy machine takes a while to draw the first picture
    while sync.account.modes["fused"] < 20 and time.monotonic() < end:
        with contextlib.suppress(TimeoutError):
            add(inbox.take(0.01))
        pairs += sync.poll(time.monotonic_ns())
    assert all([capture.stop(timeout_s=5) for capture in captures])
    inbox.close()
    with contextlib.suppress(HandoverClosed):
        while True:
            add(inbox.take(0))
    pairs += sync.flush()
    assert sum(pair.mode == "fused" for pair in pairs) >= 20
    pushed_out = sum(capture.dropped.total() for capture in captures)
    assert sum(capture.captured for capture in captures) == sum(taken.values()) + pushed_out
    for capture in captures:
        camera = capture.source.camera
        assert taken[camera] == sync.account.used[camera] + sync.dropped[camera].total()
