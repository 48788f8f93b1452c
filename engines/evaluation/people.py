"""Do warm people stand out? Their brightness against their surroundings, on labelled boxes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.evaluation.metrics import luminance

Image = NDArray[np.uint8]

PERSON = "0"
WARM_LEVELS = 10.0  # brighter than the surroundings in the clean infrared picture, or there is nothing to show
RING_SHARE = 0.5  # of the box's width and height, on every side


@dataclass(frozen=True)
class Box:
    """A labelled box, in shares of the picture."""

    x: float  # of its centre
    y: float
    width: float
    height: float

    def slices(self, shape: tuple[int, ...], grown: float = 0.0) -> tuple[slice, slice]:
        """Its rows and columns in a picture; `grown` widens it on every side by that share of its own size."""
        return (
            _span(self.y, self.height * (1 + 2 * grown), shape[0]),
            _span(self.x, self.width * (1 + 2 * grown), shape[1]),
        )


@dataclass(frozen=True)
class WarmPerson:
    """A person who is warmer than the surroundings: which pixels are theirs, which surround them."""

    body: NDArray[np.bool_]
    ring: NDArray[np.bool_]

    def contrast(self, picture: Image) -> float:
        """The mean brightness of the body less that of the surroundings, in grey levels."""
        grey = luminance(picture)
        return float(grey[self.body].mean() - grey[self.ring].mean())


def read_boxes(path: Path) -> list[Box]:
    """The people of a YOLO label file: class, centre x, centre y, width, height on each line.

    Raises:
        ValueError: if a line is none.
    """
    boxes = []
    for line in path.read_text().splitlines():
        fields = line.split()
        if not fields:
            continue
        try:
            numbers = [float(field) for field in fields[1:5]]
            if len(numbers) != 4:
                raise ValueError
        except ValueError:
            raise ValueError(f"{path.name}: '{line}' is not a class and four numbers") from None
        if fields[0] == PERSON:
            boxes.append(Box(*numbers))
    return boxes


def warm_people(infrared: Image, boxes: list[Box]) -> list[WarmPerson]:
    """The people of the CLEAN infrared picture that are warm.

    A body is the brighter half of its box. Its surroundings are a ring around the box, without all other boxes.
    """
    anyone = np.zeros(infrared.shape, bool)
    for box in boxes:
        anyone[box.slices(infrared.shape)] = True
    people = []
    for box in boxes:
        inside = box.slices(infrared.shape)
        ring = np.zeros(infrared.shape, bool)
        ring[box.slices(infrared.shape, RING_SHARE)] = True
        ring &= ~anyone
        body = np.zeros(infrared.shape, bool)
        if infrared[inside].size == 0:
            continue
        body[inside] = infrared[inside] >= np.median(infrared[inside])
        person = WarmPerson(body, ring)
        if ring.any() and person.contrast(infrared) > WARM_LEVELS:
            people.append(person)
    return people


def _span(centre: float, size: float, length: int) -> slice:
    first, last = round((centre - size / 2) * length), round((centre + size / 2) * length)
    return slice(min(max(first, 0), length), min(max(last, 0), length))
