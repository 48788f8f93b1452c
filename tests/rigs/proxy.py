"""A TCP proxy between a camera and its reader that can freeze, cut and refuse: the network's faults on demand."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

CHUNK = 1 << 16


class FaultyProxy:
    """Forwards a local port to another one, in a thread of its own.

    `freeze` holds all data back and leaves every connection open, `cut` closes them, `refuse` closes each new
    one at once, `delay_s` is added on the way to the reader. `port` is the port to connect to.
    """

    def __init__(self, target_port: int, delay_s: float = 0.0) -> None:
        self.target_port = target_port
        self.delay_s = delay_s
        self.port = 0
        self.connections = 0  # accepted so far
        self.refusing = False
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> FaultyProxy:
        self._thread.start()
        if not self._listening.wait(10):
            raise RuntimeError("the proxy did not start")
        return self

    def freeze(self) -> None:
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def thaw(self) -> None:
        self._loop.call_soon_threadsafe(self._flowing.set)

    def cut(self) -> None:
        self._loop.call_soon_threadsafe(self._close_all)

    def refuse(self, refusing: bool = True) -> None:
        self.refusing = refusing

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        self._loop.run_forever()
        server.close()
        self._close_all()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.refusing:
            writer.close()
            return
        try:
            camera_reader, camera_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, camera_writer}
        await asyncio.gather(
            self._forward(reader, camera_writer, 0.0),
            self._forward(camera_reader, writer, self.delay_s),
            return_exceptions=True,
        )
        self._writers -= {writer, camera_writer}

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
        with contextlib.suppress(ConnectionError, OSError):
            while data := await reader.read(CHUNK):
                await self._flowing.wait()
                if delay_s:
                    await asyncio.sleep(delay_s)
                writer.write(data)
                await writer.drain()
        writer.close()

    def _close_all(self) -> None:
        for writer in list(self._writers):
            writer.close()


@contextlib.contextmanager
def faulty_proxy(target_port: int, delay_s: float = 0.0) -> Iterator[FaultyProxy]:
    """A running proxy in front of a port, stopped at the end of the block."""
    proxy = FaultyProxy(target_port, delay_s).start()
    try:
        yield proxy
    finally:
        proxy.stop()
