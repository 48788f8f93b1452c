"""A calibration without a board: one shift, roll and scale from what both cameras see of ordinary scenes.

It cannot know lenses or the distance between the cameras, so it is right for far scenes and wrong near by. Which scale
the infrared picture has against the visible one is searched for; then what several scenes say together is refined, and
how well two halves of the scenes agree is what the result is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from calibration.judge import pinhole
from calibration.residual import Survey, displacement_px, settle, survey
from calibration.rig import CalibrationError, Rig, infrared_map

SCALES = 0.6 * 1.09 ** np.arange(13)  # width of what infrared sees over that of what visible sees: 0.6 to 1.7
WORKING_WIDTH = 640  # of the visible picture; larger ones are reduced
MOST_SCENES = 24
SEARCH_SCENES = 6
LEAST_SCENES = 3
ADVISED_SCENES = 8
ROUNDS = 4
FLOOR_PX = 0.6  # what is left on real pairs however many the scenes: lenses, depth (measured)
MAX_DISAGREEMENT_PX = 8.0  # of two halves of the scenes, at WORKING_WIDTH


@dataclass(frozen=True, eq=False)
class Alignment:
    """The homography of a rig, and what it is worth."""

    rig: Rig
    scenes: int  # that told something
    sigma_px: float  # expected error over the picture, visible pixels; not less than two halves of the scenes disagree
    confidence: float  # 0 to 1
    scale: float  # visible pixels per infrared pixel
    shift_px: tuple[float, float]  # of the infrared picture's middle from the visible one's, visible pixels
    roll_deg: float
    warnings: tuple[str, ...] = field(default=())

    def quality(self) -> dict[str, Any]:
        return {
            "method": "scenes",
            "scenes": self.scenes,
            "sigma_px": round(self.sigma_px, 3),
            "confidence": round(self.confidence, 3),
            "scale": round(self.scale, 5),
            "shift_px": [round(value, 3) for value in self.shift_px],
            "roll_deg": round(self.roll_deg, 4),
            "warnings": list(self.warnings),
        }


def align(scenes: Iterable[dict[str, np.ndarray]], on_scene: Callable[[], None] = lambda: None) -> Alignment:
    """Aligns two cameras by their pictures.

    Args:
        scenes: pictures of one moment by camera: infrared uint8 or uint16 (H, W), visible uint8 RGB (H, W, 3).
        on_scene: called after each scene that was read.

    Raises:
        CalibrationError: the scenes say too little, or contradict each other.
    """
    pairs, sizes = _read(scenes, on_scene)
    start = _search(_spread_out(pairs, SEARCH_SCENES))
    homography, surveys = _refine(pairs, start)
    telling = [one for one in surveys if one.residual.informative]
    if len(telling) < LEAST_SCENES:
        raise CalibrationError(_too_little(len(telling), len(pairs)))
    width, height = pairs[0][1].shape[1], pairs[0][1].shape[0]
    halves = [settle(telling[half::2]).matrix for half in (0, 1)]
    apart = displacement_px(halves[0] @ np.linalg.inv(halves[1]), (width, height)) / 2
    expected = settle(telling).sigma_px or math.inf
    sigma = math.hypot(max(apart, expected), FLOOR_PX)
    if not sigma <= MAX_DISAGREEMENT_PX:
        raise CalibrationError(
            f"two halves of the scenes disagree by {2 * apart:.0f} px: show far scenes with edges in both pictures, "
            "and both cameras at the same moment; or calibrate with a board"
        )
    return _alignment(homography, pairs, sizes, len(telling), sigma)


def _read(
    scenes: Iterable[dict[str, np.ndarray]], on_scene: Callable[[], None]
) -> tuple[list[tuple[np.ndarray, np.ndarray]], dict[str, tuple[int, int]]]:
    """Up to MOST_SCENES working pairs (infrared uint8, visible uint8 grey), and the true sizes."""
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    sizes: dict[str, tuple[int, int]] = {}
    for images in scenes:
        on_scene()
        if len(images) < 2:
            continue
        for camera, image in images.items():
            size = (image.shape[1], image.shape[0])
            if sizes.setdefault(camera, size) != size:
                raise CalibrationError(
                    f"the {camera} pictures change their size from {sizes[camera]} to {size}: give those of one rig"
                )
        visible = images["visible"]
        grey = cv2.cvtColor(visible, cv2.COLOR_RGB2GRAY) if visible.ndim == 3 else visible
        factor = min(1.0, WORKING_WIDTH / grey.shape[1])
        grey = cv2.resize(grey, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA) if factor < 1 else grey
        pairs.append((_eight_bits(images["infrared"]), grey))
        if len(pairs) >= 2 * MOST_SCENES:
            pairs = pairs[::2]  # a long recording: keep it spread out
    if len(pairs) < LEAST_SCENES:
        raise CalibrationError(_too_little(len(pairs), len(pairs)))
    return _spread_out(pairs, MOST_SCENES), sizes


def _too_little(telling: int, pairs: int) -> str:
    return (
        f"{telling} of {pairs} scenes say how the pictures lie to each other, {LEAST_SCENES} are the least: record "
        "different scenes with edges that both cameras see, or calibrate with a board"
    )


def _eight_bits(infrared: np.ndarray) -> np.ndarray:
    low, high = np.percentile(infrared[::4, ::4], (1, 99))
    stretched = (infrared.astype(np.float32) - low) * (255 / max(high - low, 1.0))
    return np.clip(stretched, 0, 255).astype(np.uint8)


def _spread_out(pairs: list[Any], count: int) -> list[Any]:
    return [pairs[index] for index in np.unique(np.linspace(0, len(pairs) - 1, count).round().astype(int))]


def _search(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """(3, 3) infrared -> working visible pixels: of all scales, the one that the scenes speak for most."""
    best: tuple[float, np.ndarray] | None = None
    for scale in SCALES:
        start = _centred(pairs[0], scale)
        surveys = [_survey(pair, start) for pair in pairs]
        evidence = sum(max(one.residual.evidence, 0.0) for one in surveys if one.residual.informative)
        if best is None or evidence > best[0]:
            best = evidence, settle(surveys).matrix @ start
    assert best is not None
    return best[1]


def _centred(pair: tuple[np.ndarray, np.ndarray], scale: float) -> np.ndarray:
    """The infrared picture in the middle of the visible one, `scale` times as wide."""
    (rows, columns), (height, width) = pair[0].shape, pair[1].shape
    factor = scale * width / columns
    return np.array(
        [
            [factor, 0, (width - 1) / 2 - factor * (columns - 1) / 2],
            [0, factor, (height - 1) / 2 - factor * (rows - 1) / 2],
            [0, 0, 1.0],
        ]
    )


def _survey(pair: tuple[np.ndarray, np.ndarray], homography: np.ndarray) -> Survey:
    infrared, visible = pair
    size = visible.shape[::-1]
    rig = Rig(pinhole(size), pinhole(infrared.shape[::-1]), np.eye(4), homography=homography)
    map_x, map_y, weight = infrared_map(rig)
    return survey(cv2.remap(infrared, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), visible, weight)


def _refine(pairs: list[tuple[np.ndarray, np.ndarray]], homography: np.ndarray) -> tuple[np.ndarray, list[Survey]]:
    """Measures what is left and takes it off, until nothing is; the last surveys."""
    size = pairs[0][1].shape[::-1]
    for _ in range(ROUNDS):
        surveys = [_survey(pair, homography) for pair in pairs]
        left = settle(surveys).matrix
        homography = left @ homography
        if displacement_px(left, size) < 0.3:
            break
    return homography, surveys


def _alignment(
    homography: np.ndarray,
    pairs: list[tuple[np.ndarray, np.ndarray]],
    sizes: dict[str, tuple[int, int]],
    scenes: int,
    sigma_px: float,
) -> Alignment:
    reduced = sizes["visible"][0] / pairs[0][1].shape[1]
    # Pixel centres are whole numbers at both sizes.
    enlarge = np.array([[reduced, 0, (reduced - 1) / 2], [0, reduced, (reduced - 1) / 2], [0, 0, 1.0]])
    full = enlarge @ homography
    full = full / full[2, 2]
    middle = full @ ((sizes["infrared"][0] - 1) / 2, (sizes["infrared"][1] - 1) / 2, 1.0)
    shift = middle[:2] / middle[2] - (np.array(sizes["visible"]) - 1) / 2
    agreement = math.exp(-sigma_px / 3)
    warnings = ["no lens and no distance between the cameras is known: near things and the corners may be off further"]
    if scenes < ADVISED_SCENES:
        warnings.append(f"{scenes} scenes are few: with {ADVISED_SCENES} different ones the result is more certain")
    rig = Rig(pinhole(sizes["visible"]), pinhole(sizes["infrared"]), np.eye(4), homography=full)
    return Alignment(
        rig=rig,
        scenes=scenes,
        sigma_px=sigma_px * reduced,
        confidence=agreement * min(1.0, scenes / ADVISED_SCENES),
        scale=float(math.sqrt(abs(np.linalg.det(full[:2, :2])))),
        shift_px=(float(shift[0]), float(shift[1])),
        roll_deg=math.degrees(math.atan2(full[1, 0], full[0, 0])),
        warnings=tuple(warnings),
    )
