"""Network cameras, over real sockets: an RTSP server with a clock in its pictures, and MPEG-TS over UDP."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import av
import numpy as np
import pytest

from pipeline.config import StreamSource
from pipeline.errors import SourceError
from pipeline.frame import Frame
from pipeline.sources.access_units import START_CODE, AccessUnits
from pipeline.sources.capture_time import CaptureTime, MinimumDelay, Timeline
from pipeline.sources.stream import StreamCamera
from tests.rigs.proxy import faulty_proxy
from tests.rigs.rtsp_server import RtspServer, clock_cells, free_port, missing_gst, read_clock, rtsp_server


def needs_gst(test):
    missing = missing_gst()
    return pytest.mark.needs_gst(pytest.mark.skipif(missing is not None, reason=missing or "")(test))


MS = 1_000_000
PERIOD = 40 * MS


@pytest.fixture(scope="module")
def cameras() -> Iterator[RtspServer]:
    with rtsp_server(infrared_phase_ms=10) as server:
        yield server


def camera(url: str, which: str = "infrared", **settings) -> StreamCamera:
    return StreamCamera(StreamSource(url=url, **({"connect_timeout_s": 20, "read_timeout_s": 8} | settings)), which)


def shown(frame: Frame) -> int:
    """The moment that the picture itself shows."""
    moment = read_clock(frame.image, frame.arrived_ns)
    assert moment is not None
    return moment


def grab(source: StreamCamera, count: int) -> list[Frame]:
    return [source.grab() for _ in range(count)]


def assert_only_gaps_are_suspect(frames: list[Frame]) -> None:
    """On a busy machine the server itself skips a picture now and then: that shows as a gap in the numbers."""
    steps = np.diff([frame.index for frame in frames])
    assert (steps >= 1).all()
    for step, before, frame in zip(steps, frames, frames[1:], strict=False):
        assert not frame.suspect or step > 1 or before.suspect


# Pictures


@pytest.fixture(scope="module")
def recording(cameras: RtspServer) -> list[tuple[Frame, Frame]]:
    """Three seconds of both cameras over TCP: long enough for the first sender report."""
    infrared, visible = camera(cameras.url("ir")), camera(cameras.url("vis"), "visible")
    infrared.open(), visible.open()
    try:
        return [(infrared.grab(), visible.grab()) for _ in range(80)]
    finally:
        infrared.close(), visible.close()


@needs_gst
def test_reads_an_infrared_camera_in_order(recording):
    frames = [infrared for infrared, _ in recording]
    assert all(frame.image.shape == (480, 640) and frame.image.dtype == np.uint8 for frame in frames)
    moments = [shown(frame) for frame in frames]
    assert moments == sorted(set(moments))
    stamps = [frame.captured_ns for frame in frames]
    assert stamps == sorted(set(stamps))
    assert all(frame.captured_ns <= frame.arrived_ns for frame in frames)
    assert_only_gaps_are_suspect(frames)


@needs_gst
def test_the_stamp_is_the_moment_in_the_picture_once_the_camera_has_told_its_clock(recording):
    told = [frame for pair in recording for frame in pair if frame.clock == "rtcp_ntp"]
    assert told, "the server sends a sender report within its first three seconds"
    errors = [frame.captured_ns - shown(frame) for frame in told]
    assert np.median(np.abs(errors)) < 5 * MS


@needs_gst
def test_the_stamps_of_two_cameras_differ_by_what_their_pictures_differ_by(recording):
    """Infrared is exposed 10 ms later: the stamps say so without a look into the pictures."""
    errors = [
        (infrared.captured_ns - visible.captured_ns) - (shown(infrared) - shown(visible))
        for infrared, visible in recording
        if infrared.clock == visible.clock == "rtcp_ntp"
    ]
    assert errors
    assert np.median(np.abs(errors)) < 5 * MS


@needs_gst
def test_a_picture_is_handed_out_before_the_next_one_is_taken(recording):
    """FFmpeg's parser keeps each picture until the next one begins."""
    # The visible camera was opened last and is read in step with the other one: it has no backlog.
    frames = [visible for _, visible in recording[40:]]
    assert any(frame.arrived_ns < shown(following) for frame, following in itertools.pairwise(frames))


