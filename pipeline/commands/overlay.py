"""Pictures that show whether two cameras are aligned: the visible picture in grey, the infrared edges in orange."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.whole_file import written_whole
from engines.evaluation.sheets import GAP_PX, side_by_side, stacked
from pipeline.errors import ConfigError

ORANGE = (255, 150, 0)
VISIBLE_SHARE = 0.65  # of its brightness: leaves room for the edges
STRONG_PERCENT = 98.0  # of the picture's pixels are weaker than an edge that is drawn in full
THUMBNAIL_PX = 320  # width of one picture on the sheet
SHEET_COLUMNS = 3  # pairs


def overlay(infrared: np.ndarray, visible: np.ndarray) -> NDArray[np.uint8]:
    """uint8 RGB (H, W, 3) of an infrared picture, uint8 (H, W), over a visible one, grey or RGB."""
    grey = visible if visible.ndim == 2 else cv2.cvtColor(visible, cv2.COLOR_RGB2GRAY)
    smooth = cv2.GaussianBlur(infrared, (0, 0), 1.0)
    steepness = cv2.magnitude(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1))
    share = np.clip(steepness / max(float(np.percentile(steepness, STRONG_PERCENT)), 1.0), 0, 1)[..., None]
    return np.asarray(VISIBLE_SHARE * grey[..., None] * (1 - share) + share * ORANGE, np.uint8)


class Overlays:
    """Writes one picture for each pair, before and after, and a sheet of all of them. Use it in a `with` block.

    Args:
        folder: is created if need be.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thumbnails: list[np.ndarray] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write pictures to {folder}: {error.strerror}: choose another place") from None

    def add(self, name: str, infrared: np.ndarray, visible: np.ndarray, matrix: np.ndarray, after: str = "") -> None:
        """Draws one pair.

        Args:
            name: of the pair, and of the file.
            infrared, visible: pictures of one size.
            matrix: (3, 3), maps a pixel of the infrared picture to the visible pixel that it belongs to.
            after: what to write over the picture that is aligned by it.
        """
        size = (visible.shape[1], visible.shape[0])
        moved = cv2.warpPerspective(infrared, matrix, size, borderMode=cv2.BORDER_REPLICATE)
        tiles = {f"{name}: before": overlay(infrared, visible), after or "after": overlay(moved, visible)}
        self._write(f"{name.replace('/', '_')}.png", side_by_side(tiles))
        small = (THUMBNAIL_PX, round(THUMBNAIL_PX * size[1] / size[0]))
        shrunk = {
            label: np.asarray(cv2.resize(tile, small, interpolation=cv2.INTER_AREA), np.uint8)
            for label, tile in tiles.items()
        }
        self._thumbnails.append(side_by_side(shrunk))

    def __enter__(self) -> Overlays:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thumbnails and error is None:
            starts = range(0, len(self._thumbnails), SHEET_COLUMNS)
            rows = [_level(self._thumbnails[start : start + SHEET_COLUMNS]) for start in starts]
            self._write("sheet.png", stacked(rows))

    def _write(self, name: str, picture: np.ndarray) -> None:
        content = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1]
        try:
            with written_whole(self._folder / name) as part:
                part.write_bytes(content.tobytes())
        except OSError as error:
            raise ConfigError(f"cannot write {self._folder / name}: {error.strerror}: choose another place") from None


def _level(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures in a row, the lower ones filled up below."""
    height = max(picture.shape[0] for picture in pictures)
    filled = [np.pad(picture, [(0, height - picture.shape[0]), (0, GAP_PX), (0, 0)]) for picture in pictures]
    return np.concatenate(filled, axis=1)
