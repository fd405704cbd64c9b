"""The WebSocket's doors and limits: handshakes, sizes, close codes, slow and silent peers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from slm.server.transport.ws_connection import WebSocketConnection
from tests.support.raw import Api, raw_exchange
from tests.support.servers import InLoopServer, eventually, running_server

NO_PINGS = {"ping_interval_seconds": 300.0}
"""So that only its buffer can be what ends a connection."""


def handshake(token: str | None, *lines: str, path: str = "/ws") -> bytes:
    """A WebSocket handshake as bytes."""
    key = base64.b64encode(os.urandom(16)).decode()
    head = [
        f"GET {path} HTTP/1.1",
        "Host: slm.example",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {key}",
        *([] if token is None else [f"Authorization: Bearer {token}"]),
        *lines,
    ]
    return ("\r\n".join(head) + "\r\n\r\n").encode("latin-1")


async def refusal(api: Api, **options: object) -> aiohttp.WSServerHandshakeError:
    """Fail to open a WebSocket."""
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        async with api.socket(**options):
            pass
    return refused.value


# --- handshakes ---


async def test_a_handshake_without_a_token_is_401(
    server: InLoopServer, anonymous: Api, session: aiohttp.ClientSession
) -> None:
    """No token, a wrong one, or one in the query: HTTP 401 before the upgrade, as a problem."""
    for api, path in (
        (anonymous, "/ws"),
        (Api(server, session, "slm_wrong"), "/ws"),
        (anonymous, f"/ws?token={server.admin_token}"),
    ):
        refused = await refusal(api, path=path)
        assert refused.status == 401
        assert refused.headers is not None
        assert refused.headers["WWW-Authenticate"] == "Bearer"
        assert refused.headers["Content-Type"] == "application/problem+json"
        assert refused.headers["SLM-Revision"] == "1"


async def test_a_foreign_origin_is_403(admin: Api) -> None:
    """A browser's page of another site cannot open a stream; this server's own can."""
    for origin in ("https://evil.example", "null"):
        assert (await refusal(admin, origin=origin)).status == 403
    async with admin.socket(origin=admin.server.url) as opened:
        assert not opened.ws.closed


async def test_a_socket_elsewhere_is_404(admin: Api) -> None:
    """There is one WebSocket path."""
    assert (await refusal(admin, path="/elsewhere")).status == 404


@pytest.mark.parametrize(
    "big",
    [
        ["X-Big: " + "x" * 9_000],
        ["X-Big: " + "x" * 1_000_000],
        [f"X-{n}: y" for n in range(127)],
        [f"X-{n}: {'y' * 100}" for n in range(100)],
        ["Cookie: " + "x" * 4_200, "X-More: " + "y" * 4_200],
    ],
    ids=["9 KB", "1 MB", "127 fields", "100 fields of 100", "two of 4 KB"],
)
async def test_large_handshake_headers_are_431(admin: Api, big: list[str]) -> None:
    """Headers over 8 KiB, in one field or many, are refused as such, and others are served."""
    received = await raw_exchange(admin.server.url, handshake(admin.token, *big))
    assert received.startswith(b"HTTP/1.1 431 "), received[:200]
    assert b'"code": "header-fields-too-large"' in received
    assert (await admin.get("/healthz")).status == 200


async def test_headers_just_under_the_limit_are_taken(admin: Api) -> None:
    """8 KiB is the limit, not less."""
    async with admin.socket(headers={"X-Big": "x" * 7_500}) as opened:
        assert not opened.ws.closed
    answer = await admin.get("/healthz", headers={"X-Big": "x" * 7_500})
    assert answer.status == 200


@pytest.mark.parametrize(
    "lines",
    [
        ["Sec-WebSocket-Version: 12"],
        ["Sec-WebSocket-Key: short"],
        ["X-Odd: caf\xe9"],
    ],
)
async def test_odd_handshakes_are_answered(admin: Api, lines: list[str]) -> None:
    """Whatever else is odd in a handshake, there is an answer, never a silence."""
    sent = handshake(admin.token, *lines)
    host, _, port = admin.server.url.partition("://")[2].partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    async with asyncio.timeout(5):
        line = await reader.readline()
    assert line.startswith(b"HTTP/1.1 "), line
    writer.close()


async def test_refused_handshakes_leave_no_error_in_the_log(
    admin: Api, anonymous: Api, caplog: pytest.LogCaptureFixture
) -> None:
    """A thousand strangers at the door must not fill the log, and no log holds a query."""
    with caplog.at_level(logging.DEBUG):
        for path in ("/ws", "/ws?token=sk-canary-query", "/elsewhere"):
            await refusal(anonymous, path=path)
        await refusal(admin, origin="https://evil.example")
        async with admin.stream() as opened:
            await opened.frame()
            await opened.ws.send_bytes(b"x")
            await opened.close_code()
        await raw_exchange(admin.server.url, b"nonsense\r\n\r\n")
    server_side = [r for r in caplog.records if r.name.startswith(("slm", "uvicorn", "websockets"))]
    assert [r.getMessage() for r in server_side if r.levelno >= logging.WARNING] == []
    everything = "\n".join(record.getMessage() for record in server_side)
    assert "canary" not in everything
    assert str(admin.token) not in everything


@contextlib.asynccontextmanager
async def raw_stream(api: Api) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A WebSocket whose bytes are the test's own; the handshake is done."""
    host, _, port = api.server.url.partition("://")[2].partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(handshake(api.token))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    try:
        yield reader, writer
    finally:
        writer.close()


