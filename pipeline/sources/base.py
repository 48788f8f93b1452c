"""What every camera and every recording can do: open, grab, close. Threads and reconnecting belong to capture."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Protocol
from weakref import WeakSet

from pipeline.frame import Camera, Frame

log = logging.getLogger("dspfusion.sources")

MAX_PIXELS = 1 << 25  # of one picture; beyond it lies a decompression bomb or a broken header
FIRST_FRAME_S = 15.0  # after opening; a stream may have to wait for its first keyframe
START_TOGETHER_NS = 5_000_000_000  # a large file may be so much slower to open than a small one
ROUNDING_NS = 1_000


class Source(Protocol):
    """One camera or one recording.

    Used by one thread at a time, except for `close`, which any thread may call. A source that has failed may be closed
    and opened again; `index` goes on counting.
    """

    @property
    def camera(self) -> Camera: ...

    @property
    def live(self) -> bool:
        """True: late frames are worthless. False: a recording, of which every frame counts."""
        ...

    @property
    def period_ns(self) -> int:
        """Nominal time from frame to frame; 0 where it is not known (yet)."""
        ...

    def open(self) -> None:
        """Connects. Raises SourceError with one line that says what, why and what to do, without any password."""
        ...

    def grab(self) -> Frame:
        """The next frame.

        Raises:
            SourceError: no frame within the read timeout, the connection is gone, or the data cannot be decoded.
            SourceEnded: the recording is over.
        """
        ...

    def close(self) -> None:
        """Lets go. May be called twice, and from another thread, which ends a grab within its read timeout."""
        ...


class OpenedOnce(ABC):
    """Lets `close` come from any thread: what is open is freed by the thread that uses it, when it returns.

    Freeing a container that another thread reads would crash the process.
    """

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._closing = threading.Event()

    def close(self) -> None:
        """Lets go now, or when the grab under way returns: after the read timeout at the latest."""
        self._closing.set()
        self._let_go_if_idle()

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        try:
            with self._busy:
                yield
        finally:
            if self._closing.is_set():
                self._let_go_if_idle()

    def _let_go_if_idle(self) -> None:
        if self._busy.acquire(blocking=False):
            try:
                self._let_go()
            finally:
                self._busy.release()

    @abstractmethod
    def _let_go(self) -> None:
        """Frees what is open; nothing, if nothing is."""


class Pace:
    """Hands out a recording at its recorded rate, on the scale of time.monotonic_ns().

    Recordings that start within a few seconds of each other share their first moment: a pair of files that were
    recorded together would otherwise be apart by the time that opening the second one takes.
    """

    _lock = threading.Lock()
    _running: ClassVar[WeakSet[Pace]] = WeakSet()

    def __init__(self, camera: Camera) -> None:
        self.fault: str | None = None  # one line on why its pictures are of other moments than the other recording's
        self._camera = camera
        self._start_ns: int | None = None
        self._lap_ns = 0  # how long the recording runs before it begins anew; 0: it has not done so yet
        self._laps = 0

    def due_ns(self, relative_ns: int) -> int:
        """When a frame that lies `relative_ns` after the recording's first one is due."""
        if self._start_ns is None:
            with Pace._lock:
                self._start_ns = self._first_moment_ns()
                Pace._running.add(self)
        return self._start_ns + relative_ns

    def _first_moment_ns(self) -> int:
        now_ns = time.monotonic_ns()
        others_ns = max((other._start_ns for other in Pace._running if other._start_ns is not None), default=None)
        if others_ns is None:
            return now_ns
        if now_ns - others_ns <= START_TOGETHER_NS:
            return others_ns
        late_s = (now_ns - others_ns) / 1e9
        self._tell(f"the {self._camera} recording starts {late_s:.1f} s after the other one, and stays so much behind")
        return now_ns

    def begins_anew(self, lap_ns: int) -> None:
        """Notes that a recording has run for `lap_ns` and loops: the other one must have the same length."""
        with Pace._lock:
            self._lap_ns, self._laps = lap_ns, self._laps + 1
            goes_on_ns = (self._laps - 1) * lap_ns  # one that still is in its first lap by then is no straggler
            for other in Pace._running - {self}:
                unequal = abs(other._lap_ns - lap_ns) > ROUNDING_NS if other._laps else goes_on_ns > START_TOGETHER_NS
                if unequal and other._start_ns == self._start_ns and not self.fault and not other.fault:
                    after = f"after {other._lap_ns / 1e9:.3f} s" if other._laps else "later"
                    self._tell(
                        f"the {self._camera} recording begins anew after {lap_ns / 1e9:.3f} s, the other one {after}: "
                        "from now on their pictures are of different moments; loop recordings of one length"
                    )

    def end(self) -> None:
        """Forgets a recording that was closed."""
        with Pace._lock:
            Pace._running.discard(self)

    def _tell(self, fault: str) -> None:
        self.fault = fault
        log.warning(fault)

    def wait(self, due_ns: int, closing: threading.Event) -> None:
        """Sleeps until the frame is due, or the source is being closed."""
        closing.wait(max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
