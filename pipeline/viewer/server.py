"""The viewer's server: JPEG messages of a running rig in, one web page with live pictures out.

It is one more subscriber, in this process or another, and asks for pictures only while somebody looks. Each browser
acknowledges what it has drawn and has at most two pictures of a stream under way; what is newer replaces what waits.
So a slow line shows fewer pictures, not older ones, and costs the server no memory.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import logging
import os
import signal
import struct
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import zmq
import zmq.asyncio
from aiohttp import WSCloseCode, WSMsgType, web
from zmq.utils.monitor import recv_monitor_message

from pipeline import messages
from pipeline.client import WATCHED, ClientError, Handshakes, connect, wanted_prefix

log = logging.getLogger(__name__)

PICTURES = ("fused", "ir", "vis")
UNDER_WAY = 2  # pictures of one stream that a browser has not acknowledged
MAX_BROWSERS = 32
START_S = 30.0  # to open the port
LOST_S = 5.0  # without any message for so long, another rig may have taken the endpoint
HERE = Path(__file__).parent
PAGES = {"/": ("index.html", "text/html"), "/viewer.js": ("viewer.js", "text/javascript")}
PAGES |= {"/viewer.css": ("viewer.css", "text/css")}
ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">
<circle cx="12" cy="16" r="9" fill="#ff8a4c"/><circle cx="20" cy="16" r="9" fill="#4cb8ff" fill-opacity=".8"/>
<path d="M16 7.9a9 9 0 0 1 0 16.2 9 9 0 0 1 0-16.2z" fill="#f4f7fb"/></svg>"""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class ViewerError(Exception):
    """A viewer that cannot start: says what, why and what to do."""


class Browser:
    """One connected page: what waits for it, and what is under way to it."""

    def __init__(self, socket: web.WebSocketResponse) -> None:
        self._socket = socket
        self._waiting: dict[str, bytes] = {}
        self._texts: asyncio.Queue[str] = asyncio.Queue(maxsize=32)
        self._under_way: Counter[str] = Counter()
        self._changed = asyncio.Event()
        self.sent = 0
        self.replaced = 0

    def offer(self, stream: str, packet: bytes) -> None:
        """Puts a picture in line; it replaces one of its stream that still waits."""
        self.replaced += stream in self._waiting
        self._waiting[stream] = packet
        self._changed.set()

    def tell(self, fact: dict[str, Any]) -> None:
        """Puts a small text in line; a page that does not read loses it."""
        if not self._texts.full():
            self._texts.put_nowait(json.dumps(fact, default=str))
            self._changed.set()

    def acknowledge(self, stream: str) -> None:
        self._under_way[stream] = max(0, self._under_way[stream] - 1)
        self._changed.set()

    async def send(self) -> None:
        """Sends what is in line, until cancelled or disconnected."""
        while not self._socket.closed:
            await self._changed.wait()
            self._changed.clear()
            while not self._texts.empty():
                await self._socket.send_str(self._texts.get_nowait())
            for stream in list(self._waiting):
                if self._under_way[stream] < UNDER_WAY:
                    self._under_way[stream] += 1
                    self.sent += 1
                    await self._socket.send_bytes(self._waiting.pop(stream))