@needs_gst
def test_reads_the_visible_camera_in_colour(recording):
    frame = recording[0][1]
    assert frame.image.shape == (480, 640, 3)
    assert frame.image.flags.c_contiguous
    red, _, blue = frame.image[100:].reshape(-1, 3).mean(axis=0)
    assert red > blue + 20  # the server's chroma is Cb 110 and Cr 150
    assert read_clock(frame.image, frame.arrived_ns) is not None


@needs_gst
def test_reads_over_udp(cameras):
    source = camera(cameras.url("ir"), transport="udp")
    source.open()
    try:
        frames = grab(source, 20)
    finally:
        source.close()
    moments = [shown(frame) for frame in frames]
    assert moments == sorted(set(moments))
    assert source.period_ns == pytest.approx(PERIOD, rel=0.2)


@needs_gst
@pytest.mark.parametrize("codec", ["h264-slices", "h265", "jpeg"])
def test_reads_other_codecs(codec):
    with rtsp_server(codec=codec, width=320, height=240) as server:
        source = camera(server.url("ir"))
        source.open()
        frames = grab(source, 15)
        source.close()
    readable = [frame for frame in frames if read_clock(frame.image, frame.arrived_ns) is not None]
    assert len(readable) >= 14
    assert_only_gaps_are_suspect(frames)


@needs_gst
def test_the_first_frame_after_joining_between_keyframes_is_a_keyframe(cameras):
    """Everything before it is built on pictures that were never received: its clock would not be readable."""
    running = camera(cameras.url("ir"))
    running.open()
    grab(running, 8)  # the stream is now between two keyframes
    late = camera(cameras.url("ir"))
    late.open()
    first = late.grab()
    assert not first.suspect
    assert read_clock(first.image, first.arrived_ns) is not None
    late.close(), running.close()


@contextmanager
def late_camera(gop: int) -> Iterator[StreamCamera]:
    """A camera with half a second of patience, opened right after a keyframe of a stream that another one keeps up."""
    with rtsp_server(width=320, height=240, gop=gop) as server:
        running, late = camera(server.url("ir")), camera(server.url("ir"), read_timeout_s=0.5)
        running.open()
        running.grab()
        late.open()
        yield late
        late.close(), running.close()


@needs_gst
def test_a_keyframe_may_take_longer_than_the_read_timeout_to_come():
    """One every four seconds, joined right after one, with half a second of patience for a stream that runs."""
    with late_camera(gop=100) as late:
        started = time.monotonic()
        assert not late.grab().suspect
        assert time.monotonic() - started > 0.5


@needs_gst
def test_a_camera_without_keyframes_is_an_error_and_may_be_closed_before(monkeypatch):
    monkeypatch.setattr("pipeline.sources.stream.FIRST_FRAME_S", 1.0)
    with late_camera(gop=10_000) as late:
        with pytest.raises(SourceError, match="sent no keyframe in 1 s: have it send one every few seconds"):
            late.grab()
        monkeypatch.setattr("pipeline.sources.stream.FIRST_FRAME_S", 60.0)
        late.open()
        threading.Timer(0.5, late.close).start()
        with pytest.raises(SourceError, match="was closed while it was read"):
            late.grab()


@needs_gst
def test_frames_after_a_loss_are_suspect_until_the_next_keyframe():
    with rtsp_server(loss=0.06) as server:
        source = camera(server.url("ir"), read_timeout_s=4)
        source.open()
        frames = grab(source, 60)
        while len({frame.suspect for frame in frames}) < 2 and len(frames) < 600:  # which packets are lost is chance
            frames += grab(source, 10)
        source.close()
    assert any(frame.suspect for frame in frames)
    assert not all(frame.suspect for frame in frames)
    unreadable = [frame for frame in frames if read_clock(frame.image, frame.arrived_ns) is None]
    unflagged = [frame for frame in unreadable if not frame.suspect]
    assert len(unflagged) <= 3 + 0.1 * len(unreadable)
    # A frame that never arrived leaves a gap in the numbers.
    assert frames[-1].index - frames[0].index >= len(frames) - 1


# Faults


@needs_gst
def test_a_frozen_camera_is_an_error_within_twice_the_read_timeout(cameras):
    with faulty_proxy(cameras.port) as proxy:
        source = camera(f"rtsp://127.0.0.1:{proxy.port}/ir", read_timeout_s=1.5)
        source.open()
        grab(source, 10)
        proxy.freeze()
        started = time.monotonic()
        with pytest.raises(SourceError, match=r"did not answer|stalled"):
            grab(source, 100)
        assert time.monotonic() - started < 2 * 1.5 + 5  # and some for a busy machine
        source.close()


