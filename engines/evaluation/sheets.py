"""Contact sheets: inputs and results side by side at full size. Quality that only a score sees is not the goal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.evaluation.cases import Case

Image = NDArray[np.uint8]

LABEL_PX = 24
GAP_PX = 4
INK, PAPER = (235, 235, 235), (24, 24, 24)


class Sheets:
    """Writes one sheet for each pair: a row for every condition. Use it in a `with` block, which writes the last one.

    Args:
        folder: is created if need be.
        prefix: of the file names.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder, self._prefix = folder, prefix
        self._name = ""
        self._rows: list[Image] = []
        self.written: list[Path] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, case: Case, results: dict[str, Image]) -> None:
        """Adds one row: clean infrared, clean visible, what was degraded, and each result under its label."""
        if case.pair.name != self._name:
            self._flush()
            self._name = case.pair.name
        tiles = {"infrared": case.pair.infrared, "visible": case.pair.visible}
        if case.infrared is not case.pair.infrared:
            tiles[f"infrared input ({case.condition})"] = case.infrared
        if case.visible is not case.pair.visible:
            tiles[f"visible input ({case.condition})"] = case.visible
        if len(tiles) == 2:
            tiles["(nothing degraded)"] = np.zeros_like(case.pair.infrared)
        labels = {f"{label}: {case.condition}": picture for label, picture in results.items()}
        self._rows.append(side_by_side({**tiles, **labels}))

    def __enter__(self) -> Sheets:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        path = self._folder / f"{self._prefix}_{self._name.replace('/', '_')}.png"
        if not cv2.imwrite(str(path), cv2.cvtColor(stacked(self._rows), cv2.COLOR_RGB2BGR)):
            raise OSError(f"cannot write {path}")
        self.written.append(path)
        self._rows = []


def side_by_side(tiles: dict[str, Image]) -> Image:
    """Pictures of one height in a row, uint8 RGB, each under its label and at full size."""
    columns = []
    for label, picture in tiles.items():
        colour = cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB) if picture.ndim == 2 else picture
        strip = np.full((LABEL_PX, picture.shape[1], 3), PAPER, np.uint8)
        cv2.putText(strip, label, (4, LABEL_PX - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.45, INK, 1, cv2.LINE_AA)
        columns.append(np.concatenate([strip, colour]))
        columns.append(np.full((columns[0].shape[0], GAP_PX, 3), PAPER, np.uint8))
    return np.concatenate(columns[:-1], 1)


def stacked(rows: Sequence[Image]) -> Image:
    """Rows one below the other, the shorter ones filled up on the right."""
    width = max(row.shape[1] for row in rows)
    gap = [(0, GAP_PX), (0, 0), (0, 0)]
    return np.concatenate(
        [
            np.pad(np.pad(row, [(0, 0), (0, width - row.shape[1]), (0, 0)], constant_values=PAPER[0]), gap)
            for row in rows
        ]
    )
