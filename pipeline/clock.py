"""How far the two cameras' clocks are apart while they run: watched in the background, applied when it is certain.

Both cameras' motion is followed in one thread of its own, on every second or third frame; none is kept. Every few
seconds the two paths of the last minutes are compared (calibration.time_offset). The result is always reported, and
taken off the infrared capture times only when two estimates in a row are certain and agree, and then by a millisecond a
second, so that pairing does not jump. A rig that stands still gets no estimate, and nothing is changed: a drift is
carried on for a few minutes after the last motion, and what was reached then is held.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from typing import Any

import numpy as np

from calibration.ego_motion import EgoMotion, Motion
from calibration.time_offset import MotionSignal, NoSharedMotion, TimeOffset, estimate_offset
from pipeline.background import give_way
from pipeline.frame import Camera, Frame
from pipeline.handover import HandoverClosed, Latest

log = logging.getLogger("dspfusion.clock")

WINDOW_S = 240.0  # of motion that is kept
FIRST_AFTER_S = 12.0  # of motion of both cameras
EVERY_S = 5.0  # from estimate to estimate, and...
EVERY_S_WHEN_SURE = 20.0
WATCH_S, REST_S = 20.0, 40.0  # when it is sure, motion is followed a third of the time
LEAST_INTERVAL_NS = 75_000_000  # between two frames of one camera: 12 a second find the offset nearly as well as 25
CARRY_ON_S = 240.0  # past the moment where the offset is known best; a drift may be chance, and hours would add it up
REACH_S = 0.5  # farther apart no two live clocks are believed to be...
REACH_S_WHEN_SURE = 0.1  # ...or to have moved since
SURE_CONFIDENCE = 0.5
SURE_SIGMA_MS = 2.5
AGREE_MS = 3.0
SLEW_MS_PER_S = 1.0
SNAP_MS = 50.0  # so far off, pairing is broken anyway, and is mended at once
EARLY_MS = 60.0  # frames that come so much sooner after their capture than any before: that clock was set forward
LATE_MS = 300.0  # so much later, without exception, for LATE_FRAMES: it was set back; a busy machine is late at times
LATE_FRAMES = 36
FAILURES = 3  # estimates in a row that fail or contradict what is applied: begin anew
WAITING_FRAMES = 16


class MotionLog:
    """The path of one camera's view, frame by frame."""

    def __init__(self, window_s: float | None = None) -> None:
        self._ego = EgoMotion()
        self._window_s = window_s
        self._samples: deque[tuple[float, float, float, bool]] = deque()
        self._broken = False
        self.frames = 0

    def add(self, frame: Frame, offset_ms: float = 0.0) -> None:
        """Measures one frame. A picture that a closed shutter repeats shows an old moment, and says nothing."""
        self.frames += 1
        if frame.repeats:
            return
        self.note(frame.captured_ns / 1e9 - offset_ms / 1e3, self._ego.add(frame.image))

    def note(self, time_s: float, motion: Motion) -> None:
        """Appends a motion that has been measured. Time that does not go forward is left out."""
        samples = self._samples
        self._broken |= motion.broken
        if samples and time_s <= samples[-1][0]:
            return
        samples.append((time_s, motion.x_px, motion.y_px, self._broken))
        self._broken = False
        while self._window_s is not None and samples[0][0] < time_s - self._window_s:
            samples.popleft()

    def forget(self) -> None:
        self._samples.clear()
        self._broken = True

    @property
    def span_s(self) -> float:
        return self._samples[-1][0] - self._samples[0][0] if self._samples else 0.0

    @property
    def newest_s(self) -> float | None:
        return self._samples[-1][0] if self._samples else None

    def signal(self, base_s: float = 0.0) -> MotionSignal:
        """The path, with times counted from `base_s`."""
        samples = np.array([sample[:3] for sample in self._samples], np.float64).reshape(-1, 3)
        broken = np.array([sample[3] for sample in self._samples], bool)
        return MotionSignal(samples[:, 0] - base_s, samples[:, 1:], broken)


