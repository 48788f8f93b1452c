"""When a picture was taken, on the scale of time.monotonic_ns(), from what a network camera says about it.

Best is the camera's own wall clock, which RTCP sender reports tie to each picture. It is believed as long as it is
plausible: cameras whose clock was never set, or steps, or runs free are common, and a capture time that is an hour away
is worse than none. One that runs 37 s ahead (TAI for UTC) is put right. Otherwise the stream's time stamps are laid
against the arrivals: the smallest delay of the last seconds is the path's own, and all that is above it is jitter,
which this removes. What remains unknown is that smallest delay itself; where the wall clock was believed for a while,
it is known from then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.frame import ClockSource

log = logging.getLogger("dspfusion.capture")

WINDOW_NS = 5_000_000_000  # two of these are kept; 100 ppm of drift makes 1 ms in both together
JUMP_NS = 5_000_000_000  # a frame this far off its timeline is stamped with its arrival
NEW_TIMELINE_FRAMES = 3  # as many in a row are a new timeline
LATE_NS = 250_000_000  # the path has become longer, or the camera's clock was set back,
LATE_FOR_NS = 1_000_000_000  # when every frame for so long is so late
NTP_EARLIEST_NS = -20_000_000  # a picture cannot arrive before it was taken; but two NTP clocks differ a little
NTP_LATEST_NS = 1_000_000_000
NTP_STEP_NS = 50_000_000
NTP_ERROR_NS = 5_000_000  # what two machines that are disciplined over NTP differ by
TAI_NS = 37_000_000_000  # atomic time is so far ahead of UTC; cameras under PTP send it by mistake
BASELINE_NS = 10_000_000_000  # after which the path's delay by the wall clock is known
WANDER_NS = 40_000_000  # a disciplined clock never moves so far against the arrivals...
WANDER_FOR_NS = 30_000_000_000  # ...for so long; a congested network may
ARRIVAL_ERROR_NS = 10_000_000


@dataclass(frozen=True, slots=True)
class Stamp:
    captured_ns: int
    clock: ClockSource
    error_ns: int


class MinimumDelay:
    """Lays a camera's time line against the arrivals by the smallest delay in a sliding window of 5 to 10 s."""

    def __init__(self) -> None:
        self.restarts = 0
        self._current: int | None = None  # smallest arrival minus time stamp of this window
        self._previous: int | None = None  # and of the window before
        self._window_ns = 0
        self._late_since_ns = 0
        self._late_minimum: int | None = None
        self._odd = 0

    def stamp(self, device_ns: int, arrived_ns: int) -> int:
        """Capture time plus the path's smallest delay; the arrival itself for a frame that is off its time line."""
        offset = arrived_ns - device_ns
        if self._current is None:
            self._restart(offset, arrived_ns)
        elif abs(offset - self._minimum) > JUMP_NS:
            self._odd += 1
            if self._odd < NEW_TIMELINE_FRAMES:
                return arrived_ns
            self.restarts += 1
            self._restart(offset, arrived_ns)
        self._odd = 0
        self._slide(offset, arrived_ns)
        return device_ns + self._minimum

    @property
    def _minimum(self) -> int:
        assert self._current is not None
        return self._current if self._previous is None else min(self._current, self._previous)

    def _slide(self, offset: int, arrived_ns: int) -> None:
        assert self._current is not None
        if arrived_ns - self._window_ns > WINDOW_NS:
            self._previous, self._current, self._window_ns = self._current, offset, arrived_ns
        self._current = min(self._current, offset)
        if offset - self._minimum < LATE_NS:
            self._late_since_ns, self._late_minimum = arrived_ns, None
            return
        self._late_minimum = offset if self._late_minimum is None else min(self._late_minimum, offset)
        if arrived_ns - self._late_since_ns > LATE_FOR_NS:
            self.restarts += 1
            self._restart(self._late_minimum, arrived_ns)

    def _restart(self, offset: int, arrived_ns: int) -> None:
        self._current, self._previous = offset, None
        self._window_ns = self._late_since_ns = arrived_ns
        self._late_minimum = None
        self._odd = 0


