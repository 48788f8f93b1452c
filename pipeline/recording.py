"""What can be known of a recording before it is replayed: its length, its rate, and what colours it has."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from calibration.rig import Rig
from calibration.rig_file import load_rig
from engines.arrays import MINIMUM_PX
from pipeline.config import READ_FILES, FolderSource, RigConfig, StreamSource
from pipeline.config import Source as AnySource
from pipeline.errors import ConfigError, SourceError
from pipeline.sources.folder import SUFFIXES, image_files, read_image

IMAGE_SUFFIXES = SUFFIXES
LOOKS = 5  # pictures of a recording that are looked at, from first to last
COLOUR_LEVELS = 3.0  # chroma of a picture in colour: real visible cameras 3.5 to 15
GREY_LEVELS = 1.0  # and of one in grey: 0 to 0.5, also compressed
PALETTE_SHARE = 0.1  # of the chroma that brightness does not explain: palettes up to 0.09, real scenes from 0.11
SCENE_SHARE = 0.2
ASPECT_RATIO = 1.1  # of two pictures' shapes: 640x512 beside 640x480 has 1.07


@dataclass(frozen=True)
class Colour:
    """How much colour there is in a picture, and of what kind."""

    levels: float  # mean distance of the chroma from grey, in grey levels of 255
    free_share: float  # of the chroma, what the brightness does not explain: 0 where each grey has one colour

    @property
    def is_palette(self) -> bool:
        """A picture of one quantity, such as temperature, that was painted in false colours."""
        return self.levels > COLOUR_LEVELS and self.free_share < PALETTE_SHARE

    @property
    def is_scene(self) -> bool:
        return self.levels > COLOUR_LEVELS and self.free_share > SCENE_SHARE


@dataclass(frozen=True)
class RecordingInfo:
    """The outline of a video file or an image folder."""

    path: Path
    frames: int
    rate_hz: float | None  # None: a folder has none of its own
    colour: Colour  # the median of several pictures
    size: tuple[int, int] | None = None  # (width, height) of the first picture
    names: tuple[str, ...] = ()  # of a folder's pictures, without suffix, in their order


def probe(path: str | Path) -> RecordingInfo:
    """Reads the outline of a recording without decoding more than a few of its pictures.

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
    """The files and folders that a rig reads: recordings, calibration, weights and keys."""
    named = [getattr(getattr(config, section), key) for section, keys in READ_FILES.items() for key in keys]
    return [path for path in (*named, path_of(config.infrared), path_of(config.visible)) if path]


def path_of(section: AnySource) -> str | None:
    """Where a recording is; None for a camera."""
    if isinstance(section, FolderSource):
        return section.path
    scheme, _, rest = section.url.rpartition("://") if isinstance(section, StreamSource) else ("camera", "", "")
    return os.path.expanduser(rest) if scheme.lower() in ("", "file") else None


def check_recordings(config: RigConfig) -> list[str]:
    """Looks at the recordings of a rig before it is started. Returns what is strange about them, for the report.

    Raises:
        SourceError: one that cannot be read, or two that cannot belong together as they are given.
        ConfigError, CalibrationError: a source of another kind than its path, or a calibration that is for another
            resolution, or cannot be read.
    """
    infos = []
    for camera, section in (("infrared", config.infrared), ("visible", config.visible)):
        if (path := path_of(section)) is None:
            continue
        _refuse_other_kind(camera, section, path)
        info = probe(path)
        infos.append(replace(info, rate_hz=section.rate_hz) if isinstance(section, FolderSource) else info)
        _refuse_empty(info)
    if len(infos) < 2:
        return []
    if infos[0].rate_hz != infos[1].rate_hz:  # then pictures of one moment have different numbers
        infos = [replace(info, names=()) for info in infos]
    refuse_unlikely(*infos)
    if config.registration.calibration:
        refuse_other_size(load_rig(config.registration.calibration), *infos)
    return doubts(*infos, calibrated=config.registration.calibration is not None)


def _refuse_other_kind(camera: str, section: AnySource, path: str) -> None:
    if isinstance(section, FolderSource) and os.path.isfile(path):
        raise ConfigError(f"{camera}: {path} is a file: write kind: stream, and url: in place of path:")
    if not isinstance(section, FolderSource) and os.path.isdir(path):
        raise ConfigError(f"{camera}: {path} is a folder: write kind: folder, and path: in place of url:")


