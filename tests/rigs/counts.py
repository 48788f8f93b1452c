"""Pictures of a 16-bit infrared camera, and how steady the picture is that becomes of them."""

from __future__ import annotations

import numpy as np

from pipeline.frame import Frame

HEIGHT, WIDTH = 240, 320


def scene(index: int, offset: float = 0.0, hot: bool = False, noise: float = 3.0) -> np.ndarray:
    """A warm gradient of 400 counts about 8000, with detector noise; a hot object fills 4 % of it."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    counts = 8000 + offset + 200 * rows / HEIGHT + 200 * columns / WIDTH
    if hot:
        counts[100:160, 40:91] = 12000 + offset
    return (counts + np.random.default_rng(index).normal(0, noise, counts.shape)).round().astype(np.uint16)


def frame(image: np.ndarray, index: int = 0, ms: float | None = None, repeats: int = 0) -> Frame:
    captured_ns = round((40 * index if ms is None else ms) * 1e6)
    return Frame("infrared", image, captured_ns, index, bits=8 if image.dtype == np.uint8 else 14, repeats=repeats)


def background_change(pictures: list[np.ndarray]) -> np.ndarray:
    """Change of the mean grey level from frame to frame, in 12 places where the hot object never is."""
    places = [
        [
            picture[row : row + 20, column : column + 20].mean()
            for row in (0, 60, 180, 220)
            for column in (100, 170, 290)
        ]
        for picture in pictures
    ]
    return np.abs(np.diff(np.array(places), axis=0))
