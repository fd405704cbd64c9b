"""Peers that flood, that do not read, or that hold what they do not use: each is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from slm.server.transport.http_protocol import HttpProtocol
from slm.server.transport.ws_connection import BURST, PONGS_WAIT_BYTES
from slm.server.transport.ws_frames import MAX_FRAGMENTS
from tests.security.test_tls import certs as certs
from tests.server.test_ws_limits import NO_PINGS, deaf_peers, handshake, masked, raw_stream
from tests.support.raw import Api, raw_exchange
from tests.support.servers import ServerProcess, eventually, running_server

REQUEST = b"GET /openapi.json HTTP/1.1\r\nHost: slm.example\r\n\r\n"


def address(url: str) -> tuple[str, int]:
    """Where to connect to."""
    host, _, port = url.partition("://")[2].partition(":")
    return host, int(port)


def connections(api: Api) -> int:
    """How many connections the server has."""
    return len(api.server.running.services.connections)


@contextlib.asynccontextmanager
async def peers(url: str, count: int, sent: bytes = b"") -> AsyncIterator[list[socket.socket]]:
    """Bare sockets that send something and never read."""
    loop = asyncio.get_running_loop()
    opened = []
    try:
        for _ in range(count):
            peer = socket.socket()
            peer.setblocking(False)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            opened.append(peer)
            await loop.sock_connect(peer, address(url))
            if sent:
                await loop.sock_sendall(peer, sent)
        yield opened
    finally:
        for peer in opened:
            peer.close()


async def flood(peer: socket.socket, data: bytes) -> None:
    """Send the same again and again, until the connection ends."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        while True:
            await loop.sock_sendall(peer, data)


# --- streams ---


@pytest.mark.parametrize("fragment", [b"", masked(1, b"", fin=False)], ids=["plain", "fragment"])
async def test_pings_of_a_peer_that_reads_nothing_do_not_grow(
    tmp_path: Path, session: aiohttp.ClientSession, fragment: bytes
) -> None:
    """Its pongs wait up to a bound, `slm_buffered_bytes` has them, and others are served."""
    async with running_server(tmp_path, **NO_PINGS) as server:
        admin = Api(server, session, server.admin_token)
        hub = server.running.services.hub
        async with deaf_peers(admin, 1) as [peer], admin.stream() as good:
            await good.frame()
            if fragment:
                await asyncio.get_running_loop().sock_sendall(peer, fragment)
            flooding = asyncio.create_task(flood(peer, masked(9, b"p" * 125) * 500))
            [deaf] = [s for s in hub.subscribers() if s.sink.waiting_bytes() or s.position == 1][:1]
            for turn in range(40):
                await admin.put("default", llm_model=f"m{turn}")
                await good.next()
                held = [s.sink.waiting_bytes() for s in hub.subscribers()]
                assert max(held) < PONGS_WAIT_BYTES + 300_000
                assert sum(hub.buffers.sizes()) >= max(held) - 64 * 1024
            assert deaf in hub.subscribers() or hub.counts.evicted
            flooding.cancel()


async def test_fragments_count(admin: Api) -> None:
    """A message in more than 1,024 pieces is 1009, empty ones too, and none is kept."""
    async with raw_stream(admin) as (reader, writer):
        writer.write(masked(1, b"", fin=False) + masked(0, b"", fin=False) * MAX_FRAGMENTS)
        async with asyncio.timeout(10):
            frame = await reader.readexactly(4)
        assert (frame[0], int.from_bytes(frame[2:4], "big")) == (0x88, 1009)
    text = b'{"subscribe": "agent_config"}'
    async with raw_stream(admin) as (reader, writer):
        pieces = [text[i : i + 1] for i in range(len(text))]
        writer.write(masked(1, b"", fin=False))
        writer.write(b"".join(masked(0, piece, fin=False) for piece in pieces) + masked(0, b""))
        async with asyncio.timeout(10):
            assert b"subscribed" in await reader.readuntil(b"}")


