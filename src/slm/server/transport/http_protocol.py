"""uvicorn's protocol class for HTTP, with limits on what a peer may send.

`uvicorn.Config(http=…)` takes a class; this subclasses the pinned version's. Knows no agent and no
token, only bytes, limits and timers. The other class, for WebSockets, is in `ws_handshake`.
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
from asyncio import TimerHandle
from collections.abc import Callable
from typing import Final

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from slm.server.transport.connections import TOKEN_SHOWN, Connections

if sys.platform == "linux":
    import fcntl
    import termios

MAX_HEADERS: Final = 100
"""How many header fields a request may have; past 128 the WebSocket parser would answer nothing."""

LINGER_SECONDS: Final = 2.0
"""How long a refused peer may go on sending before its connection is cut.

Closing with unread bytes sends a reset, which can overtake the answer that says why.
"""


READ_AT_LEAST_BYTES: Final = 4096
"""How much of an answer a peer must read in the time that a head may take."""

PIECE_BYTES: Final = 2048
"""How much is parsed at once: what is behind it waits while requests wait to be answered."""

MAX_WAITING_REQUESTS: Final = 8
"""How many requests of one connection wait to be answered before it is read on."""


class _Flow(FlowControl):
    """uvicorn's flow control, which reads on only when all that was read is parsed."""

    is_held = False

    def resume_reading(self) -> None:
        if not self.is_held:
            super().resume_reading()


class HttpProtocol(HttpToolsProtocol):
    """HTTP/1.1 with a limit on the request's head and on the time that head and body may take.

    Without the first an upgrade with large headers hangs for ever, since the WebSocket parser never
    answers it; without the second a peer that sends half a header or half a body keeps its
    connection for ever. What stands around the chunks of a body is limited as a head is: the parser
    would keep a trailer of any size. A peer that does not read its answers is cut, and requests
    that were sent ahead are not read ahead.
    """

    max_header_bytes = 8192
    header_timeout_seconds = 10.0
    table = Connections()

    _header_timer: TimerHandle | None = None
    _in_head = True
    _in_body = False
    _head_bytes = 0
    _field_bytes = 0
    flow: _Flow
    _refused = False
    _knows_token = False
    _unread = b""
    _answers = 0
    _resumed = 0
    _progress = (0, 0)
    _waited_for = 0
    _waits_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first request's head."""
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self.table.begins_http(self)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop every clock."""
        self.table.ends_http(self)
        self._stop_header_timer()
        self._unread = b""
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, unless the peer was refused; what it still sends is thrown away."""
        if self._refused or self.parser is None:
            return
        self._unset_keepalive_if_required()
        try:
            self._feed(self._unread + data if self._unread else data)
        except httptools.HttpParserError:
            self._refuse(431 if self._field_bytes > self.max_header_bytes else 400)
            return
        if self.parser is None:
            return
        if self._in_body and self._header_timer is None:
            self._header_timer = self.loop.call_later(
                self.header_timeout_seconds, self._body_is_late
            )
        elif self._in_head and self._head_bytes and self._header_timer is None:
            self._expect_head()

    def _feed(self, data: bytes) -> None:
        """Parse piece by piece, as far as the requests are answered; the rest waits."""
        view, start = memoryview(data), 0
        while start < len(data) and len(self.pipeline) < MAX_WAITING_REQUESTS:
            piece = view[start : start + PIECE_BYTES]
            start += len(piece)
            if self._in_head or self._in_body:
                self._head_bytes += len(piece)
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade as upgrade:
                if self._should_upgrade():
                    self._upgrade()
                    return
                # Any other upgrade, such as curl's h2c, is ignored (RFC 9110 section 7.8), and
                # what follows it is HTTP/1.1 like all the rest.
                start += upgrade.args[0] - len(piece)
            if self._head_bytes > self.max_header_bytes and (self._in_head or self._in_body):
                self._refuse(431)
                return
        self._unread = data[start:]
        self.flow.is_held = bool(self._unread)
        if self._unread:
            self.flow.pause_reading()

    def _upgrade(self) -> None:
        self._stop_header_timer()
        if not self.is_idle or self.flow.write_paused:
            # An answer of before would come between the frames.
            self._refuse(400)
            return
        self.table.ends_http(self)
        self.handle_websocket_upgrade()
        # The parser holds this object and is held by it: cut, both are freed at once.
        self.parser = None  # type: ignore[assignment]

    def on_response_complete(self) -> None:
        """Go on with what was sent ahead."""
        self._answers += 1
        super().on_response_complete()
        if self._unread:
            self.data_received(b"")
            self.flow.resume_reading()

    def resume_writing(self) -> None:
        """Note that the peer reads."""
        self._resumed += 1
        super().resume_writing()

    # --- what `Connections` asks ---

    @property
    def is_stranger(self) -> bool:
        """Whether no request here has carried a valid token."""
        if not self._knows_token and self.scope is not None:
            self._knows_token = self.scope["state"].get(TOKEN_SHOWN, False)
        return not self._knows_token

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def is_stuck(self, now: float) -> bool:
        """Say whether the peer has read next to nothing of its answers for too long."""
        waiting = unsent(self.transport)
        progress = (self._answers, self._resumed)
        reads = progress != self._progress or waiting <= self._waited_for - READ_AT_LEAST_BYTES
        if reads or not waiting or not self._waited_for:
            self._progress, self._waited_for, self._waits_since = progress, waiting, now
        return bool(waiting) and now - self._waits_since >= self.header_timeout_seconds

    def cut(self) -> None:
        """Close it now, and throw away what waits."""
        self.transport.abort()

    # --- what the parser calls ---

    def on_message_begin(self) -> None:
        """Count a new head."""
        self._knows_token = not self.is_stranger
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
        version = self.parser.get_http_version()
        hosts = sum(1 for name, _ in self.headers if name == b"host")
        # RFC 9112 sections 2.3 and 3.2: who reads one of two hosts otherwise is led astray.
        if version not in ("1.0", "1.1") or hosts > 1 or (version == "1.1" and not hosts):
            raise ValueError("no HTTP/1.1 request")
        if self.parser.should_upgrade() and any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
            for name, value in self.headers
        ):
            # The parser takes the body for what follows the upgrade: for requests, or for frames.
            raise ValueError("an upgrade with a body")
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
            if self.pipeline or not self._in_body or self.cycle.response_started:
                # An earlier request of the same connection is still being answered.
                self.transport.abort()
                return
            # The body of this very request: nobody else will answer it.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
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
        end_writing(self.transport)
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


