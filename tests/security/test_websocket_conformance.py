"""Both ends of our WebSockets against Autobahn's cases, as the suite `kosoku` runs them.

Sections 1 to 7 are the protocol itself (framing, pings, fragments, UTF-8, closing): 246 cases. The
rest is speed (9) and compression (12, 13), which we do not speak.

Two of them fail with the libraries as they come. 7.1.5, a close frame between two fragments, is
answered by `websockets`, and so by uvicorn, with 1002; our class mends that. In 7.9.5 a peer sends
the close code 1006, which must never be sent: aiohttp takes every code of its `WSCloseCode` for
allowed, 1006 too, and answers as if nothing were wrong. That is aiohttp's, its client's as well as
its server's; it harms nobody here, since the connection ends either way and the SDK comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any

import aiohttp
import pytest
import uvicorn
from kosoku import FailureError, run_fuzzingclient, run_fuzzingserver
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame, Opcode

from slm.client.transport.websocket import DirectWebSocket
from slm.server.transport.http_protocol import http_protocol
from slm.server.transport.ws_connection import WebSocketConnection
from slm.server.transport.ws_handshake import TAKE_OVER, handshake_protocol
from tests.support.servers import eventually

PROTOCOL_CASES = [f"{section}.*" for section in range(1, 8)]
ALL = 246


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Send every message back as it came, as an ASGI application does; for tests alone."""
    if scope["type"] != "websocket":
        return
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        text, data = message.get("text"), message.get("bytes")
        await send({"type": "websocket.send", "text": text, "bytes": data})


class Echo:
    """Frames of one message, and who sends each message back as it came."""

    def __init__(self, connection: WebSocketConnection) -> None:
        self.connection = connection
        self.encoded = b""

    def heard(self, message: str | bytes) -> None:
        opcode = Opcode.TEXT if isinstance(message, str) else Opcode.BINARY
        data = message.encode() if isinstance(message, str) else message
        self.encoded = Frame(opcode, data).serialize(mask=False, extensions=[])
        self.connection.push(self)

    def gone(self) -> None:
        """Nothing is left to do."""


async def echo_taken_over(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The same by way of the connection itself, as the server's own route does."""
    if scope["type"] != "websocket":
        return
    await receive()
    await send({"type": "websocket.accept"})
    connection = scope["extensions"][TAKE_OVER]()
    connection.listen(Echo(connection))


@contextlib.asynccontextmanager
async def echo_server(protocol: type[WebSocketsSansIOProtocol], app: Any) -> AsyncIterator[str]:
    """Serve `app` over this protocol class and yield `host:port`."""
    config = uvicorn.Config(
        app,
        port=0,
        http=http_protocol(8192, 5.0),
        ws=protocol,
        ws_per_message_deflate=False,
        lifespan="off",
        log_config=None,
        log_level="critical",
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await eventually(lambda: server.started)
    host, port = server.servers[0].sockets[0].getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        server.should_exit = True
        await serving


def failed(results: Iterable[Any]) -> dict[str, str]:
    """What did not pass, and why."""
    return {
        result.case_id: f"{result.result} {result.result_close}"
        for result in results
        if not result.passed
    }


async def _cases_against(protocol: type[WebSocketsSansIOProtocol], app: Any) -> list[Any]:
    async with echo_server(protocol, app) as address:
        try:
            return list(await run_fuzzingclient(address, PROTOCOL_CASES, concurrency=8))
        except FailureError as failure:
            return list(failure.results)


async def test_our_server_protocol_passes_every_case() -> None:
    """The class that serves /ws speaks RFC 6455 to the letter, under an echo application."""
    results = await _cases_against(handshake_protocol(20, 20), echo_taken_over)
    assert len(results) == ALL
    assert failed(results) == {}


async def test_plain_uvicorn_fails_the_case_that_our_protocol_mends() -> None:
    """Without our class 7.1.5 fails; the day it passes, the mending can go."""
    assert set(failed(await _cases_against(WebSocketsSansIOProtocol, echo))) == {"7.1.5"}


@pytest.mark.parametrize("direct", [False, True], ids=["aiohttp's", "ours over it"])
async def test_the_client_passes_every_case_but_one(direct: bool) -> None:
    """The SDK's WebSocket in an echo loop, heard both ways; 7.9.5 is aiohttp's, harming nobody."""
    async with (
        run_fuzzingserver(PROTOCOL_CASES, port=0) as server,
        aiohttp.ClientSession(ws_response_class=DirectWebSocket) as session,
    ):
        base = f"http://{server.address}:{server.port}"
        async with session.ws_connect(f"{base}/getCaseCount") as socket:
            assert int(await socket.receive_str()) == ALL
        for first in range(1, ALL + 1, 8):
            numbers = range(first, min(first + 8, ALL + 1))
            urls = [f"{base}/runCase?case={number}&agent=aiohttp" for number in numbers]
            await asyncio.gather(*(_echo_case(session, url, direct) for url in urls))
        async with session.ws_connect(f"{base}/updateReports?agent=aiohttp") as socket:
            await socket.receive()
        try:
            async with asyncio.timeout(10):
                results: list[Any] = list(await server.get_result())
        except FailureError as failure:
            results = list(failure.results)
    assert len(results) == ALL
    assert set(failed(results)) == {"7.9.5"}


async def _echo_case(session: aiohttp.ClientSession, url: str, direct: bool) -> None:
    async with session.ws_connect(url, compress=0, max_msg_size=0) as socket:
        echoes: set[asyncio.Task[None]] = set()
        assert isinstance(socket, DirectWebSocket)
        if direct:
            socket.hear(lambda text: echoes.add(asyncio.create_task(socket.send_str(text))))
        async for message in socket:
            if message.type is aiohttp.WSMsgType.TEXT:
                await socket.send_str(message.data)
            elif message.type is aiohttp.WSMsgType.BINARY:
                await socket.send_bytes(message.data)
        await asyncio.gather(*echoes, return_exceptions=True)