class Viewer:
    """Serves the page from a thread of its own, between `start` and `stop`."""

    def __init__(
        self,
        endpoint: str,
        host: str = "127.0.0.1",
        port: int = 8870,
        *,
        rig: str | None = None,
        server_key: str | Path | None = None,
        secret_key: str | Path | None = None,
    ) -> None:
        """Nothing is opened before `start`.

        Args:
            endpoint: where the rig publishes.
            host: the address to serve on. Anything but a loopback address shows the video to the whole network.
            port: 0 takes a free one; see `port` after `start`.
            rig: None shows the first rig that is heard.
            server_key, secret_key: as of `pipeline.client.Client`.
        """
        self.endpoint = endpoint
        self.host = host
        self.port = port
        self._given_rig = rig
        self._rig = rig
        self._server_key = server_key
        self._secret_key = secret_key
        self._browsers: set[Browser] = set()
        self._prefixes: set[bytes] = set()
        self._received: Counter[str] = Counter()
        self._errors = 0
        self._last_message = 0.0  # time.monotonic() of the newest message of any kind
        self._gone: Counter[str] = Counter()  # what browsers that have gone were sent, for counters that never fall
        self._handshakes = Handshakes(endpoint)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._error: Exception | None = None
        self._zmq: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._stop_asked: asyncio.Event | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/"

    def __enter__(self) -> Viewer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Opens the port and returns when the page can be loaded.

        Raises:
            ViewerError: the port is in use, or the address is not this machine's.
            ClientError: an endpoint or key that cannot be used.
        """
        if not 0 <= self.port <= 65535:
            raise ViewerError(
                f"the viewer cannot have port {self.port}: choose one from 1 to 65535, or 0 for a free one"
            )
        if not _is_loopback(self.host):
            log.warning("the viewer on %s shows the video to everybody who can reach it", self.host)
        self._thread = threading.Thread(target=self._run, name="viewer", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_S):
            self.stop()
            raise ViewerError(f"the viewer did not start within {START_S:g} s: is this machine overloaded?")
        if self._error is not None:
            self._thread.join(timeout=2)
            raise self._error

    def stop(self) -> None:
        """Closes the port and all connections. May be called twice."""
        loop, stop_asked = self._loop, self._stop_asked
        if loop is not None and stop_asked is not None:
            with suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(stop_asked.set)
        if self._thread is not None:
            self._thread.join(timeout=5)

    # -- the viewer's thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except (ViewerError, ClientError) as error:
            self._error = error
        except Exception as error:
            log.exception("the viewer ended")
            self._error = ViewerError(f"the viewer ended: {error}")
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._stop_asked = asyncio.get_running_loop(), asyncio.Event()
        self._zmq = zmq.asyncio.Context()
        self._socket = cast(zmq.asyncio.Socket, connect(self._zmq, self.endpoint, self._server_key, self._secret_key))
        monitor = self._socket.get_monitor_socket(WATCHED)
        runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=0.5, handle_signals=False)
        tasks: list[asyncio.Task[None]] = []
        try:
            await runner.setup()
            await self._listen(runner)
            self._want()
            tasks = [asyncio.create_task(work) for work in (self._receive(), self._watch(), self._explain(monitor))]
            self._ready.set()
            await self._stop_asked.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await runner.cleanup()
            self._socket.disable_monitor()
            monitor.close(linger=0)
            self._socket.close(linger=0)
            self._zmq.term()

    async def _listen(self, runner: web.AppRunner) -> None:
        site = web.TCPSite(runner, self.host, self.port)
        try:
            await site.start()
        except UnicodeError:
            raise ViewerError(f"viewer.host {self.host} is no address: choose one of this machine") from None
        except OSError as error:
            # asyncio's own text repeats the address.
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
            mend = "choose another viewer.host: an address of this machine"
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                mend = "choose another viewer.port, or stop what uses this one"
            raise ViewerError(f"cannot serve the viewer on {self.host}:{self.port}: {reason}: {mend}") from None
        self.port = int(runner.addresses[0][1])

    def _application(self) -> web.Application:
        application = web.Application(middlewares=[_guard(self.host)])
        for path in PAGES:
            application.router.add_get(path, _page)
        application.router.add_get("/icon.svg", _icon)
        application.router.add_get("/ws", self._websocket)
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/metrics", self._metrics)
        application.on_shutdown.append(self._disconnect)
        return application

    async def _disconnect(self, _: web.Application) -> None:
        for browser in list(self._browsers):
            await browser._socket.close(code=WSCloseCode.GOING_AWAY, message=b"the viewer stops")

    # -- from ZeroMQ ------------------------------------------------------------------------------------------

    def _want(self) -> None:
        """Subscribes to what is looked at now: pictures only while a browser is here."""
        assert self._socket is not None
        wanted = {wanted_prefix(self._rig, "health", "msg")}
        if self._rig is not None:
            wanted.add(wanted_prefix(self._rig, "event", "msg"))
            if self._browsers:
                wanted |= {wanted_prefix(self._rig, stream, "jpeg") for stream in PICTURES}
        for prefix in wanted - self._prefixes:
            self._socket.setsockopt(zmq.SUBSCRIBE, prefix)
        for prefix in self._prefixes - wanted:
            self._socket.setsockopt(zmq.UNSUBSCRIBE, prefix)
        self._prefixes = wanted

    async def _receive(self) -> None:
        assert self._socket is not None
        while True:
            part = await self._socket.recv()
            try:
                message = messages.decode(part)
                self._take(message)
            except (messages.MessageError, ClientError, ValueError, TypeError):
                self._errors += 1  # whatever a publisher sends: the next message may be better

    def _take(self, message: messages.Message) -> None:
        header = message.header
        if self._rig is None:
            self._rig = header.rig
            self._want()
        if header.rig != self._rig:
            return
        self._last_message = time.monotonic()
        self._received[header.stream] += 1
        if header.stream in PICTURES and header.codec == "jpeg":
            packet = make_packet(message, time.time_ns())
            for browser in self._browsers:
                browser.offer(header.stream, packet)
        elif header.stream in ("health", "event"):
            for browser in self._browsers:
                browser.tell({"type": header.stream, "utc_ms": header.published_ns / 1e6, **message.data()})

    async def _watch(self) -> None:
        """Tells the pages how the publisher is, and looks for another rig when this one stays away."""
        while True:
            await asyncio.sleep(0.5)
            silent_s = time.monotonic() - self._last_message
            if self._given_rig is None and self._rig is not None and silent_s > LOST_S:
                self._rig = None
                self._want()
            state = {"rig": self._rig, "publisher": silent_s < 2.5 and self._rig is not None}
            for browser in self._browsers:
                browser.tell({"type": "state", **state, "problem": self._handshakes.refusal})

    async def _explain(self, monitor: zmq.asyncio.Socket) -> None:
        """Logs why the publisher does not take our keys, once; the pages and /healthz tell it as long as it lasts."""
        while True:
            before = self._handshakes.refusal
            self._handshakes.note((await recv_monitor_message(monitor))["event"])
            if self._handshakes.refusal not in (None, before):
                log.warning("nothing can be shown: %s", self._handshakes.refusal)

    # -- to browsers ------------------------------------------------------------------------------------------

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        _check_origin(request)
        if len(self._browsers) >= MAX_BROWSERS:
            raise web.HTTPServiceUnavailable(text=f"{MAX_BROWSERS} pages are connected already")
        socket = web.WebSocketResponse(heartbeat=10, max_msg_size=4096, compress=False)
        await socket.prepare(request)
        browser = Browser(socket)
        self._browsers.add(browser)
        self._want()
        sender = asyncio.create_task(browser.send())
        try:
            async for incoming in socket:
                if incoming.type != WSMsgType.TEXT or not _answer(browser, incoming.data):
                    break
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
            self._browsers.discard(browser)
            self._gone.update(sent=browser.sent, replaced=browser.replaced)
            if self._socket is not None and not self._socket.closed:
                self._want()
        return socket

    async def _healthz(self, _: web.Request) -> web.Response:
        """200 while the publisher is heard, else 503."""
        silent_s = time.monotonic() - self._last_message
        heard = self._last_message > 0 and silent_s < 2.5
        return web.json_response(
            {
                "status": "ok" if heard else "no_signal",
                "rig": self._rig,
                "silent_s": round(silent_s, 3) if self._last_message else None,
                "problem": self._handshakes.refusal,
                "browsers": len(self._browsers),
                "messages": dict(self._received),
                "errors": self._errors,
            },
            status=200 if heard else 503,
        )

    async def _metrics(self, _: web.Request) -> web.Response:
        sent = self._gone["sent"] + sum(browser.sent for browser in self._browsers)
        replaced = self._gone["replaced"] + sum(browser.replaced for browser in self._browsers)
        lines = [
            "# TYPE dspfusion_viewer_browsers gauge",
            f"dspfusion_viewer_browsers {len(self._browsers)}",
            "# TYPE dspfusion_viewer_messages_total counter",
            *(f'dspfusion_viewer_messages_total{{stream="{name}"}} {n}' for name, n in self._received.items()),
            "# TYPE dspfusion_viewer_pictures_sent_total counter",
            f"dspfusion_viewer_pictures_sent_total {sent}",
            "# TYPE dspfusion_viewer_pictures_replaced_total counter",
            f"dspfusion_viewer_pictures_replaced_total {replaced}",
        ]
        return web.Response(text="\n".join(lines) + "\n", content_type="text/plain")


def run(
    endpoint: str,
    host: str = "127.0.0.1",
    port: int = 8870,
    *,
    rig: str | None = None,
    server_key: str | Path | None = None,
    secret_key: str | Path | None = None,
    duration_s: float | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serves the page until SIGINT or SIGTERM, or for `duration_s`: what `dspfusion view` does.

    Args:
        on_ready: called with the page's address once it can be loaded.

    Raises:
        ViewerError, ClientError: see `Viewer.start`.
    """
    ended = threading.Event()
    with Viewer(endpoint, host, port, rig=rig, server_key=server_key, secret_key=secret_key) as viewer:
        before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, lambda *_: ended.set())
        try:
            if on_ready is not None:
                on_ready(viewer.url)
            ended.wait(duration_s)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def make_packet(message: messages.Message, now_utc_ns: int) -> bytes:
    """One picture for the page: u32 length of the JSON (little endian), the JSON, the JPEG."""
    header = message.header
    age_ms = (now_utc_ns - header.published_ns) / 1e6 + header.age_us / 1e3
    clocks = {"infrared": header.infrared_clock, "visible": header.visible_clock}
    facts = {
        "stream": header.stream,
        "rig": header.rig,
        "session": f"{header.session:x}",
        "sequence": header.sequence,
        "width": header.width,
        "height": header.height,
        "mode": header.mode if header.mode in messages.MODES else "stub",
        "flags": header.flag_names,
        # When it was captured, on this machine's clock; for a recording, when it would have been.
        "captured_ms": now_utc_ns / 1e6 - age_ms,
        "publish_ms": header.age_us / 1e3,
        "ages_ms": {
            "infrared": None if header.infrared_age_us is None else header.infrared_age_us / 1e3,
            "visible": None if header.visible_age_us is None else header.visible_age_us / 1e3,
        },
        "skew_ms": None if header.skew_us is None else header.skew_us / 1e3,
        "clocks": {
            name: None if clock is None else {"source": clock.source, "error_ms": clock.error_us / 1e3}
            for name, clock in clocks.items()
        },
        "stages_ms": {name: value / 1e3 for name, value in header.latency_us.items()},
        "degradation": header.degradation,
        "degradation_strength": header.degradation_strength,
        "calibrated": header.calibrated,
        "engine": [part for part in (header.model, header.runtime, header.precision) if part],
        "drops": header.drops,
    }
    text = json.dumps(facts).encode()
    return b"".join((struct.pack("<I", len(text)), text, message.payload))


