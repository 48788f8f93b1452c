"""A day of two network cameras whose clocks drift, wrap and are set: are the pairs still of one moment?

Simulated time: stamps are made every two seconds all day, and five times an hour both cameras run at full rate through
synchronisation. The true capture times are known.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest

from pipeline.config import SyncConfig
from pipeline.frame import Camera, Frame, FramePair
from pipeline.sources.capture_time import TAI_NS, CaptureTime, Timeline
from pipeline.sync import Sync

HOUR = 3600.0
RATE_HZ = 25.0
UTC_NS = 1_790_000_000_000_000_000  # wall clock minus monotonic clock of this machine
TICK = Fraction(10**9, 90_000)


@dataclass
class NetworkCamera:
    """Stamps as a network camera's reader does: a 32-bit 90 kHz counter, perhaps a wall clock, a jittery path."""

    camera: Camera
    path_ms: float
    drift_ppm: float = 0.0
    wall_error_ms: Callable[[float], float] | None = None  # of the camera's wall clock; None: it sends none
    counter_jump_s: Callable[[float], float] = lambda now_s: 0.0
    phase_s: float = 0.0
    seed: int = 0
    times: CaptureTime = field(default_factory=lambda: CaptureTime(lambda: UTC_NS))
    timeline: Timeline = field(default_factory=Timeline)
    index: int = 0
    true_s: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def expose(self, true_s: float) -> tuple[int, Frame]:
        """(arrival, frame) of a picture taken at a true time, monotonic seconds."""
        counted_s = true_s * (1 + self.drift_ppm * 1e-6) + self.counter_jump_s(true_s) + 30_000
        pts = round(counted_s * 90_000) % (1 << 32)
        device_ns = int(self.timeline.repair(pts, 3600) * TICK)
        arrived_ns = round((true_s + self.path_ms / 1e3 + self.random.exponential(0.004)) * 1e9)
        ntp_ns = None
        if self.wall_error_ms is not None:
            ntp_ns = UTC_NS + round((true_s + self.wall_error_ms(true_s) / 1e3) * 1e9)
        stamp = self.times.stamp(device_ns, ntp_ns, arrived_ns)
        self.index += 1
        self.true_s[self.index] = true_s
        image = np.full((8, 2) if self.camera == "infrared" else (8, 2, 3), self.index % 251, np.uint8)
        return arrived_ns, Frame(self.camera, image, stamp.captured_ns, self.index, clock=stamp.clock)


def burst(cameras: list[NetworkCamera], sync: Sync, start_s: float, seconds: float) -> list[FramePair]:
    """Both cameras at full rate through synchronisation."""
    exposures: list[tuple[float, int]] = []
    for number, camera in enumerate(cameras):
        exposures += [(start_s + camera.phase_s + k / RATE_HZ, number) for k in range(int(seconds * RATE_HZ))]
    arrivals: list[tuple[int, int, Frame]] = []
    newest_ns = [0, 0]
    for count, (true_s, number) in enumerate(sorted(exposures)):
        arrived_ns, one = cameras[number].expose(true_s)
        newest_ns[number] = max(newest_ns[number] + 1, arrived_ns)
        heapq.heappush(arrivals, (newest_ns[number], count, one))
    pairs: list[FramePair] = []
    while arrivals:
        arrived_ns, _, one = heapq.heappop(arrivals)
        while (deadline := sync.next_deadline_ns) is not None and deadline < arrived_ns:
            pairs += sync.poll(deadline)
        sync.add(one, arrived_ns)
        pairs += sync.poll(arrived_ns)
    return pairs


def run_a_day(cameras: list[NetworkCamera], offset_ms: float = 0.0) -> tuple[Sync, list[tuple[float, list[FramePair]]]]:
    sync = Sync(SyncConfig(infrared_offset_ms=offset_ms))
    bursts = []
    for start_s in np.arange(100.0, 24 * HOUR, 720.0):
        bursts.append((float(start_s), burst(cameras, sync, float(start_s), 1.6)))
        for second in range(2, 720, 2):
            for camera in cameras:
                camera.expose(start_s + second)
    return sync, bursts


def skew_errors_ms(pairs: list[FramePair], cameras: list[NetworkCamera]) -> np.ndarray:
    """What the pairs say about their distance in time, minus the truth."""
    infrared, visible = cameras
    return np.array(
        [
            pair.skew_ms - (infrared.true_s[pair.infrared.index] - visible.true_s[pair.visible.index]) * 1e3
            for pair in pairs
            if pair.mode == "fused"
        ]
    )


