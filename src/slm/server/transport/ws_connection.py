"""A WebSocket after its handshake; kept small, since a server holds thousands.

The handshake is in `ws_handshake`. Knows no agent, no token and no message's meaning, only bytes
and turns (RFC 6455; docs/decisions/0009-frames-go-to-the-transport.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, Protocol

from websockets import protocol as sans_io
from websockets.frames import Frame, Opcode

from slm.server.transport.http_protocol import LINGER_SECONDS, end_writing, unsent_bytes_of
from slm.server.transport.ws_frames import MAX_FRAGMENTS, Encoded, Parser, encode_frame
from slm.server.transport.ws_pings import Keepalive

try:
    from websockets.speedups import apply_mask
except ImportError:  # pragma: no cover - where it has no wheel
    from websockets.utils import apply_mask

SHORT_BYTES: Final = 4096
"""A longer or fragmented message needs a full parser."""

CLOSE_SECONDS: Final = 10.0
"""How long a peer may take to answer a close frame."""

TURN_FRAMES: Final = 64
"""After this many frames from one peer, other tasks get a turn."""

PIECE_BYTES: Final = 1024
"""How much the library's parser gets at once; it parses all frames in what it is given."""

BURST: Final = 1000
PER_SECOND: Final = 500
FRAME_BYTES: Final = 16 * 1024
"""A peer may send `BURST` frames at once, then `PER_SECOND`; `FRAME_BYTES` count as one more.

A peer that sends more is read only at that rate. A backend that acks sends ten per second.
"""

RECKON_AT: Final = 32
"""After this much, the time is checked."""

PONGS_WAIT_BYTES: Final = 16 * 1024
"""A peer that reads nothing gets no pongs beyond this many bytes (RFC 6455 section 5.5.3)."""

_TEXT, _PING, _PONG = 0x81, 0x89, 0x8A
"""The first byte of a whole message in one frame, a ping and a pong (RFC 6455 section 5.2)."""


class Listener(Protocol):
    """Receives what a peer sends."""

    def heard(self, message: str | bytes) -> None:
        """Handle one message, text or binary."""

    def gone(self) -> None:
        """Called once when no more messages will come: the connection has ended or is ending."""