def _answer(browser: Browser, text: str) -> bool:
    """Handles what a page says. False: nonsense, hang up."""
    try:
        said = json.loads(text)
        if "ack" in said and said["ack"] in PICTURES:
            browser.acknowledge(said["ack"])
        elif "ping" in said:
            browser.tell({"type": "pong", "ping": float(said["ping"]), "utc_ms": time.time_ns() / 1e6})
        else:
            return False
    except (ValueError, TypeError, RecursionError):
        return False
    return True


async def _page(request: web.Request) -> web.Response:
    name, kind = PAGES[request.path]
    return web.Response(body=(HERE / name).read_bytes(), content_type=kind, charset="utf-8")


async def _icon(_: web.Request) -> web.Response:
    return web.Response(text=ICON, content_type="image/svg+xml")


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _guard(host: str) -> Any:
    """Refuses requests under a foreign host name: a hostile page could have its name resolve to us (DNS rebinding)."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not _host_allowed(request.headers.get("Host", ""), host):
            raise web.HTTPForbidden(text="this host name is not the viewer's: open it by its address")
        response = await handler(request)
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    return guard


def _host_allowed(header: str, host: str) -> bool:
    """An address, localhost, or the name that we serve under. An address cannot be rebound."""
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    return name in ("localhost", host.lower()) or _is_address(name)


def _check_origin(request: web.Request) -> None:
    """A browser says which page opens the connection: it must be ours."""
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("Host"):
        raise web.HTTPForbidden(text="only the viewer's own page may connect")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
