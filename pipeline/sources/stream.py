"""Network cameras (RTSP, RTP, MPEG-TS over UDP) and video files, read through PyAV.

What the libraries do and users must not see: a connection that is cut ends like a file, errors carry the password, a
probe keeps a second of pictures back, the parser keeps one, decoder threads keep two, and the pictures before the
first keyframe are rubbish.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import av
from av.codec.context import Flags
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipeline.config import StreamSource
from pipeline.errors import SourceEnded, SourceError
from pipeline.frame import Camera, ClockSource, Frame
from pipeline.redaction import redact, secrets_of
from pipeline.sources.access_units import AccessUnit, AccessUnits
from pipeline.sources.base import FIRST_FRAME_S, MAX_PIXELS, OpenedOnce, Pace
from pipeline.sources.capture_time import CaptureTime, Timeline
from pipeline.sources.cut_off import is_cut_off
from pipeline.sources.pictures import to_image

log = logging.getLogger("dspfusion.sources")

# FFmpeg's log echoes URLs with their passwords, and from decoder threads at that: silence is PyAV's own default.
av.logging.set_level(None)

# Widened nowhere: with "http" in it a playlist could make this machine fetch from anywhere.
PROTOCOLS = {
    "rtsp": "rtsp,rtp,udp,tcp",
    "rtsps": "rtsps,rtsp,rtp,udp,tcp,tls",
    "rtp": "rtp,udp",
    "udp": "udp",
    "file": "file",
}
# Demuxers that take a text for a video, or a list of other files.
REFUSED_FORMATS = frozenset({"tty", "hls", "concat", "dash", "sdp", "lavfi", "imf"})
FALLBACK_PERIOD_NS = 40_000_000
REORDER_NS = 1_000_000_000


class StreamCamera(OpenedOnce):
    """A network stream (live) or a video file (a recording)."""

    def __init__(self, config: StreamSource, camera: Camera) -> None:
        """Raises SourceError at once where the URL's scheme is none of rtsp, rtsps, udp, rtp and file."""
        super().__init__()
        self.camera: Camera = camera
        self.config = config
        self.period_ns: int = 0  # 0: unknown before `open`, or not told by the stream
        self._secrets = secrets_of(config.url)
        self._name = redact(config.url, self._secrets)
        self._scheme = self._scheme_of(config.url)
        self.live: bool = self._scheme != "file"
        self._reader: _LiveReader | _FileReader | None = None
        self._index = 0
        self._earlier_steps = 0  # of the connections before this one
        self._losses = _Losses()
        self._losses_logged = False
        self._pace = Pace(camera)

    @property
    def clock_steps(self) -> int:
        """How often the camera's clock was set, or its time stamps began anew, since the beginning."""
        reader = self._reader
        return self._earlier_steps + (reader.clock_steps if isinstance(reader, _LiveReader) else 0)

    @property
    def unreadable(self) -> int:
        """Frames of a recording that could not be read: damaged, or behind the place where it was cut off.

        Known once its end was reached.
        """
        return self._losses.frames

    @property
    def fault(self) -> str | None:
        """One line on what is wrong with a recording that is read nevertheless."""
        return "; ".join(filter(None, (self._told_losses(), self._pace.fault))) or None

    def _told_losses(self) -> str | None:
        if not self._losses.found:
            return None
        losses, told = self._losses, []
        if losses.frames or losses.cut_off:
            lost = f"{losses.frames} of its frames" if losses.frames else "its end"
            told.append(f"{lost} could not be read, the others are used")
        if losses.damaged:
            told.append(f"{losses.damaged} of its frames are damaged or build on damaged ones, and are used as decoded")
        what = "is cut off" if losses.cut_off else "is damaged"
        return f"the {self.camera} recording {self._name} {what}: {'; '.join(told)}"

    def open(self) -> None:
        self._closing.clear()
        with self._using():
            self._let_go()
            self._reader = self._connect()
            self.period_ns = self._reader.period_ns

    def grab(self) -> Frame:
        with self._using():
            if self._reader is None or self._closing.is_set():
                raise SourceError(f"{self._name} is closed: open it before a grab")
            try:
                frame = self._reader.read(self._index)
            except av.FFmpegError as error:
                raise SourceError(self._explain(error, "reading")) from None
            finally:
                self._warn_of_losses()
            self.period_ns = self._reader.period_ns
            self._index = frame.index + 1
            return frame

    def _warn_of_losses(self) -> None:
        if self._losses.complete and not self._losses_logged:
            self._losses_logged = True
            log.warning(self._told_losses())

    def _let_go(self) -> None:
        if self._reader is not None:
            self._earlier_steps = self.clock_steps
            self._reader.close()
            self._reader = None
        self._pace.end()

    def _scheme_of(self, url: str) -> str:
        scheme, separator, _ = url.partition("://")
        if not separator:
            return "file"
        if scheme.lower() not in PROTOCOLS:
            raise SourceError(f"{self._name}: {scheme}:// is not read; use rtsp, rtsps, udp, rtp, or a file's path")
        return scheme.lower()

    def _connect(self) -> _LiveReader | _FileReader:
        started = time.monotonic()
        try:
            if self.live:
                return self._connect_live()
            path = self._file_path()
            reopen = partial(self._open_file, path)
            self._pace = Pace(self.camera)
            return _FileReader(path, self.camera, self.config, self._closing, reopen, self._losses, self._pace)
        except av.FFmpegError as error:
            # A handshake that runs out of time is reported as invalid data where it was in the middle of an answer.
            late = self.live and time.monotonic() - started >= self.config.connect_timeout_s
            raise SourceError(self._explain(av.ExitError(0, "") if late else error, "opening")) from None
        except (ValueError, UnicodeError, OSError) as error:
            raise SourceError(redact(f"{self._name} cannot be opened: {error}", self._secrets)) from None

    # Live

    def _connect_live(self) -> _LiveReader:
        options = {"protocol_whitelist": PROTOCOLS[self._scheme], "max_pixels": str(MAX_PIXELS)}
        if self._scheme in ("rtsp", "rtsps"):
            options |= {
                "rtsp_transport": self.config.transport,
                "analyzeduration": "100000",  # the camera's description says all; a probe of 1 s is 1 s of old pictures
                "buffer_size": str(1 << 20),
                "max_delay": "100000",  # UDP: how long a lost packet is waited for
            }
            container = self._open_url(options | {"fflags": "noparse"})
            # Only H.264 is put together here, and a JPEG comes whole: anything else needs FFmpeg's parser.
            if container.streams.video and container.streams.video[0].codec_context.name not in ("h264", "mjpeg"):
                container.close()
                container = self._open_url(options)
        else:
            options |= {"analyzeduration": "1000000", "overrun_nonfatal": "1", "fifo_size": "32768"}
            container = self._open_url(options)
        stream = self._video_of(container)
        parsed = self._scheme not in ("rtsp", "rtsps") or stream.codec_context.name != "h264"
        timeout_s = self.config.read_timeout_s
        return _LiveReader(container, stream, self.camera, timeout_s, self._name, self._closing, by_packet=not parsed)

    def _open_url(self, options: dict[str, str]) -> InputContainer:
        timeout = (self.config.connect_timeout_s, self.config.read_timeout_s)
        return av.open(self.config.url, "r", options=options, timeout=timeout)

    # Files

    def _file_path(self) -> Path:
        text = self.config.url
        path = Path(os.path.expanduser(text.partition("://")[2] if "://" in text else text))
        if not path.exists():
            raise SourceError(f"there is no file {path}: check the path")
        if path.is_dir():
            raise SourceError(f"{path} is a folder: give it as a folder source")
        try:
            with path.open("rb") as file:
                empty = not file.read(1)
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror or 'unknown reason'}") from None
        if empty:
            raise SourceError(f"{path} is empty: was its recording interrupted?")
        return path

    def _open_file(self, path: Path) -> tuple[InputContainer, VideoStream]:
        # "file:" keeps FFmpeg from taking a colon in the name for a protocol.
        container = av.open(f"file:{path}", "r", options={"protocol_whitelist": PROTOCOLS["file"]})
        if set(container.format.name.split(",")) & REFUSED_FORMATS:
            container.close()
            raise SourceError(f"{path} is no video: it is a text or a list of other files")
        stream = self._video_of(container)
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = 2
        return container, stream

    # Both

    def _video_of(self, container: InputContainer) -> VideoStream:
        streams = [s for s in container.streams.video if "attached_pic" not in str(s.disposition)]
        if not streams:
            container.close()
            raise SourceError(f"{self._name} has no video in it: is it the right stream?")
        context = streams[0].codec_context
        if context is None:
            container.close()
            raise SourceError(f"{self._name} has a codec that cannot be decoded here: use H.264, or FFV1 for files")
        context.options = {"max_pixels": str(MAX_PIXELS)}
        return streams[0]

    def _explain(self, error: av.FFmpegError, doing: str) -> str:
        """One line for a failure of FFmpeg. Its own text is not used: it echoes the URL."""
        config = self.config
        limit_s = config.connect_timeout_s if doing == "opening" else config.read_timeout_s
        if isinstance(error, (av.ExitError, TimeoutError)):
            return f"{self._name} did not answer within {limit_s:g} s: is the camera on, and the network up?"
        if isinstance(error, ConnectionRefusedError):
            return f"{self._name} refused the connection: is its RTSP service on, and the port right?"
        if isinstance(error, (av.HTTPUnauthorizedError, av.HTTPForbiddenError)):
            return f"{self._name} refused the user name or password: check both in the configuration"
        if isinstance(error, av.HTTPNotFoundError):
            return f"{self._name} has no such stream: check the path behind the host"
        if isinstance(error, (av.InvalidDataError, EOFError, av.DecoderNotFoundError, av.DemuxerNotFoundError)):
            return f"{self._name} cannot be decoded: it is damaged, or no video"
        reason = redact(str(error.strerror or type(error).__name__), self._secrets)
        return f"{self._name} failed while {doing}: {reason}"