def end_writing(transport: asyncio.WriteTransport) -> None:
    """Say that nothing more comes, where the transport can; a peer that is gone already is cut."""
    if not transport.can_write_eof() or transport.is_closing():
        return
    try:
        transport.write_eof()
    except OSError:
        # The peer has reset the connection, and the loop has not read of it yet.
        transport.abort()


def unsent(transport: asyncio.Transport) -> int:
    """Return how many bytes wait for the peer, on Linux those in the kernel included."""
    # Of TLS only what is encrypted: its session tickets wait for the first answer.
    waiting = (beneath_tls(transport) or transport).get_write_buffer_size()
    ours = transport.get_extra_info("socket")
    if sys.platform == "linux" and ours is not None and ours.fileno() >= 0:
        packed = fcntl.ioctl(ours.fileno(), termios.TIOCOUTQ, bytes(4))
        waiting += struct.unpack("i", packed)[0]
    return waiting


def beneath_tls(transport: asyncio.Transport) -> asyncio.WriteTransport | None:
    """Return the transport that carries the bytes of a TLS one, and what it has not sent yet."""
    found = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None)
    return found if isinstance(found, asyncio.WriteTransport) else None


def unsent_bytes_of(transport: asyncio.Transport) -> Callable[[], int]:
    """Return what tells how many bytes wait for the peer, those that TLS has encrypted too."""
    beneath = beneath_tls(transport)
    if beneath is None:
        return transport.get_write_buffer_size
    carrier = beneath
    return lambda: transport.get_write_buffer_size() + carrier.get_write_buffer_size()


def http_protocol(
    max_header_bytes: int, header_timeout_seconds: float, table: Connections | None = None
) -> type[HttpProtocol]:
    """Return the HTTP protocol class with these limits, for `uvicorn.Config(http=…)`.

    Args:
        max_header_bytes: how large a request's head may be.
        header_timeout_seconds: how long a head, a body, or the reading of an answer may take.
        table: where its connections are entered; none: one of its own, without a limit.
    """
    limits = {
        "max_header_bytes": max_header_bytes,
        "header_timeout_seconds": header_timeout_seconds,
        "table": Connections() if table is None else table,
    }
    return type("LimitedHttpProtocol", (HttpProtocol,), limits)
