"""uvicorn's two protocol classes, mended: limits on what a peer may send, and frames pushed raw.

`uvicorn.Config(http=…, ws=…)` takes classes; these subclass the pinned version's. Knows no agent,
no token and no message, only bytes, limits and timers.
"""

from __future__ import annotations

import asyncio
import json
import logging
from asyncio import TimerHandle
from collections.abc import Sequence
from typing import Any, Final, Protocol

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN
from websockets.server import ServerProtocol

PUSH_EXTENSION: Final = "slm.push"
"""The key of `scope["extensions"]` under which an application finds its `Outlet`."""

MAX_HEADERS: Final = 100
"""How many header fields a request may have; past 128 the WebSocket parser would answer nothing."""

LINGER_SECONDS: Final = 2.0
"""How long a refused peer may go on sending before its connection is cut.

Closing with unread bytes sends a reset, which can overtake the answer that says why.
"""

logger = logging.getLogger(__name__)


def text_frames(messages: Sequence[str]) -> bytes:
    """Return the WebSocket text frames of these messages, one after the other, ready to be sent.

    A server's frames carry no mask (RFC 6455 section 5.1), so one encoding fits every connection.
    """
    return b"".join(
        Frame(Opcode.TEXT, message.encode()).serialize(mask=False, extensions=[])
        for message in messages
    )


