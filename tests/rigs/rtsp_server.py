"""A pair of RTSP cameras whose pictures carry their own capture time.

Two programs in one file. Run by the system's Python (the one that has `gi`), it serves `/ir` and `/vis`; imported by a
test, it starts, stops and kills that program and reads the clock back out of a picture.

The clock is a row of 40 cells along the top edge, each a fortieth of the width and 16 pixels high, so that it survives
any encoder: four guard cells (white, black, white, black), 32 bits of CLOCK_MONOTONIC in units of 0.1 ms, most
significant first, and a four-bit check sum. Both processes of one machine share that clock, so that picture minus now
is the true latency, and infrared minus visible the true skew.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

CELLS = 40
CLOCK_ROWS = 16
TICK_NS = 100_000
GUARD = (1, 0, 1, 0)
SYSTEM_PYTHON = "/usr/bin/python3"
INSTALL_LINE = (
    "apt-get install gstreamer1.0-rtsp gir1.2-gst-rtsp-server-1.0 gir1.2-gst-plugins-base-1.0 python3-gi "
    "gstreamer1.0-plugins-{base,good,bad,ugly} gstreamer1.0-libav"
)


# The clock in the picture


def clock_cells(monotonic_ns: int) -> list[int]:
    """The 40 cells (0 or 1) that show a monotonic time."""
    ticks = (monotonic_ns // TICK_NS) & 0xFFFFFFFF
    check = sum((ticks >> shift) & 15 for shift in range(0, 32, 4)) & 15
    bits = [(ticks >> shift) & 1 for shift in range(31, -1, -1)] + [(check >> shift) & 1 for shift in range(3, -1, -1)]
    return [*GUARD, *bits]


def read_clock(image: Any, near_ns: int | None = None) -> int | None:
    """The monotonic time (ns) that a picture shows, or None where its clock is not readable.

    Args:
        image: uint8 (H, W) or (H, W, 3), at least 16 pixels high, as decoded.
        near_ns: a monotonic time within 59 hours of it, now by default: 32 bits alone repeat every 119 hours.
    """
    cell = image.shape[1] // CELLS
    rows = image[4 : CLOCK_ROWS - 4]
    grey = rows if rows.ndim == 2 else rows.mean(axis=2)
    levels = [grey[:, k * cell + cell // 4 : (k + 1) * cell - cell // 4].mean() for k in range(CELLS)]
    bits = [int(level > 128) for level in levels]
    if tuple(bits[:4]) != GUARD:
        return None
    ticks = int("".join(map(str, bits[4:36])), 2)
    if clock_cells(ticks * TICK_NS) != bits:
        return None
    near = (time.monotonic_ns() if near_ns is None else near_ns) // TICK_NS
    return (near + (ticks - near + 0x80000000) % 0x100000000 - 0x80000000) * TICK_NS


# For the tests


@lru_cache(maxsize=1)
def missing_gst() -> str | None:
    """Why no RTSP server can be started here, with the line that mends it; None where one can."""
    probe = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import Gst, GstRtspServer\n"
    probe += "Gst.init(None); assert all(Gst.ElementFactory.find(n) for n in ('x264enc', 'rtph264pay', 'appsrc'))"
    if shutil.which(SYSTEM_PYTHON) is None:
        return f"needs {SYSTEM_PYTHON} with GStreamer: {INSTALL_LINE}"
    found = subprocess.run([SYSTEM_PYTHON, "-c", probe], capture_output=True, timeout=300)  # a first start is slow
    return None if found.returncode == 0 else f"needs the GStreamer RTSP server: {INSTALL_LINE}"


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class RtspServer:
    """The server as a child process. `url("ir")` and `url("vis")` are its two cameras.

    Keyword arguments of `options` become options of the program: `width=320`, `fps=25`, `user="name:password"`.
    """

    port: int = 0  # 0: a free one, known once it has started
    options: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None

    def url(self, mount: str, credentials: str = "") -> str:
        prefix = f"{credentials}@" if credentials else ""
        return f"rtsp://{prefix}127.0.0.1:{self.port}/{mount}"

    def start(self, timeout_s: float = 60.0) -> RtspServer:
        """Starts the server and waits until it listens."""
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in self.options.items()]
        command = [SYSTEM_PYTHON, os.path.abspath(__file__), f"--port={self.port}", "--until-stdin-closes", *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        deadline = time.monotonic() + timeout_s
        assert self.process.stdout is not None
        # The program prints one line as soon as it listens, or ends: readline() cannot wait for longer than its start.
        said, *port = self.process.stdout.readline().split() or [""]
        if said != "READY" or time.monotonic() > deadline:
            self.kill()
            raise RuntimeError(f"the RTSP server on port {self.port} did not start: is the port taken?")
        self.port = int(port[0])
        return self

    def freeze(self) -> None:
        """Stops the cameras where they are, with every connection left open."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Pulls the plug."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()
            self.process = None

    def restart(self) -> None:
        """Kills the cameras and brings them back on the same port."""
        self.kill()
        self.start()

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)