def masked(opcode: int, payload: bytes, fin: bool = True) -> bytes:
    """A client's frame; the mask is zero, so the payload stands as it is."""
    head = bytes([(0x80 if fin else 0) | opcode])
    if len(payload) < 126:
        head += bytes([0x80 | len(payload)])
    elif len(payload) < 65536:
        head += bytes([0x80 | 126]) + len(payload).to_bytes(2, "big")
    else:
        head += bytes([0x80 | 127]) + len(payload).to_bytes(8, "big")
    return head + bytes(4) + payload


# --- messages and sizes ---


async def test_deflate_is_never_agreed_to(admin: Api) -> None:
    """A client that offers permessage-deflate gets a plain stream."""
    async with admin.socket(compress=15) as opened:
        assert opened.ws.compress == 0


async def test_close_codes_of_what_cannot_be_read(admin: Api) -> None:
    """Binary is 1003, text that is not UTF-8 or not JSON 1007, too big 1009."""
    not_json = ["not json", "{", '{"a": 1', "\ufeff{}", "9" * 5000 + "x", "[" * 60_000]
    cases: list[tuple[int, bytes, int]] = [
        (2, b"binary", 1003),
        (1, b"\xff\xfe", 1007),
        (1, b'"\xed\xa0\x80"', 1007),
        *((1, text.encode(), 1007) for text in not_json),
        (1, json.dumps({"subscribe": "x" * 70_000}).encode(), 1009),
        (1, b" " * (1024 * 1024 + 1), 1009),
    ]
    for opcode, payload, code in cases:
        async with raw_stream(admin) as (reader, writer):
            writer.write(masked(opcode, payload))
            async with asyncio.timeout(5):
                frame = await reader.readexactly(4)
            assert (frame[0], int.from_bytes(frame[2:4], "big")) == (0x88, code), payload[:20]


async def test_text_in_fragments_is_one_message(admin: Api) -> None:
    """A character cut by a fragment's end is whole again; pings between are answered."""
    text = '{"subscribe": "agent_config", "client": {"name": "é"}}'.encode()
    cut = text.index("é".encode()) + 1
    async with raw_stream(admin) as (reader, writer):
        writer.write(masked(1, text[:cut], fin=False) + masked(9, b"hi") + masked(0, text[cut:]))
        async with asyncio.timeout(5):
            assert await reader.readexactly(4) == b"\x8a\x02hi"
            assert b"subscribed" in await reader.readuntil(b"}")


async def test_an_ack_may_be_a_megabyte(admin: Api) -> None:
    """Acks have a limit of their own; everything else is held to 64 KiB.

    Of the names in one only those of agents that there are stay.
    """
    keys = {f"agent-{n:05}": n for n in range(45_000)}
    await admin.create("agent-00007")
    async with admin.stream() as opened:
        await opened.frame()
        ack = json.dumps({"ack": 1, "keys": keys})
        assert 900_000 < len(ack) < 1024 * 1024
        await opened.ws.send_str(ack)
        [backend] = admin.server.running.services.fleet.backends()
        await eventually(lambda: backend.applied == 1)
        assert backend.keys == {"agent-00007": 7}
        fits = {"subscribe": "y" * (65_536 - 20)}
        await opened.send(**fits)
        assert (await opened.next())["type"] == "error"


# --- slow and silent peers ---


def hold_little(api: Api) -> None:
    """Let the kernel hold little for each subscriber, so that what waits, waits with us."""
    for subscriber in api.server.running.services.hub.subscribers():
        assert isinstance(subscriber.sink, WebSocketConnection)
        theirs = subscriber.sink.transport.get_extra_info("socket")
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


@contextlib.asynccontextmanager
async def deaf_peers(api: Api, count: int) -> AsyncIterator[list[socket.socket]]:
    """Subscribers that never read."""
    host, _, port = api.server.url.partition("://")[2].partition(":")
    loop = asyncio.get_running_loop()
    peers = []
    hub = api.server.running.services.hub
    live = hub.live_count()
    try:
        for _ in range(count):
            peer = socket.socket()
            peer.setblocking(False)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peers.append(peer)
            await loop.sock_connect(peer, (host, int(port)))
            await loop.sock_sendall(peer, handshake(api.token))
            received = b""
            while b"\r\n\r\n" not in received:
                received += await loop.sock_recv(peer, 1024)
            await loop.sock_sendall(peer, masked(1, b'{"subscribe": "agent_config"}'))
        await eventually(lambda: hub.live_count() == live + count)
        hold_little(api)
        yield peers
    finally:
        for peer in peers:
            peer.close()


async def grow(api: Api, turns: int) -> int:
    """Write changes of 12 KB each; return the last revision."""
    last = 0
    for turn in range(turns):
        written = await api.put("default", llm_options={"filler": f"{turn}" + "x" * 12_000})
        assert written.status == 200
        last = written.revision
    return last


