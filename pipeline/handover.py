"""Hands items from one thread to the next, bounded: live drops the oldest and counts it, replay drops nothing."""

from __future__ import annotations

from collections import deque
from threading import Condition
from typing import Generic, TypeVar

T = TypeVar("T")


class HandoverClosed(Exception):
    """The other side has gone: nothing more can be put, or nothing more will come."""


class _Handover(Generic[T]):
    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"a hand-over has at least one slot, got {slots}")
        self._slots = slots
        self._changed = Condition()
        self._items: deque[T] = deque()
        self._closed = False

    def __len__(self) -> int:
        return len(self._items)

    @property
    def closed(self) -> bool:
        return self._closed

    def take(self, timeout_s: float | None = None) -> T:
        """The oldest item that waits; blocks until there is one.

        What was put before `close` is still handed out.

        Raises:
            TimeoutError: nothing came in time.
            HandoverClosed: closed, and everything has been taken.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._items or self._closed, timeout_s):
                raise TimeoutError(f"nothing new in {timeout_s} s")
            if not self._items:
                raise HandoverClosed("no more items: the sender has closed")
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Wakes everybody who waits. May be called by either side, and more than once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Latest(_Handover[T]):
    """Keeps the newest items, in order. One that is pushed out before it was taken counts as dropped."""

    def __init__(self, slots: int = 1) -> None:
        super().__init__(slots)
        self.dropped = 0

    def put(self, item: T) -> int:
        """Never blocks. Returns how many older items this one pushed out (0 or 1).

        Raises:
            HandoverClosed: after `close`.
        """
        with self._changed:
            if self._closed:
                raise HandoverClosed("nobody takes these items any more")
            pushed_out = int(len(self._items) == self._slots)
            if pushed_out:
                self._items.popleft()
                self.dropped += 1
            self._items.append(item)
            self._changed.notify_all()
            return pushed_out


class Queue(_Handover[T]):
    """Keeps every item: whoever puts waits for a free slot."""

    def __init__(self, slots: int = 4) -> None:
        super().__init__(slots)
        self.dropped = 0  # always 0: the same counters as of Latest

    def put(self, item: T, timeout_s: float | None = None) -> int:
        """Waits for a free slot. Returns 0: nothing is ever pushed out.

        Raises:
            TimeoutError: no slot became free in time.
            HandoverClosed: closed, also while waiting.
        """
        with self._changed:
            free = self._changed.wait_for(lambda: self._closed or len(self._items) < self._slots, timeout_s)
            if self._closed:
                raise HandoverClosed("nobody takes these items any more")
            if not free:
                raise TimeoutError(f"no free slot in {timeout_s} s: the next stage is stuck or too slow")
            self._items.append(item)
            self._changed.notify_all()
            return 0
