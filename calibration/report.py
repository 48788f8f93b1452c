"""The calibration report: one HTML file that needs nothing else. Plots are drawn as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from calibration.judge import Judgement
from calibration.rig import COEFFICIENTS, CalibrationError, Rig
from calibration.solve import DISTANCES_M, PARALLAX_M, Solution, distance_name, parallax
from calibration.views import CELLS, BoardView, Detections, coverage, summary
from calibration.whole_file import write_text

CAMERAS = ("visible", "infrared")
COLOURS = {"visible": "#2b6cb0", "infrared": "#c05621"}
PLOT_PX = 430


@dataclass(frozen=True)
class Content:
    """What a report shows."""

    title: str
    rig: Rig
    views: Sequence[BoardView]
    residuals: Sequence[dict[str, np.ndarray]]
    detected: dict[str, Any] | None = None  # see views.summary
    quality: dict[str, Any] = field(default_factory=dict)  # as in the calibration file
    outliers: Sequence[tuple[str, str]] = ()
    refused: Sequence[tuple[str, str, str]] = ()  # view, camera, text
    transfer_px: dict[str, float] | None = None  # of views that took no part in a given calibration
    warnings: Sequence[str] = ()


def of_solution(solution: Solution, detections: Detections) -> Content:
    return Content(
        "Calibration",
        solution.rig,
        solution.views,
        solution.residuals,
        summary(detections),
        solution.quality(),
        solution.outliers,
        _refusals(detections),
        None,
        solution.warnings,
    )


def of_judgement(rig: Rig, judgement: Judgement, detections: Detections, quality: dict[str, Any]) -> Content:
    return Content(
        "Calibration, judged on views of a board",
        rig,
        judgement.views,
        judgement.residuals,
        summary(detections),
        quality,
        (),
        _refusals(detections),
        judgement.transfer_px,
        tuple(str(line) for line in quality.get("warnings", ()) or ()),
    )


def _refusals(detections: Detections) -> list[tuple[str, str, str]]:
    return [
        (view.name, camera, result.text)
        for view in detections.views
        for camera, result in view.results.items()
        if hasattr(result, "text")
    ]


def write_html(content: Content, path: str | Path) -> None:
    """Writes the report, whole or not at all. Raises CalibrationError if it cannot be written."""
    path = Path(path)
    try:
        write_text(path, render(content))
    except OSError as error:
        raise CalibrationError(f"cannot write the report {path}: {error.strerror}: choose another place") from None


def render(content: Content) -> str:
    """The page."""
    parts = [f"<h1>{html.escape(content.title)}</h1>", _warnings(content), _facts(content)]
    if content.rig.homography is None:
        parts += [_map_error(content), _parallax(content.rig)]
    for camera in CAMERAS:
        parts.append(_camera(content, camera))
    parts += [_lists(content)]
    body = "\n".join(part for part in parts if part)
    return f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(content.title)}</title>" \
        f"<style>{_STYLE}</style></head><body>{body}</body></html>\n"  # fmt: skip


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#1a202c}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #e2e8f0}
table{border-collapse:collapse;margin:.6em 0}td,th{padding:.2em .7em;border:1px solid #e2e8f0;text-align:right}
th{background:#f7fafc}td:first-child,th:first-child{text-align:left}
.warn{background:#fffaf0;border-left:4px solid #dd6b20;padding:.4em .8em;margin:.4em 0}
.plots{display:flex;flex-wrap:wrap;gap:1.2em}figure{margin:0}figcaption{font-size:.85em;color:#4a5568}
svg text{font:11px system-ui,sans-serif;fill:#4a5568}.bad{color:#c53030;font-weight:600}
"""


def _warnings(content: Content) -> str:
    return "".join(f"<p class='warn'>Warning: {html.escape(line)}</p>" for line in content.warnings)