@needs_gst
def test_a_cut_connection_is_an_error_and_not_the_end_of_a_recording(cameras):
    with faulty_proxy(cameras.port) as proxy:
        source = camera(f"rtsp://127.0.0.1:{proxy.port}/ir")
        source.open()
        grab(source, 5)
        proxy.cut()
        with pytest.raises(SourceError) as caught:
            grab(source, 100)
        assert type(caught.value) is SourceError
        source.close()


@needs_gst
def test_a_camera_that_comes_back_is_read_again_and_goes_on_counting():
    with rtsp_server(width=320, height=240) as server:
        source = camera(server.url("ir"), read_timeout_s=3)
        source.open()
        last = grab(source, 5)[-1]
        server.restart()
        with pytest.raises(SourceError):
            grab(source, 200)
        source.open()
        assert source.grab().index > last.index
        source.close()


@needs_gst
def test_close_from_another_thread_ends_a_grab(cameras):
    with faulty_proxy(cameras.port) as proxy:
        source = camera(f"rtsp://127.0.0.1:{proxy.port}/ir", read_timeout_s=2)
        source.open()
        source.grab()
        proxy.freeze()
        threading.Timer(0.2, source.close).start()
        with pytest.raises(SourceError):
            grab(source, 100)
        source.close()
        with pytest.raises(SourceError, match="closed"):
            source.grab()


def test_a_camera_that_is_off_refuses_at_once():
    with pytest.raises(SourceError, match="refused the connection"):
        camera(f"rtsp://127.0.0.1:{free_port()}/ir").open()


def test_a_camera_that_accepts_but_never_answers_ends_at_the_connect_timeout():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(SourceError, match=r"did not answer within 0\.5 s"):
            camera(f"rtsp://127.0.0.1:{silent.getsockname()[1]}/ir", connect_timeout_s=0.5).open()
        assert time.monotonic() - started < 5


def test_two_hundred_failed_connections_leave_nothing_behind():
    import psutil

    process = psutil.Process()
    source = camera(f"rtsp://127.0.0.1:{free_port()}/ir")

    def fail(times: int) -> None:
        for _ in range(times):
            with pytest.raises(SourceError):
                source.open()

    fail(20)
    before = process.num_fds(), process.num_threads(), process.memory_info().rss
    fail(200)
    assert process.num_fds() <= before[0]  # fewer, where something of an earlier test ends meanwhile
    assert process.num_threads() <= before[1]
    assert process.memory_info().rss - before[2] < 5 << 20


@needs_gst
def test_a_stream_that_the_camera_does_not_have_is_named(cameras):
    with pytest.raises(SourceError, match="no such stream"):
        camera(cameras.url("infrared")).open()


# Passwords

CANARY = "c@nary:w0rd/9"
SPELLINGS = ("c@nary", "c%40nary", "w0rd", "c%40nary%3Aw0rd%2F9")


@needs_gst
def test_a_password_opens_the_camera_and_a_wrong_one_is_not_repeated():
    with rtsp_server(width=320, height=240, user="operator:right") as server:
        source = camera(server.url("ir", "operator:right"))
        source.open()
        assert source.grab().index == 0
        source.close()
        with pytest.raises(SourceError, match="refused the user name or password") as caught:
            camera(server.url("ir", "operator:c%40nary%3Aw0rd%2F9")).open()
        assert not any(spelling in repr(caught.value) for spelling in SPELLINGS)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    "url",
    [
        "rtsp://operator:c%40nary%3Aw0rd%2F9@127.0.0.1:1/ir",
        "rtsp://operator:c@nary:w0rd@127.0.0.1:1/ir",
        "http://operator:c%40nary%3Aw0rd%2F9@127.0.0.1/ir",
        "rtsp://127.0.0.1:1/ir?user=operator&password=c%40nary%3Aw0rd%2F9",
        "rtsp://operator:c%40nary%3Aw0rd%2F9@[broken/ir",
    ],
)
def test_no_error_repeats_the_password(url, capfd, caplog):
    with pytest.raises(SourceError) as caught:
        camera(url).open()
    out = repr(caught.value) + "".join(capfd.readouterr()) + caplog.text
    assert not any(spelling in out for spelling in SPELLINGS)


# MPEG-TS over UDP


