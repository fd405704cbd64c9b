"""A WebSocket after its handshake: what is heard, in whatever pieces it comes, and the pings."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode

from slm.server.stream.encoding import Frames
from slm.server.transport.ws_connection import SHORT_BYTES, WebSocketConnection
from slm.server.transport.ws_pings import Keepalive
from tests.support.servers import eventually

TIMEOUT_SECONDS = 0.3


class Heard:
    """What a connection heard."""

    def __init__(self) -> None:
        self.messages: list[str | bytes] = []
        self.ended = 0

    def heard(self, message: str | bytes) -> None:
        self.messages.append(message)

    def gone(self) -> None:
        self.ended += 1


class TakenOver(asyncio.Protocol):
    """What stands where the handshake was."""

    def __init__(self, keepalive: Keepalive, heard: Heard) -> None:
        self._keepalive = keepalive
        self._heard = heard
        self.connections: set[Any] = set()
        self.connection: WebSocketConnection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.connection = WebSocketConnection(
            transport, self._keepalive, self.connections, 1024 * 1024
        )
        transport.set_protocol(self.connection)
        self.connection.listen(self._heard)


class Peer:
    """The other end: a bare socket."""

    def __init__(self, taken: TakenOver, heard: Heard, end: socket.socket) -> None:
        self.taken = taken
        self.connection = taken.connection
        self.heard = heard
        self._end = end
        self._unread = b""

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._end, data)

    async def frame(self) -> tuple[int, bytes]:
        """Return the next frame's first byte and payload; it is a short one."""
        while len(self._unread) < 2 or len(self._unread) < 2 + self._unread[1]:
            received = await asyncio.get_running_loop().sock_recv(self._end, 4096)
            assert received, "the connection ended"
            self._unread += received
        end = 2 + self._unread[1]
        frame, self._unread = self._unread[:end], self._unread[end:]
        return frame[0], frame[2:]

    def reset(self) -> None:
        """Cut the connection; the other end hears of it in its loop's next turn."""
        self._end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._end.close()

    def leave(self) -> None:
        """Close this end."""
        self._end.close()

    async def closed(self) -> None:
        """Wait until nothing more comes."""
        while await asyncio.get_running_loop().sock_recv(self._end, 4096):
            pass


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of one TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        theirs = socket.create_connection(listening.getsockname())
        ours, _ = listening.accept()
        ours.setblocking(False)
        return ours, theirs


@asynccontextmanager
async def opened(
    interval_seconds: float = 60,
    pair: Callable[[], tuple[socket.socket, socket.socket]] = socket.socketpair,
) -> AsyncIterator[Peer]:
    """A connection that was taken over, and its peer."""
    ours, theirs = pair()
    theirs.setblocking(False)
    heard = Heard()
    taken = TakenOver(Keepalive(interval_seconds, TIMEOUT_SECONDS), heard)
    transport, _ = await asyncio.get_running_loop().connect_accepted_socket(lambda: taken, ours)
    try:
        yield Peer(taken, heard, theirs)
    finally:
        transport.abort()
        theirs.close()
        await eventually(lambda: not taken.connections)
        assert heard.ended == 1


def masked(opcode: Opcode, payload: bytes, fin: bool = True) -> bytes:
    """A client's frame, under a mask of its own."""
    return Frame(opcode, payload, fin).serialize(mask=True, extensions=[])


texts = st.text(max_size=200) | st.integers(1, 3 * SHORT_BYTES).map("é".__mul__)
messages = st.lists(st.tuples(texts, st.integers(1, 3), st.booleans()), max_size=6)


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
                data += masked(opcode, part, fin=number == len(parts) - 1)
                if ping:
                    data += masked(Opcode.PING, b"%d" % pings)
                    pings += 1
        async with opened() as peer:
            for cut in cuts:
                await peer.send(data[:cut])
                data = data[cut:]
                await asyncio.sleep(0)
            await peer.send(data + masked(Opcode.TEXT, b"last"))
            await eventually(lambda: peer.heard.messages[-1:] == ["last"], every=0)
            assert peer.heard.messages[:-1] == [text for text, _, _ in sent]
            for number in range(pings):
                assert await peer.frame() == (0x8A, b"%d" % number)

    asyncio.run(example())