def _facts(content: Content) -> str:
    quality, detected = content.quality, content.detected
    rows: list[tuple[str, str]] = []
    if detected:
        found = ", ".join(
            f"{camera} {detected[camera]['found']} of {detected['views']} ({100 * detected[camera]['share']:.0f} %)"
            for camera in CAMERAS
        )
        rows += [("board found", found), ("in both cameras", str(detected["paired"]))]
    rows.append(("views shown here", str(len(content.views))))
    for camera in CAMERAS:
        values = np.concatenate([item[camera] for item in content.residuals if camera in item])
        rms = math.sqrt(float(np.nanmean((values**2).sum(axis=1)))) if np.isfinite(values).any() else math.nan
        rows.append((f"reprojection error, {camera}", f"{rms:.3f} px rms of a point"))
    if content.transfer_px:
        rows.append(("infrared points from the visible ones (these views took no part)", _spread(content.transfer_px)))
    heldout = quality.get("heldout_px")
    if isinstance(heldout, dict):
        rows.append(("held-out error: infrared points of left-out views, from the visible ones", _spread(heldout)))
    for key, text in (("method", "method"), ("lens_model", "lens models")):
        if quality.get(key):
            rows.append((text, _plain(quality[key])))
    rows.append(("baseline", f"{1000 * content.rig.baseline_m:.1f} mm"))
    plane = content.rig.plane_distance_m
    rows.append(("pictures coincide at", "very far" if math.isinf(plane) else f"{plane:g} m"))
    return _table(("", ""), rows)


