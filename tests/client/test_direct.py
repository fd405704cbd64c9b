"""Messages taken as they are read: in order, in whatever pieces they come, and with aiohttp."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
import trustme
from aiohttp import WSMsgType, web
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode

from slm.client.transport.websocket import SHORT_BYTES, DirectWebSocket
from slm.errors import ProtocolError
from tests.support.servers import eventually


class Line:
    """A WebSocket between aiohttp's client and a server that writes whatever bytes it is given."""

    def __init__(self, ws: DirectWebSocket, transport: asyncio.Transport) -> None:
        self.ws = ws
        self.transport = transport
        self.heard: list[str] = []
        self.direct = 0
        self.pings: list[bytes] = []

    def take(self, text: str) -> None:
        self.heard.append(text)
        self.direct += 1

    async def receive(self) -> WSMsgType:
        """Hear what does not come directly; return how it ended."""
        while True:
            message = await self.ws.receive()
            if message.type is WSMsgType.TEXT:
                self.heard.append(message.data)
            elif message.type is WSMsgType.PING:
                self.pings.append(bytes(message.data))
            elif message.type is not WSMsgType.PONG:
                return message.type


@asynccontextmanager
async def line(authority: trustme.CA | None = None) -> AsyncIterator[Line]:
    """A line that was just opened, over TLS where there is somebody to vouch for it."""
    ours = theirs = None
    if authority is not None:
        ours = ssl.create_default_context()
        authority.configure_trust(ours)
        theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(theirs)
    transports: asyncio.Queue[asyncio.Transport] = asyncio.Queue()
    over = asyncio.Event()

    async def serve(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(compress=False, autoping=False)
        await ws.prepare(request)
        assert isinstance(request.transport, asyncio.Transport)
        transports.put_nowait(request.transport)
        await over.wait()
        return ws

    app = web.Application()
    app.router.add_get("/ws", serve)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=theirs).start()
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession(ws_response_class=DirectWebSocket) as session:
        timeout = aiohttp.ClientWSTimeout(ws_close=0.1)
        ws = await session.ws_connect(
            f"{'https' if theirs else 'http'}://127.0.0.1:{port}/ws",
            autoping=False,
            compress=0,
            timeout=timeout,
            ssl=ours or True,
        )
        assert isinstance(ws, DirectWebSocket)
        yield Line(ws, await transports.get())
        over.set()
        await ws.close()
    await runner.cleanup()


async def test_without_a_transport_messages_come_by_receive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Should aiohttp no longer give its transport away, nothing is lost but a little time."""
    async with line() as end:
        with monkeypatch.context() as patched:
            patched.setattr("aiohttp.connector.Connection.transport", None)
            end.ws.hear(end.take)
        hearing = asyncio.create_task(end.receive())
        end.transport.write(frame(Opcode.TEXT, b"told"))
        await eventually(lambda: end.heard == ["told"])
        assert end.direct == 0
        hearing.cancel()


def frame(opcode: Opcode, payload: bytes, fin: bool = True) -> bytes:
    """A server's frame: without a mask."""
    return Frame(opcode, payload, fin).serialize(mask=False, extensions=[])


texts = st.text(max_size=200) | st.integers(1, 3 * SHORT_BYTES).map("é".__mul__)
messages = st.lists(st.tuples(texts, st.sampled_from([1, 1, 1, 2, 3]), st.booleans()), max_size=6)


@given(messages, st.lists(st.integers(1, 5000), max_size=30))
def test_whatever_pieces_it_comes_in_the_messages_are_the_same(
    sent: list[tuple[str, int, bool]], cuts: list[int]
) -> None:
    """Fragments, pings between and any cut of the bytes: each message is heard once, in order."""

    async def example() -> None:
        data, pings = b"", 0
        for text, fragments, ping in sent:
            raw = text.encode()
            size = len(raw) // fragments + 1
            parts = [raw[start : start + size] for start in range(0, len(raw), size)] or [b""]
            for number, part in enumerate(parts):
                opcode = Opcode.CONT if number else Opcode.TEXT
                data += frame(opcode, part, fin=number == len(parts) - 1)
                if ping:
                    data += frame(Opcode.PING, b"%d" % pings)
                    pings += 1
        async with line() as end:
            end.ws.hear(end.take)
            hearing = asyncio.create_task(end.receive())
            for cut in cuts:
                end.transport.write(data[:cut])
                data = data[cut:]
                await asyncio.sleep(0)
            end.transport.write(data + frame(Opcode.TEXT, b"last"))
            await eventually(lambda: end.heard[-1:] == ["last"], every=0)
            await eventually(lambda: len(end.pings) == pings, every=0)
            assert end.heard[:-1] == [text for text, _, _ in sent]
            assert end.pings == [b"%d" % number for number in range(pings)]
            hearing.cancel()

    asyncio.run(example())


@pytest.mark.parametrize("size", [0, 1, 125, 126, 4096, 65535])
async def test_a_message_needs_no_task(size: int) -> None:
    """A whole message is heard though nobody waits in `receive`; a short one in pieces as well."""
    async with line() as end:
        end.ws.hear(end.take)
        data = frame(Opcode.TEXT, b"x" * size)
        whole = len(data) if size > SHORT_BYTES else 1
        for start in range(0, len(data), whole):
            end.transport.write(data[start : start + whole])
        await eventually(lambda: end.heard == ["x" * size])
        assert end.direct == 1