def test_reads_mpeg_ts_over_udp():
    port, stop = free_port(), threading.Event()
    sender = threading.Thread(target=send_mpeg_ts, args=(port, stop), daemon=True)
    sender.start()
    source = camera(f"udp://127.0.0.1:{port}", connect_timeout_s=10)
    try:
        source.open()
        frames = grab(source, 20)
    finally:
        source.close()
        stop.set()
        sender.join(10)
    assert all(frame.image.shape == (128, 160) and frame.clock == "arrival" for frame in frames)
    # The sender's picture is as bright as its number: in order, none twice.
    levels = [round(frame.image[64:].mean()) for frame in frames]
    steps = np.diff(levels) % 100
    assert (steps > 0).all()


def send_mpeg_ts(port: int, stop: threading.Event) -> None:
    with av.open(f"udp://127.0.0.1:{port}?pkt_size=1316", "w", format="mpegts") as output:
        stream = output.add_stream("libx264", rate=25, options={"preset": "ultrafast", "tune": "zerolatency"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 160, 128, "yuv420p", 10
        for index in itertools.count():
            if stop.wait(0.02):
                return
            luma = np.full((192, 160), 128, np.uint8)
            luma[:128] = 60 + 2 * index % 100
            for packet in stream.encode(av.VideoFrame.from_ndarray(luma, format="yuv420p")):
                output.mux(packet)


# Where a picture ends


def fragments(length: int, kind: int = 1, size: int = 100, first_macroblock: int = 0) -> list[bytes]:
    """A slice of `length` bytes as FFmpeg hands it out: cut at `size`, the first piece with start code and header."""
    body = bytes([0x80 if first_macroblock == 0 else 0x40]) + b"\x55" * (length - 1)
    pieces = [body[start : start + size] for start in range(0, length, size)]
    return [START_CODE + bytes([0x60 | kind]) + pieces[0], *pieces[1:]]


def test_learns_where_pictures_end_and_then_releases_each_with_its_last_packet():
    units = AccessUnits()
    for pts, length in enumerate([350, 420, 50, 555, 60, 70, 333, 280]):
        for piece in fragments(length):
            units.add(piece, pts)
    assert units.early
    *begin, last = fragments(470)
    assert not [unit for piece in begin for unit in units.add(piece, 100) if unit.pts == 100]
    (released,) = units.add(last, 100)
    assert released.pts == 100
    assert released.data == b"".join(fragments(470))
    (small,) = units.add(fragments(30)[0], 101)
    assert small.data == fragments(30)[0]


def test_a_sender_that_splits_evenly_is_never_released_early():
    units, released = AccessUnits(), []
    lengths = [360, 450, 390, 480, 300, 420, 330, 510, 540, 399]
    for pts, length in enumerate(lengths):
        for piece in fragments(length, size=-(-length // 4)):
            released += units.add(piece, pts)
    assert not units.early
    assert units.damaged == 0
    assert [len(unit.data) for unit in released] == [length + 5 for length in lengths[:-1]]


def test_pictures_of_several_slices_are_released_whole():
    units, released = AccessUnits(), []
    for pts in range(12):
        for part in range(3):
            for piece in fragments(310 + 7 * pts, first_macroblock=part):
                released += units.add(piece, pts)
    assert units.early
    assert units.damaged == 0
    assert [unit.pts for unit in released] == list(range(12))  # the last one too, without a successor
    assert {len(unit.data) for unit in released} == {3 * (315 + 7 * pts) for pts in range(12)}


def test_a_picture_with_one_slice_more_than_usual_is_noticed():
    units = AccessUnits()
    for pts in range(10):
        for piece in fragments(310 + 7 * pts):
            units.add(piece, pts)
    assert units.early
    for piece in [*fragments(310), *fragments(310, first_macroblock=5)]:
        units.add(piece, 50)
    assert units.damaged == 1
    assert not units.early


def test_a_fragment_without_its_beginning_is_counted_as_damage():
    units = AccessUnits()
    units.add(b"\x55" * 100, 0)
    assert units.damaged == 1


# Capture time


def test_jitter_is_taken_out_of_the_arrival_times():
    """Taken every 40 ms, 15 to 35 ms on the way: the stamps are 40 ms apart although the arrivals are not."""
    delay, random = MinimumDelay(), np.random.default_rng(3)
    stamps = []
    for k in range(200):
        jitter = 0 if k == 10 else int(random.integers(0, 20 * MS))
        stamps.append(delay.stamp(7_000_000 * MS + k * PERIOD, 500 * MS + k * PERIOD + 15 * MS + jitter))
    assert set(np.diff(stamps[10:])) == {PERIOD}
    assert stamps[10] - (500 * MS + 10 * PERIOD) == 15 * MS  # what remains is the path's smallest delay


@pytest.mark.parametrize("drift_ppm", [-100, 100])
def test_a_drifting_camera_clock_stays_within_a_quarter_period_over_a_day(drift_ppm):
    delay, worst = MinimumDelay(), 0
    for true_ns in range(0, 86_400 * 10**9, 900 * MS):  # every 0.9 s stands for all frames of it
        stamp = delay.stamp(round(true_ns * (1 + drift_ppm * 1e-6)), true_ns + 5 * MS)
        worst = max(worst, abs(stamp - true_ns - 5 * MS))
    assert worst < PERIOD / 4


def test_one_frame_ten_hours_off_is_stamped_with_its_arrival_and_three_are_a_new_time_line():
    delay = MinimumDelay()
    hours = 36_000_000 * MS
    for k in range(10):
        delay.stamp(k * PERIOD, k * PERIOD + 20 * MS)
    assert delay.stamp(hours, 10 * PERIOD + 33 * MS) == 10 * PERIOD + 33 * MS
    assert delay.stamp(11 * PERIOD, 11 * PERIOD + 33 * MS) == 11 * PERIOD + 20 * MS
    assert delay.restarts == 0
    for k in range(12, 16):
        stamp = delay.stamp(k * PERIOD - hours, k * PERIOD + 20 * MS)
    assert delay.restarts == 1
    assert stamp == 15 * PERIOD + 20 * MS


def test_a_clock_set_back_by_a_second_is_followed_within_little_more_than_a_second():
    delay = MinimumDelay()
    for k in range(60):
        step = 1000 * MS if k >= 25 else 0
        stamp = delay.stamp(k * PERIOD - step, k * PERIOD + 20 * MS)
    assert stamp == 59 * PERIOD + 20 * MS


def stamps_of(ntp_error_ns: int, frames: int = 20) -> tuple[int, str]:
    """Error and clock of the last stamp for a camera whose wall clock is off by so much; 30 ms on the way."""
    wall_offset = 1_700_000_000 * 10**9
    times = CaptureTime(lambda: wall_offset)
    for k in range(frames):
        taken = k * PERIOD
        stamp = times.stamp(taken + 123 * MS, wall_offset + taken + ntp_error_ns, taken + 30 * MS)
    return stamp.captured_ns - (frames - 1) * PERIOD, stamp.clock


def test_a_true_wall_clock_gives_the_moment_of_exposure():
    assert stamps_of(0) == (0, "rtcp_ntp")


def test_a_wall_clock_that_counts_atomic_time_is_put_right():
    assert stamps_of(37 * 10**9) == (0, "rtcp_ntp")


@pytest.mark.parametrize("error_s", [-37, 3600, -1.2, 1.0, -5 * 3600])
def test_a_wall_clock_that_cannot_be_true_is_not_believed(error_s):
    """A wrong time zone, a step: the stamp is the arrival less its jitter, and says so."""
    assert stamps_of(int(error_s * 1e9)) == (30 * MS, "arrival")


def test_stamps_never_run_backwards_or_ahead_of_the_arrival():
    times = CaptureTime(lambda: 0)
    stamps = [times.stamp(device, None, arrived).captured_ns for device, arrived in [(0, 50), (10, 45), (5, 60)]]
    assert stamps[0] <= 50
    assert stamps == sorted(set(stamps))


@pytest.mark.parametrize("bits", [32, 33])
def test_time_stamps_go_on_where_the_counter_wraps_around(bits):
    """A 32-bit counter at 90 kHz wraps after 13 h 15 min."""
    timeline = Timeline()
    before = [(1 << bits) - 7200, (1 << bits) - 3600]
    repaired = [timeline.repair(pts, 3600) for pts in [*before, 0, 3600, None, 10800]]
    assert list(np.diff(repaired)) == [3600] * 5


# The rig itself


def test_the_clock_in_the_picture_is_read_back():
    now = time.monotonic_ns()
    image = np.zeros((64, 320), np.uint8)
    image[:16] = np.repeat(np.array(clock_cells(now)) * 200 + 20, 8)
    moment = read_clock(image, now)
    assert moment is not None
    assert 0 <= now - moment < 100_000
    assert read_clock(255 - image, now) is None