@pytest.mark.parametrize(
    "first",
    [masked(2, b"x"), masked(1, b"\xff"), masked(1, b"not json"), masked(1, b"x", fin=False)],
    ids=["binary", "not UTF-8", "not JSON", "a fragment"],
)
async def test_a_message_and_a_close_in_one_segment_end_quietly(
    admin: Api, caplog: pytest.LogCaptureFixture, first: bytes
) -> None:
    """Whatever comes right before a close, the connection is closed and nothing fails."""
    before = connections(admin)
    async with raw_stream(admin) as (reader, writer):
        writer.write(first + masked(8, (1000).to_bytes(2, "big")))
        async with asyncio.timeout(5):
            assert (await reader.readexactly(2))[0] == 0x88
            await reader.read()
    await eventually(lambda: connections(admin) <= before)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


async def test_a_flood_of_frames_is_read_slowly_and_whole(admin: Api) -> None:
    """Beyond its burst a peer is read at its rate; nothing is lost, and others go on."""
    async with raw_stream(admin) as (reader, writer), admin.stream() as good:
        await good.frame()
        began = asyncio.get_running_loop().time()
        writer.write(masked(9, b"") * (BURST + 400) + masked(9, b"last"))
        async with asyncio.timeout(10):
            await admin.put("default", llm_model="meanwhile")
            await good.next()
            assert (await reader.readuntil(b"\x8a\x04last")).count(b"\x8a\x00") == BURST + 400
            assert asyncio.get_running_loop().time() - began > 0.2


