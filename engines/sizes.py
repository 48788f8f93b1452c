"""The picture sizes that one engine serves."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engines.base import EngineError

Size = tuple[int, int]  # height, width
LEAST_PX, MOST_PX = 32, 8192


@dataclass(frozen=True)
class SizeRange:
    """Picture sizes that one engine serves: height and width, each end included."""

    smallest: Size
    usual: Size  # what the tactics are chosen for
    largest: Size

    def __post_init__(self) -> None:
        for low, usual, high in zip(self.smallest, self.usual, self.largest, strict=True):
            if not LEAST_PX <= low <= usual <= high <= MOST_PX:
                raise EngineError(
                    f"the sizes {self} are no range: give the smallest, the usual and the largest, {LEAST_PX} to "
                    f"{MOST_PX} pixels a side"
                )

    def __str__(self) -> str:
        return "-".join(f"{width}x{height}" for height, width in (self.smallest, self.usual, self.largest))

    def holds(self, size: Size) -> bool:
        return all(low <= side <= high for low, side, high in zip(self.smallest, size, self.largest, strict=True))


def range_of(text: str) -> SizeRange:
    """The range that a text names as people do, widths first: 320x240-640x480-1280x720.

    Raises:
        EngineError: it is no such text, or no range.
    """
    sides = re.fullmatch(r"(\d+)x(\d+)-(\d+)x(\d+)-(\d+)x(\d+)", text)
    if sides is None:
        raise EngineError(f"'{text}' is no range of sizes: give SMALLEST-USUAL-LARGEST, as 320x240-640x480-1280x720")
    width = [int(side) for side in sides.groups()]
    return SizeRange((width[1], width[0]), (width[3], width[2]), (width[5], width[4]))