def refuse_other_size(rig: Rig | None, infrared: RecordingInfo, visible: RecordingInfo) -> None:
    """Raises ConfigError for a calibration at another resolution than the recordings have."""
    if rig is None:
        return
    models = rig.infrared, rig.visible
    for camera, info, model, other in zip(
        ("infrared", "visible"), (infrared, visible), models, models[::-1], strict=True
    ):
        if info.size is not None and info.size != model.size:
            swapped = ", the other camera's size: are the two swapped?" if info.size == other.size else ":"
            raise ConfigError(
                f"the calibration is for {model.size[0]}x{model.size[1]}, but the {camera} recording {info.path.name} "
                f"has {info.size[0]}x{info.size[1]}{swapped} give one of that size, or calibrate at this one"
            )


def refuse_overwriting(output: str | Path | None, *inputs: str | Path) -> None:
    """Raises ConfigError for an output that would replace an input, or lie among the pictures of one.

    Links are followed, and two names of one file are one file.
    """
    if output is None:
        return
    target = Path(output)
    for path in map(Path, inputs):
        if _is_same(target, path) or (path.is_dir() and _is_same(target.absolute().parent, path)):
            raise ConfigError(f"{output} would replace or mix with the input {path}: choose another place")


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.resolve() == other.resolve() or one.samefile(other)
    except (OSError, RuntimeError, ValueError):  # not there, a circle of links, or no path at all
        return False


def colour_of(*images: np.ndarray) -> Colour:
    """The colour of pictures, uint8 BGR or RGB (H, W, 3) or grey (H, W): the median over them."""
    found = np.array([_colour_of(image) for image in images if image.ndim == 3])
    return Colour(*(float(value) for value in np.median(found, axis=0))) if len(found) else Colour(0.0, 0.0)


def _colour_of(image: np.ndarray) -> tuple[float, float]:
    small = cv2.cvtColor(np.ascontiguousarray(image[::4, ::4]), cv2.COLOR_RGB2YCrCb).reshape(-1, 3)
    chroma = small[:, 1:].astype(np.float64) - 128
    grey = small[:, 0] // 4
    counts = np.maximum(np.bincount(grey, minlength=64), 1)
    of_its_grey = np.stack([np.bincount(grey, plane, minlength=64) / counts for plane in chroma.T], axis=1)[grey]
    return np.abs(chroma).mean(), ((chroma - of_its_grey) ** 2).sum() / max((chroma**2).sum(), 1.0)


def look_swapped(infrared: Colour, visible: Colour) -> bool:
    """Whether what is given as infrared shows a scene in colour, and what is given as visible none or a palette.

    Two grey recordings may be right, and so may a palette beside a visible camera's colours.
    """
    if infrared.levels > COLOUR_LEVELS and visible.levels < GREY_LEVELS:
        return True
    return infrared.is_scene and visible.is_palette


def refuse_one_for_both(infrared: Path, visible: Path) -> None:
    """Raises SourceError for two recordings or pictures that are one and the same."""
    if _is_same(infrared, visible):
        raise SourceError(f"infrared and visible are the same, {visible}: give each camera its own")


def refuse_swapped(infrared: Path, infrared_colour: Colour, visible: Path, visible_colour: Colour) -> None:
    """Raises SourceError for two recordings or pictures that `look_swapped`."""
    if look_swapped(infrared_colour, visible_colour):
        other = "in false colours" if visible_colour.is_palette else "grey"
        raise SourceError(
            f"{infrared.name} is in colour and {visible.name} is {other}: infrared and visible look swapped: "
            "give the infrared one first"
        )


def doubts(infrared: RecordingInfo, visible: RecordingInfo, *, calibrated: bool) -> list[str]:
    """What is strange about two recordings, and may be right: one line each, for the report.

    Args:
        infrared, visible: their outlines.
        calibrated: whether a calibration brings the infrared pictures into the visible ones; else they are resized.
    """
    lines = []
    if infrared.colour.levels > COLOUR_LEVELS:
        lines.append(
            f"the infrared recording {infrared.path.name} is in colour, of which only the brightness is used: "
            "if it shows temperature by a palette, record it in grey; if it is the visible one, give it second"
        )
    if not calibrated and infrared.size and visible.size:
        (width, height), (wide, high) = infrared.size, visible.size
        if max(width * high, wide * height) > ASPECT_RATIO * min(width * high, wide * height):
            lines.append(
                f"the infrared recording {infrared.path.name} of {width}x{height} is stretched to the shape of the "
                f"visible one, {wide}x{high}: calibrate the cameras, or turn or cut the pictures"
            )
    return lines


