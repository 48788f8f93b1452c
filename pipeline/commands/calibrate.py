"""`dspfusion calibrate`: where the two cameras look, from pictures of a board or of ordinary scenes.

detect -> solve -> report need a board; check and time work on ordinary recordings.
"""

from __future__ import annotations

import typer

from pipeline.commands.check import check
from pipeline.commands.time import time

app = typer.Typer(no_args_is_help=True, help="Calibrate two cameras: find boards, solve, report, check, and time.")


@app.callback()
def calibrate() -> None:
    """Calibrate two cameras: find boards, solve, report, check, and time."""


# --- check: is the calibration still right? (calibration/residual.py) ---
app.command()(check)


# --- time: how far apart are the two clocks? (calibration/time_offset.py) ---
app.command()(time)
