"""Writes fused frames to a video file, whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from fractions import Fraction
from itertools import count
from pathlib import Path
from threading import Thread

import av
import cv2
import numpy as np

from calibration.whole_file import part_of
from pipeline.errors import ConfigError
from pipeline.handover import HandoverClosed, Latest

log = logging.getLogger("dspfusion.record")

TIME_BASE = Fraction(1, 90_000)
FINISH_S = 5.0
FORMATS = {".mp4": "mp4", ".mkv": "matroska"}


def keep_aside(path: Path) -> None:
    """Renames a file to STEM.previous.SUFFIX, or previous2 and so on where that is taken, and logs it.

    Nothing is done where there is no file, or an empty one. A link goes on pointing to the place that it names.
    """
    earlier = Path(os.path.realpath(path))
    if not earlier.is_file() or earlier.stat().st_size == 0:
        return
    for number in count(1):
        word = "previous" if number == 1 else f"previous{number}"
        aside = earlier.with_name(f"{earlier.stem}.{word}{earlier.suffix}")
        if not os.path.lexists(aside):
            break
    earlier.rename(aside)
    log.warning("%s was there already: it is kept as %s", path, aside.name)


class VideoFile:
    """An H.264 file (.mp4 or .mkv) of RGB frames with their own times.

    Equal frames give equal bytes. Halved chroma needs even sizes, so an odd picture gets its last row or column twice.
    The file appears under its name when `close` is called; until then, and after
    `discard`, there is only a ".part" file or nothing.

    Args:
        path: its place and name.
        rate_hz: of the frames, about.
        preset: of x264.
        threads: of the encoder.
        keep_earlier: a file that has the name by then is not replaced, but kept under another one.
    """

    def __init__(
        self,
        path: str | Path,
        rate_hz: float = 25.0,
        preset: str = "veryfast",
        threads: int = 1,
        keep_earlier: bool = False,
    ) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in FORMATS:
            raise ConfigError(f"{self.path.name}: a video ends in .mp4 or .mkv: choose one of them")
        if not self.path.parent.is_dir():
            raise ConfigError(f"the folder {self.path.parent} does not exist: create it first")
        self._part = part_of(self.path)
        self._refuse_unwritable()
        self._rate_hz, self._preset, self._threads = rate_hz, preset, threads
        self._keep_earlier = keep_earlier
        self._container: av.container.OutputContainer | None = None
        self._stream: av.VideoStream | None = None
        self._size: tuple[int, int] | None = None
        self._last_pts = -1
        self._first_ns: int | None = None
        self.frames = 0

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height), fixed by the first frame."""
        return self._size

    def write(self, image: np.ndarray, time_ns: int) -> None:
        """Adds one frame: uint8 RGB (H, W, 3), all of one size, at `time_ns` on any scale (the first counts as 0)."""
        if self._container is None:
            self._open(image.shape[1], image.shape[0])
        assert self._container is not None
        assert self._stream is not None
        assert self._size is not None
        if self._size != (image.shape[1], image.shape[0]):
            raise ConfigError(
                f"the picture became {image.shape[1]}x{image.shape[0]} while {self.path.name} is "
                f"{self._size[0]}x{self._size[1]}: a video has one size: start a new recording"
            )
        self._first_ns = time_ns if self._first_ns is None else self._first_ns
        pts = max(self._last_pts + 1, round((time_ns - self._first_ns) / 1e9 / TIME_BASE))
        even = cv2.copyMakeBorder(image, 0, image.shape[0] % 2, 0, image.shape[1] % 2, cv2.BORDER_REPLICATE)
        planes = cv2.cvtColor(even, cv2.COLOR_RGB2YUV_I420).astype(np.uint8, copy=False)
        frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
        frame.pts, frame.time_base, self._last_pts = pts, TIME_BASE, pts
        try:
            self._container.mux(self._stream.encode(frame))
        except (av.FFmpegError, OSError) as error:
            raise self._cannot_write(error) from None
        self.frames += 1

    def close(self) -> None:
        """Finishes the file and gives it its name. Without a frame there is no file.

        Raises:
            ConfigError: the place cannot be written to (any more); nothing is left there.
        """
        if self._container is None:
            return
        assert self._stream is not None
        try:
            self._container.mux(self._stream.encode(None))
            self._container.close()
            self._container = None
            if self._keep_earlier:
                keep_aside(self.path)
            self._part.replace(self.path)
        except (av.FFmpegError, OSError) as error:
            self.discard()
            raise self._cannot_write(error) from None

    def discard(self) -> None:
        """Removes what was written."""
        if self._container is not None:
            container, self._container = self._container, None
            with contextlib.suppress(av.FFmpegError, OSError):  # it writes the file's end, which nobody wants
                container.close()
        with contextlib.suppress(OSError):
            self._part.unlink(missing_ok=True)

    def _refuse_unwritable(self) -> None:
        """Before the first frame is made, which may be long after the start."""
        if self.path.is_dir():
            raise ConfigError(f"{self.path} is a folder: name a file in it")
        try:
            self._part.touch()
            self._part.unlink()
        except (OSError, ValueError) as error:
            raise self._cannot_write(error) from None

    def _cannot_write(self, error: Exception) -> ConfigError:
        reason = getattr(error, "strerror", None) or str(error)
        return ConfigError(f"cannot write {self.path}: {reason}: choose another place, or make room")

    def _open(self, width: int, height: int) -> None:
        try:
            # "bitexact" keeps random identifiers and library versions out of the file.
            self._container = av.open(
                str(self._part), "w", format=FORMATS[self.path.suffix.lower()], options={"fflags": "+bitexact"}
            )
            stream = self._container.add_stream("libx264", rate=Fraction(self._rate_hz).limit_denominator(1001))
        except (av.FFmpegError, OSError) as error:
            self.discard()
            raise self._cannot_write(error) from None
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = TIME_BASE
        stream.codec_context.thread_count = self._threads
        # With its macroblock tree, x264 gave other bytes in about one of 30 equal runs; without it in none of 400.
        stream.options = {"preset": self._preset, "crf": "18", "bf": "0", "x264-params": "mbtree=0:rc-lookahead=0"}
        self._stream, self._size = stream, (width, height)