class HttpProtocol(HttpToolsProtocol):
    """HTTP/1.1 with a limit on the request's head and on the time that head and body may take.

    Without the first an upgrade with large headers hangs for ever, since the WebSocket parser never
    answers it; without the second a peer that sends half a header or half a body keeps its
    connection for ever. What stands around the chunks of a body is limited as a head is: the parser
    would keep a trailer of any size.
    """

    max_header_bytes = 8192
    header_timeout_seconds = 10.0

    _header_timer: TimerHandle | None = None
    _in_head = True
    _in_body = False
    _head_bytes = 0
    _field_bytes = 0
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first request's head."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop every clock."""
        self._stop_header_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, unless the peer was refused; what it still sends is thrown away."""
        if self._refused or self.parser is None:
            return
        self._unset_keepalive_if_required()
        if self._in_head or self._in_body:
            self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._stop_header_timer()
            # Any other upgrade, such as curl's h2c, is ignored (RFC 9110 section 7.8).
            if self._should_upgrade():
                self.handle_websocket_upgrade()
        except httptools.HttpParserError:
            self._refuse(431 if self._field_bytes > self.max_header_bytes else 400)
        else:
            if (self._in_head or self._in_body) and self._head_bytes > self.max_header_bytes:
                self._refuse(431)
            elif self._in_body and self._header_timer is None:
                self._header_timer = self.loop.call_later(
                    self.header_timeout_seconds, self._body_is_late
                )
            elif self._in_head and self._head_bytes and self._header_timer is None:
                self._expect_head()

    def on_message_begin(self) -> None:
        """Count a new head."""
        super().on_message_begin()
        self._in_head = True
        self._field_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Count the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header field; a trailer counts too."""
        self._count(len(name) + len(value) + 4)
        if len(self.headers) >= MAX_HEADERS:
            self._count(self.max_header_bytes)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop the clock: what follows is the body."""
        self._in_head, self._in_body = False, True
        self._head_bytes = 0
        self._stop_header_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body; its size is the application's to limit."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Wait for the next request, if the connection is kept."""
        self._in_head, self._in_body = True, False
        self._head_bytes = 0
        self._stop_header_timer()
        super().on_message_complete()

    def shutdown(self) -> None:
        """Close when idle, else after the answer under way."""
        self._stop_header_timer()
        super().shutdown()

    def _count(self, size: int) -> None:
        self._field_bytes += size
        if self._field_bytes > self.max_header_bytes:
            # Inside a callback of the parser this ends the parsing.
            raise ValueError("the request's head is over the limit")

    def _expect_head(self) -> None:
        self._header_timer = self.loop.call_later(self.header_timeout_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._header_timer = None
        if self._head_bytes:
            self._refuse(408)
        else:
            self.transport.close()

    def _body_is_late(self) -> None:
        """Cut the connection: the request is answered already, or waits for its body in vain."""
        self._header_timer = None
        self.transport.abort()

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _refuse(self, status: int) -> None:
        """Answer with a problem and close, reading on for a moment so that the answer arrives."""
        if self._refused:
            return
        self._refused = True
        self._stop_header_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            # An earlier request of the same connection is still being answered.
            self.transport.abort()
            return
        code, title = REFUSALS[status]
        problem = {"type": "about:blank", "title": title, "status": status, "detail": title}
        body = json.dumps(problem | {"code": code}).encode()
        self.transport.write(
            STATUS_LINE[status]
            + b"content-type: application/problem+json\r\nconnection: close\r\ncontent-length: "
            + str(len(body)).encode()
            + b"\r\n\r\n"
            + body
        )
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def eof_received(self) -> None:
        """Let a half-closed connection end."""
        if self._refused:
            self.transport.abort()


REFUSALS: Final = {
    400: ("bad-request", "The request cannot be read"),
    408: ("request-timeout", "The request's head did not come in time"),
    431: ("header-fields-too-large", "The request's head is too large"),
}
"""What the parser itself refuses, by status: the problem's code and title."""


class _Conversation(ServerProtocol):
    """The library's protocol, which answers a close frame between two fragments as it must.

    The library calls it a protocol error (1002), so plain uvicorn fails Autobahn's case 7.1.5; a
    control frame may stand there (RFC 6455 section 5.4), and each close is answered (5.5.1).
    """

    def recv_frame(self, frame: Frame) -> None:
        if frame.opcode is Opcode.CLOSE:
            self.current_size = None
        super().recv_frame(frame)


class Encoded(Protocol):
    """What is pushed: WebSocket frames, ready for any connection."""

    @property
    def encoded(self) -> bytes:
        """The frames, one after the other."""


class Outlet:
    """The way straight to one connection's transport; the order of `push` is that on the wire.

    Kept apart from the connection and as small as can be: a broadcast to thousands touches this
    alone, while their protocol objects would push each other out of the processor's cache.

    Attributes:
        transport: where the frames go.
        closed: whether a close frame has gone out, after which nothing may.
    """

    __slots__ = ("_protocol", "closed", "transport")

    def __init__(self, protocol: PushProtocol) -> None:
        self._protocol = protocol
        self.transport = protocol.transport
        self.closed = False

    def push(self, frames: Encoded) -> int:
        """Write without waiting; return how many bytes wait for the peer, -1 once it is closed."""
        transport = self.transport
        if self.closed or transport.is_closing():
            return -1
        transport.write(frames.encoded)
        return transport.get_write_buffer_size()

    def waiting_bytes(self) -> int:
        """Return how many bytes wait for the peer to read."""
        return self.transport.get_write_buffer_size()

    async def drained(self) -> None:
        """Wait until the peer has read most of what was written, or is gone."""
        await self._protocol.writable.wait()

    def end(self, code: int, reason: str = "") -> None:
        """Send a close frame; cut the connection when the peer does not answer it in time."""
        self._protocol.end(code, reason)

    def abort(self) -> None:
        """Cut the connection, throwing away what waits."""
        self._protocol.abort()


class PushProtocol(WebSocketsSansIOProtocol):
    """A WebSocket whose frames come in ready, from whoever finds its `Outlet` in the scope.

    The application reads through ASGI as usual.
    """

    outlet: Outlet | None = None
    _close_sent = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # uvicorn names the class itself; the subclass has no state of its own.
        self.conn.__class__ = _Conversation
        # Its log has every header, the token among them, and every frame.
        self.conn.debug = False

    @property
    def close_sent(self) -> bool:
        """Whether a close frame has gone out; uvicorn sets it, and the outlet must know."""
        return self._close_sent

    @close_sent.setter
    def close_sent(self, sent: bool) -> None:
        self._close_sent = sent
        if self.outlet is not None:
            self.outlet.closed = sent

    # --- what the outlet uses ---

    def end(self, code: int, reason: str = "") -> None:
        """Send a close frame; cut the connection when the peer does not answer it in time."""
        if self.close_sent or self.transport.is_closing():
            return
        if self.handshake_complete and self.conn.state is OPEN:
            self.stop_keepalive()
            self.conn.send_close(code, reason)
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = True
            self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
            self._resume_reading()
        self._abort_later()

    def abort(self) -> None:
        """Cut the connection, throwing away what waits."""
        self.stop_keepalive()
        self.transport.abort()

    # --- what uvicorn calls ---

    def handle_connect(self, event: Any) -> None:
        """Offer this connection to the application before its task starts."""
        super().handle_connect(event)
        if not self.close_sent:
            self.outlet = Outlet(self)
            self.scope["extensions"][PUSH_EXTENSION] = self.outlet  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Parse; a handshake that the parser itself refused is answered and closed."""
        if self.conn.parser_exc is not None:
            # Refused already: what such a peer still sends is thrown away.
            return
        super().data_received(data)
        if not self.handshake_initiated and self.conn.handshake_exc is not None:
            # uvicorn would leave the parser's own answer unsent and the peer waiting.
            self.transport.write(b"".join(self.conn.data_to_send()) or _BAD_HANDSHAKE)
            self.close_sent = True
            self._abort_later()

    def send_receive_event_to_app(self) -> None:
        """Hand a whole message on; text that is not UTF-8 ends the connection, unlogged."""
        if self.curr_msg_data_type == "text" and not self.close_sent:
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                self.frames = []
                self.end(1007, "not UTF-8")
                return
        super().send_receive_event_to_app()

    def handle_parser_exception(self) -> None:
        """Tell why (1002, 1007, 1009) and end, reading on for a moment so that it arrives."""
        close = self.conn.close_sent
        code, reason = (close.code, close.reason) if close is not None else (1006, "")
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.stop_keepalive()
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self._resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._abort_later(LINGER_SECONDS)

    def handle_close(self, event: Any) -> None:
        """Answer the peer's close; a peer that reads nothing is cut."""
        super().handle_close(event)
        if self.close_sent:
            self.transport.close()
        self._abort_later()

    def keepalive_timeout(self) -> None:
        """Cut a peer that answered no ping: a close frame would wait in its buffer for ever."""
        self.abort()

    async def send(self, message: Any) -> None:
        """Pass on what the application sends; its close is ours, which has a time limit."""
        if message["type"] == "websocket.close" and self.handshake_complete:
            self.end(message.get("code", 1000), message.get("reason") or "")
            return
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and self.close_sent:
            # A refused handshake is complete too; uvicorn would log an error for each.
            self.handshake_complete = True

    async def run_asgi(self) -> None:
        """Run the application; when it returns, the connection ends even if the peer is stuck."""
        await super().run_asgi()
        self._abort_later()

    def shutdown(self) -> None:
        """Close as a restarting server does (1012)."""
        if self.handshake_complete:
            self.end(1012, "restarting")
        else:
            super().shutdown()

    def _resume_reading(self) -> None:
        # The peer's close frame must be seen though the application reads no more.
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()

    def _abort_later(self, seconds: float | None = None) -> None:
        # uvicorn's own timer closes, which waits for ever when the peer does not read.
        if self.close_timer is None and not self.disconnected:
            seconds = seconds or min(self.close_timeout, self.ping_timeout or self.close_timeout)
            self.close_timer = self.loop.call_later(seconds, self.transport.abort)


_BAD_HANDSHAKE: Final = (
    b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
)


def http_protocol(max_header_bytes: int, header_timeout_seconds: float) -> type[HttpProtocol]:
    """Return the HTTP protocol class with these limits, for `uvicorn.Config(http=…)`."""
    limits = {
        "max_header_bytes": max_header_bytes,
        "header_timeout_seconds": header_timeout_seconds,
    }
    return type("LimitedHttpProtocol", (HttpProtocol,), limits)