async def test_a_slow_reader_costs_only_itself(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """One that reads nothing is dropped at its buffer's limit; the others miss nothing."""
    async with running_server(tmp_path, buffer_bytes=200_000, **NO_PINGS) as server:
        admin = Api(server, session, server.admin_token)
        hub = server.running.services.hub
        async with deaf_peers(admin, 1), admin.stream() as good:
            await good.frame()
            turns = 0
            while hub.counts.evicted == 0:
                await grow(admin, 10)
                turns += 10
                assert turns < 500, "the slow reader was never dropped"
                assert sum(hub.buffers.sizes()) < 200_000 + 100_000
            frames = await good.until(1 + turns)
            assert [f["revision"] for f in frames] == list(range(2, 2 + turns))
            # It answers no close frame either, so it is cut.
            await eventually(lambda: len(hub.subscribers()) == 1)
        assert hub.counts.evicted == 1


async def test_of_many_slow_readers_the_largest_goes_first(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """All buffers together stay under the total, each being under its own limit."""
    async with running_server(
        tmp_path, buffer_bytes=10_000_000, buffer_total_bytes=400_000, **NO_PINGS
    ) as server:
        admin = Api(server, session, server.admin_token)
        hub = server.running.services.hub
        async with deaf_peers(admin, 4):
            turns = 0
            while hub.counts.evicted < 3:
                await grow(admin, 10)
                turns += 10
                assert turns < 500, "the total was never reached"
                assert sum(hub.buffers.sizes()) <= 400_000 + 4 * 20_000


async def test_a_reader_that_was_dropped_resumes(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """1013 tells a slow reader to come back, and `since` gives it all that it missed."""
    async with running_server(tmp_path, buffer_bytes=50_000, **NO_PINGS) as server:
        admin = Api(server, session, server.admin_token)
        hub = server.running.services.hub
        url = f"{server.url}/ws"
        async with session.ws_connect(
            url, headers=admin.auth(), autoping=False, heartbeat=None
        ) as slow:
            await slow.send_str('{"subscribe": "agent_config"}')
            first = json.loads(await slow.receive_str())
            hold_little(admin)
            slow._response.connection.transport.pause_reading()  # type: ignore[union-attr]
            last = 1
            while hub.counts.evicted == 0:
                last = await grow(admin, 10)
            slow._response.connection.transport.resume_reading()  # type: ignore[union-attr]
            reached = first["revision"]
            while (message := await slow.receive()).type is aiohttp.WSMsgType.TEXT:
                frame = json.loads(message.data)
                if frame["type"] != "heartbeat":
                    assert frame["revision"] == reached + 1
                    reached += 1
            assert slow.close_code == 1013
        async with admin.stream(since=reached, epoch=first["epoch"]) as again:
            assert (await again.frame())["revision"] == reached
            frames = await again.until(last)
            assert [f["revision"] for f in frames] == list(range(reached + 1, last + 1))


async def test_a_peer_that_answers_no_ping_is_cut(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """A connection whose peer is gone without a word ends within interval and time-out."""
    async with running_server(
        tmp_path, ping_interval_seconds=0.2, ping_timeout_seconds=0.2, heartbeat_seconds=60
    ) as server:
        admin = Api(server, session, server.admin_token)
        hub = server.running.services.hub
        async with deaf_peers(admin, 1), admin.stream() as answering:
            await answering.frame()
            reading = asyncio.create_task(answering.ws.receive())
            await eventually(lambda: len(hub.subscribers()) == 1)
            await admin.put("default", llm_model="still heard")
            assert "still heard" in (await reading).data


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /api/agents HT", b"GET /ws HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nX: "],
    ids=["nothing", "half a line", "half a handshake"],
)
async def test_half_a_request_and_silence_is_closed(admin: Api, sent: bytes) -> None:
    """A peer that does not finish its request's head is closed, told 408 if it had begun."""
    received = await raw_exchange(admin.server.url, sent)
    assert received.startswith(b"HTTP/1.1 408 ") if sent else received == b""


async def test_many_half_requests_leave_others_served(admin: Api) -> None:
    """200 peers with half a request each: others are served meanwhile, and all are closed."""
    host, _, port = admin.server.url.partition("://")[2].partition(":")
    connections = server_connections(admin)
    before = connections()
    peers = [await asyncio.open_connection(host, int(port)) for _ in range(200)]
    for _, writer in peers:
        writer.write(b"GET /ws HTTP/1.1\r\nHost: h\r\nX-Big: " + b"x" * 4000)
    async with admin.stream() as opened:
        await opened.frame()
        await admin.put("default", llm_model="served")
        assert (await opened.next())["revision"] == 2
    await eventually(lambda: connections() <= before + 1)
    for _, writer in peers:
        writer.close()


def server_connections(api: Api):  # type: ignore[no-untyped-def]
    """Return what counts the server's connections."""
    uvicorn_server = api.server.running._server
    assert uvicorn_server is not None
    return lambda: len(uvicorn_server.server_state.connections)
