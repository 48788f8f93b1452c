"""What every camera and every recording can do: open, grab, close. Threads and reconnecting belong to capture."""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

from pipeline.frame import Camera, Frame

MAX_PIXELS = 1 << 25  # of one picture; beyond it lies a decompression bomb or a broken header
START_TOGETHER_NS = 500_000_000


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

    Recordings that start within half a second of each other share their first moment: a pair of files that were
    recorded together would otherwise be apart by the time that opening the second one takes.
    """

    _lock = threading.Lock()
    _epoch_ns = -(10**18)

    def __init__(self) -> None:
        self._start_ns: int | None = None

    def due_ns(self, relative_ns: int) -> int:
        """When a frame that lies `relative_ns` after the recording's first one is due."""
        if self._start_ns is None:
            with Pace._lock:
                now_ns = time.monotonic_ns()
                if now_ns - Pace._epoch_ns > START_TOGETHER_NS:
                    Pace._epoch_ns = now_ns
                self._start_ns = Pace._epoch_ns
        return self._start_ns + relative_ns

    def wait(self, due_ns: int, closing: threading.Event) -> None:
        """Sleeps until the frame is due, or the source is being closed."""
        closing.wait(max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
