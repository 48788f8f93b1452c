"""Settings of the whole process that carries frames: for the command line, which owns its process."""

from __future__ import annotations

import ctypes
import sys

import cv2

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
KEPT_BYTES = 32 << 20  # the most that glibc accepts
SWITCH_INTERVAL_S = 0.001


def carry_frames() -> None:
    """Makes the work of a frame take the same short time, every time. Call it once, before any thread is started.

    - Memory that a picture gave back stays with the process. Otherwise the system takes it away and clears it anew for
      every picture of every stage.
    - OpenCV computes in the thread that calls it: the steps take less than a millisecond, and waking a pool for each of
      them took longer than it saved.
    - A thread that comes back from the network gets the interpreter soon, whatever the others do.
    """
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (OSError, AttributeError):  # another C library than glibc, which has no such setting
            pass
        else:
            mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
            mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    cv2.setNumThreads(1)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