class OffsetTracker:
    """Follows the offset between two running clocks. Without thread and clock: time is the visible capture time.

    The offset is what is left after the configured one.
    """

    def __init__(self) -> None:
        self.logs: dict[Camera, MotionLog] = {camera: MotionLog(WINDOW_S) for camera in ("infrared", "visible")}
        self.latest: TimeOffset | None = None  # sure or not
        self.applied_ms = 0.0
        self.estimates = 0
        self.refused: Counter[str] = Counter()
        self.steps = 0  # clocks that were set
        self._base_s = 0.0  # visible time 0 of `latest`
        self._accepted: tuple[TimeOffset, float] | None = None  # with its time 0; one reference, read by two threads
        self._next_s: float | None = None
        self._slewed_s: float | None = None
        self._delays_ms: dict[Camera, deque[float]] = {camera: deque() for camera in ("infrared", "visible")}
        self._least_ms: dict[Camera, float] = {}
        self._failures = 0

    @property
    def sure(self) -> bool:
        return self._accepted is not None

    @property
    def state(self) -> str:
        """ "sure", "unsure", or why there is no estimate."""
        if self.sure:
            return "sure"
        if self.latest is not None:
            return "unsure"
        return self.refused.most_common(1)[0][0] if self.refused else "waiting"

    def came(self, camera: Camera, captured_s: float, arrived_s: float) -> None:
        """Watches the time from capture to arrival: where its minimum steps, a clock was set, and the past is void."""
        delay_ms, delays = (arrived_s - captured_s) * 1e3, self._delays_ms[camera]
        delays.append(delay_ms)
        if len(delays) < LATE_FRAMES:
            return
        delays.popleft()
        least_ms, before_ms = min(delays), self._least_ms.setdefault(camera, min(delays))
        if delay_ms < before_ms - EARLY_MS or least_ms > before_ms + LATE_MS:
            delays.clear()
            del self._least_ms[camera]
            self.steps += 1
            self._begin_anew()
        else:
            self._least_ms[camera] = min(before_ms, least_ms) + 1e-3 * max(0.0, least_ms - before_ms)

    def resting(self, now_s: float) -> bool:
        """Whether motion need not be measured now."""
        return self.sure and now_s % (WATCH_S + REST_S) >= WATCH_S

    def due(self) -> bool:
        """Whether there is enough that is new for an estimate."""
        newest_s = self.logs["visible"].newest_s
        if newest_s is None or min(one.span_s for one in self.logs.values()) < FIRST_AFTER_S:
            return False
        return self._next_s is None or newest_s >= self._next_s

    def estimate(self) -> None:
        """Compares both paths."""
        newest_s = self.logs["visible"].newest_s
        assert newest_s is not None
        self._next_s = newest_s + (EVERY_S_WHEN_SURE if self.sure else EVERY_S)
        base_s = newest_s - WINDOW_S
        # Around what is applied and around what is configured: either may be right after a clock was set.
        reach_s, about_ms = REACH_S + abs(self.applied_ms) / 2e3, self.applied_ms / 2
        if self.sure:
            reach_s, about_ms = REACH_S_WHEN_SURE, self.target_ms(newest_s)
        infrared, visible = (self.logs[camera].signal(base_s) for camera in ("infrared", "visible"))
        try:
            found = estimate_offset(infrared, visible, reach_s, about_ms)
        except NoSharedMotion as refusal:
            self.refused[refusal.reason] += 1
            if refusal.reason not in ("no_motion", "too_short", "blind"):
                self._contradicted()
            return
        self.estimates += 1
        before, before_base_s = self.latest, self._base_s
        self.latest, self._base_s = found, base_s
        certain = found.confidence >= SURE_CONFIDENCE and found.middle_sigma_ms <= SURE_SIGMA_MS
        if not certain or before is None:
            self._contradicted()
            return
        apart_ms = abs(_at(found, newest_s - base_s) - _at(before, newest_s - before_base_s))
        if apart_ms <= max(AGREE_MS, 2 * found.middle_sigma_ms):
            self._accepted, self._failures = (found, base_s), 0
        else:
            self._contradicted()

    def target_ms(self, now_s: float) -> float:
        """What the accepted estimate says for a moment; 0 without one."""
        accepted = self._accepted
        return 0.0 if accepted is None else _at(accepted[0], now_s - accepted[1])

    def slew(self, now_s: float) -> float:
        """By how many milliseconds to change what is taken off the infrared capture times, now."""
        passed_s = 0.0 if self._slewed_s is None else now_s - self._slewed_s
        self._slewed_s = now_s
        if not self.sure or not 0 < passed_s < 10:
            return 0.0
        change_ms, limit_ms = self.target_ms(now_s) - self.applied_ms, SLEW_MS_PER_S * passed_s
        if abs(change_ms) < SNAP_MS:
            change_ms = float(np.clip(change_ms, -limit_ms, limit_ms))
        self.applied_ms += change_ms
        return change_ms

    def report(self) -> dict[str, Any]:
        found = self.latest
        return {
            "state": self.state,
            "offset_ms": None if found is None else round(found.middle_offset_ms, 3),
            "sigma_ms": None if found is None else round(found.middle_sigma_ms, 3),
            "drift_ppm": None if found is None else round(found.drift_ppm, 2),
            "drift_sigma_ppm": None if found is None else round(found.drift_sigma_ppm, 2),
            "confidence": 0.0 if found is None else found.confidence,
            "applied_ms": round(self.applied_ms, 3),
            "estimates": self.estimates,
            "refused": dict(self.refused),
            "clock_steps": self.steps,
        }

    def _contradicted(self) -> None:
        """What is applied may be wrong by now; motion from before a clock was set must not go on to spoil the fit."""
        self._failures += 1
        if self.sure and self._failures >= FAILURES:
            self._begin_anew()

    def _begin_anew(self) -> None:
        self._failures = 0
        self.latest = self._accepted = self._next_s = None
        for one in self.logs.values():
            one.forget()