class WebSocketConnection(asyncio.Protocol):
    """A WebSocket after its handshake; the order of `push` is the order on the wire.

    What nearly all peers send, a short message in one frame or a pong, is parsed here. For anything
    else the library's parser is created and kept until the connection ends.

    Args:
        transport: the open connection; not read before `listen`.
        keepalive: pings the peer.
        connections: the server's set of connections; contains this one while it is open.
        max_message_bytes: a longer message ends the connection (1009).

    Attributes:
        transport: where the frames go.
        closed: whether a close frame was sent, after which nothing may be sent.
    """

    # There are thousands, and a broadcast visits each.
    __slots__ = (
        "_connections",
        "_credit",
        "_credit_at",
        "_go_on",
        "_keepalive",
        "_listener",
        "_max_message_bytes",
        "_on_waiting",
        "_parser",
        "_spent",
        "_timer",
        "_unread",
        "_unsent",
        "_writable",
        "closed",
        "transport",
    )

    def __init__(
        self,
        transport: asyncio.Transport,
        keepalive: Keepalive,
        connections: set[Any],
        max_message_bytes: int,
    ) -> None:
        self.transport = transport
        self.closed = False
        self._connections = connections
        self._keepalive = keepalive
        self._max_message_bytes = max_message_bytes
        self._listener: Listener | None = None
        self._unread = b""
        self._parser: Parser | None = None
        self._writable: asyncio.Event | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._go_on: asyncio.TimerHandle | None = None
        self._on_waiting: Callable[[int], object] | None = None
        # Returns the bytes waiting for the peer; bound once, since each push calls it.
        self._unsent = unsent_bytes_of(transport)
        self._spent = 0.0
        self._credit = float(BURST)
        self._credit_at = 0.0

    def listen(self, listener: Listener, on_waiting: Callable[[int], object] | None = None) -> None:
        """Start receiving from the peer and pinging it; called once, before anything is read.

        Args:
            listener: receives the messages.
            on_waiting: called with the number of bytes waiting for the peer after anything other
                than a push was sent to it, and when much of what it sent is waiting here.
        """
        self._listener = listener
        self._on_waiting = on_waiting
        self._connections.add(self)
        if not self.closed:
            self._keepalive.watch(self)
        self.transport.resume_reading()

    # --- sending ---

    def push(self, frames: Encoded) -> int:
        """Write without waiting; return how many bytes wait for the peer, or -1 if it is closed."""
        # After a reset it is closing until the loop's next turn; much could be written until then.
        if self.closed or self.transport.is_closing():
            return -1
        self.transport.write(frames.encoded)
        return self._unsent()

    def _answer(self, data: bytes) -> None:
        """Write a frame of our own and account for it; nothing else writes one."""
        if data and not self.transport.is_closing():
            self.transport.write(data)
            waiting = self._unsent()
            if waiting and self._on_waiting is not None and not self.closed:
                self._on_waiting(waiting)

    def waiting_bytes(self) -> int:
        """Return how many bytes wait for the peer to read, or were received and await the rest."""
        held = self._parser.held_bytes if self._parser is not None else 0
        return self._unsent() + len(self._unread) + held

    async def drained(self) -> None:
        """Wait until the peer has read most of what was written, or is gone."""
        if self._writable is not None:
            await self._writable.wait()

    def end(self, code: int, reason: str = "") -> None:
        """Send a close frame; cut the connection if the peer does not answer in time."""
        if self.closed or self.transport.is_closing():
            return
        parser = self._parser_from_now_on()
        if parser.state is not sans_io.State.OPEN:
            return  # The peer has closed; its frame is answered when its turn comes.
        parser.send_close(code, reason)
        self._close()
        self._send_of(parser)

    def abort(self) -> None:
        """Cut the connection and discard what is waiting."""
        self.closed = True
        self._unread = b""
        self._keepalive.forget(self)
        self.transport.abort()

    def ping(self, frame: bytes) -> None:
        """Write a ping, unless the connection is closing."""
        if not self.closed and not self.transport.is_closing():
            self._answer(frame)

    def shutdown(self) -> None:
        """Close like a restarting server (1012); called by uvicorn."""
        self.end(1012, "restarting")

    # --- reading; called by the transport ---

    def data_received(self, data: bytes) -> None:
        """Process what the peer sent, as far as its turn allows."""
        self._unread = self._unread + data if self._unread else data
        if self._go_on is None:
            self._take_turn()

    def eof_received(self) -> None:
        """End the connection, because the peer will send no more."""
        if not self.closed:
            self._close(LINGER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release everything."""
        self.closed = True
        self._keepalive.forget(self)
        self._connections.discard(self)
        self._unread = b""
        self._parser = self._on_waiting = None
        for timer in (self._timer, self._go_on):
            if timer is not None:
                timer.cancel()
        self.resume_writing()
        self._say_gone()

    def pause_writing(self) -> None:
        """Note that much is waiting for the peer."""
        self._writable = asyncio.Event()

    def resume_writing(self) -> None:
        """Note that the peer has read most of it."""
        if self._writable is not None:
            self._writable.set()
            self._writable = None

    # --- turns ---

    def _take_turn(self) -> None:
        """Process some frames; reading pauses if more are there or the peer sent too many."""
        data = self._unread
        start = frames = 0
        if self._parser is None:
            start, frames = self._read_short(data)
        while self._parser is not None and start < len(data) and frames < TURN_FRAMES:
            frames += self._read(self._parser, data[start : start + PIECE_BYTES])
            start += PIECE_BYTES
        self._unread = b"" if start >= len(data) or self.transport.is_closing() else data[start:]
        # A read has a cost of its own, whatever it contains.
        self._spent += frames + start / FRAME_BYTES + 0.1
        if self._spent >= RECKON_AT or frames >= TURN_FRAMES:
            self._reckon()
        if self._parser is not None or self._go_on is not None:
            self._note_held()

    def _reckon(self) -> None:
        """Pause reading if the peer sent too much, or until the others had a turn."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        credit = min(BURST, self._credit + (now - self._credit_at) * PER_SECOND) - self._spent
        self._credit, self._credit_at, self._spent = credit, now, 0.0
        if credit < 0 or self._unread:
            self.transport.pause_reading()
            self._go_on = loop.call_later(max(0.0, -credit / PER_SECOND), self._next_turn)

    def _note_held(self) -> None:
        if self._on_waiting is not None and self.waiting_bytes() > SHORT_BYTES:
            self._on_waiting(self._unsent())

    def _next_turn(self) -> None:
        self._go_on = None
        self.transport.resume_reading()
        if self._unread:
            self._take_turn()

    # --- the fast path ---

    def _read_short(self, data: bytes) -> tuple[int, int]:
        """Process whole short messages, pings and pongs; the parser takes over at anything else.

        Returns:
            How far it read, and how many frames there were.
        """
        start, size, frames = 0, len(data), 0
        while self._parser is None and size - start >= 2 and frames < TURN_FRAMES:
            first, length = data[start], data[start + 1] & 0x7F
            mask = start + 2
            is_short = first in (_TEXT, _PING, _PONG) and data[start + 1] & 0x80
            if length == 126 and first == _TEXT:
                if size - start < 4:
                    break
                length = int.from_bytes(data[mask : mask + 2], "big")
                mask += 2
                is_short = is_short and 126 <= length <= SHORT_BYTES
            elif length > 125:
                is_short = False
            if not is_short:
                self._parser_from_now_on()
                break
            payload = mask + 4
            if payload + length > size:
                break
            start = payload + length
            frames += 1
            self._take(first, apply_mask(data[payload:start], data[mask:payload]))
        return start, frames

    def _take(self, first: int, payload: bytes) -> None:
        if first == _TEXT:
            self._hear_text(payload)
        elif first == _PONG:
            self._keepalive.answered(self, payload)
        else:
            self._pong(payload)

    def _pong(self, payload: bytes) -> None:
        if not self.closed and self._unsent() < PONGS_WAIT_BYTES:
            self._answer(encode_frame(Opcode.PONG, payload))

    def _hear_text(self, payload: bytes) -> None:
        try:
            message = payload.decode()
        except UnicodeDecodeError:
            self.end(1007, "not UTF-8")
        else:
            self._hear(message)

    def _hear(self, message: str | bytes) -> None:
        if self._listener is not None and not self.closed:
            self._listener.heard(message)

    # --- the library's parser ---

    def _parser_from_now_on(self) -> Parser:
        if self._parser is None:
            self._parser = Parser(self._max_message_bytes)
        return self._parser

    def _read(self, parser: Parser, data: bytes) -> int:
        """Run the parser; return how many frames there were."""
        if parser.parser_exc is not None:
            return 0  # It was told why already; what it still sends is discarded.
        parser.receive_data(data)
        if parser.parser_exc is not None:
            self._fail(parser)
            return 1
        frames = parser.frames_received()
        for frame in frames:
            if frame.opcode is Opcode.CLOSE:
                self._answer_close(parser)
                break
            if self.closed:
                continue
            if frame.opcode is Opcode.PING:
                self._pong(bytes(frame.data))
            elif frame.opcode is Opcode.PONG:
                self._keepalive.answered(self, bytes(frame.data))
            else:
                self._assemble(parser, frame)
        return len(frames)

    def _assemble(self, parser: Parser, frame: Frame) -> None:
        whole = parser.add(frame)
        if len(parser.parts) > MAX_FRAGMENTS:
            parser.parts = []
            self.end(1009, "too many fragments")
        elif whole is not None and parser.opcode is Opcode.TEXT:
            self._hear_text(whole)
        elif whole is not None:
            self._hear(whole)

    def _answer_close(self, parser: Parser) -> None:
        """Answer the peer's close, or handle its answer to ours; cut a peer that does not read."""
        self._send_of(parser)
        self.transport.close()
        if not self.closed:
            self._close()

    def _fail(self, parser: Parser) -> None:
        """Close with the reason (1002, 1007, 1009), reading briefly so that it arrives."""
        self._send_of(parser)
        end_writing(self.transport)
        if not self.closed:
            self._close(LINGER_SECONDS)

    def _send_of(self, parser: Parser) -> None:
        self._answer(b"".join(parser.data_to_send()))

    # --- the end ---

    def _close(self, seconds: float = CLOSE_SECONDS) -> None:
        self.closed = True
        self._keepalive.forget(self)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(
            min(seconds, self._keepalive.timeout_seconds), self.transport.abort
        )
        # Later, because the caller may be iterating over all connections.
        loop.call_soon(self._say_gone)

    def _say_gone(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.gone()