class CaptureTime:
    """Stamps the frames of one network camera."""

    def __init__(self, wall_offset_ns: Callable[[], int] | None = None) -> None:
        """`wall_offset_ns` gives wall clock minus monotonic clock of this machine."""
        self._wall_offset_ns = wall_offset_ns or (lambda: time.time_ns() - time.monotonic_ns())
        self._delay = MinimumDelay()
        self._ntp_minus_device: int | None = None
        self._trusted = 0  # frames in a row whose wall clock was plausible
        self._wall_steps = 0
        self._ahead_ns = 0  # TAI_NS for a camera that sends TAI
        self._path_ns: int | None = None  # smallest delay of the path, by the wall clock
        self._path_since_ns = 0
        self._wanders_since_ns: int | None = None
        self._free_running = False
        self._last_ns: int | None = None

    @property
    def steps(self) -> int:
        """How often the camera's clock or time stamps were set, or began anew."""
        return self._wall_steps + self._delay.restarts

    def stamp(self, device_ns: int | None, ntp_ns: int | None, arrived_ns: int) -> Stamp:
        """When a frame was taken.

        Args:
            device_ns: its time stamp in the stream, on any scale; None if it has none.
            ntp_ns: its wall-clock time by the sender report, ns since 1970; None if there was none yet.
            arrived_ns: time.monotonic_ns() when it arrived.

        Returns:
            A time later than the frame before's and not after the arrival.
        """
        by_arrival = arrived_ns if device_ns is None else self._delay.stamp(device_ns, arrived_ns)
        captured_ns, error_ns = by_arrival, ARRIVAL_ERROR_NS
        clock: ClockSource = "arrival"
        if device_ns is not None and ntp_ns is not None:
            by_ntp = ntp_ns - self._wall_offset_ns()
            if self._believes(ntp_ns - device_ns, by_arrival - by_ntp, arrived_ns):
                captured_ns, clock, error_ns = by_ntp - self._ahead_ns, "rtcp_ntp", NTP_ERROR_NS
        if clock == "arrival" and device_ns is not None and self._path_ns is not None:
            captured_ns = by_arrival - max(0, self._path_ns)
        captured_ns = min(captured_ns, arrived_ns)
        if self._last_ns is not None:
            captured_ns = max(captured_ns, self._last_ns + 1_000)  # time runs forwards, whatever the camera says
        self._last_ns = captured_ns
        return Stamp(captured_ns, clock, error_ns)

    def _believes(self, ntp_minus_device: int, smallest_delay: int, arrived_ns: int) -> bool:
        if self._ntp_minus_device is not None and abs(ntp_minus_device - self._ntp_minus_device) > NTP_STEP_NS:
            self._trusted = 0  # the camera's wall clock was set
            self._wall_steps += 1
            self._path_ns, self._free_running = None, False
        self._ntp_minus_device = ntp_minus_device
        ahead_ns = TAI_NS if _plausible(smallest_delay + TAI_NS) else 0
        if ahead_ns != self._ahead_ns:
            self._ahead_ns = ahead_ns
            if ahead_ns:
                log.warning("a camera's clock is 37 s ahead, so it counts TAI: taken off; set the camera to UTC")
        delay = smallest_delay + ahead_ns
        self._trusted = self._trusted + 1 if _plausible(delay) else 0
        if self._trusted < NEW_TIMELINE_FRAMES:
            return False
        self._watch_wander(delay, arrived_ns)
        return not self._free_running

    def _watch_wander(self, delay: int, arrived_ns: int) -> None:
        """A wall clock that moves against the arrivals is not disciplined: it is right today and off tomorrow."""
        if self._path_ns is None:
            self._path_ns, self._path_since_ns, self._wanders_since_ns = delay, arrived_ns, None
        elif arrived_ns - self._path_since_ns < BASELINE_NS:
            self._path_ns = min(self._path_ns, delay)
        elif abs(delay - self._path_ns) < WANDER_NS:
            self._wanders_since_ns = None
        elif self._wanders_since_ns is None:
            self._wanders_since_ns = arrived_ns
        elif arrived_ns - self._wanders_since_ns > WANDER_FOR_NS and not self._free_running:
            self._free_running = True
            log.warning("a camera's clock drifts: its pictures are timed by their arrival; let it follow an NTP server")


def _plausible(delay: int) -> bool:
    return NTP_EARLIEST_NS <= delay <= NTP_LATEST_NS


class Timeline:
    """Repairs a stream's time stamps: fills in missing ones, and carries on where the counter wraps around."""

    def __init__(self, wrap_bits: tuple[int, ...] = (32, 33)) -> None:
        self._wraps = tuple(1 << bits for bits in wrap_bits)
        self._last: int | None = None
        self._carried = 0

    def repair(self, pts: int | None, period: int) -> int:
        """The time stamp in ticks; `period` is the usual distance of two frames, also in ticks."""
        if pts is None:
            repaired = 0 if self._last is None else self._last + max(1, period)
        else:
            repaired = pts + self._carried
            if self._last is not None:
                for wrap in self._wraps:
                    if abs(repaired + wrap - self._last) < wrap // 64:
                        self._carried += wrap
                        repaired += wrap
                        break
        self._last = repaired
        return repaired