def _at(offset: TimeOffset, visible_s: float) -> float:
    """The offset at a moment; a drift that may as well be none is taken for none."""
    if abs(offset.drift_ppm) < 2 * offset.drift_sigma_ppm:
        return offset.middle_offset_ms
    return offset.at(min(visible_s, offset.middle_s + CARRY_ON_S))


class ClockWatch:
    """Runs an OffsetTracker in a thread of its own.

    Args:
        infrared_offset_ms, visible_offset_ms: what is taken off the capture times anyway.
    """

    def __init__(self, infrared_offset_ms: float = 0.0, visible_offset_ms: float = 0.0) -> None:
        self._configured_ms: dict[Camera, float] = {"infrared": infrared_offset_ms, "visible": visible_offset_ms}
        self._tracker = OffsetTracker()
        self._waiting: Latest[Frame] = Latest(WAITING_FRAMES)
        self._offered_ns: dict[Camera, int] = {}  # capture times
        self._logged_sure = False
        self._failed = False  # for good; what is applied by then stays
        self._thread = threading.Thread(target=self._run, name="clock-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def offer(self, frame: Frame) -> None:
        """Takes a look at a frame, soon. Never waits; what is old or the thread cannot keep up with is left out."""
        passed_ns = frame.captured_ns - self._offered_ns.get(frame.camera, 0)
        if frame.repeats or 0 <= passed_ns < LEAST_INTERVAL_NS or not self._thread.is_alive():
            return
        self._offered_ns[frame.camera] = frame.captured_ns
        self._waiting.put(frame)

    def slew(self, now_ns: int) -> float:
        """By how many milliseconds to change what is taken off the infrared capture times, now."""
        return 0.0 if self._failed else self._tracker.slew(now_ns / 1e9)

    def report(self) -> dict[str, Any]:
        """As of the tracker; the state is "ended" where its thread has failed."""
        return self._tracker.report() | ({"state": "ended"} if self._failed else {})

    @property
    def drift_ppm(self) -> dict[str, float]:
        """How much faster the infrared clock runs, where that is certain."""
        found = self._tracker.latest
        return (
            {} if found is None or self._failed or not self._tracker.sure else {"infrared": round(found.drift_ppm, 2)}
        )

    def close(self) -> None:
        self._waiting.close()
        if self._thread.ident is not None:
            self._thread.join(1.0)

    def _run(self) -> None:
        give_way()
        try:
            while True:
                self._look_at(self._waiting.take())
        except HandoverClosed:
            return
        except Exception:  # fusion goes on without it, and the report shows that the estimates have ended
            self._failed = True
            log.exception("the clock offset is no longer watched")

    def _look_at(self, frame: Frame) -> None:
        tracker, camera = self._tracker, frame.camera
        now_s = frame.captured_ns / 1e9
        tracker.came(camera, now_s, frame.arrived_ns / 1e9)
        if tracker.resting(now_s):
            return
        tracker.logs[camera].add(frame, self._configured_ms[camera])
        if not tracker.due():
            return
        tracker.estimate()
        if tracker.sure != self._logged_sure:
            self._logged_sure = tracker.sure
            offset_ms = tracker.target_ms(now_s)
            text = f"is {offset_ms:+.1f} ms" if tracker.sure else "is no longer known"
            log.info("the offset of the infrared clock %s", text)
