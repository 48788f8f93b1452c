"""Threads behind the flow: estimators that give way to the frames, and workers that take frames through the network."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

NICENESS = 10  # a tenth of the share of the threads that carry frames, when both want the processor
T = TypeVar("T")


def give_way() -> None:
    """Lowers the priority of the calling thread; where the system knows no priority of threads, nothing happens."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


class Workers:
    """A fixed number of threads that call functions. The library's own pool waits at exit for a call that hangs."""

    def __init__(self, name: str, number: int) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = (
            queue.SimpleQueue()
        )
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{k}", daemon=True) for k in range(number)]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        future: Future[T] = Future()
        self._calls.put((future, function, arguments))
        return future

    def close(self, timeout_s: float = 1.0) -> None:
        """Ends the threads after the calls that were submitted; those that take longer are left behind."""
        for _ in self._threads:
            self._calls.put(None)
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, arguments = call
            try:
                result = function(*arguments)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
