"""Two network cameras over a day, in simulated time, whose clocks drift, wrap and are set.

Stamps are made every two seconds all day, and five times an hour both cameras run at full rate through
synchronisation. The true capture times are known.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from pipeline.config import SyncConfig
from pipeline.frame import Camera, Frame, FramePair
from pipeline.sources.capture_time import CaptureTime, Timeline
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