def _spread(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {float(value):.3f} px" for name, value in values.items())


def _plain(value: Any) -> str:
    return "; ".join(f"{key}: {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)


def _map_error(content: Content) -> str:
    sigma = content.quality.get("map_sigma_px")
    if not isinstance(sigma, dict) or not sigma:
        return (
            "<h2>Predicted error of the map</h2><p>Not known: this calibration was not made by "
            "<code>calibrate solve</code>.</p>"
        )
    names = [distance_name(distance) for distance in DISTANCES_M if distance_name(distance) in sigma]
    values = [float(sigma[name]) for name in names]
    return (
        "<h2>Predicted error of the map</h2><p>How far an infrared pixel may be from its place for things at a "
        "distance: views drawn again, and what the residuals imply, whichever is more.</p>"
        + _table(("distance", *names), [("infrared pixels, rms", *(f"{value:.3f}" for value in values))])
        + _bars(names, values, "px", 420)
    )


def _parallax(rig: Rig) -> str:
    planes = sorted({5.0, 10.0, 30.0, rig.plane_distance_m, math.inf})
    rows = []
    for plane, row in parallax(rig, tuple(planes)):
        name = distance_name(plane) + (" (this rig)" if plane == rig.plane_distance_m else "")
        rows.append((name, *(_marked(value) for value in row.values())))
    return (
        "<h2>Parallax of this rig</h2><p>Visible pixels by which things at a distance (columns) are off when the "
        "pictures are made to coincide at another (rows). No single map does better near by; above 2 px is marked.</p>"
        + _table(("coincide at", *(distance_name(distance) for distance in PARALLAX_M)), rows, raw=True)
    )


def _marked(value: float) -> str:
    return f"<span class='bad'>{value:.1f}</span>" if value > 2 else f"{value:.1f}"


def _camera(content: Content, camera: str) -> str:
    model = content.rig.visible if camera == "visible" else content.rig.infrared
    shown = [(view, item) for view, item in zip(content.views, content.residuals, strict=True) if camera in item]
    if not shown:
        return f"<h2>{camera}</h2><p>No view.</p>"
    lens = ""
    if content.rig.homography is None:
        matrix, sigma = model.matrix, (content.quality.get("sigma") or {}).get(camera, {})
        cells = [
            f"{value:.2f}" + (f" ± {sigma[name]:.2f}" if name in sigma else "")
            for name, value in zip(("fx", "fy", "cx", "cy"), (matrix[0, 0], matrix[1, 1], *matrix[:2, 2]), strict=True)
        ]
        cells += [f"{value:.4f}" for value in model.distortion]
        lens = _table((model.lens, "fx", "fy", "cx", "cy", *COEFFICIENTS[model.lens]), [("pixels", *cells)])
    cells_seen = coverage([view for view, _ in shown], camera, model.size)
    rms = [math.sqrt(float(np.nanmean((item[camera] ** 2).sum(axis=1)))) for _, item in shown]
    return (
        f"<h2>{camera}: {model.width}x{model.height}, {len(shown)} views</h2>{lens}<div class='plots'>"
        + _figure(_vectors(shown, camera, model.size), "Residual vectors, each from where a point was measured; "
                  "a pattern in them is a lens that the model does not follow.")
        + _figure(_coverage(cells_seen, model.size), f"Coverage: points in {CELLS[0]}x{CELLS[1]} cells; "
                  f"{int((cells_seen == 0).sum())} are empty.")
        + "</div>"
        + _figure(_bars([view.name for view, _ in shown], rms, "px", 900, COLOURS[camera]), "Error of each view, rms.")
    )  # fmt: skip


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _vectors(shown: list[tuple[BoardView, dict[str, np.ndarray]]], camera: str, size: tuple[int, int]) -> str:
    points = np.concatenate([_points_of(view, camera) for view, _ in shown])
    errors = np.concatenate([item[camera] for _, item in shown])
    known = np.isfinite(points).all(axis=1) & np.isfinite(errors).all(axis=1)
    points, errors = points[known], errors[known]
    scale = PLOT_PX / size[0]
    typical = float(np.median(np.linalg.norm(errors, axis=1))) if len(errors) else 1.0
    gain = 8.0 / max(typical, 1e-3)  # a usual one is drawn 8 pixels long
    stretch = 10 ** math.floor(math.log10(gain / scale)) if gain > 0 else 1.0
    stretch *= max(factor for factor in (1, 2, 5) if factor * stretch <= gain / scale)
    lines = "".join(
        f"<path d='M{x:.1f} {y:.1f}l{dx:.1f} {dy:.1f}'/>"
        for (x, y), (dx, dy) in zip(points * scale, np.clip(errors * scale * stretch, -60, 60), strict=True)
    )
    height = size[1] * scale
    return (
        f"<svg width='{PLOT_PX}' height='{height + 16:.0f}'><rect width='{PLOT_PX}' height='{height:.0f}' "
        f"fill='#f7fafc' stroke='#cbd5e0'/><g stroke='{COLOURS[camera]}' stroke-width='1' fill='none'>{lines}</g>"
        f"<text x='4' y='{height + 13:.0f}'>drawn {stretch:g} times as long; median {typical:.3f} px</text></svg>"
    )


def _points_of(view: BoardView, camera: str) -> np.ndarray:
    points = view.points(camera)
    assert points is not None
    return points


def _coverage(cells: np.ndarray, size: tuple[int, int]) -> str:
    rows, columns = cells.shape
    height = PLOT_PX * size[1] / size[0]
    wide, high = PLOT_PX / columns, height / rows
    most = max(int(cells.max()), 1)
    boxes = []
    for row in range(rows):
        for column in range(columns):
            count = int(cells[row, column])
            shade = "#fed7d7" if count == 0 else f"rgba(49,130,206,{0.12 + 0.7 * count / most:.2f})"
            x, y = column * wide, row * high
            boxes.append(
                f"<rect x='{x:.1f}' y='{y:.1f}' width='{wide:.1f}' height='{high:.1f}' fill='{shade}' stroke='#fff'/>"
                f"<text x='{x + wide / 2:.1f}' y='{y + high / 2 + 4:.1f}' text-anchor='middle'>{count}</text>"
            )
    return f"<svg width='{PLOT_PX}' height='{height:.0f}'>{''.join(boxes)}</svg>"


def _bars(names: Sequence[str], values: Sequence[float], unit: str, width: int, colour: str = "#2f855a") -> str:
    height, gap = 110, 2
    finite = [value for value in values if math.isfinite(value)]
    top = max(finite, default=1.0) * 1.1 or 1.0
    wide = min(60.0, (width - 40) / max(len(values), 1))
    bars = []
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        tall = height * (min(value, top) / top if math.isfinite(value) else 1)
        bars.append(
            f"<rect x='{40 + index * wide:.1f}' y='{height - tall:.1f}' width='{max(wide - gap, 1):.1f}' "
            f"height='{tall:.1f}' fill='{colour}'><title>{html.escape(str(name))}: {value:.3f} {unit}</title></rect>"
        )
        if len(values) <= 8:
            x = 40 + index * wide + wide / 2
            bars.append(f"<text x='{x:.1f}' y='{height + 14}' text-anchor='middle'>{html.escape(str(name))}</text>")
    scale = f"<text x='0' y='10'>{top:.2f}</text><text x='0' y='{height}'>0 {unit}</text>"
    return f"<svg width='{width}' height='{height + 18}'>{scale}{''.join(bars)}</svg>"


def _lists(content: Content) -> str:
    text = ""
    if content.outliers:
        text += "<h2>Views left out</h2>" + _table(("view", "why"), content.outliers)
    if content.refused:
        rows: Iterable[Sequence[str]] = content.refused[:200]
        text += "<h2>Pictures without a usable board</h2>" + _table(("view", "camera", "why"), rows)
    return text


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], raw: bool = False) -> str:
    def cell(text: str, tag: str) -> str:
        return f"<{tag}>{text if raw else html.escape(str(text))}</{tag}>"

    top = "<tr>" + "".join(cell(text, "th") for text in head) + "</tr>" if any(head) else ""
    return (
        "<table>" + top + "".join("<tr>" + "".join(cell(t, "td") for t in row) + "</tr>" for row in rows) + "</table>"
    )
