"""What stands between a backend and its SLM, for tests: a proxy with CONNECT, raw answers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class ForwardProxy:
    """An HTTP proxy that tunnels (CONNECT) and forwards plain requests.

    Attributes:
        url: where it listens, without user and password.
        asked: the first line of each request.
        shown: the Proxy-Authorization of each request, or None.
        passed: every byte that it could read: of a tunnel, only what asked for it.
        wants: user and password that it asks for, or None.
        refuse: what it answers instead, such as `403 Forbidden`; None lets everything through.
    """

    url: str = ""
    asked: list[str] = field(default_factory=list)
    shown: list[str | None] = field(default_factory=list)
    passed: list[bytes] = field(default_factory=list)
    wants: str | None = None
    refuse: str | None = None

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            await self._serve(reader, writer)
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines if ": " in line)
        exact = dict(line.split(": ", 1) for line in lines if ": " in line)
        self.asked.append(first)
        self.shown.append(exact.get("Proxy-Authorization"))
        self.passed.append(head)
        refused = self.refuse
        if self.wants is not None:
            due = "Basic " + base64.b64encode(self.wants.encode()).decode()
            if exact.get("Proxy-Authorization") != due:
                refused = "407 Proxy Authentication Required"
        if refused is not None:
            writer.write(f"HTTP/1.1 {refused}\r\nContent-Length: 0\r\n\r\n".encode())
            await writer.drain()
            return
        method, target, _ = first.split()
        if method == "CONNECT":
            host, _, port = target.rpartition(":")
            up_reader, up_writer = await asyncio.open_connection(host, int(port))
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            parts = urlsplit(target)
            up_reader, up_writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            kept = [line for line in lines if not line.startswith("Proxy-")]
            if "upgrade" not in headers:
                kept = [line for line in kept if not line.lower().startswith("connection:")]
                kept.insert(1, "Connection: close")
            up_writer.write("\r\n".join([f"{method} {path} HTTP/1.1", *kept]).encode())
        await _both(reader, writer, up_reader, up_writer)


async def _both(
    one: asyncio.StreamReader,
    to_one: asyncio.StreamWriter,
    other: asyncio.StreamReader,
    to_other: asyncio.StreamWriter,
) -> None:
    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()

    await asyncio.gather(pump(one, to_other), pump(other, to_one))


@contextlib.asynccontextmanager
async def listening(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[int]:
    """Listen on a free port of 127.0.0.1 and return it; every connection ends with the block."""
    tasks: set[asyncio.Task[None]] = set()

    def opened(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def one() -> None:
            try:
                await handle(reader, writer)
            finally:
                writer.close()

        task = asyncio.get_running_loop().create_task(one())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(opened, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def forward_proxy(
    *, wants: str | None = None, refuse: str | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[ForwardProxy]:
    """Run a proxy for as long as the block lasts."""
    proxy = ForwardProxy(wants=wants, refuse=refuse)
    async with listening(proxy.handle, tls) as port:
        proxy.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        yield proxy


@contextlib.asynccontextmanager
async def swallowing(upstream: str, answer: bytes | None) -> AsyncIterator[str]:
    """Pass everything on to an SLM but WebSocket upgrades, which get this answer.

    Args:
        upstream: the SLM's address.
        answer: raw HTTP; empty closes the connection, None drops the header and passes it on.
    """
    parts = urlsplit(upstream)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode().split("\r\n")
            if head.startswith(b"GET /ws") and answer is not None:
                writer.write(answer)
                await writer.drain()
                return
            dropped = ("connection:", "upgrade:")
            lines = [line for line in lines if not line.lower().startswith(dropped)]
            lines.insert(1, "Connection: close")
            up_reader, up_writer = await asyncio.open_connection(parts.hostname, parts.port)
            up_writer.write("\r\n".join(lines).encode())
            await _both(reader, writer, up_reader, up_writer)

    async with listening(handle) as port:
        yield f"http://127.0.0.1:{port}"


def raw(status: str, body: str = "", **headers: str) -> bytes:
    """Return an HTTP answer as it is on the wire."""
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    head = [f"HTTP/1.1 {status}", *lines, f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join([*head, "", body]).encode()
