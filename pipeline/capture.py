"""Keeps one camera running: opens it, grabs, hands every frame on, notices silence, and calls it back when it is lost.

    connecting ──► live ◄──► stalled     no frame for max(3 periods, stall_ms); judged by the clock, not by the grab
        ▲           │ ◄────► shutter     infrared repeats its picture while it recalibrates
        │           ▼
     backoff ◄──── lost                  the source failed, or stalled or hung so long that it is closed from outside
                   ended                 a recording is over

A source only opens, grabs and closes; all waiting is here, in one reading thread and one watchdog per camera.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from threading import Event, Lock, Thread
from typing import Any, Literal

from pipeline.config import CaptureConfig
from pipeline.errors import SourceEnded, SourceError
from pipeline.frame import Frame
from pipeline.handover import HandoverClosed
from pipeline.redaction import redact
from pipeline.shutter import Repeats, Shutter
from pipeline.sources.base import FIRST_FRAME_S, Source

log = logging.getLogger("dspfusion.capture")

State = Literal["connecting", "live", "stalled", "shutter", "lost", "backoff", "ended"]

RECYCLE_S = 2.5  # by default
HANGING_S = 10.0  # a camera that hangs for so long is called back, and ever more seldom if that does not help...
HANGING_MOST_S = 1200.0
SAME_PICTURE_S = 10.0  # a visible camera that repeats its picture for so long is told of
STABLE_S = 2.0  # a connection that held this long starts the backoff from the beginning


class Capture:
    """Reads one source in a thread of its own and puts every frame into `sink`.

    Args:
        source: opened, grabbed and closed by this class only. Its `close` is called from another thread when `grab` has
            blocked for too long.
        sink: takes a frame without waiting, and returns how many older ones it pushed out (`Latest.put`). It ends the
            capture by raising HandoverClosed. Nothing is put into it once `stop` has returned.
        config: patience and backoff.
        recycle_s: a connection that stays silent this long is closed from outside. Longer than the source's own read
            timeout, which should come first.
    """

    def __init__(
        self,
        source: Source,
        sink: Callable[[Frame], int | None],
        config: CaptureConfig | None = None,
        recycle_s: float = RECYCLE_S,
    ) -> None:
        self.source = source
        self.captured = 0
        self.dropped: Counter[str] = Counter()  # of the captured ones, by reason
        self.reconnects = 0  # times that frames came again after the camera was lost
        self.failures = 0
        self.stalls = 0
        self.missed = 0  # frames that the driver lost before we saw them: gaps in the frame index
        self.repeated = 0  # frames whose picture had come before
        self.hanging = False  # set by who sees both cameras: what comes is one picture, and no closed shutter's
        self.failure: Exception | None = None  # why a recording could not be read to its end
        self._sink = sink
        self._config = config or CaptureConfig()
        self._recycle_s = recycle_s
        self._stopping = Event()
        self._phase: State = "connecting"
        self._waiting_since_ns: int | None = None  # start of the grab that blocks now
        self._opened = False
        self._recycle: str | None = None  # why its connection is being renewed
        self._closing = Lock()
        self._handing_on = Lock()  # a frame is counted together with what becomes of it
        self._shutter = Shutter()
        self._visible_repeats = Repeats()
        self._new_picture_s = 0.0  # when the visible picture last changed
        self._same_picture_logged = False
        self._hanging_since_s: float | None = None
        self._hanging_limit_s = HANGING_S
        self._hanging_ended_s = 0.0  # when it last was called back for that
        self._last_index: int | None = None
        self._frozen = False
        self._failures_in_a_row = 0
        self._outage_logged = False
        self._logged_state: State = "connecting"
        self._reader = Thread(target=self._read, name=f"capture-{source.camera}", daemon=True)
        self._watchdog = Thread(target=self._watch, name=f"watchdog-{source.camera}", daemon=True)

    def start(self) -> Capture:
        self._reader.start()
        self._watchdog.start()
        return self

    def stop(self, timeout_s: float = 1.0) -> bool:
        """Ends both threads and closes the source. Returns False if the source still blocks after `timeout_s`.

        The threads are daemons: one that a driver never gives back cannot keep the process alive.
        """
        deadline = time.monotonic() + timeout_s
        with self._handing_on:
            self._stopping.set()
        self._join(self._reader, 0.3 * timeout_s)
        if self._reader.is_alive():
            # The driver holds the thread: closing under it is the only way to get it back, and may block as well.
            closer = Thread(target=self._close_source, args=(True,), name="capture-closer", daemon=True)
            closer.start()
            self._join(closer, 0.4 * timeout_s)
            self._join(self._reader, max(0.0, deadline - time.monotonic() - 0.05))
        self._join(self._watchdog, max(0.0, deadline - time.monotonic()))
        return not self._reader.is_alive()

    def join(self, timeout_s: float | None = None) -> bool:
        """Waits for the end of a recording. Returns whether it has come."""
        self._join(self._reader, timeout_s)
        return not self._reader.is_alive()

    @property
    def state(self) -> State:
        """Exact at any moment: a stall is seen from the clock, while the grab still blocks."""
        phase = self._phase
        if phase != "live":
            return phase
        if self._silent_ns() > self.stall_limit_ns:
            return "stalled"
        return "shutter" if self._frozen else "live"

    @property
    def stall_limit_ns(self) -> int:
        return max(3 * (self.source.period_ns or 0), round(self._config.stall_ms * 1e6))

    @property
    def fault(self) -> str | None:
        """One line on a recording that is damaged or cut off, and was read as far as that goes."""
        return getattr(self.source, "fault", None)

    def counters(self) -> dict[str, Any]:
        """All counters and the state of one moment: each captured frame was handed on, or is in `dropped`."""
        with self._handing_on:
            captured, dropped = self.captured, dict(self.dropped)
        return {
            "state": self.state,
            "captured": captured,
            "dropped": dropped,
            "missed": self.missed,
            "repeated": self.repeated,
            "reconnects": self.reconnects,
            "failures": self.failures,
            "stalls": self.stalls,
            "clock_steps": getattr(self.source, "clock_steps", 0),
            "unreadable": getattr(self.source, "unreadable", 0),
        }

    # The reading thread

    def _read(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    self._read_until_it_fails()
                except SourceEnded:
                    self._phase = "ended"
                    return
                except HandoverClosed:
                    return
                except Exception as error:  # a driver may raise anything; the camera must come back whatever it was
                    if not self._give_up_or_wait(error):
                        return
        finally:
            self._waiting_since_ns = None
            self._close_source()

    def _read_until_it_fails(self) -> None:
        self._phase = "connecting"
        self._recycle = None
        self.source.open()
        self._opened = True
        opened_ns = time.monotonic_ns()
        self._last_index = None
        while not self._stopping.is_set():
            self._waiting_since_ns = time.monotonic_ns()
            frame = self._shutter.judged(self.source.grab())
            self._waiting_since_ns = None
            self._frozen = frame.frozen
            if self._recycle:
                raise SourceError(self._recycle)
            self._note_gap(frame)
            self._note_repeat(frame)
            if self._phase != "live":
                self._went_live()
            if self._failures_in_a_row and time.monotonic_ns() - opened_ns > STABLE_S * 1e9:
                self._failures_in_a_row = 0
            self._hand_on(frame)

    def _note_gap(self, frame: Frame) -> None:
        if self._last_index is not None and frame.index > self._last_index + 1:
            self.missed += frame.index - self._last_index - 1
        self._last_index = frame.index

    def _note_repeat(self, frame: Frame) -> None:
        """Counts a picture that came before. A visible camera has no shutter: one that goes on so is told of, once."""
        if frame.camera == "infrared":
            self.repeated += frame.repeats > 0
            return
        now_s = time.monotonic()
        if not self._visible_repeats.add(frame.image):
            self._new_picture_s = now_s
            if self._same_picture_logged:
                self._same_picture_logged = False
                log.warning("the visible picture changes again")
            return
        self.repeated += 1
        if self.source.live and not self._same_picture_logged and now_s - self._new_picture_s > SAME_PICTURE_S:
            self._same_picture_logged = True
            log.warning(
                "the visible camera has sent one picture for %g s: it hangs, or its codec skips what does not move",
                SAME_PICTURE_S,
            )

    def _hand_on(self, frame: Frame) -> None:
        with self._handing_on:
            self.captured += 1
            try:
                if self._stopping.is_set():
                    raise HandoverClosed("this frame came after the stop")
                pushed_out = self._sink(frame)
            except HandoverClosed:
                self.dropped["stopping"] += 1
                raise
            if pushed_out:
                self.dropped["handover"] += pushed_out

    def _went_live(self) -> None:
        self._phase = "live"
        if self.failures:
            self.reconnects += 1
        if self._outage_logged:
            self._outage_logged = False
            log.warning("the %s camera is back", self.source.camera)  # as loud as its loss

    def _give_up_or_wait(self, error: Exception) -> bool:
        """Returns whether to try again, after the backoff."""
        self._waiting_since_ns = None
        if self._stopping.is_set():
            return False
        self._phase = "lost"
        self.failures += 1
        self._failures_in_a_row += 1
        self._close_source()
        if not self.source.live:
            self.failure = error
            log.error("the %s recording cannot be read: %s", self.source.camera, redact(str(error)))
            return False
        if not self._outage_logged:  # once per outage: a camera that is away for a night must not fill the disk
            self._outage_logged = True
            reason = self._recycle or redact(str(error) or type(error).__name__)
            log.warning("the %s camera is lost, calling it back: %s", self.source.camera, reason)
        self._phase = "backoff"
        return not self._stopping.wait(self._backoff_s())

    def _backoff_s(self) -> float:
        """Doubles with every failure in a row up to the cap; a random part keeps many clients from calling at once."""
        doublings = min(self._failures_in_a_row - 1, 30)
        longest = min(self._config.max_backoff_s, self._config.backoff_s * 2**doublings)
        if doublings == 0:
            longest = min(longest, 0.1)  # a connection that was cut is called back at once
        return longest * random.uniform(0.5, 1.0)

    # The watchdog

    def _watch(self) -> None:
        while self._reader.is_alive() and not self._stopping.wait(0.05):
            self._check()

    def _check(self) -> None:
        state = self.state
        if state != self._logged_state and "stalled" in (state, self._logged_state):
            if state == "stalled":
                self.stalls += 1
                log.warning("the %s camera stalled: no frame for %d ms", self.source.camera, self._silent_ns() // 10**6)
            elif state in ("live", "shutter"):
                log.warning("the %s camera delivers again", self.source.camera)
        self._logged_state = state
        if self.source.live and not self._recycle:
            self._recycle = self._why_recycle(state)
            if self._recycle:
                self._phase = "lost"
                self._close_source()

    def _why_recycle(self, state: State) -> str | None:
        if self._silent_ns() > self._recycle_limit_ns(state):
            return "it was silent for too long"
        if self._hangs_for_too_long():
            return "it hangs: it repeats one picture"
        return None

    def _recycle_limit_ns(self, state: State) -> int:
        limit_s = max(self._recycle_s, FIRST_FRAME_S + 0.5 if state == "connecting" else 0.0)
        return max(round(limit_s * 1e9), 2 * self.stall_limit_ns)

    def _hangs_for_too_long(self) -> bool:
        now_s = time.monotonic()
        if not self.hanging or self._phase != "live":
            self._hanging_since_s = None
            return False
        if self._hanging_since_s is None:
            self._hanging_since_s = now_s
            if now_s - self._hanging_ended_s > 2 * self._hanging_limit_s:  # it was well in between
                self._hanging_limit_s = HANGING_S
        if now_s - self._hanging_since_s < self._hanging_limit_s:
            return False
        self._hanging_since_s, self._hanging_ended_s = None, now_s
        self._hanging_limit_s = min(2 * self._hanging_limit_s, HANGING_MOST_S)
        return True

    def _silent_ns(self) -> int:
        """How long the present grab has been waiting; 0 while a frame is handed on: a slow consumer is no stall."""
        since = self._waiting_since_ns
        return 0 if since is None else time.monotonic_ns() - since

    def _close_source(self, even_unopened: bool = False) -> None:
        with self._closing:
            if not (self._opened or even_unopened):
                return
            self._opened = False
        try:
            self.source.close()
        except Exception as error:  # nothing depends on it any more
            log.debug("closing the %s source: %s", self.source.camera, redact(str(error)))

    @staticmethod
    def _join(thread: Thread, timeout_s: float | None) -> None:
        if thread.ident is not None:
            thread.join(timeout_s)
