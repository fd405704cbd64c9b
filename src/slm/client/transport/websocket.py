"""Direct delivery: a message is processed in the turn of the event loop that read it.

With aiohttp's `receive`, it waits for a task's turn; in a process with many streams, all reads of a
turn come before the first callback of the next. Knows frames (RFC 6455 section 5.2), and nothing
about their content.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import aiohttp

from slm.client.runtime.log import quiet_logger
from slm.errors import SLMError

SHORT_BYTES: Final = 4096
"""Longer, fragmented data is left to aiohttp."""

_TEXT, _PING, _PONG = 0x81, 0x89, 0x8A
"""The first byte of a whole message in one frame, of a ping and of a pong."""
_OTHER: Final = 0
"""Any other frame, or one that violates the protocol."""

_log = quiet_logger("slm.client")

Take = Callable[[str], None]
"""Processes a message.

If it raises an SLMError, that message and all that follow come through `receive`; any other
exception ends the connection.
"""


class DirectWebSocket(aiohttp.ClientWebSocketResponse):
    """aiohttp's WebSocket with direct delivery: `ClientSession(ws_response_class=…)`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Identified by type, because what else aiohttp passes, and in which order, may change; and
        # by names that aiohttp cannot use.
        given = (*args, *options.values())
        answer = next((each for each in given if isinstance(each, aiohttp.ClientResponse)), None)
        self.__connection = None if answer is None else answer.connection
        self.__ear: _Ear | None = None

    def hear(self, take: Take) -> None:
        """Pass each whole text message to `take` as it is read, until `deafen`.

        Pings, pongs and the end still come through `receive`; so does everything from the first
        message on that is fragmented, not text, or violates the protocol.
        """
        connection = self.__connection
        transport = None if connection is None else connection.transport
        library = None if transport is None else transport.get_protocol()
        if transport is None or not isinstance(library, asyncio.Protocol):
            return  # Already ended, as `receive` will report.
        self.__ear = _Ear(transport, library, take)

    def deafen(self) -> None:
        """Stop passing messages to `take`."""
        if self.__ear is not None:
            self.__ear.leave()


class _Ear(asyncio.Protocol):
    """Sits between a transport and aiohttp's protocol as long as nothing unusual arrives.

    Args:
        transport: the transport of an open WebSocket; nothing was read from it yet.
        library: aiohttp's protocol.
        take: processes a message.
    """

    __slots__ = ("_left", "_library", "_take", "_transport", "_unread")

    def __init__(self, transport: asyncio.Transport, library: asyncio.Protocol, take: Take) -> None:
        self._transport = transport
        self._library = library
        self._take = take
        self._unread = b""
        self._left = False
        transport.set_protocol(self)

    def leave(self) -> None:
        """Hand what is unread, and everything after it, to aiohttp."""
        if self._left:
            return
        self._left = True
        unread, self._unread = self._unread, b""
        # A closing transport may be partly torn down already (asyncio's, over TLS).
        if not self._transport.is_closing():
            self._transport.set_protocol(self._library)
        if unread:
            self._library.data_received(unread)

    # --- called by the transport ---

    def data_received(self, data: bytes) -> None:
        """Process whole messages, pass on pings and pongs, keep the start of a short one."""
        try:
            self._read(data)
        except Exception:
            # One of our own errors ends the connection, and is logged.
            _log.exception("the stream failed; connecting again")
            self._transport.abort()

    def eof_received(self) -> bool | None:
        """Pass it on."""
        return self._library.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass it on."""
        self._left = True
        self._library.connection_lost(exc)

    def pause_writing(self) -> None:
        """Pass it on."""
        self._library.pause_writing()

    def resume_writing(self) -> None:
        """Pass it on."""
        self._library.resume_writing()

    def _read(self, data: bytes) -> None:
        if self._unread:
            data, self._unread = self._unread + data, b""
        start = 0
        while not self._left and (frame := _frame_at(data, start)) is not None:
            first, begin, end = frame
            if first in (_PING, _PONG):
                self._library.data_received(data[start:end])
            elif first == _OTHER or not self._taken(data[begin:end]):
                self.leave()
                break
            start = end
        rest = data[start:]
        if not self._left:
            self._unread = rest
        elif rest:
            self._library.data_received(rest)

    def _taken(self, payload: bytes) -> bool:
        try:
            self._take(payload.decode())
        except (UnicodeDecodeError, SLMError):
            return False
        return True


def _frame_at(data: bytes, start: int) -> tuple[int, int, int] | None:
    """Return the frame's first byte, or _OTHER, and where its payload starts and ends.

    Returns None if it is incomplete and short enough to wait for here.
    """
    size = len(data) - start
    if size < 2:
        return None
    first, length, begin = data[start], data[start + 1], start + 2
    if first == _TEXT and length == 126:
        if size < 4:
            return None
        length, begin = int.from_bytes(data[begin : begin + 2], "big"), begin + 2
        usual = length >= 126
    else:
        # The highest bit marks a mask, which a server must not use.
        usual = length <= 125 and first in (_TEXT, _PING, _PONG)
    end = begin + length
    if usual and end <= len(data):
        return first, begin, end
    return None if usual and length <= SHORT_BYTES else (_OTHER, start, start)
