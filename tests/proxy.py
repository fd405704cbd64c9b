"""A TCP proxy that misbehaves on demand: delays, cuts, stalls half-open, drops and duplicates.

It stands between a client and a server on this machine, and knows of what passes only where a
WebSocket frame ends, so that a frame can be sent twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Literal
from urllib.parse import urlsplit

Direction = Literal["up", "down"]
"""`up` is from the client to the server, `down` is back."""


class Proxy:
    """A listener on a free port of this machine, in front of one server.

    Attributes:
        url: where clients connect.
        delay: seconds that each chunk is held back, asked for each; order is kept.
        drop: whether a new connection is closed at once, asked for each.
        duplicate: whether a WebSocket frame from the server is sent twice, asked for each.
        accepted_at: the monotonic time of each connection that came, dropped ones too.
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._scheme = parts.scheme
        self._upstream = (parts.hostname, parts.port)
        self.url = ""
        self.delay: Callable[[], float] = lambda: 0.0
        self.drop: Callable[[], bool] = lambda: False
        self.duplicate: Callable[[], bool] = lambda: False
        self.accepted_at: list[float] = []
        self._flowing: dict[Direction, asyncio.Event] = {
            "up": asyncio.Event(),
            "down": asyncio.Event(),
        }
        for event in self._flowing.values():
            event.set()
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"{self._scheme}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Cut everything and listen no more."""
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in list(self._links):
            task.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    @property
    def links(self) -> int:
        """How many connections are open through it."""
        return len(self._writers) // 2

    def cut(self) -> None:
        """Abort every connection, as a lost network does."""
        for writer in list(self._writers):
            writer.transport.abort()

    def stall(self, *directions: Direction) -> None:
        """Let nothing pass any more that way, and close nothing: half-open connections."""
        for direction in directions or ("up", "down"):
            self._flowing[direction].clear()

    def flow(self) -> None:
        """Let what was stalled pass again."""
        for event in self._flowing.values():
            event.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted_at.append(time.monotonic())
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        self._writers.add(writer)
        up_writer: asyncio.StreamWriter | None = None
        try:
            if self.drop():
                return
            up_reader, up_writer = await asyncio.open_connection(*self._upstream)
            self._writers.add(up_writer)
            pumps = [
                asyncio.create_task(self._pump(reader, up_writer, "up")),
                asyncio.create_task(self._pump(up_reader, writer, "down")),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # the server is away: the client sees its connection end
        finally:
            for each in (writer, up_writer):
                if each is not None:
                    self._writers.discard(each)
                    each.transport.abort() if self.drop() else each.close()
            self._links.discard(task)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction
    ) -> None:
        """Pass on what comes, in order, each chunk after its delay."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        repeat = _Repeater() if direction == "down" else None

        async def send() -> None:
            while True:
                due, chunk = await queue.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                await self._flowing[direction].wait()
                if not chunk:
                    return
                writer.write(chunk)
                await writer.drain()

        sender = asyncio.create_task(send())
        try:
            due = 0.0
            chunk = b"-"
            while chunk:
                chunk = await reader.read(65536)
                if repeat is not None:
                    chunk = repeat.take(chunk, self.duplicate) if chunk else chunk
                    if not chunk and not reader.at_eof():
                        chunk = b"-"  # half a frame so far; nothing to pass on yet
                        continue
                due = max(due, loop.time() + self.delay())
                queue.put_nowait((due, chunk))
            await sender
        except OSError:
            return
        finally:
            sender.cancel()


class _Repeater:
    """Finds where the frames of a WebSocket end, and sends some of them twice.

    Bytes of plain HTTP pass as they are; so do frames of which only a part came so far, later.
    """

    def __init__(self) -> None:
        self._head = b""
        self._is_websocket: bool | None = None
        self._buffer = b""

    def take(self, chunk: bytes, duplicate: Callable[[], bool]) -> bytes:
        if self._is_websocket is None:
            self._head += chunk
            end = self._head.find(b"\r\n\r\n")
            if end < 0 and len(self._head) < 65536:
                return chunk
            self._is_websocket = b" 101 " in self._head[:20]
            kept = len(chunk) - (len(self._head) - end - 4) if self._is_websocket else len(chunk)
            passed, chunk = chunk[:kept], chunk[kept:]
        else:
            passed = b""
        if not self._is_websocket:
            return passed + chunk
        self._buffer += chunk
        while (size := self._frame_size()) is not None and len(self._buffer) >= size:
            frame, self._buffer = self._buffer[:size], self._buffer[size:]
            twice = frame[0] == 0x81 and duplicate()  # a whole text message
            passed += frame * 2 if twice else frame
        return passed

    def _frame_size(self) -> int | None:
        data = self._buffer
        if len(data) < 2:
            return None
        size = data[1] & 0x7F
        if size < 126:
            return 2 + size
        width = 2 if size == 126 else 8
        if len(data) < 2 + width:
            return None
        return 2 + width + int.from_bytes(data[2 : 2 + width], "big")


@contextlib.asynccontextmanager
async def proxy(upstream: str) -> AsyncIterator[Proxy]:
    """Run a proxy in front of `upstream` for as long as the block lasts."""
    each = Proxy(upstream)
    await each.start()
    try:
        yield each
    finally:
        await each.stop()
