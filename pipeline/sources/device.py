"""A camera at this machine: V4L2, read through PyAV. Sixteen-bit thermal cores (Y16) stay sixteen bits."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame

from pipeline.config import DeviceSource
from pipeline.errors import SourceError
from pipeline.frame import Camera, ClockSource, Frame
from pipeline.sources.base import MAX_PIXELS, OpenedOnce
from pipeline.sources.pictures import to_image

OPEN_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 3.0  # beyond the half second to three seconds that a thermal core's shutter takes
DRIVER_ERROR_NS = 1_000_000
ARRIVAL_ERROR_NS = 10_000_000
OLDEST_NS = 5_000_000_000


def device_options(config: DeviceSource) -> dict[str, str]:
    """The options of FFmpeg's v4l2 reader for a configuration."""
    options = {"timestamps": "mono2abs"}  # the driver's monotonic stamps, given as wall-clock times
    if config.pixel_format:
        options["input_format"] = config.pixel_format
    if config.width and config.height:
        options["video_size"] = f"{config.width}x{config.height}"
    if config.rate_hz:
        options["framerate"] = str(Fraction(config.rate_hz).limit_denominator(1001))
    return options


def driver_time(wall_us: int | None, arrived_ns: int, wall_offset_ns: int) -> tuple[int, ClockSource, int]:
    """Capture time on the monotonic scale, its source, and its error.

    Args:
        wall_us: the driver's stamp in microseconds since 1970; None if it gave none.
        arrived_ns: time.monotonic_ns() at the arrival, which is used where the stamp is not plausible.
        wall_offset_ns: wall clock minus monotonic clock of this machine.
    """
    if wall_us is not None:
        captured_ns = wall_us * 1000 - wall_offset_ns
        if -DRIVER_ERROR_NS <= arrived_ns - captured_ns <= OLDEST_NS:
            return min(captured_ns, arrived_ns), "driver", DRIVER_ERROR_NS
    return arrived_ns, "arrival", ARRIVAL_ERROR_NS


def device_frame(picture: VideoFrame, camera: Camera, index: int, arrived_ns: int, wall_offset_ns: int) -> Frame:
    """The frame that a device's picture makes."""
    image, bits = to_image(picture, camera)
    wall_us = None if picture.pts is None or not picture.time_base else int(picture.pts * picture.time_base * 10**6)
    captured_ns, clock, error_ns = driver_time(wall_us, arrived_ns, wall_offset_ns)
    return Frame(
        camera=camera,
        image=image,
        captured_ns=captured_ns,
        index=index,
        clock=clock,
        clock_error_ns=error_ns,
        arrived_ns=arrived_ns,
        bits=bits,
        suspect=picture.is_corrupt,
    )


class DeviceCamera(OpenedOnce):
    """A V4L2 device."""

    live = True

    def __init__(self, config: DeviceSource, camera: Camera) -> None:
        super().__init__()
        self.camera: Camera = camera
        self.config = config
        self.period_ns: int = round(1e9 / config.rate_hz) if config.rate_hz else 0
        self._container: InputContainer | None = None
        self._packets: Iterator[Packet[Any]] = iter(())
        self._pictures: deque[VideoFrame] = deque()  # decoded, and not yet handed out
        self._index = 0

    def open(self) -> None:
        self._closing.clear()
        with self._using():
            self._let_go()
            self._check_device()
            try:
                self._container = av.open(
                    self.config.path,
                    "r",
                    format="v4l2",
                    options=device_options(self.config),
                    timeout=(OPEN_TIMEOUT_S, READ_TIMEOUT_S),
                )
            except (av.FFmpegError, ValueError) as error:
                raise SourceError(self._explain(error)) from None
            stream = self._container.streams.video[0]
            stream.thread_type = "NONE"
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            if stream.average_rate:
                self.period_ns = round(1e9 / stream.average_rate)
            self._packets = self._container.demux(stream)
            self._pictures.clear()

    def grab(self) -> Frame:
        with self._using():
            if self._container is None or self._closing.is_set():
                raise SourceError(f"{self.config.path} is closed: open it before a grab")
            try:
                picture = self._next_picture()
            except av.FFmpegError as error:
                raise SourceError(self._explain(error)) from None
            arrived_ns = time.monotonic_ns()
            frame = device_frame(picture, self.camera, self._index, arrived_ns, time.time_ns() - arrived_ns)
            self._index += 1
            return frame

    def _let_go(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    def _next_picture(self) -> VideoFrame:
        """Skips what cannot be decoded, and counts it: behind a bad cable JPEGs are cut off, one or all of them."""
        give_up = time.monotonic() + READ_TIMEOUT_S
        while not self._pictures:
            if self._closing.is_set():
                raise SourceError(f"{self.config.path} was closed while it was read")
            if time.monotonic() > give_up:
                raise SourceError(
                    f"{self.config.path} sent no whole picture for {READ_TIMEOUT_S:g} s: is its cable good?"
                )
            packet = next(self._packets, None)
            if packet is None or (packet.size == 0 and packet.pts is None):  # the end, as FFmpeg gives it
                raise SourceError(f"{self.config.path} is gone: was the camera unplugged?")
            try:
                pictures = packet.decode() if packet.size else []  # empty: the driver itself found it damaged
            except av.InvalidDataError:
                pictures = []
            self._index += not pictures
            self._pictures.extend(pictures)
        return self._pictures.popleft()

    def _check_device(self) -> None:
        path = self.config.path
        if not os.path.exists(path):
            raise SourceError(f"there is no device {path}: is the camera plugged in?")
        if not os.access(path, os.R_OK | os.W_OK):
            raise SourceError(f"{path} may not be used: add this user to the group 'video', then log in again")

    def _explain(self, error: Exception) -> str:
        path, config = self.config.path, self.config
        if isinstance(error, (av.ExitError, TimeoutError)):
            return f"{path} sent no picture for {READ_TIMEOUT_S:g} s: it has stalled"
        if getattr(error, "errno", None) == 16:  # EBUSY
            return f"{path} is in use by another program: close that one first"
        if isinstance(error, PermissionError):
            return f"{path} may not be used: add this user to the group 'video', then log in again"
        wishes = (config.pixel_format, config.width, config.height, config.rate_hz)
        wish = ", ".join(str(value) for value in wishes if value)
        return f"{path} cannot be read as a camera{f' with {wish}' if wish else ''}: {_reason(error)}"


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or type(error).__name__)