def assert_paired_all_day(cameras, sync, bursts, except_near_s: tuple[float, ...] = ()) -> None:
    fused, total = 0, 0
    for start_s, pairs in bursts:
        if any(0 <= start_s - step_s < 720 for step_s in except_near_s):
            continue  # the burst in which a clock was set; the next one counts again
        errors = skew_errors_ms(pairs, cameras)
        assert len(errors) >= 20, (start_s, [pair.mode for pair in pairs])
        assert np.abs(errors).max() <= 10.0, start_s  # a quarter of a period
        fused, total = fused + len(errors), total + len(pairs)
    assert fused > 0.85 * total
    for camera in ("infrared", "visible"):
        account = sync.account
        waiting = len(sync._pending[camera])
        assert 0 <= account.captured[camera] - account.used[camera] - account.dropped[camera].total() <= waiting


@pytest.mark.parametrize("drift_ppm", [-100.0, 100.0])
def test_drifting_counters_that_wrap_jump_and_reset_are_paired_by_their_arrivals(drift_ppm):
    def jumps(now_s: float) -> float:
        """Set ahead by 1 s, back by 3 s, and reset to nearly 0."""
        return 0.0 if now_s < 5 * HOUR else 1.0 if now_s < 10 * HOUR else -2.0 if now_s < 15 * HOUR else -80_000.0

    cameras = [
        NetworkCamera("infrared", 45, drift_ppm, counter_jump_s=jumps, phase_s=0.011, seed=1),
        NetworkCamera("visible", 20, -drift_ppm, seed=2),
    ]
    sync, bursts = run_a_day(cameras, offset_ms=25)  # what `calibrate time` says of such a rig
    assert_paired_all_day(cameras, sync, bursts, (10 * HOUR, 15 * HOUR))
    assert cameras[0].times.steps >= 2
    assert cameras[1].times.steps == 0


def test_wall_clocks_that_are_disciplined_set_or_count_tai_are_believed_as_far_as_they_can_be():
    def disciplined(now_s: float) -> float:
        return 2.0 * np.sin(now_s / 4000)

    def tai_and_steps(now_s: float) -> float:
        step_ms = 1000.0 if 7 * HOUR < now_s < 8 * HOUR else 0.0
        return disciplined(now_s) + TAI_NS / 1e6 + step_ms

    cameras = [
        NetworkCamera("infrared", 45, 80, wall_error_ms=tai_and_steps, phase_s=0.011, seed=1),
        NetworkCamera("visible", 20, -80, wall_error_ms=disciplined, seed=2),
    ]
    _, bursts = run_a_day(cameras)
    late = [pairs for start_s, pairs in bursts if not 7 * HOUR <= start_s < 8 * HOUR + 720]
    errors = np.concatenate([skew_errors_ms(pairs, cameras) for pairs in late[1:]])  # trust takes a moment
    assert np.abs(errors).max() <= 10
    assert np.mean([pair.mode == "fused" for pairs in late[1:] for pair in pairs]) > 0.85
    assert cameras[0].times.steps == 2  # set, and set back
    assert {pair.infrared.clock for pair in late[-1] if pair.infrared} == {"rtcp_ntp"}


def test_a_wall_clock_that_runs_free_is_found_out():
    camera = NetworkCamera("infrared", 45, 50, wall_error_ms=lambda now_s: -0.1 * now_s, seed=1)  # -100 ppm
    errors_ms, clocks = [], []
    for second in range(0, 20_000, 2):
        _, one = camera.expose(float(second) + 1)
        errors_ms.append(one.captured_ns / 1e6 - (second + 1) * 1e3)
        clocks.append(one.clock)
    assert clocks[100] == "rtcp_ntp"
    assert clocks[-1] == "arrival"
    assert np.abs(errors_ms).max() <= 60  # -100 ppm would be 2 s by then
    assert np.abs(errors_ms[-1000:]).max() <= 15  # the path's delay is known from the time when the clock was right


def test_the_moment_a_clock_is_set_is_noticed_within_a_second():
    camera = NetworkCamera(
        "visible", 20, wall_error_ms=lambda now_s: 1000.0 if now_s > 30 else 0.0, counter_jump_s=lambda now_s: 0.0
    )
    noticed_s = None
    for number in range(int(40 * RATE_HZ)):
        camera.expose(number / RATE_HZ)
        if noticed_s is None and camera.times.steps:
            noticed_s = number / RATE_HZ
    assert noticed_s is not None
    assert 30 <= noticed_s <= 31
