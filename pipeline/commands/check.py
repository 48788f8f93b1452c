"""`dspfusion calibrate check`: is the calibration still right? Measured on what the cameras saw, without a board."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pipeline.frame import AlignedPair, FramePair

MOST_PAIRS = 32  # of a recording, evenly spread over it
EXIT_STATUS = {"ok": 0, "degraded": 1, "lost": 1, "no_information": 3}  # 2 is a user's mistake, as everywhere


def check(
    infrared: Annotated[Path, typer.Argument(metavar="IR", help="Infrared image, image folder or video file.")],
    visible: Annotated[Path, typer.Argument(metavar="VIS", help="Visible image, image folder or video file.")],
    calibration: Annotated[
        str | None, typer.Option(help="A dspfusion-calibration/1 file; without it, infrared is only resized.")
    ] = None,
    as_json: Annotated[
        str | None, typer.Option("--json", help="Write the result as JSON to this file; - is the terminal.")
    ] = None,
) -> None:
    """Measure how far infrared, as it would be fused, is off the visible picture.

    `matrix` maps a pixel of the infrared picture, as it would be fused, to the visible pixel that it belongs to.

    Exit status: 0 ok, 1 degraded or lost, 3 no information (the pictures have nothing in common), 2 an error.
    """
    from pipeline.telemetry import write_report

    result = check_alignment(infrared, visible, calibration)
    if as_json != "-":
        print(describe(result))
    if as_json:
        write_report(result, as_json)
    raise typer.Exit(EXIT_STATUS[result["state"]])


def check_alignment(infrared: Path, visible: Path, calibration: str | None = None) -> dict[str, Any]:
    """The residual transform of stills, folders or clips, with state and health.

    Raises:
        DspfusionError, CalibrationError: the input cannot be read, compared, or does not fit the calibration.
    """
    import numpy as np

    from calibration.residual import displacement_px, settle, survey

    size: tuple[int, int] | None = None
    surveyed = []
    for aligned in _aligned(infrared, visible, calibration):
        assert aligned.infrared is not None
        assert aligned.visible is not None
        size = (aligned.visible.shape[1], aligned.visible.shape[0])
        surveyed.append(survey(aligned.infrared, aligned.visible, aligned.weight))
    verdict = settle(surveyed)
    matrix = verdict.matrix
    assert size is not None
    x, y, roll, log_scale = verdict.parameters
    return {
        "matrix": [[float(value) for value in row] for row in matrix],
        "state": verdict.state,
        "health": round(verdict.health, 3),
        "frames": len(surveyed),
        "informative_frames": verdict.informative,
        "displacement_px": round(displacement_px(matrix, size), 3),
        "sigma_px": None if verdict.sigma_px is None else round(verdict.sigma_px, 3),
        "shift_px": [round(float(x), 3), round(float(y), 3)],
        "roll_deg": round(float(np.degrees(roll)), 4),
        "scale": round(float(np.exp(log_scale)), 5),
        "size": list(size),
        "calibrated": calibration is not None,
    }


def describe(result: dict[str, Any]) -> str:
    """One line for people."""
    if result["state"] == "no_information":
        return "no information: the pictures show nothing that both cameras see; record a scene with edges in both"
    (x, y), sigma = result["shift_px"], result["sigma_px"]
    return (
        f"{result['state']} (health {result['health']:.2f}): infrared belongs {result['displacement_px']:.1f} px off "
        f"(+-{sigma:.1f}): x {x:+.1f} px, y {y:+.1f} px, roll {result['roll_deg']:+.2f} deg, "
        f"scale {result['scale']:.4f}; {result['informative_frames']} of {result['frames']} frames told"
    )


def _aligned(infrared: Path, visible: Path, calibration: str | None) -> Iterator[AlignedPair]:
    """Up to MOST_PAIRS pairs, as the pipeline would hand them to the fusion."""
    from pipeline.config import GainConfig, RegistrationConfig
    from pipeline.errors import SourceError
    from pipeline.gain import InfraredGain
    from pipeline.register import Register

    register = Register(RegistrationConfig(calibration=calibration, refine=False), InfraredGain(GainConfig()))
    any_pair = False
    for pair in _pairs(infrared, visible, register):
        any_pair = True
        yield register(pair)
    if not any_pair:
        raise SourceError("no infrared picture is near a visible one in time: give recordings of the same moment")


def _pairs(infrared: Path, visible: Path, register: Any) -> Iterator[FramePair]:
    from pipeline.board_views import refuse_swapped_pictures
    from pipeline.still import list_pairs, read_pair

    named = _stills(infrared, visible)
    if named:
        step = -(-len(named) // MOST_PAIRS)
        pairs = list_pairs(infrared, visible, Path("."))
        refuse_swapped_pictures(*pairs[0][:2])
        for thermal, colour, _ in pairs[::step]:
            yield read_pair(thermal, colour)
        return
    yield from _pairs_in_time(infrared, visible, register)


def _stills(infrared: Path, visible: Path) -> list[str]:
    """The names of still pairs, if that is what was given: two images, or two folders with equal names."""
    from pipeline.recording import IMAGE_SUFFIXES
    from pipeline.sources.folder import image_files

    if infrared.is_dir() and visible.is_dir():
        names = [sorted(file.stem for file in image_files(folder, none_allowed=True)) for folder in (infrared, visible)]
        return names[0] if names[0] == names[1] else []
    both = all(path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir() for path in (infrared, visible))
    return [visible.stem] if both else []


def _pairs_in_time(infrared: Path, visible: Path, register: Any) -> Iterator[FramePair]:
    """Pairs of two recordings as replay would form them."""
    from pipeline.config import SyncConfig
    from pipeline.live import with_rig_offset
    from pipeline.recording import probe, refuse_unlikely
    from pipeline.replay import DEFAULT_RATE_HZ, frames_of
    from pipeline.sync import Account, pair_recordings

    infos = probe(infrared), probe(visible)
    refuse_unlikely(*infos)
    rate_hz = infos[1].rate_hz or infos[0].rate_hz or DEFAULT_RATE_HZ
    frames = frames_of(str(infrared), "infrared", rate_hz), frames_of(str(visible), "visible", rate_hz)
    step = max(1, min(info.frames for info in infos) // MOST_PAIRS)
    fused = (
        pair
        for pair in pair_recordings(*frames, with_rig_offset(SyncConfig(), register), Account())
        if pair.mode == "fused"
    )
    yield from islice(islice(fused, 0, None, step), MOST_PAIRS)
