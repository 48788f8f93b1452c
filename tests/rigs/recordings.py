"""Small recordings made for a test: lossless, exact, with known pictures."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_video(
    path: Path, frames: int = 12, rate: int = 25, size: tuple[int, int] = (96, 64), colour: bool = True
) -> Path:
    """An FFV1 file: a textured picture that moves by two pixels a frame, in colour or grey."""
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.width, stream.height = width, height
        stream.pix_fmt = "bgr0" if colour else "gray"
        stream.codec_context.time_base = Fraction(1, rate)
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(index, size, colour), format="rgb24" if colour else "gray")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def picture(index: int, size: tuple[int, int], colour: bool) -> np.ndarray:
    """Picture `index`: uint8 (H, W, 3) or (H, W)."""
    width, height = size
    x = np.arange(width) + 2 * index
    grey = (np.add.outer(np.arange(height) * 2, x * 3) % 200 + 20).astype(np.uint8)
    return np.dstack([grey, 255 - grey, np.full_like(grey, 40)]) if colour else grey
