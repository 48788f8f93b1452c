"""A folder of images as a recording: natural name order, eight or sixteen bits as they are in the files."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

import numpy as np

from pipeline.config import FolderSource
from pipeline.errors import SourceEnded, SourceError
from pipeline.frame import Camera, Frame
from pipeline.sources.base import MAX_PIXELS, Pace

# OpenCV reads this when it is imported. A PNG of 109 kB can hold 900 megapixels: 16 s and 5 GB without the limit.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
import cv2

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # we say ourselves what cannot be read, in one line

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"})


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts frame2 before frame10."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part) for part in parts]


def image_files(folder: Path, none_allowed: bool = False) -> list[Path]:
    """The images of a folder in natural name order. Raises SourceError if there are none, unless that is allowed."""
    try:
        with os.scandir(folder) as entries:
            files = [
                folder / entry.name
                for entry in entries
                # A Mac leaves a "._picture.png" beside each picture.
                if Path(entry.name).suffix.lower() in SUFFIXES and not entry.name.startswith(".") and entry.is_file()
            ]
    except FileNotFoundError:
        raise SourceError(f"there is no folder {folder}: check the path") from None
    except NotADirectoryError:
        raise SourceError(f"{folder} is a file, not a folder of images: give it as a stream source") from None
    except PermissionError:
        raise SourceError(f"the folder {folder} may not be read: check its permissions") from None
    if not files and not none_allowed:
        kinds = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        raise SourceError(f"the folder {folder} holds no images: it needs files of {kinds}")
    return sorted(files, key=lambda file: (natural_key(file.name), file.name))


def read_image(file: Path, camera: Camera) -> np.ndarray:
    """One image file.

    Returns:
        visible: uint8 RGB (H, W, 3). infrared: uint8 or uint16 (H, W), the samples as they are in the file.

    Raises:
        SourceError: the file is no image, is damaged, or has more than 33 megapixels.
    """
    try:
        data = np.fromfile(file, dtype=np.uint8)
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror or 'unknown reason'}") from None
    samples = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_GRAYSCALE
    image = _decoded(data, cv2.IMREAD_COLOR_RGB if camera == "visible" else samples)
    found = _decoded(data, samples) if image is None else image  # no colours can be made of floats
    if found is not None and found.dtype not in (np.uint8, np.uint16):
        raise SourceError(f"{file} has samples of {found.dtype}: save it with 8 or 16 bits a sample")
    if image is None:
        raise SourceError(f"{file} cannot be decoded: it is damaged, no image, or larger than {MAX_PIXELS} pixels")
    if image.shape[0] * image.shape[1] > MAX_PIXELS:
        raise SourceError(f"{file} has {image.size} samples, more than {MAX_PIXELS} pixels: make it smaller")
    return np.asarray(image)


def _decoded(data: np.ndarray, flags: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(data, flags | cv2.IMREAD_IGNORE_ORIENTATION) if data.size else None
    except cv2.error:
        return None  # beyond OPENCV_IO_MAX_IMAGE_PIXELS, or a header that makes no sense


class ImageFolder:
    """The images of a folder, in name order, at the rate of its configuration."""

    live = False

    def __init__(self, config: FolderSource, camera: Camera) -> None:
        self.camera: Camera = camera
        self.config = config
        self.period_ns: int = round(1e9 / config.rate_hz)
        self._closing = threading.Event()
        self._files: list[Path] = []
        self._next = 0
        self._index = 0
        self._size: tuple[int, ...] = ()
        self._pace = Pace(camera)

    @property
    def fault(self) -> str | None:
        """One line on what is wrong with a recording that is read nevertheless."""
        return self._pace.fault

    def open(self) -> None:
        self._closing.clear()
        self._files = image_files(Path(os.path.expanduser(self.config.path)))
        self._next, self._size, self._pace = 0, (), Pace(self.camera)
        self._start = self._index

    def grab(self) -> Frame:
        if not self._files or self._closing.is_set():
            raise SourceError("the image folder is closed: open it before a grab")
        if self._next >= len(self._files):
            if not self.config.loop:
                raise SourceEnded(f"all {len(self._files)} images have been shown")
            self._next = 0
            self._pace.begins_anew(round(len(self._files) * 1e9 / self.config.rate_hz))
        file = self._files[self._next]
        image = read_image(file, self.camera)
        self._check_size(file, image)
        # From the frame number each time: a sum of rounded periods would drift.
        captured_ns = round((self._index - self._start) * 1e9 / self.config.rate_hz)
        if self.config.realtime:
            captured_ns = self._pace.due_ns(captured_ns)
            self._pace.wait(captured_ns, self._closing)
        frame = Frame(
            camera=self.camera,
            image=image,
            captured_ns=captured_ns,
            index=self._index,
            clock="file",
            arrived_ns=time.monotonic_ns(),
            bits=image.dtype.itemsize * 8,
        )
        self._next += 1
        self._index += 1
        return frame

    def close(self) -> None:
        self._closing.set()
        self._pace.end()

    def _check_size(self, file: Path, image: np.ndarray) -> None:
        if not self._size:
            self._size = image.shape[:2]
        elif image.shape[:2] != self._size:
            (height, width), (rows, columns) = self._size, image.shape[:2]
            raise SourceError(
                f"{file} has {columns}x{rows} pixels, but the images before it {width}x{height}: "
                "give every recording a folder of its own"
            )
