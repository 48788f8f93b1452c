"""SIGINT and SIGTERM: an orderly end of what runs, and a prompt one of what has not begun.

    starting   nothing exists that is worth keeping: `Stopped` is raised in the main thread
    running    the work is asked to end, and finishes its files
    again      the process ends at once

Python runs signal handlers in the main thread, between two instructions. A compiler that is at work there holds them up
for seconds, so each signal is also written to a socket that a thread of ours reads.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from types import FrameType

from pipeline.terminal import console

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# For the main thread to notice. OpenVINO's converter keeps our thread waiting for up to 0.5 s before that.
GRACE_S = 0.3
LOOK_S = 0.1

asked = Event()  # set by the first signal of this process that its main thread heard


class Stopped(BaseException):
    """A signal came before the work began. No Exception: nothing but the command line shall catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Stopping:
    """What a signal does now."""

    def __init__(self) -> None:
        self._stop: Callable[[], None] | None = None
        self._starting: Callable[[], bool] = lambda: False
        self._empty_handed: Callable[[], bool] = lambda: False
        self._gave_up: Stopped | None = None

    def ask(
        self,
        stop: Callable[[], None],
        starting: Callable[[], bool] = lambda: False,
        empty_handed: Callable[[], bool] = lambda: False,
    ) -> None:
        """From now on a signal calls `stop`, from the main thread.

        Args:
            stop: asks the work to end.
            starting: while it is true, `Stopped` is raised instead.
            empty_handed: while it is true, there is nothing to finish, and a main thread that does not hear is not
                waited for.
        """
        self._stop, self._starting, self._empty_handed = stop, starting, empty_handed

    def handle(self, number: int, _: FrameType | None) -> None:
        """The handler of both signals."""
        asked.set()
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if self._stop is None or self._starting():
            self._gave_up = Stopped(number)
            raise self._gave_up
        self._stop()

    def _is_late(self) -> bool:
        """Whether nothing is lost by ending the process under the main thread, which had its time."""
        deaf = not asked.is_set()
        return self._gave_up is not None or self._stop is None or self._starting() or (deaf and self._empty_handed())

    def refuse_to_go_on(self) -> None:
        """Raises `Stopped` again, where a library made another error of it."""
        if self._gave_up is not None:
            raise self._gave_up

    def watch(self, told: socket.socket) -> None:
        """Ends the process where the main thread cannot; returns when `told` is closed at its other end."""
        first = 0
        patience_s = GRACE_S
        while True:
            told.settimeout(patience_s if first else None)
            try:
                received = told.recv(16)
            except TimeoutError:
                if self._is_late():
                    end_now(first)
                patience_s = LOOK_S
                continue
            if not received:
                return
            numbers = [number for number in received if number in SIGNALS]
            if len(numbers) + bool(first) > 1:
                end_now(numbers[-1])
            first = first or (numbers[0] if numbers else 0)


@contextmanager
def stopping_on_signals() -> Iterator[Stopping]:
    """Handles SIGINT and SIGTERM inside; call `ask` of what it gives once there is something to stop.

    Must be entered in the main thread.

    Raises:
        Stopped: a signal came before that.
    """
    stopping = Stopping()
    told, teller = socket.socketpair()
    teller.setblocking(False)
    before = {number: signal.signal(number, stopping.handle) for number in SIGNALS}
    descriptor_before = signal.set_wakeup_fd(teller.fileno(), warn_on_full_buffer=False)
    watcher = Thread(target=stopping.watch, args=(told,), name="signals", daemon=True)
    watcher.start()
    try:
        yield stopping
    except Exception:
        stopping.refuse_to_go_on()
        raise
    finally:
        signal.set_wakeup_fd(descriptor_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        teller.close()
        watcher.join()
        told.close()


def end_now(number: int) -> None:
    """Ends the process without waiting for anybody, with the status that a shell gives to a signal's end.

    To take down an interpreter with all its libraries in order takes another second.
    """
    with suppress(Exception):
        console.show_cursor()  # a progress bar hides it
        print("dspfusion: stopped", file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(128 + number)
