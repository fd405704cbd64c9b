"""A TCP proxy that does what networks do: delays, cuts, stalls half-open, drops and doubles.

It also reads the WebSocket frames that pass, so that the history of any client can be judged, the
SDK's too. Knows TCP and RFC 6455's framing, and of SLM's messages only that they are JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from tests.support.faults import recording
from tests.support.faults.history import Connection

TEXT: Final = 1
UP: Final = "up"
DOWN: Final = "down"


@dataclass(frozen=True)
class WireFrame:
    """One WebSocket frame: its opcode, what it says, and its bytes as they were."""

    opcode: int
    payload: bytes
    raw: bytes


class FrameReader:
    """Cuts a stream of bytes into WebSocket frames; feed it what follows the handshake."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[WireFrame]:
        """Yield each frame that is complete."""
        self._buffer += data
        while (frame := self._next()) is not None:
            yield frame

    def _next(self) -> WireFrame | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        size, at = buffer[1] & 0x7F, 2
        if size >= 126:
            width = 2 if size == 126 else 8
            if len(buffer) < at + width:
                return None
            size, at = int.from_bytes(buffer[at : at + width], "big"), at + width
        mask = b""
        if buffer[1] & 0x80:
            mask, at = bytes(buffer[at : at + 4]), at + 4
        if len(buffer) < at + size:
            return None
        raw = bytes(buffer[: at + size])
        del buffer[: at + size]
        payload = raw[at:]
        if mask:
            payload = bytes(byte ^ mask[n % 4] for n, byte in enumerate(payload))
        return WireFrame(raw[0] & 0x0F, payload, raw)


@dataclass
class Passage:
    """One connection through the proxy.

    Attributes:
        connection: what the history checker takes; None until it subscribed.
        client: what the subscriber said of itself.
        accepted_at: the monotonic time of its beginning.
    """

    accepted_at: float
    connection: Connection | None = None
    client: dict[str, Any] = field(default_factory=dict)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    upgraded: bool = False
    head: dict[str, bytes] = field(default_factory=lambda: {UP: b"", DOWN: b""})
    readers: dict[str, FrameReader] = field(
        default_factory=lambda: {UP: FrameReader(), DOWN: FrameReader()}
    )

    def cut(self) -> None:
        """End it without a word, on both sides."""
        for writer in self.writers:
            writer.transport.abort()


class Proxy:
    """Listens on a port of its own and passes everything on to one other.

    Args:
        host: of the target.
        port: of the target.

    Attributes:
        port: where it listens, also after `close` and `open`.
        delay_seconds: each piece waits between the two, in order.
        doubled: the share of the server's text frames that are sent twice.
        dropped: the share of connections that are cut within `drop_after_seconds`.
        passages: every connection there was.
    """

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.port = 0
        self.delay_seconds: tuple[float, float] = (0.0, 0.0)
        self.doubled = 0.0
        self.dropped = 0.0
        self.drop_after_seconds = 1.0
        self.passages: list[Passage] = []
        self.random = random.Random(1)
        self._flowing = {UP: asyncio.Event(), DOWN: asyncio.Event()}
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.resume()

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def histories(self) -> list[list[Connection]]:
        """What each subscriber saw, told apart by the instance that it names itself."""
        found: dict[str, list[Connection]] = {}
        for passage in self.passages:
            if passage.connection is not None:
                who = str(passage.client.get("instance", "?"))
                found.setdefault(who, []).append(passage.connection)
        return list(found.values())

    # --- faults ---

    def cut(self) -> None:
        """Cut every connection there is."""
        for passage in self.passages:
            passage.cut()

    def stall(self, *directions: str) -> None:
        """Pass nothing on, not even an end: the connections look alive and are dead."""
        for direction in directions or (UP, DOWN):
            self._flowing[direction].clear()

    def resume(self) -> None:
        """Pass on again, with what waited."""
        for event in self._flowing.values():
            event.set()

    # --- its life ---

    async def open(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(
            self._accept, "127.0.0.1", self.port, backlog=2048
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Refuse new connections and cut those there are."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        self.cut()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._pass(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passage = Passage(time.monotonic())
        passage.writers.append(writer)
        self.passages.append(passage)
        try:
            await self._flowing[UP].wait()
            there, back = await asyncio.open_connection(*self.target)
        except OSError:
            passage.cut()
            return
        passage.writers.append(back)
        if self.random.random() < self.dropped:
            seconds = self.random.uniform(0, self.drop_after_seconds)
            asyncio.get_running_loop().call_later(seconds, passage.cut)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(passage, reader, back, UP))
                group.create_task(self._pump(passage, there, writer, DOWN))
        except* OSError:
            passage.cut()
        finally:
            # What is stalled keeps its sockets: an end that nobody hears of is the fault.
            for each in passage.writers:
                each.close()

    async def _pump(
        self,
        passage: Passage,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        direction: str,
    ) -> None:
        while data := await reader.read(65536):
            low, high = self.delay_seconds
            if high:
                await asyncio.sleep(self.random.uniform(low, high))
            await self._flowing[direction].wait()
            writer.write(self._seen(passage, data, direction))
            await writer.drain()
        await self._flowing[direction].wait()
        if writer.can_write_eof():
            with contextlib.suppress(OSError):
                writer.write_eof()

    def _seen(self, passage: Passage, data: bytes, direction: str) -> bytes:
        """Read along, and return what is to be passed on."""
        if not passage.upgraded:
            passage.head[direction] += data
            if direction == UP:
                return data
            # Before the upgrade, the connection may have carried other requests and their answers.
            answer = passage.head[DOWN].find(b"HTTP/1.1 101 ")
            _, end, rest = passage.head[DOWN][max(answer, 0) :].partition(b"\r\n\r\n")
            if answer < 0 or not end:
                return data
            passage.upgraded = True
            before = data[: len(data) - len(rest)]
            # What the client said before it saw the answer is no part of the request's head.
            request = passage.head[UP].rfind(b"GET /ws")
            _, _, early = passage.head[UP][max(request, 0) :].partition(b"\r\n\r\n")
            self._frames(passage, early, UP)
            return before + self._frames(passage, rest, DOWN)
        return self._frames(passage, data, direction)

    def _frames(self, passage: Passage, data: bytes, direction: str) -> bytes:
        out = data
        twice = direction == DOWN and self.doubled > 0
        doubled = bytearray()
        for frame in passage.readers[direction].feed(data):
            if frame.opcode == TEXT:
                self._note(passage, frame.payload, direction)
            doubled += frame.raw
            if twice and frame.opcode == TEXT and self.random.random() < self.doubled:
                doubled += frame.raw
        return bytes(doubled) if twice else out

    @staticmethod
    def _note(passage: Passage, payload: bytes, direction: str) -> None:
        if direction == DOWN:
            if passage.connection is not None:
                passage.connection.frames.append(recording.now.frame(payload))
        elif "subscribe" in (message := recording.parsed(payload)):
            passage.client = message.get("client", {})
            passage.connection = recording.begun(recording.now.passed, message)


@contextlib.asynccontextmanager
async def proxied(url: str) -> AsyncIterator[Proxy]:
    """Run a proxy before a URL's host and port for as long as the block lasts."""
    parts = urlsplit(url)
    proxy = Proxy(parts.hostname or "127.0.0.1", parts.port or 5432)
    await proxy.open()
    try:
        yield proxy
    finally:
        await proxy.close()
