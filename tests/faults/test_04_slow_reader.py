"""Fault 4: a client that stops reading, with 500 others: it costs only itself."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from tests.support.faults import recording
from tests.support.faults.history import violations
from tests.support.faults.network import TEXT, FrameReader, WireFrame
from tests.support.faults.site import Operator, Site
from tests.support.faults.subscriber import heard, subscribers
from tests.support.servers import eventually

BUFFER_BYTES = 64 * 1024
OTHERS = 500
# Who does not read answers no ping either: it is the buffer that is to find it here.
UNHURRIED: dict[str, Any] = {
    "heartbeat_seconds": 1.0,
    "ping_interval_seconds": 60.0,
    "ping_timeout_seconds": 60.0,
}


class Sluggard:
    """A socket that has subscribed, and reads only when it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connection = recording.begun(recording.now.heard, {})
        self.close_code: int | None = None
        self._reader = reader
        self._writer = writer
        self._frames = FrameReader()

    async def read_to_the_end(self) -> None:
        """Read what there is, until the other side ends it."""
        while True:
            try:
                data = await self._reader.read(65536)
            except ConnectionError:
                return
            if not data:
                return
            for frame in self._frames.feed(data):
                self._take(frame)

    async def read_one(self) -> None:
        """Read the first frame."""
        while not self.connection.frames:
            for frame in self._frames.feed(await self._reader.read(4096)):
                self._take(frame)

    def _take(self, frame: WireFrame) -> None:
        if frame.opcode == TEXT:
            self.connection.frames.append(recording.now.frame(frame.payload))
        elif frame.opcode == 8:
            self.close_code = int.from_bytes(frame.payload[:2], "big")

    def close(self) -> None:
        self._writer.transport.abort()


@asynccontextmanager
async def sluggard(url: str, token: str) -> AsyncIterator[Sluggard]:
    parts = urlsplit(url)
    sock = socket.socket()
    # Small, so that what is not read waits at the server and not in the kernel.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (parts.hostname, parts.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
    writer.write(
        f"GET /ws HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        f"Authorization: Bearer {token}\r\n\r\n".encode()
    )
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101"), head
    said = json.dumps({"subscribe": "agent_config"}).encode()
    # A client's frames are masked; a mask of zeros leaves them as they are.
    writer.write(bytes([0x81, 0x80 | len(said)]) + bytes(4) + said)
    slow = Sluggard(reader, writer)
    await slow.read_one()
    try:
        yield slow
    finally:
        slow.close()


async def test_a_slow_reader_costs_only_itself(
    sqlite_site: Site,
    http: aiohttp.ClientSession,
    record_property: Callable[[str, object], None],
) -> None:
    """500 others get every change as it comes; the slow one is closed, and resumes."""
    server = sqlite_site.in_loop(buffer_bytes=BUFFER_BYTES, **UNHURRIED)
    await server.start()
    try:
        hub = server.running.services.hub
        operator = Operator(http, server.url, sqlite_site.admin_token)
        revision = await operator.create("billing")
        async with (
            subscribers(
                OTHERS,
                server.url,
                sqlite_site.backend_token,
                believes=False,
                heartbeat_seconds=10.0,
            ) as subs,
            sluggard(server.url, sqlite_site.backend_token) as slow,
        ):
            await eventually(lambda: all(s.connected for s in subs), 30)
            most = sent = 0
            slowest = 0.0
            text = "x" * 12_000
            while hub.counts.evicted == 0:
                fields: dict[str, Any] = {"llm_options": {"n": sent, "text": text}}
                began = time.monotonic()
                revision = await operator.set("billing", **fields)
                # The slow one holds nobody up: each change is with all others before the next.
                await eventually(lambda: all(s.revision >= revision for s in subs), 30)  # noqa: B023
                slowest = max(slowest, max(s.arrivals[revision] for s in subs) - began)
                most = max(most, sum(hub.buffers.sizes()))
                sent += 1
                assert sent < 100, "the slow reader was never dropped"
            record_property("slowest_change_seconds", round(slowest, 2))
            record_property("changes", sent)
            assert slowest < 5
            # One change may come on top of a buffer that was just not full.
            assert most <= BUFFER_BYTES + 2 * len(text)
            revision = await operator.set("billing", llm_model="after it was dropped")
            await slow.read_to_the_end()
            assert slow.close_code in (1013, None)
            await eventually(lambda: len(hub.subscribers()) == OTHERS)
            last = slow.connection.frames[-1]["revision"]
            assert last < revision
            epoch = slow.connection.frames[0]["epoch"]
            resumed = await heard(
                http,
                server.url,
                sqlite_site.backend_token,
                last,
                epoch,
                upto=revision,
            )
            assert violations([slow.connection, resumed]) == []
            assert all(len(s.connections) == 1 for s in subs)
    finally:
        await server.stop()


async def test_the_total_is_bounded_too(sqlite_site: Site, http: aiohttp.ClientSession) -> None:
    """Many slow readers together stay within the total: the largest go, and those who read stay."""
    total = 3 * BUFFER_BYTES
    server = sqlite_site.in_loop(
        buffer_bytes=4 * BUFFER_BYTES, buffer_total_bytes=total, **UNHURRIED
    )
    await server.start()
    try:
        hub = server.running.services.hub
        operator = Operator(http, server.url, sqlite_site.admin_token)
        await operator.create("billing")
        async with subscribers(
            5, server.url, sqlite_site.backend_token, heartbeat_seconds=10.0
        ) as subs:
            async with (
                sluggard(server.url, sqlite_site.backend_token),
                sluggard(server.url, sqlite_site.backend_token),
                sluggard(server.url, sqlite_site.backend_token),
                sluggard(server.url, sqlite_site.backend_token),
            ):
                sent, text = 0, "x" * 12_000
                while hub.counts.evicted < 2:
                    fields: dict[str, Any] = {"llm_options": {"n": sent, "text": text}}
                    revision = await operator.set("billing", **fields)
                    await eventually(lambda: all(s.reached(revision) for s in subs))  # noqa: B023
                    assert sum(hub.buffers.sizes()) <= total
                    sent += 1
                    assert sent < 200, "the slow readers were never dropped"
            assert all(len(s.connections) == 1 for s in subs)
    finally:
        await server.stop()
