"""Fault 21: handshake headers of 9 KB, 1 MB, half a header and silence, 1,000 of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.support.faults.site import Operator, Site
from tests.support.faults.subscriber import subscribers
from tests.support.servers import eventually

HANDSHAKE = (
    "GET /ws HTTP/1.1\r\nHost: slm\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)
PLAIN = "GET /healthz HTTP/1.1\r\nHost: slm\r\n"


async def refused(url: str, head: bytes, limit: float = 15) -> bytes:
    """Send this, read until the server ends the connection, and return what it said."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    said = b""
    try:
        async with asyncio.timeout(limit):
            with contextlib.suppress(ConnectionError):
                writer.write(head)
                await writer.drain()
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(65536):
                    said += data
    finally:
        writer.transport.abort()
    return said


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.parametrize("start", [HANDSHAKE, PLAIN], ids=["websocket", "plain"])
@pytest.mark.parametrize("size", [9_000, 1_000_000])
async def test_large_headers(
    sqlite_site: Site, http: aiohttp.ClientSession, start: str, size: int
) -> None:
    """A head over the limit is 431 and closed before a token is looked at; others never notice."""
    server = sqlite_site.in_loop()
    await server.start()
    try:
        operator = Operator(http, server.url, sqlite_site.admin_token)
        async with subscribers(3, server.url, sqlite_site.backend_token) as subs:
            await eventually(lambda: all(s.connected for s in subs))
            head = f"{start}X-Padding: {'x' * size}\r\n\r\n".encode()
            said = await refused(server.url, head)
            assert said.startswith(b"HTTP/1.1 431 ") or said == b""
            many = "".join(f"X-{n}: {'x' * 100}\r\n" for n in range(size // 110))
            said = await refused(server.url, f"{start}{many}\r\n".encode())
            assert said.startswith(b"HTTP/1.1 431 ") or said == b""
            after = await operator.create("billing")
            await eventually(lambda: all(s.reached(after) for s in subs))
            assert all(len(s.connections) == 1 for s in subs)
    finally:
        await server.stop()


async def test_a_thousand_half_headers(
    sqlite_site: Site,
    http: aiohttp.ClientSession,
    record_property: Callable[[str, object], None],
) -> None:
    """1,000 that stop in the middle of a head are closed in time; all others never notice."""
    # The attackers are in this very process: its own pings may be late, and are not what is tested.
    settings = {"ping_interval_seconds": 30.0, "ping_timeout_seconds": 30.0}
    async with sqlite_site.process(0, header_timeout_seconds=1.0, **settings) as server:
        operator = Operator(http, server.url, sqlite_site.admin_token)
        await operator.create("billing")
        async with subscribers(
            20, server.url, sqlite_site.backend_token, heartbeat_seconds=12
        ) as subs:
            await eventually(lambda: all(s.connected for s in subs))
            before = resident_bytes(server.process.pid)
            half = (HANDSHAKE + "Authorization: Bea").encode()
            large = f"{HANDSHAKE}X-Padding: {'x' * 1_000_000}".encode()
            attack = [
                asyncio.create_task(refused(server.url, large if n % 50 == 0 else half, 60))
                for n in range(1000)
            ]
            began = time.monotonic()
            n = 0
            while not all(task.done() for task in attack):
                revision = await operator.set("billing", llm_model=f"m{n}")
                await eventually(lambda: all(s.reached(revision) for s in subs))  # noqa: B023
                n += 1
            said = await asyncio.gather(*attack)
            record_property("seconds_until_all_were_closed", round(time.monotonic() - began, 1))
            assert all(s == b"" or s.split()[1] in (b"408", b"431", b"400") for s in said)
            grown = resident_bytes(server.process.pid) - before
            record_property("grown_mib", round(grown / 2**20, 1))
            record_property("changes_meanwhile", n)
            assert grown < 100 * 2**20
            assert n >= 1
            assert all(len(s.connections) == 1 for s in subs)
