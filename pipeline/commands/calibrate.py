"""`dspfusion calibrate`: where the two cameras look, from pictures of a board or of ordinary scenes.

detect -> solve -> report need a board; selfcal, check and time work on ordinary recordings.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.check import check
from pipeline.commands.time import time

if TYPE_CHECKING:
    from calibration.rig import CalibrationError, Lens
    from calibration.targets import Board
    from calibration.views import Detections

app = typer.Typer(no_args_is_help=True, help="Calibrate two cameras: find boards, solve, report, check, and time.")

AsJson = Annotated[str | None, typer.Option("--json", help="Write the result as JSON to this file; - is the terminal.")]
Spacing = Annotated[
    float | None,
    typer.Option(help="Metres between corners (a square's side), or between neighbouring rows of circles. Measure it."),
]
Plane = Annotated[float, typer.Option(help="Distance in metres at which the fused pictures coincide; inf is allowed.")]
Rig = Annotated[Path, typer.Option("--output", "-o", help="The calibration file to write.")]


@app.callback()
def calibrate() -> None:
    """Calibrate two cameras: find boards, solve, report, check, and time."""


@app.command()
def detect(
    infrared: Annotated[Path, typer.Argument(metavar="IR", help="Infrared picture, image folder or video file.")],
    visible: Annotated[Path, typer.Argument(metavar="VIS", help="Visible picture, image folder or video file.")],
    size: Annotated[str, typer.Option(help="Inner corners, as 9x6; or circles in a row and rows, as 4x11.")],
    board: Annotated[str, typer.Option(help="chessboard, or circles (asymmetric grid).")] = "chessboard",
    spacing: Spacing = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The detections to write.")] = Path("detections.json"),
    every: Annotated[float, typer.Option(help="Of recordings: seconds from one picture to the next.")] = 0.5,
    as_json: AsJson = None,
) -> None:
    """Find a board in the pictures of both cameras, and say why where there is none.

    Where no view shows the board to both cameras, detections that are already there stay as they were.
    """
    from calibration.views import save_detections, summary
    from pipeline.board_views import detect_boards, pair_up
    from pipeline.telemetry import check_targets, write_report

    check_targets(output, as_json, inputs=(infrared, visible))
    target = _board(board, size, spacing)
    if not 0.02 <= every <= 60:
        from pipeline.errors import ConfigError

        raise ConfigError(f"--every {every:g}: give 0.02 to 60 seconds")
    pairing = pair_up(infrared, visible, every)
    from pipeline.terminal import console, progress

    with progress("detect") as (start, advance):
        start(pairing.count)
        detections = detect_boards(pairing, target, on_view=lambda _: advance())
    found = summary(detections)
    refusal = _refusal_of(detections, found)
    saved = refusal is None or not output.exists()
    if saved:
        save_detections(detections, output)
    if as_json != "-":
        _tell_detected(detections, found, pairing.by, saved)
        if not saved:
            console.print(f"{output} stays as it was: these views are not written over it", highlight=False)
    if as_json:
        write_report(found | {"paired_by": pairing.by, "output": str(output), "saved": saved}, as_json)
    if refusal is not None:
        raise refusal


@app.command()
def solve(
    detections: Annotated[Path, typer.Argument(help="What `calibrate detect` wrote.")],
    output: Rig = Path("rig.yaml"),
    spacing: Spacing = None,
    plane: Plane = 30.0,
    lens: Annotated[
        list[str] | None,
        typer.Option(
            help="plumb_bob, rational_polynomial or equidistant (a fisheye, from about 90 degrees); of one camera: "
            "visible=equidistant. May be given twice."
        ),
    ] = None,
    max_views: Annotated[int, typer.Option("--views", min=4, max=200, help="Use so many, the most different.")] = 60,
    homography: Annotated[
        bool, typer.Option("--homography", help="No lenses, one homography: right at the board's distance only.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write the HTML report to this file.")] = None,
    as_json: AsJson = None,
) -> None:
    """Calibrate lenses and pose from detected views, and say how far off the map may be."""
    from calibration.report import of_solution, write_html
    from calibration.rig_file import save_rig
    from calibration.solve import solve as solve_rig
    from calibration.views import load_detections
    from pipeline.telemetry import check_targets, write_report
    from pipeline.terminal import console, progress

    check_targets(output, report, as_json, inputs=(detections,))
    lenses = _lenses(lens or [])
    seen = load_detections(detections)
    origin = _origin(detections)
    if homography:
        result = _solve_plane(seen, output, origin)
    else:
        with progress("solve") as (start, advance):
            start(len(SOLVE_STEPS))
            solution = solve_rig(seen, spacing, _plane(plane), max_views, progress=lambda _: advance(), lenses=lenses)
        quality = solution.quality()
        save_rig(solution.rig, output, origin | {"cameras": _camera_notes(seen, quality), "quality": quality})
        result = quality | {"outliers": [{"view": view, "why": why} for view, why in solution.outliers]}
        result["baseline_m"] = round(solution.rig.baseline_m, 5)
        if report:
            write_html(of_solution(solution, seen), report)
    if as_json != "-":
        for line in _solved_lines(result):
            console.print(line, highlight=False)
        console.print(f"calibration: {output}" + (f"\nreport: {report}" if report and not homography else ""))
    if as_json:
        write_report(result | {"output": str(output)}, as_json)


@app.command()
def report(
    calibration: Annotated[Path, typer.Argument(help="A calibration file (dspfusion, or a Kalibr camchain).")],
    detections: Annotated[Path, typer.Argument(help="What `calibrate detect` wrote; best of pictures of its own.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("calibration.html"),
    spacing: Spacing = None,
    as_json: AsJson = None,
) -> None:
    """Judge a calibration, from wherever, on views of a board: residuals, coverage, map error, parallax."""
    from calibration.judge import judge
    from calibration.report import of_judgement, write_html
    from calibration.rig_file import load_quality, load_rig
    from calibration.solve import PARALLAX_M, distance_name, parallax
    from calibration.views import load_detections
    from pipeline.telemetry import check_targets, write_report
    from pipeline.terminal import console

    check_targets(output, as_json, inputs=(calibration, detections))
    rig, seen = load_rig(calibration), load_detections(detections)
    quality = load_quality(calibration)
    judgement = judge(rig, seen, spacing)
    write_html(of_judgement(rig, judgement, seen, quality), output)
    errors = ", ".join(f"{name} {value:.2f}" for name, value in judgement.transfer_px.items())
    if as_json != "-":
        console.print(
            f"infrared points from the visible ones, {len(judgement.views)} views: {errors} px", highlight=False
        )
        console.print(f"report: {output}")
    if as_json:
        table = [] if rig.homography is not None else parallax(rig, (rig.plane_distance_m,))
        write_report(
            {
                "views": len(judgement.views),
                "transfer_px": {name: round(value, 4) for name, value in judgement.transfer_px.items()},
                "map_sigma_px": quality.get("map_sigma_px"),
                "parallax_px": {distance_name(z): round(table[0][1][distance_name(z)], 3) for z in PARALLAX_M if table},
                "output": str(output),
            },
            as_json,
        )


@app.command()
def selfcal(
    infrared: Annotated[Path, typer.Argument(metavar="IR", help="Infrared picture, image folder or video file.")],
    visible: Annotated[Path, typer.Argument(metavar="VIS", help="Visible picture, image folder or video file.")],
    output: Rig = Path("rig.yaml"),
    every: Annotated[
        float, typer.Option(min=0, max=3600, help="Of recordings: seconds from one picture to the next.")
    ] = 2.0,
    as_json: AsJson = None,
) -> None:
    """Without a board: shift, roll and scale from what both cameras see of ordinary scenes; needs several of them."""
    from calibration.rig_file import save_rig
    from calibration.selfcal import align
    from pipeline.board_views import pair_up
    from pipeline.telemetry import check_targets, write_report
    from pipeline.terminal import console, progress

    check_targets(output, as_json, inputs=(infrared, visible))
    pairing = pair_up(infrared, visible, every)
    with progress("selfcal") as (start, advance):
        start(pairing.count)
        scenes = (moment.images for moment in pairing.moments)
        result = align(scenes, on_scene=advance)
    quality = result.quality()
    save_rig(result.rig, output, _origin() | {"quality": quality})
    if as_json != "-":
        console.print(
            f"{result.scenes} scenes agree within {result.sigma_px:.1f} px (confidence {result.confidence:.2f}): "
            f"scale {result.scale:.3f}, shift {result.shift_px[0]:+.1f} {result.shift_px[1]:+.1f} px, "
            f"roll {result.roll_deg:+.2f} deg",
            highlight=False,
        )
        for line in result.warnings:
            console.print(f"[yellow]warning:[/] {line}", highlight=False)
        console.print(f"calibration: {output}")
    if as_json:
        write_report(quality | {"output": str(output)}, as_json)


# --- check: is the calibration still right? (calibration/residual.py) ---
app.command()(check)


# --- time: how far apart are the two clocks? (calibration/time_offset.py) ---
app.command()(time)


# --- the inside of detect, solve, report and selfcal ---

SOLVE_STEPS = ("views", "lenses", "pose", "outliers", "held-out views", "bootstrap")


def _board(kind: str, size: str, spacing_m: float | None) -> Board:
    from calibration.targets import Board
    from pipeline.errors import ConfigError

    columns, _, rows = size.lower().partition("x")
    if not (columns.isdecimal() and rows.isdecimal()) or len(size) > 8:
        raise ConfigError(f"--size {size}: give COLUMNSxROWS, such as 9x6 inner corners or 4x11 circles")
    if kind not in ("chessboard", "circles"):
        raise ConfigError(f"--board {kind}: give chessboard or circles")
    return Board(kind, int(columns), int(rows), spacing_m)  # type: ignore[arg-type]


def _lenses(given: list[str]) -> dict[str, Lens]:
    from typing import cast

    from calibration.rig import COEFFICIENTS
    from pipeline.errors import ConfigError

    chosen: dict[str, Lens] = {}
    for text in given:
        camera, _, lens = text.rpartition("=")
        if lens not in COEFFICIENTS or camera not in ("", "visible", "infrared"):
            raise ConfigError(f"--lens {text}: give {' or '.join(COEFFICIENTS)}; of one camera: visible=equidistant")
        chosen |= dict.fromkeys([camera] if camera else ["visible", "infrared"], cast("Lens", lens))
    return chosen


def _plane(distance_m: float) -> float:
    from pipeline.errors import ConfigError

    if not distance_m > 0:
        raise ConfigError(f"--plane {distance_m:g}: give a distance in metres in front of the cameras, or inf")
    return distance_m


def _origin(*inputs: Path) -> dict[str, Any]:
    """When, with what and from what a calibration was made."""
    import hashlib
    from datetime import UTC, datetime
    from importlib.metadata import PackageNotFoundError, version

    import cv2

    try:
        own = version("dspfusion-rt")
    except PackageNotFoundError:
        own = "unknown"
    made = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tool": f"dspfusion {own}, OpenCV {cv2.__version__}",
    }
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in inputs}
    return made | ({"inputs_sha256": hashes} if hashes else {})


def _camera_notes(seen: Detections, quality: dict[str, Any]) -> dict[str, Any]:
    """What the calibration file says of each camera beyond its lens."""
    return {
        name: {
            "bit_depth": seen.bits[camera],
            "rms_px": quality["rms_px"][camera],
            "sigma": quality["sigma"][camera],
        }
        for name, camera in (("visible", "visible"), ("thermal", "infrared"))
    }


def _solve_plane(seen: Detections, output: Path, origin: dict[str, Any]) -> dict[str, Any]:
    from calibration.judge import solve_plane
    from calibration.rig_file import save_rig

    solution = solve_plane(seen)
    quality = solution.quality()
    save_rig(solution.rig, output, origin | {"quality": quality})
    return quality


def _solved_lines(result: dict[str, Any]) -> list[str]:
    error = result.get("heldout_px") or result.get("fit_px")
    kind = "held-out error" if "heldout_px" in result else "error of the fit"
    lines = [f"{result['views']} views of both cameras; {kind} " + _numbers(error) + " px"]
    if "rms_px" in result:
        lines.append("reprojection error " + _numbers(result["rms_px"]) + " px rms")
        lines.append("predicted error of the map " + _numbers(result["map_sigma_px"]) + " infrared px")
        lines.append(
            f"baseline {1000 * result['baseline_m']:.1f} mm; lenses: {result['lens_model']}; {result['method']}"
        )
    lines += [f"left out {item['view']}: {item['why']}" for item in result.get("outliers", [])]
    return lines + [f"[yellow]warning:[/] {line}" for line in result["warnings"]]


def _numbers(values: Any) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def _refusal_of(detections: Detections, found: dict[str, Any]) -> CalibrationError | None:
    """Why nothing can be calibrated from these views."""
    from calibration.rig import CalibrationError
    from calibration.views import refuse_wrong_count

    try:
        refuse_wrong_count(detections)
    except CalibrationError as refusal:
        return refusal
    if found["paired"]:
        return None
    counts = f"{found['infrared']['found']} infrared and {found['visible']['found']} visible of {found['views']}"
    return CalibrationError(f"no view shows the board to both cameras (found in {counts}): {_usual_reason(detections)}")


def _tell_detected(detections: Detections, found: dict[str, Any], paired_by: str, saved: bool) -> None:
    from calibration.targets import MIN_SPACING_PX, Refusal
    from pipeline.terminal import console

    looked_for = f"{detections.board.name}, of either polarity, {MIN_SPACING_PX:.0f} px or more apart"
    console.print(f"looked for: {looked_for}", highlight=False)
    console.print(f"{found['views']} views, paired by {paired_by}; the board in both pictures of {found['paired']}")
    for camera in ("infrared", "visible"):
        of = found[camera]
        measured = f", misfit {of['misfit_px']} px, pattern {of['spacing_px']} px, edges {of['blur_px']} px"
        console.print(
            f"{camera}: found in {of['found']} ({100 * of['share']:.0f} %){measured if of['found'] else ''}",
            highlight=False,
        )
    refused: dict[str, list[str]] = {}
    for view in detections.views:
        for camera, result in view.results.items():
            if isinstance(result, Refusal):
                refused.setdefault(f"{camera}: {result.text}", []).append(view.name)
    for reason, names in sorted(refused.items(), key=lambda item: -len(item[1]))[:20]:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        console.print(f"  {reason} ({shown})", highlight=False)
    if len(refused) > 20:
        console.print(f"  and {len(refused) - 20} more reasons" + (", all in the file" if saved else ""))


def _usual_reason(detections: Detections) -> str:
    from collections import Counter

    from calibration.targets import Refusal

    texts = Counter(
        f"in {camera}, {result.text}"
        for view in detections.views
        for camera, result in view.results.items()
        if isinstance(result, Refusal)
    )
    return texts.most_common(1)[0][0] if texts else "give pictures of the same moments"