@contextlib.contextmanager
def rtsp_server(port: int = 0, **options: Any) -> Iterator[RtspServer]:
    """Two running RTSP cameras, stopped at the end of the block."""
    server = RtspServer(port, options)
    server.start()
    try:
        yield server
    finally:
        server.kill()


# The program


class Picture:
    """I420 pictures whose texture scrolls down by two rows a frame: one memory copy each, hardly any CPU time."""

    def __init__(self, width: int, height: int, mount: str) -> None:
        self.width, self.height = width, height
        self.cell = width // CELLS
        rows = [self._row(y, mount) for y in range(2 * height)]
        self.texture = b"".join(rows)
        chroma = width * height // 4
        blue, red = (128, 128) if mount == "ir" else (110, 150)
        self.chroma = bytes([blue]) * chroma + bytes([red]) * chroma

    def _row(self, y: int, mount: str) -> bytes:
        step, base = (32, 40) if mount == "ir" else (20, 60)
        y %= self.height
        return bytes(base + ((x // step + y // step) % 2) * 70 + (x * 60) // self.width for x in range(self.width))

    def draw(self, index: int, now_ns: int) -> bytes:
        start = ((2 * index) % self.height) * self.width
        row = b"".join(bytes([235 if bit else 16]) * self.cell for bit in clock_cells(now_ns))
        row += bytes([16]) * (self.width - len(row))
        luma = self.texture[start + CLOCK_ROWS * self.width : start + self.width * self.height]
        return row * CLOCK_ROWS + luma + self.chroma


def feed(media: Any, picture: Picture, fps: int, phase_ms: float, Gst: Any) -> None:
    """Starts the camera of one mount: a thread that pushes a picture at every period of CLOCK_MONOTONIC."""
    camera = media.get_element().get_child_by_name("camera")
    stopped = threading.Event()
    media.connect("unprepared", lambda *_: stopped.set())
    period_ns = 1_000_000_000 // fps
    phase_ns = int(phase_ms * 1e6)

    def run() -> None:
        due = (time.monotonic_ns() - phase_ns) // period_ns + 1
        while not stopped.wait(max(0.0, (due * period_ns + phase_ns - time.monotonic_ns()) / 1e9)):
            buffer = Gst.Buffer.new_wrapped(picture.draw(due, time.monotonic_ns()))
            if camera.emit("push-buffer", buffer) != Gst.FlowReturn.OK:
                break
            due = max(due + 1, (time.monotonic_ns() - phase_ns) // period_ns)

    threading.Thread(target=run, daemon=True).start()


def protect(server: Any, factories: list[Any], user: str, GstRtspServer: Any) -> None:
    """Asks for `name:password` on every mount (basic authentication)."""
    name, _, password = user.partition(":")
    token = GstRtspServer.RTSPToken()
    token.set_string("media.factory.role", "viewer")
    auth = GstRtspServer.RTSPAuth()
    auth.add_basic(GstRtspServer.RTSPAuth.make_basic(name, password), token)
    server.set_auth(auth)
    for factory in factories:
        permissions = GstRtspServer.RTSPPermissions()
        permissions.add_role("viewer")
        for right in ("access", "construct"):
            permissions.add_permission_for_role("viewer", f"media.factory.{right}", True)
        factory.set_permissions(permissions)


def pipeline(options: argparse.Namespace) -> str:
    """The GStreamer launch line of one mount."""
    size = f"width={options.width},height={options.height},framerate={options.fps}/1"
    encoder = {
        "h264": f"x264enc tune=zerolatency speed-preset=ultrafast key-int-max={options.gop or options.fps} "
        f"bitrate={options.kbps} threads=1 sliced-threads=false ! rtph264pay config-interval=-1",
        "h264-slices": f"x264enc tune=zerolatency speed-preset=ultrafast key-int-max={options.gop or options.fps} "
        f"bitrate={options.kbps} option-string=slices=4 threads=1 sliced-threads=false ! rtph264pay config-interval=-1",
        "h265": f"x265enc tune=zerolatency speed-preset=ultrafast key-int-max={options.gop or options.fps} "
        f"bitrate={options.kbps} ! rtph265pay config-interval=-1",
        "jpeg": "jpegenc ! rtpjpegpay",
    }[options.codec]
    end = f" ! identity drop-probability={options.loss} name=pay0" if options.loss else " name=pay0"
    return (
        "( appsrc name=camera is-live=true format=time do-timestamp=true block=false max-buffers=4 leaky-type=2 "
        f"caps=video/x-raw,format=I420,{size} ! {encoder}{end} )"
    )


def serve(options: argparse.Namespace) -> None:
    """Serves until killed. Prints READY and its port when it listens."""
    import gi  # type: ignore[import-not-found]

    gi.require_version("Gst", "1.0")
    gi.require_version("GstRtspServer", "1.0")
    from gi.repository import GLib, Gst, GstRtspServer  # type: ignore[import-not-found]

    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(str(options.port))
    factories = []
    for mount in ("ir", "vis"):
        picture = Picture(options.width, options.height, mount)
        phase_ms = options.infrared_phase_ms if mount == "ir" else 0.0
        factory = GstRtspServer.RTSPMediaFactory()
        factory.set_launch(pipeline(options))
        factory.set_shared(True)
        factory.set_latency(0)
        # The arguments are bound now: the callback runs later, when the loop is over.
        factory.connect("media-configure", lambda _f, media, p=picture, m=phase_ms: feed(media, p, options.fps, m, Gst))
        server.get_mount_points().add_factory(f"/{mount}", factory)
        factories.append(factory)
    if options.user:
        protect(server, factories, options.user, GstRtspServer)
    if not server.attach(None):
        sys.exit(f"port {options.port} is taken")
    if options.until_stdin_closes:
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    print("READY", server.get_bound_port(), flush=True)
    GLib.MainLoop().run()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=8554)
    parser.add_argument("--width", type=int, default=640, help="a multiple of 40")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--fps", type=int, default=25)
    parser.add_argument("--gop", type=int, default=0, help="frames from keyframe to keyframe; 0: one second")
    parser.add_argument("--kbps", type=int, default=2000)
    parser.add_argument("--codec", choices=("h264", "h264-slices", "h265", "jpeg"), default="h264")
    parser.add_argument("--loss", type=float, default=0.0, help="share of the RTP packets that is lost")
    parser.add_argument("--user", default="", help="name:password that the cameras ask for")
    parser.add_argument("--until-stdin-closes", action="store_true", help="end with the process that started this one")
    parser.add_argument("--infrared-phase-ms", type=float, default=0.0, help="infrared exposes this much later")
    return parser.parse_args()


if __name__ == "__main__":
    serve(parse_options())
