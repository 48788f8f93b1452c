"""What can be known of a recording before it is replayed: its length, rate, size, and whether it is in colour."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from pipeline.errors import SourceError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
COLOUR_LEVELS = 6.0  # mean distance of the chroma from grey that a colour picture exceeds; compression leaves about 1


@dataclass(frozen=True)
class RecordingInfo:
    """The outline of a video file or an image folder."""

    path: Path
    frames: int
    rate_hz: float | None  # None: a folder has none of its own
    colour: bool  # judged by the first picture


def probe(path: str | Path) -> RecordingInfo:
    """Reads the outline of a recording without decoding more than its first picture.

    Raises:
        SourceError: not there, no pictures in it, or not a video.
    """
    path = Path(path)
    if not path.exists():
        raise SourceError(f"{path} does not exist: check the path")
    return _probe_folder(path) if path.is_dir() else _probe_video(path)


def images_in(folder: Path) -> list[Path]:
    """The pictures of a folder, by name."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)


def is_colour(image: np.ndarray) -> bool:
    """Whether a picture, uint8 BGR or RGB (H, W, 3) or grey (H, W), has colour worth the name."""
    if image.ndim == 2:
        return False
    chroma = cv2.cvtColor(image[::4, ::4], cv2.COLOR_RGB2YCrCb)[..., 1:].astype(np.float32) - 128
    return float(np.abs(chroma).mean()) > COLOUR_LEVELS


def refuse_unlikely(infrared: RecordingInfo, visible: RecordingInfo) -> None:
    """Refuses two recordings that cannot belong together as they are given.

    Raises:
        SourceError: swapped cameras, no frames, or as many frames at another rate.
    """
    for info in (infrared, visible):
        if info.frames == 0:
            raise SourceError(f"{info.path} has no frames: give a recording with at least one picture")
    if infrared.colour and not visible.colour:
        raise SourceError(
            f"{infrared.path.name} is in colour and {visible.path.name} is grey: infrared and visible look swapped: "
            "give the infrared recording first"
        )
    rates = (infrared.rate_hz, visible.rate_hz)
    if infrared.frames == visible.frames > 1 and rates[0] and rates[1] and abs(rates[0] / rates[1] - 1) > 0.01:
        raise SourceError(
            f"both recordings have {infrared.frames} frames, but {infrared.path.name} runs at {rates[0]:g} Hz and "
            f"{visible.path.name} at {rates[1]:g} Hz: one of the rates is wrong, and pairing by time would mismatch "
            "them: correct the file's rate"
        )


def _probe_folder(path: Path) -> RecordingInfo:
    images = images_in(path)
    first = cv2.imread(str(images[0]), cv2.IMREAD_COLOR_RGB) if images else None
    if images and first is None:
        raise SourceError(f"{images[0]} cannot be read as an image: it is damaged or something else: remove it")
    return RecordingInfo(path, len(images), None, first is not None and is_colour(first))


def _probe_video(path: Path) -> RecordingInfo:
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise SourceError(f"{path} has no video stream: give a video file")
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            first = next(iter(container.decode(stream)), None)
            colour = first is not None and is_colour(first.to_ndarray(format="rgb24"))
        with av.open(str(path)) as container:
            packets = sum(1 for packet in container.demux(video=0) if packet.size)
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise SourceError(f"{path} cannot be read as a video ({reason}): give a video file") from None
    if first is None:
        packets = 0
    return RecordingInfo(path, packets, float(Fraction(rate)) if rate else None, colour)
