"""Looks for a calibration board in two folders of pictures or two recordings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from calibration.targets import Board
from calibration.views import BoardView, Detections, detect_view
from pipeline.errors import SourceError
from pipeline.frame import Camera, Frame
from pipeline.recording import IMAGE_SUFFIXES, probe, refuse_unlikely
from pipeline.replay import DEFAULT_RATE_HZ, frames_of
from pipeline.sources.folder import image_files, read_image

MAX_VIEWS = 400  # of a recording; more are a question of patience, not of accuracy
SOME_PICTURES = 7  # of a folder, spread over it, are looked at for their colour
CAMERAS: tuple[Camera, Camera] = ("infrared", "visible")


@dataclass(frozen=True)
class Moment:
    """The pictures of one moment, of one camera or both."""

    name: str
    images: dict[str, np.ndarray]
    bits: dict[str, int]


@dataclass(frozen=True)
class Pairing:
    """How the pictures of two inputs belong together."""

    by: Literal["name", "order", "time"]
    count: int
    moments: Iterator[Moment]


def pair_up(infrared: Path, visible: Path, every_s: float = 0.5) -> Pairing:
    """Pairs two pictures, two folders (by equal names, else by order if they hold as many) or two recordings by time.

    Args:
        every_s: of recordings, a picture is taken so often.

    Raises:
        SourceError: the inputs cannot be read, do not belong together, or look swapped.
    """
    for path in (infrared, visible):
        if not path.exists():
            raise SourceError(f"{path} does not exist: check the path")
    if _is_stills(infrared) and _is_stills(visible):
        files = {"infrared": _files(infrared), "visible": _files(visible)}
        refuse_swapped_pictures(files["infrared"], files["visible"])
        return _pair_stills(files, both_files=not infrared.is_dir())
    infos = probe(infrared), probe(visible)
    refuse_unlikely(*infos)
    rate_hz = infos[1].rate_hz or infos[0].rate_hz or DEFAULT_RATE_HZ
    shortest_s = min(info.frames / (info.rate_hz or rate_hz) for info in infos)
    every_s = max(every_s, shortest_s / MAX_VIEWS)
    count = int(shortest_s / every_s) + 1
    return Pairing("time", count, _moments_in_time(infrared, visible, rate_hz, every_s))


def detect_boards(pairing: Pairing, board: Board, on_view: Callable[[BoardView], None] = lambda _: None) -> Detections:
    """Looks for the board in every moment.

    Raises:
        SourceError: nothing to look at, or pictures of changing size.
    """
    views: list[BoardView] = []
    sizes: dict[str, tuple[int, int]] = {}
    bits: dict[str, int] = {}
    for moment in pairing.moments:
        for camera, image in moment.images.items():
            size = (image.shape[1], image.shape[0])
            if sizes.setdefault(camera, size) != size:
                raise SourceError(
                    f"{moment.name}: the {camera} picture has {size[0]}x{size[1]} pixels, those before it "
                    f"{sizes[camera][0]}x{sizes[camera][1]}: calibrate pictures of one size at a time"
                )
            bits[camera] = max(bits.get(camera, 0), moment.bits[camera])
        before = views[-1] if views and pairing.by == "time" else None
        views.append(detect_view(moment.name, moment.images, board, before))
        on_view(views[-1])
    missing = [camera for camera in CAMERAS if camera not in sizes]
    if missing:
        raise SourceError(f"there are no {missing[0]} pictures to look at: check the paths")
    if pairing.by == "time":
        views = _held_still(views)
    return Detections(board, sizes, bits, tuple(views))


def _held_still(views: list[BoardView]) -> list[BoardView]:
    """The first view has none before it: it moves as the second one says."""
    if len(views) > 1 and views[0].motion_px is None:
        views[0] = BoardView(views[0].name, views[0].results, views[1].motion_px)
    return views


def _is_stills(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES


def _files(path: Path) -> list[Path]:
    return image_files(path) if path.is_dir() else [path]


def _pair_stills(files: dict[str, list[Path]], both_files: bool) -> Pairing:
    named = {camera: {file.stem: file for file in listed} for camera, listed in files.items()}
    shared = named["infrared"].keys() & named["visible"].keys()
    if shared and not both_files:
        names = sorted(named["infrared"].keys() | named["visible"].keys())
        chosen = [(name, {camera: named[camera][name] for camera in files if name in named[camera]}) for name in names]
        return Pairing("name", len(chosen), _moments_of(chosen))
    counts = [len(listed) for listed in files.values()]
    if counts[0] != counts[1]:
        raise SourceError(
            f"{counts[0]} infrared and {counts[1]} visible pictures, and no two names are equal: give the pictures of "
            "one moment equal names"
        )
    in_order = [
        (visible.stem, {"infrared": infrared, "visible": visible})
        for infrared, visible in zip(files["infrared"], files["visible"], strict=True)
    ]
    return Pairing("order", len(in_order), _moments_of(in_order))


def _moments_of(chosen: list[tuple[str, dict[str, Path]]]) -> Iterator[Moment]:
    for name, paths in chosen:
        images: dict[str, np.ndarray] = {
            camera: read_image(paths[camera], camera) for camera in CAMERAS if camera in paths
        }
        yield Moment(name, images, {camera: image.dtype.itemsize * 8 for camera, image in images.items()})


def refuse_swapped_pictures(infrared: list[Path], visible: list[Path]) -> None:
    """By colour, and by bits: no visible camera delivers sixteen beside an infrared one of eight."""
    from pipeline.recording import colour_of, refuse_one_for_both, refuse_swapped

    shown = [files[0] if len(files) == 1 else files[0].parent for files in (infrared, visible)]
    refuse_one_for_both(*shown)
    thermal, colour = (_some_read(files) for files in (infrared, visible))
    if not thermal or not colour:
        return  # reading them says why
    if thermal[0].dtype == np.uint8 and colour[0].dtype == np.uint16 and colour[0].ndim == 2:
        raise SourceError(
            f"infrared and visible look swapped: give the infrared pictures first ({infrared[0].name} is of 8 bits, "
            f"{visible[0].name} grey of 16)"
        )
    if any(picture.dtype != np.uint8 for picture in (*thermal, *colour)):
        return
    # One picture of a night has hardly any colour; several together tell the cameras apart.
    colours = [
        colour_of(*(picture[..., :3] if picture.ndim == 3 else picture for picture in one)) for one in (thermal, colour)
    ]
    refuse_swapped(shown[0], colours[0], shown[1], colours[1])


def _some_read(files: list[Path]) -> list[np.ndarray]:
    chosen = files[:: -(-len(files) // SOME_PICTURES)]
    pictures = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in chosen]
    return [picture for picture in pictures if picture is not None]


def _moments_in_time(infrared: Path, visible: Path, rate_hz: float, every_s: float) -> Iterator[Moment]:
    """Every so often the visible frame due, and the infrared frame nearest to it in time since the recordings began."""
    thermal, colour = (
        _Player(frames_of(str(infrared), "infrared", rate_hz)),
        _Player(frames_of(str(visible), "visible", rate_hz)),
    )
    index = 0
    while True:
        seen = colour.at(round(index * every_s * 1e9))
        if seen is None:
            return
        felt = thermal.nearest(colour.since_start_ns(seen))
        if felt is None:
            return
        images = {"infrared": felt.image, "visible": seen.image}
        yield Moment(f"{index * every_s:.2f} s", images, {"infrared": felt.bits, "visible": seen.bits})
        index += 1


class _Player:
    """The frames of one recording, looked up by the time since its beginning."""

    def __init__(self, frames: Iterator[Frame]) -> None:
        self._frames = frames
        self._start_ns: int | None = None
        self._last: Frame | None = None
        self._next: Frame | None = self._take()

    def since_start_ns(self, frame: Frame) -> int:
        assert self._start_ns is not None
        return frame.captured_ns - self._start_ns

    def at(self, when_ns: int) -> Frame | None:
        """The first frame not before a time; None at the end."""
        while self._next is not None and self.since_start_ns(self._next) < when_ns:
            self._last, self._next = self._next, self._take()
        return self._next

    def nearest(self, when_ns: int) -> Frame | None:
        """The frame nearest to a time; None if the recording has ended more than a tenth of a second before."""
        after = self.at(when_ns)
        before = self._last
        if after is None:
            return before if before is not None and when_ns - self.since_start_ns(before) < 100_000_000 else None
        if before is None or self.since_start_ns(after) - when_ns <= when_ns - self.since_start_ns(before):
            return after
        return before

    def _take(self) -> Frame | None:
        frame = next(self._frames, None)
        if frame is not None and self._start_ns is None:
            self._start_ns = frame.captured_ns
        return frame
