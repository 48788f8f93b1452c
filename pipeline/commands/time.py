"""`dspfusion calibrate time`: how far apart the two cameras' clocks are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def time(
    infrared: Annotated[str, typer.Argument(metavar="IR", help="Infrared video file or image folder.")],
    visible: Annotated[str, typer.Argument(metavar="VIS", help="Visible video file or image folder.")],
    max_offset: Annotated[
        float, typer.Option(min=0.05, max=60, help="Search so many seconds to either side of no offset.")
    ] = 2.0,
    longest: Annotated[
        float, typer.Option(min=5, max=1e6, help="Read no more than so many seconds of each recording.")
    ] = 300.0,
    rate: Annotated[float, typer.Option(min=0.1, max=1000, help="Frames a second of image folders.")] = 25.0,
    into: Annotated[
        Path | None,
        typer.Option(help="Write both into this calibration file: run takes the offset, replay also the drift."),
    ] = None,
    as_json: Annotated[
        str | None, typer.Option("--json", help="Write the result as JSON to this file; - is the terminal.")
    ] = None,
) -> None:
    """Measure offset and drift of the two cameras' clocks from a recording in which the rig turns.

    The offset is infrared time minus visible time of the same moment, at the recordings' beginning: what run and
    replay take off the infrared time. Replay also takes off the drift; a live rig follows the offset while it runs.
    30 s of irregular turning give the offset to a millisecond, two minutes the drift.
    """
    from calibration.rig_file import load_rig, save_timing
    from calibration.time_offset import NoSharedMotion
    from pipeline.clock_recordings import compare_recordings
    from pipeline.recording import probe, refuse_unlikely
    from pipeline.telemetry import check_targets, write_report
    from pipeline.terminal import console, progress

    check_targets(as_json, inputs=(infrared, visible, into))
    if into is not None:
        load_rig(into)  # a file that cannot be written into is better known before the measurement
    infos = probe(infrared), probe(visible)
    refuse_unlikely(*infos)
    with progress("motion") as (start, advance):
        start(sum(min(info.frames, round(longest * (info.rate_hz or rate))) for info in infos))
        try:
            found = compare_recordings(infrared, visible, rate, max_offset, longest, advance)
        except NoSharedMotion as refusal:
            if as_json:
                write_report(
                    {"state": refusal.reason, "offset_ms": None, "drift_ppm": None, "confidence": 0.0}, as_json
                )
            raise
    offset = found.offset
    console.print(
        f"the infrared clock is {offset.offset_ms:+.2f} ms (± {offset.offset_sigma_ms:.2f}) from the visible one, and "
        f"gains {offset.drift_ppm:+.1f} ppm (± {offset.drift_sigma_ppm:.1f}); correlation {offset.correlation:.2f}, "
        f"confidence {offset.confidence:.2f}"
    )
    if as_json:
        write_report(found.as_json(), as_json)
    if into is not None:
        save_timing(into, offset.for_calibration())
        console.print(f"written into {into}")
