"""What can be known of a recording before it is replayed: its length, rate, size, and whether it is in colour."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from pipeline.config import FolderSource, RigConfig, StreamSource
from pipeline.errors import ConfigError, SourceError
from pipeline.record import part_of
from pipeline.sources.folder import SUFFIXES, image_files, read_image

IMAGE_SUFFIXES = SUFFIXES
COLOUR_LEVELS = 6.0  # mean distance of the chroma from grey that a colour picture exceeds; compression leaves about 1


@dataclass(frozen=True)
class RecordingInfo:
    """The outline of a video file or an image folder."""

    path: Path
    frames: int
    rate_hz: float | None  # None: a folder has none of its own
    colour: bool  # judged by the first picture
    names: tuple[str, ...] = ()  # of a folder's pictures, without suffix, in their order


def probe(path: str | Path) -> RecordingInfo:
    """Reads the outline of a recording without decoding more than its first picture.

    Raises:
        SourceError: not there, no pictures in it, or not a video.
    """
    path = Path(path)
    refuse_unless_there(path)
    if path.is_dir():
        return _probe_folder(path)
    if not path.is_file():  # to open a pipe or a device may wait for ever
        raise SourceError(f"{path} is neither a file nor a folder: give a recording (a camera belongs in a rig's file)")
    return _probe_video(path)


def refuse_unless_there(path: Path) -> None:
    """Raises SourceError for a path that leads nowhere, is no path at all, or may not be followed."""
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", str(path)):
        raise SourceError(f"{path} is an address: give a file or a folder (a camera belongs in a rig's file)")
    try:
        path.stat()
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist: check the path") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def inputs_of(config: RigConfig) -> list[str]:
    """The files and folders that a rig reads: recordings and calibration."""
    paths = [config.registration.calibration]
    for section in (config.infrared, config.visible):
        if isinstance(section, FolderSource):
            paths.append(section.path)
        elif isinstance(section, StreamSource) and "://" not in (path := section.url.removeprefix("file://")):
            paths.append(path)
    return [path for path in paths if path]


def refuse_overwriting(output: str | Path | None, *inputs: str | Path) -> None:
    """Raises ConfigError for an output that would replace an input, or lie among the pictures of one.

    Links are followed, and two names of one file are one file. What is written aside first counts as well.
    """
    if output is None:
        return
    target = Path(output)
    for path in map(Path, inputs):
        replaced = any(_is_same(written, path) for written in (target, part_of(target)))
        if replaced or (path.is_dir() and _is_same(target.absolute().parent, path)):
            raise ConfigError(f"{output} would replace or mix with the input {path}: choose another place")


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.resolve() == other.resolve() or one.samefile(other)
    except (OSError, RuntimeError, ValueError):  # not there, a circle of links, or no path at all
        return False


def is_colour(image: np.ndarray) -> bool:
    """Whether a picture, uint8 BGR or RGB (H, W, 3) or grey (H, W), has colour worth the name."""
    if image.ndim == 2:
        return False
    chroma = cv2.cvtColor(image[::4, ::4], cv2.COLOR_RGB2YCrCb)[..., 1:].astype(np.float32) - 128
    return float(np.abs(chroma).mean()) > COLOUR_LEVELS


def refuse_unlikely(infrared: RecordingInfo, visible: RecordingInfo) -> None:
    """Refuses two recordings that cannot belong together as they are given.

    Raises:
        SourceError: swapped cameras, no frames, folders with unmatched names, or as many frames at another rate.
    """
    for info in (infrared, visible):
        if info.frames == 0:
            raise SourceError(f"{info.path} has no frames: give a recording with at least one picture")
    if infrared.colour and not visible.colour:
        raise SourceError(
            f"{infrared.path.name} is in colour and {visible.path.name} is grey: infrared and visible look swapped: "
            "give the infrared recording first"
        )
    _refuse_unmatched(infrared, visible)
    rates = (infrared.rate_hz, visible.rate_hz)
    if infrared.frames == visible.frames > 1 and rates[0] and rates[1] and abs(rates[0] / rates[1] - 1) > 0.01:
        raise SourceError(
            f"both recordings have {infrared.frames} frames, but {infrared.path.name} runs at {rates[0]:g} Hz and "
            f"{visible.path.name} at {rates[1]:g} Hz: one of the rates is wrong, and pairing by time would mismatch "
            "them: correct the file's rate"
        )


def _refuse_unmatched(infrared: RecordingInfo, visible: RecordingInfo) -> None:
    """Pictures of two folders are paired by their order: a name that only one of them has shifts all that follow."""
    if not (infrared.names and visible.names):
        return
    lone = sorted(set(infrared.names) ^ set(visible.names))
    named_alike = len(lone) < len(set(infrared.names) | set(visible.names))
    if lone and (named_alike or infrared.frames != visible.frames):
        raise SourceError(
            f"{infrared.path} and {visible.path} hold {infrared.frames} and {visible.frames} images, and {len(lone)} "
            f"of the names have no partner (first: {lone[0]}): give two folders with equal names"
        )


def _probe_folder(path: Path) -> RecordingInfo:
    images = image_files(path, none_allowed=True)
    colour = bool(images) and is_colour(read_image(images[0], "visible"))
    return RecordingInfo(path, len(images), None, colour, tuple(image.stem for image in images))


def _probe_video(path: Path) -> RecordingInfo:
    try:
        # "file:" and the list keep FFmpeg from taking a colon for a protocol, and a playlist from calling the network.
        with av.open(f"file:{path}", options={"protocol_whitelist": "file"}) as container:
            if not container.streams.video:
                raise SourceError(f"{path} has no video stream: give a video file")
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            first = next(iter(container.decode(stream)), None)
            colour = first is not None and is_colour(first.to_ndarray(format="rgb24"))
        with av.open(f"file:{path}", options={"protocol_whitelist": "file"}) as container:
            packets = sum(1 for packet in container.demux(video=0) if packet.size)
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise SourceError(f"{path} cannot be read as a video ({reason}): give a video file") from None
    if first is None:
        packets = 0
    return RecordingInfo(path, packets, float(Fraction(rate)) if rate else None, colour)
