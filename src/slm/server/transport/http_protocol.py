"""uvicorn's protocol class for HTTP, with limits on what a peer may send.

`uvicorn.Config(http=…)` takes a class; this subclasses that of the pinned version. Knows no agent
and no token, only bytes, limits and timers. The WebSocket class is in `ws_handshake`.
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
"""The maximum number of header fields; above 128 the WebSocket parser would not answer at all."""

LINGER_SECONDS: Final = 2.0
"""How long a rejected peer may keep sending before its connection is cut.

Closing with unread bytes sends a reset, which can overtake the response that explains why.
"""


READ_AT_LEAST_BYTES: Final = 4096
"""How much of a response a peer must read within the time limit for a request head."""

PIECE_BYTES: Final = 2048
"""How much is parsed at once; the rest waits while requests are waiting for a response."""

MAX_WAITING_REQUESTS: Final = 8
"""How many requests on a connection may wait for a response before reading pauses."""


class _Flow(FlowControl):
    """uvicorn's flow control, but resumes reading only when everything read has been parsed."""

    is_held = False

    def resume_reading(self) -> None:
        if not self.is_held:
            super().resume_reading()


class HttpProtocol(HttpToolsProtocol):
    """HTTP/1.1 with limits on the size of the head and on the time for head and body.

    Without the first, an upgrade with large headers hangs forever, since the WebSocket parser never
    answers it; without the second, a peer that sends half a head or half a body keeps its
    connection forever. Chunk framing and trailers have the same limit as a head, because the parser
    would keep a trailer of any size. A peer that does not read its responses is cut, and pipelined
    requests are not read ahead.
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
        """Start the timer for the first request's head."""
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self.table.begins_http(self)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        self.table.ends_http(self)
        self._stop_header_timer()
        self._unread = b""
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser; discard the data if the peer was rejected."""
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
        """Parse in pieces, as fast as requests are answered; the rest waits."""
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
                # Any other upgrade, such as curl's h2c, is ignored (RFC 9110 section 7.8), and what
                # follows it is plain HTTP/1.1.
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
            # An earlier response would end up between the frames.
            self._refuse(400)
            return
        self.table.ends_http(self)
        self.handle_websocket_upgrade()
        # The parser and this object refer to each other; breaking the cycle frees both at once.
        self.parser = None  # type: ignore[assignment]

    def on_response_complete(self) -> None:
        """Continue with pipelined requests."""
        self._answers += 1
        super().on_response_complete()
        if self._unread:
            self.data_received(b"")
            self.flow.resume_reading()

    def resume_writing(self) -> None:
        """Note that the peer is reading."""
        self._resumed += 1
        super().resume_writing()

    # --- called by `Connections` ---

    @property
    def is_stranger(self) -> bool:
        """Whether no request on this connection has carried a valid token."""
        if not self._knows_token and self.scope is not None:
            self._knows_token = self.scope["state"].get(TOKEN_SHOWN, False)
        return not self._knows_token

    @property
    def is_idle(self) -> bool:
        """Whether no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    def is_stuck(self, now: float) -> bool:
        """Return whether the peer has read next to nothing of its responses for too long."""
        waiting = unsent(self.transport)
        progress = (self._answers, self._resumed)
        reads = progress != self._progress or waiting <= self._waited_for - READ_AT_LEAST_BYTES
        if reads or not waiting or not self._waited_for:
            self._progress, self._waited_for, self._waits_since = progress, waiting, now
        return bool(waiting) and now - self._waits_since >= self.header_timeout_seconds

    def cut(self) -> None:
        """Close the connection now and discard what is waiting."""
        self.transport.abort()

    # --- called by the parser ---

    def on_message_begin(self) -> None:
        """Start counting a new head."""
        self._knows_token = not self.is_stranger
        super().on_message_begin()
        self._in_head = True
        self._field_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Count the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header field, including trailers."""
        self._count(len(name) + len(value) + 4)
        if len(self.headers) >= MAX_HEADERS:
            self._count(self.max_header_bytes)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop the timer: the body follows."""
        version = self.parser.get_http_version()
        hosts = sum(1 for name, _ in self.headers if name == b"host")
        # RFC 9112 sections 2.3 and 3.2: two hosts could be interpreted differently further on.
        if version not in ("1.0", "1.1") or hosts > 1 or (version == "1.1" and not hosts):
            raise ValueError("no HTTP/1.1 request")
        if self.parser.should_upgrade() and any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
            for name, value in self.headers
        ):
            # The parser would treat the body as data after the upgrade: as requests, or as frames.
            raise ValueError("an upgrade with a body")
        self._in_head, self._in_body = False, True
        self._head_bytes = 0
        self._stop_header_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Handle part of the body; the application limits its size."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Wait for the next request if the connection is kept alive."""
        self._in_head, self._in_body = True, False
        self._head_bytes = 0
        self._stop_header_timer()
        super().on_message_complete()

    def shutdown(self) -> None:
        """Close if idle, otherwise after the current response."""
        self._stop_header_timer()
        super().shutdown()

    def _count(self, size: int) -> None:
        self._field_bytes += size
        if self._field_bytes > self.max_header_bytes:
            # Inside a parser callback, this ends the parsing.
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
        """Cut the connection: the request was answered already, or its body never came."""
        self._header_timer = None
        self.transport.abort()

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _refuse(self, status: int) -> None:
        """Respond with a problem and close, reading briefly so that the response arrives."""
        if self._refused:
            return
        self._refused = True
        self._stop_header_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            if self.pipeline or not self._in_body or self.cycle.response_started:
                # An earlier request on the same connection is still being answered.
                self.transport.abort()
                return
            # The body of this very request, which nothing else will answer.
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
"""The problem code and title for each status with which the parser itself rejects a request."""


def end_writing(transport: asyncio.WriteTransport) -> None:
    """Signal the end of writing where the transport can; cut a peer that is already gone."""
    if not transport.can_write_eof() or transport.is_closing():
        return
    try:
        transport.write_eof()
    except OSError:
        # The peer reset the connection, and the loop has not noticed yet.
        transport.abort()


def unsent(transport: asyncio.Transport) -> int:
    """Return how many bytes wait for the peer; on Linux, including those in the kernel."""
    # With TLS, only encrypted bytes: its session tickets wait for the first response.
    waiting = (beneath_tls(transport) or transport).get_write_buffer_size()
    ours = transport.get_extra_info("socket")
    if sys.platform == "linux" and ours is not None and ours.fileno() >= 0:
        packed = fcntl.ioctl(ours.fileno(), termios.TIOCOUTQ, bytes(4))
        waiting += struct.unpack("i", packed)[0]
    return waiting


def beneath_tls(transport: asyncio.Transport) -> asyncio.WriteTransport | None:
    """Return the transport that carries a TLS transport's bytes and buffers what is unsent."""
    found = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None)
    return found if isinstance(found, asyncio.WriteTransport) else None


def unsent_bytes_of(transport: asyncio.Transport) -> Callable[[], int]:
    """Return a function that counts the bytes waiting for the peer, encrypted ones included."""
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
        max_header_bytes: the maximum size of a request's head.
        header_timeout_seconds: how long receiving a head or a body, or reading a response, may
            take.
        table: where connections are registered; None for a table of its own without a limit.
    """
    limits = {
        "max_header_bytes": max_header_bytes,
        "header_timeout_seconds": header_timeout_seconds,
        "table": Connections() if table is None else table,
    }
    return type("LimitedHttpProtocol", (HttpProtocol,), limits)