@pytest.mark.parametrize("size", [0, 1, 125, 126, 200, SHORT_BYTES])
async def test_short_messages_need_no_parser(size: int) -> None:
    """What a backend says, even byte by byte, is heard without the memory of a parser."""
    async with opened() as peer:
        for byte in masked(Opcode.TEXT, b"x" * size) + masked(Opcode.PING, b"?"):
            await peer.send(bytes([byte]))
        assert await peer.frame() == (0x8A, b"?")
        assert peer.heard.messages == ["x" * size]
        assert peer.connection._parser is None


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x81\x02hi", 1002),
        (b"\xc1\x82\0\0\0\0hi", 1002),
        (b"\x83\x80\0\0\0\0", 1002),
        (b"\x89\xfe\x00\x7e\0\0\0\0" + bytes(126), 1002),
        (b"\x80\x80\0\0\0\0", 1002),
        (b"\x81\xff" + (1 << 40).to_bytes(8, "big"), 1009),
        (masked(Opcode.TEXT, b"\xff"), 1007),
        (masked(Opcode.TEXT, b"a", fin=False) + masked(Opcode.CONT, b"\xff"), 1007),
    ],
    ids=[
        "no mask",
        "a reserved bit",
        "no opcode",
        "a ping of 126 bytes",
        "the rest of nothing",
        "a terabyte",
        "not UTF-8",
        "not UTF-8 in fragments",
    ],
)
async def test_what_breaks_the_protocol_is_told_so(data: bytes, code: int) -> None:
    """The close code says what was wrong, after a sound message too, and nothing of it is heard."""
    async with opened() as peer:
        await peer.send(masked(Opcode.TEXT, b"sound") + data)
        first, payload = await peer.frame()
        assert (first, int.from_bytes(payload[:2], "big")) == (0x88, code)
        assert peer.heard.messages == ["sound"]
        assert peer.connection.push(Frames(("late",), 1)) == -1
        await eventually(lambda: peer.heard.ended)


async def test_a_close_is_answered_and_ends_it() -> None:
    """A peer that closes gets its code back, and the connection is over."""
    async with opened() as peer:
        await peer.send(masked(Opcode.CLOSE, (1000).to_bytes(2, "big")))
        assert await peer.frame() == (0x88, (1000).to_bytes(2, "big"))
        await peer.closed()


async def test_our_close_waits_for_the_answer_but_not_for_ever() -> None:
    """What comes between our close and its answer is thrown away; without an answer it is cut."""
    async with opened() as peer:
        peer.connection.end(1013, "too slow")
        assert await peer.frame() == (0x88, (1013).to_bytes(2, "big") + b"too slow")
        await eventually(lambda: peer.heard.ended)
        await peer.send(masked(Opcode.TEXT, b"late"))
        await peer.closed()
        assert peer.heard.messages == []


async def test_one_that_answers_pings_stays_and_each_ping_is_another() -> None:
    """A peer is pinged again and again, as long as it answers."""
    async with opened(interval_seconds=0.05) as peer:
        seen = set()
        for _ in range(5):
            first, payload = await peer.frame()
            assert first == 0x89
            seen.add(payload)
            await peer.send(masked(Opcode.PONG, payload))
        assert len(seen) == 5


async def test_a_pong_that_answers_nothing_does_not_count() -> None:
    """A peer that sends pongs of its own making is cut as one that sends none."""
    async with opened(interval_seconds=0.05) as peer:
        await peer.frame()
        await peer.send(masked(Opcode.PONG, b"of its own"))
        await peer.closed()


async def test_a_peer_that_reset_the_connection_is_told_nothing_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """However much there is to tell it before the loop hears of the reset, nothing is logged."""
    async with opened(pair=tcp_pair) as peer:
        peer.reset()
        told = [peer.connection.push(Frames(("{}",), 1)) for _ in range(10)]
        assert told[-1] == -1
        await eventually(lambda: peer.heard.ended == 1)
    assert not caplog.records


async def test_a_broken_frame_of_a_peer_that_is_gone_ends_the_connection() -> None:
    """It cannot be told what was wrong, and nothing is written to it afterwards."""
    async with opened(pair=tcp_pair) as peer:
        peer.leave()
        # Whatever is sent to it now is answered with a reset, before the loop hears of the end.
        peer.connection.data_received(b"\xff\x80\x00\x00\x00\x00")
        assert peer.connection.closed
        assert peer.connection.push(Frames(("{}",), 1)) == -1
        await eventually(lambda: peer.heard.ended == 1)
