"""Background work gives way: the estimators share two cores with frames that must not be late."""

from __future__ import annotations

import contextlib
import os
import threading

NICENESS = 10  # a tenth of the share of the threads that carry frames, when both want the processor


def give_way() -> None:
    """Lowers the priority of the calling thread; where the system knows no priority of threads, nothing happens."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