@pytest.mark.parametrize(
    "data",
    [
        b"\x81\x82\0\0\0\0hi",
        b"\xc1\x02hi",
        b"\x83\x00",
        b"\x89\x7e\x00\x7e" + bytes(126),
        b"\x80\x00",
        b"\x81\x7e\x00\x02hi",
        frame(Opcode.TEXT, b"\xff"),
        frame(Opcode.TEXT, b"a", fin=False) + frame(Opcode.CONT, b"\xff"),
        frame(Opcode.BINARY, b"a"),
        frame(Opcode.CLOSE, (1012).to_bytes(2, "big")),
    ],
    ids=[
        "a mask",
        "a reserved bit",
        "no opcode",
        "a ping of 126 bytes",
        "the rest of nothing",
        "a length that is longer than it need be",
        "not UTF-8",
        "not UTF-8 in fragments",
        "binary",
        "a close",
    ],
)
async def test_whatever_is_not_usual_is_aiohttps(data: bytes) -> None:
    """It ends, or goes on, as it does without the short way; what came before it was heard."""
    seen: list[tuple[WSMsgType, list[str], int | None]] = []
    for direct in (True, False):
        async with line() as end:
            if direct:
                end.ws.hear(end.take)
            after = frame(Opcode.TEXT, b"after") + frame(Opcode.CLOSE, (1001).to_bytes(2, "big"))
            end.transport.write(frame(Opcode.TEXT, b"before") + data + after)
            async with asyncio.timeout(10):
                ended = await end.receive()
            assert end.direct == direct
            seen.append((ended, end.heard, end.ws.close_code))
    assert seen[0] == seen[1]
    assert seen[0][1][0] == "before"


async def test_what_cannot_be_taken_comes_again() -> None:
    """A message that is refused is told to who waits in `receive`, and so is all that follows."""

    def take(text: str) -> None:
        if text == "bad":
            raise ProtocolError("bad")
        end.take(text)

    async with line() as end:
        end.ws.hear(take)
        end.transport.write(b"".join(frame(Opcode.TEXT, text) for text in (b"good", b"bad", b"x")))
        assert [(await end.ws.receive()).data for _ in range(2)] == ["bad", "x"]
        assert end.heard == ["good"]


async def test_a_mistake_ends_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    """An exception that nobody foresaw is logged, and nothing that follows is heard."""

    def take(text: str) -> None:
        end.take(text)
        if text == "bad":
            raise RuntimeError

    async with line() as end:
        end.ws.hear(take)
        end.transport.write(b"".join(frame(Opcode.TEXT, text) for text in (b"good", b"bad", b"x")))
        assert await end.receive() is WSMsgType.CLOSED
        assert end.heard == ["good", "bad"]
    assert "the stream failed; connecting again" in caplog.text


async def test_who_takes_a_message_may_stop_hearing() -> None:
    """`deafen` in the middle of what was read at once: the rest is there, once and in order."""

    def take(text: str) -> None:
        end.take(text)
        end.ws.deafen()

    async with line() as end:
        end.ws.hear(take)
        data = b"".join(frame(Opcode.TEXT, text) for text in (b"one", b"two", b"three"))
        end.transport.write(data[:1])
        await asyncio.sleep(0)
        end.transport.write(data[1:])
        assert [(await end.ws.receive()).data for _ in range(2)] == ["two", "three"]
        assert end.heard == ["one"]


async def test_nothing_is_taken_any_more() -> None:
    """After `deafen` everything comes by `receive`, the rest of a message under way too."""
    async with line() as end:
        end.ws.hear(end.take)
        data = frame(Opcode.TEXT, b"one") + frame(Opcode.TEXT, b"two")
        end.transport.write(data[:-2])
        await eventually(lambda: end.heard)
        end.ws.deafen()
        end.transport.write(data[-2:] + frame(Opcode.TEXT, b"three"))
        assert [(await end.ws.receive()).data for _ in range(2)] == ["two", "three"]
        assert end.heard == ["one"]


@pytest.mark.parametrize("ending", ["close", "abort"])
async def test_an_end_over_tls_is_an_end(ending: str) -> None:
    """However it ends, over TLS too, what was said before was heard and nothing is raised."""
    async with line(trustme.CA()) as end:
        end.ws.hear(end.take)
        end.transport.write(frame(Opcode.TEXT, b"one"))
        await eventually(lambda: end.heard == ["one"])
        end.transport.write(frame(Opcode.CLOSE, (1012).to_bytes(2, "big")))
        getattr(end.transport, ending)()
        async with asyncio.timeout(10):
            await end.receive()
        end.ws.deafen()


async def test_a_line_that_is_gone_is_not_heard() -> None:
    """Nothing happens where there is nothing to hear."""
    async with line() as end:
        end.transport.abort()
        assert (await end.ws.receive()).type is WSMsgType.CLOSED
        end.ws.hear(end.take)
        end.ws.deafen()