class BackgroundVideo:
    """A video file written in a thread of its own, so that an encoder or a disk never holds the live flow up.

    When the writer falls behind, the oldest waiting frame is dropped and counted. When it fails (a full disk), it
    stops, keeps what was written, and says so at once to `on_failure` and in `failure`; fusion goes on.

    A rig that starts again under the same configuration, as a service does, cannot record the last drive once more: a
    file that is there is kept under another name, unless `keep_earlier` is false.
    """

    def __init__(
        self,
        path: str | Path,
        rate_hz: float,
        on_failure: Callable[[str], None] = lambda line: None,
        keep_earlier: bool = True,
    ) -> None:
        self._file = VideoFile(path, rate_hz, preset="ultrafast", keep_earlier=keep_earlier)
        self._on_failure = on_failure
        self._slot: Latest[tuple[np.ndarray, int]] = Latest(slots=8)
        self.failure: str | None = None
        self._thread = Thread(target=self._write, name="video", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        return self._slot.dropped

    @property
    def frames(self) -> int:
        return self._file.frames

    def write(self, image: np.ndarray, time_ns: int) -> None:
        """Hands one frame over; never waits."""
        if self.failure is None:
            self._slot.put((image, time_ns))

    def _write_resized(self, image: np.ndarray, time_ns: int) -> None:
        """A video has one size, but a lone infrared frame of an uncalibrated rig may have another: it is scaled."""
        size = self._file.size
        if size is not None and size != (image.shape[1], image.shape[0]):
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        self._file.write(image, time_ns)

    def close(self) -> None:
        """Writes what waits and finishes the file, within 5 s."""
        self._slot.close()
        self._thread.join(FINISH_S)
        if self._thread.is_alive() and self.failure is None:
            self._fail(f"the video {self._file.path.name} was not finished within {FINISH_S:g} s: it may be lost")

    def _fail(self, line: str) -> None:
        self.failure = line
        self._on_failure(line)

    def _write(self) -> None:
        try:
            while True:
                try:
                    self._write_resized(*self._slot.take())
                except HandoverClosed:
                    break
            self._file.close()
        except Exception as error:  # an encoder may raise anything; whatever it was, somebody has to hear of it
            reason = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
            self._fail(f"the video {self._file.path.name} was given up after {self._file.frames} frames: {reason}")
            try:
                self._file.close()  # what was written is worth keeping, if its end still fits
            except Exception:
                self._file.discard()