async def test_streams_have_a_cap_and_plain_http_goes_on(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """At the cap an upgrade is answered 503, and an operator is served."""
    async with (
        running_server(tmp_path, max_connections=6) as server,
        contextlib.AsyncExitStack() as s,
    ):
        admin = Api(server, session, server.admin_token)
        for _ in range(3):
            await s.enter_async_context(admin.socket())
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await s.enter_async_context(admin.socket())
        assert refused.value.status == 503
        assert (await admin.get("/api/agents")).status == 200


async def test_silent_streams_of_one_token_keep_no_other_out(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """However many streams a token opens and leaves silent, another token gets in at once."""
    async with running_server(tmp_path, max_opening_streams=20) as server:
        admin, backend = (
            Api(server, session, token) for token in (server.admin_token, server.backend_token)
        )
        silent = handshake(admin.token)
        async with peers(server.url, 60, silent):
            for _ in range(3):
                async with asyncio.timeout(1), backend.stream() as opened:
                    assert (await opened.frame())["type"] == "subscribed"


# --- HTTP ---


async def test_who_does_not_read_its_answers_is_cut(admin: Api) -> None:
    """Peers that ask and read nothing are gone within twice the time that a head may take."""
    before = connections(admin)
    async with peers(admin.server.url, 20, REQUEST * 40):
        await eventually(lambda: connections(admin) >= before + 20)
        assert (await admin.get("/healthz")).status == 200
        await eventually(lambda: connections(admin) <= before + 1, 8)


async def test_a_slow_reader_gets_its_whole_answer(admin: Api) -> None:
    """Who reads, however slowly, is not cut; forty requests sent ahead are all answered."""
    reader, writer = await asyncio.open_connection(*address(admin.server.url), limit=4096)
    writer.write(REQUEST * 40 + b"GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    received = bytearray()
    async with asyncio.timeout(60):
        while piece := await reader.read(65536):
            received += piece
            await asyncio.sleep(0)
    assert received.count(b"HTTP/1.1 200 OK") == 41
    writer.close()


async def test_requests_sent_ahead_are_not_read_ahead(admin: Api) -> None:
    """Of thousands of requests in one segment a few wait in the server; the rest is not read."""
    async with peers(admin.server.url, 1) as [peer]:
        flooding = asyncio.create_task(flood(peer, b"GET / HTTP/1.1\r\nHost:h\r\n\r\n" * 5000))
        server = admin.server.running._server
        assert server is not None
        waited = 0
        for _ in range(200):
            found = [c for c in server.server_state.connections if isinstance(c, HttpProtocol)]
            waited = max(waited, sum(len(each.pipeline) for each in found))
            assert all(len(each._unread) < 600_000 for each in found)
            await asyncio.sleep(0.001)
        assert 0 < waited < 200
        flooding.cancel()


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /healthz\r\n\r\n",
        b"GET /healthz HTTP/2.0\r\nHost: h\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST /api/agents HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST /api/agents HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2\n{}\n0\n\n",
        b"POST /api/agents HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
        b"Content-Length: %d\r\n\r\n" % len(REQUEST),
    ],
    ids=["0.9", "2.0", "no host", "two hosts", "no coding", "bare line feeds", "h2c with a body"],
)
async def test_heads_that_two_readers_take_differently_are_refused(
    admin: Api, request_head: bytes
) -> None:
    """What a proxy may read in another way is answered with an error and closed."""
    received = await raw_exchange(admin.server.url, request_head + REQUEST)
    assert received.count(b"HTTP/1.1 ") == 1
    assert received[9:12] in (b"400", b"401")
    assert b"HTTP/1.1 200" not in received


async def test_an_upgrade_that_is_ignored_loses_no_request(admin: Api) -> None:
    """After an h2c upgrade the next request of the connection is answered, as in HTTP/1.1."""
    h2c = b"GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    last = b"GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    received = await raw_exchange(admin.server.url, h2c + last)
    assert received.count(b"HTTP/1.1 200 OK") == 2


# --- TLS and descriptors ---


async def test_a_tls_handshake_that_does_not_end_holds_nothing(
    tmp_path: Path, session: aiohttp.ClientSession, certs: Path
) -> None:
    """Half a handshake, none at all, or no request after it: each is cut within seconds."""
    async with running_server(
        tmp_path / "data",
        tls_cert=certs / "server.pem",
        tls_key=certs / "server-key.pem",
        tls_handshake_seconds=0.5,
    ) as server:
        table = server.running.services.connections
        trust = ssl.create_default_context(cafile=certs / "ca.pem")
        async with peers(server.url, 10), peers(server.url, 10, b"\x16\x03\x01"):
            await eventually(lambda: len(table.arriving) == 20)
            _, silent = await asyncio.open_connection(*address(server.url), ssl=trust)
            await eventually(lambda: len(table) == 0, 8)
            silent.close()


@contextlib.contextmanager
def few_descriptors(limit: int) -> Iterator[None]:
    """Let children have so many descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_strangers_make_room(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """When connections are used up the oldest without a token goes, and no one with a token."""
    async with running_server(tmp_path, max_connections=20, header_timeout_seconds=60) as server:
        admin = Api(server, session, server.admin_token)
        held = aiohttp.TCPConnector(limit=1)
        async with aiohttp.ClientSession(connector=held) as old:
            kept = Api(server, old, server.backend_token)
            assert (await kept.get("/api/agents")).status == 200
            async with peers(server.url, 60):
                table = server.running.services.connections
                await eventually(lambda: len(table) == 20)
                assert (await admin.get("/api/agents")).status == 200
                assert len(table) <= 20
            ports = {str(each) for each in held._conns}
            assert (await kept.get("/api/agents")).status == 200
            assert {str(each) for each in held._conns} == ports


async def test_without_descriptors_it_neither_spins_nor_fills_the_log(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """Where no descriptor is left, one line a second says so; it goes on when there are some."""
    async with running_server(tmp_path) as server:
        admin = Api(server, session, server.admin_token)
        assert (await admin.get("/healthz")).status == 200
        acceptor = server.running._server._acceptor  # type: ignore[union-attr]
        assert acceptor is not None
        with pytest.MonkeyPatch.context() as patch:
            tries = 0

            class Full:
                """A listening socket of a process without descriptors."""

                def __init__(self, real: socket.socket) -> None:
                    self.real = real

                def fileno(self) -> int:
                    return self.real.fileno()

                def close(self) -> None:
                    self.real.close()

                def accept(self) -> None:
                    nonlocal tries
                    tries += 1
                    raise OSError(24, "Too many open files")

            real = acceptor._listener
            patch.setattr(acceptor, "_listener", Full(real))
            with _lines() as lines:
                async with peers(server.url, 3):
                    await eventually(lambda: tries >= 5)
                    assert tries < 50
                assert len(lines) <= 2
            patch.setattr(acceptor, "_listener", real)
        async with aiohttp.ClientSession() as fresh:
            assert (await Api(server, fresh, server.admin_token).get("/readyz")).status == 200


@contextlib.contextmanager
def _lines() -> Iterator[list[str]]:
    lines: list[str] = []

    class Taken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, logger = Taken(), logging.getLogger("slm.server.transport.acceptor")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


async def test_the_soft_limit_of_open_files_is_raised(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """A server that was started with few descriptors takes as many as the system allows."""
    with few_descriptors(256):
        server = ServerProcess(tmp_path / "data")
        await server.start()
    try:
        soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        assert soft == hard
    finally:
        server.kill()