def refuse_unlikely(infrared: RecordingInfo, visible: RecordingInfo) -> None:
    """Refuses two recordings that cannot belong together as they are given.

    Raises:
        SourceError: swapped cameras, no frames, folders with unmatched names, or as many frames at another rate.
    """
    for info in (infrared, visible):
        _refuse_empty(info)
    refuse_one_for_both(infrared.path, visible.path)
    refuse_swapped(infrared.path, infrared.colour, visible.path, visible.colour)
    _refuse_unmatched(infrared, visible)
    rates = (infrared.rate_hz, visible.rate_hz)
    if infrared.frames == visible.frames > 1 and rates[0] and rates[1] and abs(rates[0] / rates[1] - 1) > 0.01:
        raise SourceError(
            f"both recordings have {infrared.frames} frames, but {infrared.path.name} runs at {rates[0]:g} Hz and "
            f"{visible.path.name} at {rates[1]:g} Hz: one of the rates is wrong, and pairing by time would mismatch "
            "them: correct the file's rate"
        )


def _refuse_empty(info: RecordingInfo) -> None:
    if info.frames == 0:
        raise SourceError(f"{info.path} has no frames: give a recording with at least one picture")
    if info.size is not None:
        refuse_small(info.path, info.size)


def refuse_small(path: Path, size: tuple[int, int]) -> None:
    """Raises SourceError for pictures of a (width, height) that the network cannot take."""
    width, height = size
    if min(size) < MINIMUM_PX:
        raise SourceError(f"{path} is {width}x{height}: give pictures of at least {MINIMUM_PX} pixels a side")


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
    return outline_of(path, image_files(path, none_allowed=True))


def outline_of(path: Path, images: Sequence[Path]) -> RecordingInfo:
    """The outline of some image files, of which a few are read; `path` names them all."""
    looked_at = sorted({round(share * (len(images) - 1)) for share in np.linspace(0, 1, LOOKS)}) if images else []
    pictures = [read_image(images[index], "visible") for index in looked_at]
    names = tuple(image.stem for image in images)
    return RecordingInfo(path, len(images), None, colour_of(*pictures), size_of(*pictures), names)


def picture_size(path: str) -> tuple[int, int] | None:
    """(width, height) of a recording, from its first picture or its header; None where neither tells."""
    if Path(path).is_dir():
        images = image_files(Path(path), none_allowed=True)
        return size_of(read_image(images[0], "visible")) if images else None
    try:
        with av.open(f"file:{path}", options={"protocol_whitelist": "file"}) as container:
            codec = container.streams.video[0].codec_context
            return (codec.width, codec.height) if codec.width and codec.height else None
    except (av.FFmpegError, OSError, IndexError):
        return None


def size_of(*pictures: np.ndarray) -> tuple[int, int] | None:
    """(width, height) of the first of some pictures."""
    return (pictures[0].shape[1], pictures[0].shape[0]) if pictures else None


def _probe_video(path: Path) -> RecordingInfo:
    try:
        # "file:" and the list keep FFmpeg from taking a colon for a protocol, and a playlist from calling the network.
        with av.open(f"file:{path}", options={"protocol_whitelist": "file"}) as container:
            if not container.streams.video:
                raise SourceError(f"{path} has no video stream: give a video file")
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            pictures = _look_at(container, stream)
        with av.open(f"file:{path}", options={"protocol_whitelist": "file"}) as container:
            packets = _count_packets(container)
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise SourceError(f"{path} cannot be read as a video ({reason}): give a video file") from None
    frames, rate_hz = packets if pictures else 0, float(Fraction(rate)) if rate else None
    return RecordingInfo(path, frames, rate_hz, colour_of(*pictures), size_of(*pictures))


def _look_at(container: InputContainer, stream: VideoStream) -> list[np.ndarray]:
    """The first picture, and those at the keyframes before some later moments. What is damaged is left out."""
    pictures = [_next_picture(container, stream)]
    start, length = container.start_time or 0, container.duration or 0
    for share in np.linspace(0, 1, LOOKS)[1:-1] if length else ():
        with contextlib.suppress(av.FFmpegError):  # there is no way there: cut off before it, or without an index
            container.seek(start + round(share * length))
            pictures.append(_next_picture(container, stream))
    return [picture for picture in pictures if picture is not None]


def _next_picture(container: InputContainer, stream: VideoStream) -> np.ndarray | None:
    for packet in container.demux(stream):
        with contextlib.suppress(av.InvalidDataError, EOFError):
            for frame in packet.decode():
                return np.asarray(frame.to_ndarray(format="rgb24"))
    return None


def _count_packets(container: InputContainer) -> int:
    """As many as can be reached: where the file is broken off, the replay says so."""
    count = 0
    with contextlib.suppress(av.InvalidDataError, EOFError):
        for packet in container.demux(video=0):
            count += bool(packet.size)
    return count
