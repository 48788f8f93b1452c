"""Where the command `dspfusion` starts: a signal is one line even while the libraries are still being imported."""

import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main() -> None:
    """Imports the command line, and runs it."""
    before = {number: signal.signal(number, leave) for number in SIGNALS}
    from pipeline.cli import main as run

    for number, handler in before.items():
        signal.signal(number, handler)
    run()


def leave(number: int, _: FrameType | None) -> None:
    """Ends the process at once, with the status that a shell gives to a signal's end: nothing has begun yet."""
    sys.stderr.write("dspfusion: stopped\n")
    sys.stderr.flush()
    os._exit(128 + number)