class _LiveReader:
    """One connection to a network camera."""

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        camera: Camera,
        read_timeout_s: float,
        name: str,
        closing: threading.Event,
        by_packet: bool,
    ) -> None:
        self._container, self._stream, self._camera = container, stream, camera
        self._read_timeout_s, self._name, self._closing = read_timeout_s, name, closing
        self._context = stream.codec_context
        stream.thread_type = "NONE"  # frame threads hold two pictures back (measured: 123 ms against 66 ms)
        self._context.flags |= Flags.low_delay.value
        self._units = AccessUnits() if by_packet else None
        self._damaged = 0
        self._packets = container.demux(stream)
        self._ready: deque[VideoFrame] = deque()
        self._time_base: Fraction = stream.time_base or Fraction(1, 90_000)
        self._timeline = Timeline()
        self._capture_time = CaptureTime()
        self._ntp_ns: dict[int, int] = {}
        self._last_device_ns: int | None = None
        self._steps_ns: deque[int] = deque(maxlen=25)
        self._size: tuple[int, int] | None = None
        self._received_ns = 0
        self._started = False
        self._suspect = False
        self.period_ns = _nominal_period_ns(stream)

    @property
    def clock_steps(self) -> int:
        return self._capture_time.steps

    def read(self, index: int) -> Frame:
        began_s = time.monotonic()
        while True:
            while self._ready:
                frame = self._accept(self._ready.popleft(), index)
                if frame is not None:
                    return frame
            self._check_patience(time.monotonic() - began_s)
            self._receive()

    def _check_patience(self, waited_s: float) -> None:
        """Ends the wait for a picture while packets go on arriving; where none arrive, FFmpeg ends it."""
        if self._closing.is_set():
            raise SourceError(f"{self._name} was closed while it was read")
        if self._started and waited_s > self._read_timeout_s:
            raise SourceError(f"{self._name} sent no whole picture for {self._read_timeout_s:g} s: it has stalled")
        longest_s = max(self._read_timeout_s, FIRST_FRAME_S)
        if waited_s > longest_s:
            raise SourceError(f"{self._name} sent no keyframe in {longest_s:g} s: have it send one every few seconds")

    def close(self) -> None:
        self._ready.clear()
        self._container.close()

    def _receive(self) -> None:
        packet = next(self._packets, None)
        # A connection that is cut looks like the end of a file: FFmpeg then asks the decoder to flush.
        if packet is None or packet.size == 0:
            raise SourceError(f"{self._name} closed the connection")
        self._received_ns = time.monotonic_ns()
        self._note_wall_clock(packet)
        if packet.is_corrupt:
            self._suspect = True
        if self._units is None:
            self._decode(packet)
            return
        for unit in self._units.add(bytes(packet), packet.pts):
            self._decode(self._as_packet(unit))
        if self._units.damaged != self._damaged:
            self._damaged, self._suspect = self._units.damaged, True

    def _as_packet(self, unit: AccessUnit) -> Packet[Any]:
        packet: Packet[Any] = Packet(unit.data)
        packet.pts, packet.time_base = unit.pts, self._time_base
        return packet

    def _decode(self, packet: Packet[Any]) -> None:
        try:
            self._ready.extend(self._context.decode(packet))
        except (av.InvalidDataError, av.BugError, av.UnknownError):
            self._suspect = True  # lost or damaged on the way: the pictures up to the next keyframe build on it

    def _note_wall_clock(self, packet: Packet[Any]) -> None:
        if packet.pts is None or not packet.has_sidedata("prft"):
            return
        reference = bytes(packet.get_sidedata("prft"))
        if len(reference) >= 8:
            if len(self._ntp_ns) > 100:
                self._ntp_ns.clear()
            self._ntp_ns[packet.pts] = struct.unpack_from("=q", reference)[0] * 1000

    def _accept(self, picture: VideoFrame, index: int) -> Frame | None:
        """The frame that a picture makes; None before the first keyframe, and for a picture older than the last one."""
        ntp_ns = None if picture.pts is None else self._ntp_ns.pop(picture.pts, None)
        missed = self._follow_time(picture)
        if missed is None:
            return None
        if picture.key_frame:
            self._started, self._suspect = True, False
        elif missed:
            self._suspect = True
        if picture.is_corrupt:
            self._suspect = True
        if not self._started:
            return None
        self._check_size(picture)
        image, bits = to_image(picture, self._camera)
        stamp = self._capture_time.stamp(self._last_device_ns, ntp_ns, self._received_ns)
        return Frame(
            camera=self._camera,
            image=image,
            captured_ns=stamp.captured_ns,
            index=index + missed,
            clock=stamp.clock,
            clock_error_ns=stamp.error_ns,
            arrived_ns=time.monotonic_ns(),
            bits=bits,
            suspect=self._suspect or picture.is_corrupt,
        )

    def _follow_time(self, picture: VideoFrame) -> int | None:
        """How many pictures were lost before this one; None if it is older than the last one."""
        period_ns = self.period_ns or FALLBACK_PERIOD_NS
        ticks = self._timeline.repair(picture.pts, round(Fraction(period_ns, 10**9) / self._time_base))
        device_ns = int(ticks * self._time_base * 10**9)
        last_ns = self._last_device_ns
        step_ns = period_ns if last_ns is None else device_ns - last_ns
        if -REORDER_NS < step_ns <= 0:
            return None
        self._last_device_ns = device_ns
        if last_ns is None or not 0 < step_ns < 10 * REORDER_NS:
            return 0  # the first picture, or a new time line
        missed = self._missed(step_ns)
        self._steps_ns.append(step_ns)
        if len(self._steps_ns) >= 5:
            self.period_ns = round(median(self._steps_ns))
        return missed

    def _missed(self, step_ns: int) -> int:
        # Only a steady stream shows a hole: one of variable rate would look full of them.
        period_ns = self.period_ns if len(self._steps_ns) >= 5 else min(self._steps_ns, default=self.period_ns)
        if not self._started or not period_ns:
            return 0
        regular = sum(abs(step - period_ns) < period_ns // 4 for step in self._steps_ns)
        return max(0, round(step_ns / period_ns) - 1) if regular >= 0.6 * len(self._steps_ns) else 0

    def _check_size(self, picture: VideoFrame) -> None:
        size = (picture.width, picture.height)
        if self._size is not None and size != self._size:
            raise SourceError(f"{self._name} changed its picture from {self._size} to {size}: it is opened again")
        self._size = size


@dataclass
class _Losses:
    """What of a recording could not be read, or not be read right."""

    frames: int = 0  # where the end is missing, as many as its announced duration holds
    damaged: int = 0  # that are handed out nevertheless
    cut_off: bool = False
    complete: bool = False  # something is lost, and the end was reached, so that it can be told

    @property
    def found(self) -> bool:
        return bool(self.frames or self.damaged) or self.cut_off


class _FileReader:
    """One video file: every frame, in order, with exact times.

    One that is cut off or damaged is read as far as possible, and what is lost is counted.
    """

    def __init__(
        self,
        path: Path,
        camera: Camera,
        config: StreamSource,
        closing: threading.Event,
        reopen: Callable[[], tuple[InputContainer, VideoStream]],
        losses: _Losses,
        pace: Pace,
    ) -> None:
        self._path, self._camera, self._config, self._closing, self._reopen = path, camera, config, closing, reopen
        self._losses, self._pace = losses, pace
        self._lap_ns = 0  # where this run through the file begins
        self._last_ns = -1
        self._frames = 0
        self._size: tuple[int, int] | None = None
        self._start()

    def _start(self) -> None:
        self._container, self._stream = self._reopen()
        self.period_ns = _nominal_period_ns(self._stream)
        self._first_pts: int | None = None
        self._pictures = self._decode()
        self._undecodable = 0
        self._lost = self._damaged = 0  # on this run through the file
        self._decoded = 0
        self._end_pts: int | None = None  # of the last picture
        self._broken_off = False
        self._suspect = False

    def read(self, index: int) -> Frame:
        picture = self._next_picture()
        missed, self._undecodable = self._undecodable, 0
        self._check_size(picture)
        relative_ns = self._relative_ns(picture)
        image, bits = to_image(picture, self._camera)
        captured_ns = relative_ns
        if self._config.realtime:
            captured_ns = self._pace.due_ns(relative_ns)
            self._pace.wait(captured_ns, self._closing)
        clock: ClockSource = "file"
        return Frame(
            camera=self._camera,
            image=image,
            captured_ns=captured_ns,
            index=index + missed,
            clock=clock,
            arrived_ns=time.monotonic_ns(),
            bits=bits,
            suspect=self._suspect,
        )

    def close(self) -> None:
        self._container.close()

    def _next_picture(self) -> VideoFrame:
        picture = next(self._pictures, None)
        if picture is None and self._frames:
            self._note_losses()
            if self._config.loop:
                self._container.close()
                ends_ns = self._last_ns + (self.period_ns or FALLBACK_PERIOD_NS)
                self._pace.begins_anew(ends_ns - self._lap_ns)
                self._lap_ns = ends_ns
                self._start()
                picture = next(self._pictures, None)
        if picture is not None:
            self._frames += 1
            return picture
        if not self._frames:
            raise SourceError(f"{self._path} holds not one whole frame: was its recording interrupted?")
        raise SourceEnded(f"all {self._frames} frames of {self._path.name} have been read")

    def _decode(self) -> Iterator[VideoFrame]:
        for packet in self._packets():
            try:
                pictures = packet.decode() if packet is not None else self._stream.codec_context.decode(None)
            except av.InvalidDataError:
                self._undecodable += 1
                self._lost += 1
                self._suspect = True
                continue
            except EOFError:
                return
            for picture in pictures:
                if picture.key_frame:
                    self._suspect = False
                if picture.is_corrupt:
                    self._suspect = True  # and so are the pictures up to the next keyframe, which build on it
                self._decoded += 1
                self._damaged += self._suspect
                self._end_pts = picture.pts
                yield picture

    def _packets(self) -> Iterator[Packet[Any] | None]:
        """All packets, then one (or None) that has the decoder hand out what it holds back."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError:  # a broken index, or a broken disk: what comes after it is out of reach
                if not self._decoded:
                    raise
                self._broken_off = True
                yield None
                return
            if packet is None:
                return
            yield packet

    def _note_losses(self) -> None:
        """At the end: what was damaged, and what should have followed if the file is shorter than it says."""
        try:
            cut_off = self._broken_off or is_cut_off(self._path)
        except OSError:
            cut_off = True
        lost = max(self._lost, self._missing_at_the_end() if cut_off else 0)
        self._losses.frames = max(self._losses.frames, lost)  # a recording that loops loses the same ones each time
        self._losses.damaged = max(self._losses.damaged, self._damaged)
        self._losses.cut_off |= cut_off
        self._losses.complete = self._losses.found

    def _missing_at_the_end(self) -> int:
        stream, duration_s = self._stream, self._announced_s()
        if self._container.format.name == "avi" and stream.frames:  # FFmpeg corrects its duration by what is there
            return max(0, stream.frames - self._decoded)
        if not (duration_s and self.period_ns and self._end_pts is not None and stream.time_base):
            return 0
        missing_s = duration_s - float(self._end_pts * stream.time_base) - self.period_ns / 1e9
        return max(0, round(missing_s * 1e9 / self.period_ns))

    def _announced_s(self) -> float:
        """When the recording ends by its header, on the scale of its time stamps; 0 where that tells nothing."""
        stream = self._stream
        if stream.duration and stream.time_base:
            return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
        hours, minutes, seconds = (["0", "0", *stream.metadata.get("DURATION", "0").split(":")])[-3:]
        try:
            tagged_s = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        except ValueError:
            tagged_s = 0.0
        return tagged_s or (self._container.duration or 0) / av.time_base

    def _relative_ns(self, picture: VideoFrame) -> int:
        """Nanoseconds since the recording's first frame. Always later than the frame before's."""
        period_ns = self.period_ns or FALLBACK_PERIOD_NS
        if picture.pts is None or picture.time_base is None:
            relative_ns = self._last_ns + period_ns if self._last_ns >= 0 else 0
        else:
            if self._first_pts is None:
                self._first_pts = picture.pts
            relative_ns = self._lap_ns + round((picture.pts - self._first_pts) * picture.time_base * 10**9)
        if relative_ns <= self._last_ns:
            relative_ns = self._last_ns + period_ns
        self._last_ns = relative_ns
        return relative_ns

    def _check_size(self, picture: VideoFrame) -> None:
        size = (picture.width, picture.height)
        if self._size is not None and size != self._size:
            raise SourceError(f"{self._path} changes its picture from {self._size} to {size}: split it into two files")
        self._size = size


def _nominal_period_ns(stream: VideoStream) -> int:
    """From the stream's own rate, 0 where it tells none. A live stream's is corrected by what arrives."""
    rate = stream.average_rate or stream.guessed_rate
    return round(1_000_000_000 / rate) if rate and 1 <= rate <= 1000 else 0
