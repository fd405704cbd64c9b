"""Direct hearing: a message is taken in the turn of the event loop that read it.

By aiohttp's `receive` it waits for a task's turn; in a process of many streams, all reads of one
turn come before the first callback of the next. Knows frames (RFC 6455 section 5.2), and nothing
of what they say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import aiohttp

from slm.client.runtime.log import quiet_logger
from slm.errors import SLMError

SHORT_BYTES: Final = 4096
"""What is longer and comes in pieces is better collected by aiohttp."""

_TEXT, _PING, _PONG = 0x81, 0x89, 0x8A
"""The first byte of a whole message in one frame, of a ping and of a pong."""
_OTHER: Final = 0
"""Stands for every frame that is none of these, or that breaks the protocol."""

_log = quiet_logger("slm.client")

Take = Callable[[str], None]
"""Takes a message. One that it raises an SLMError for comes by `receive`, with all that follow; any
other exception ends the connection."""


class DirectWebSocket(aiohttp.ClientWebSocketResponse):
    """aiohttp's WebSocket, which can be heard directly: `ClientSession(ws_response_class=…)`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # By its type, since what else aiohttp gives, and in which order, is its own affair; and by
        # names that none of its own can be.
        given = (*args, *options.values())
        answer = next((each for each in given if isinstance(each, aiohttp.ClientResponse)), None)
        self.__connection = None if answer is None else answer.connection
        self.__ear: _Ear | None = None

    def hear(self, take: Take) -> None:
        """Have each whole text message given to `take` as it is read, until `deafen`.

        Pings, pongs and the end come by `receive`, as they would without this; so does everything
        from the first message on that comes in fragments, is not text, or breaks the protocol.
        """
        connection = self.__connection
        transport = None if connection is None else connection.transport
        library = None if transport is None else transport.get_protocol()
        if transport is None or not isinstance(library, asyncio.Protocol):
            return  # It ended already, as `receive` will say.
        self.__ear = _Ear(transport, library, take)

    def deafen(self) -> None:
        """Give nothing to `take` any more."""
        if self.__ear is not None:
            self.__ear.leave()


class _Ear(asyncio.Protocol):
    """Stands between a transport and aiohttp's protocol for as long as all is as usual.

    Args:
        transport: of an open WebSocket; nothing was read from it yet.
        library: aiohttp's protocol.
        take: takes a message.
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
        """Leave what is unread, and all that follows, to aiohttp."""
        if self._left:
            return
        self._left = True
        unread, self._unread = self._unread, b""
        # One that is closing may be in pieces already (asyncio's, over TLS).
        if not self._transport.is_closing():
            self._transport.set_protocol(self._library)
        if unread:
            self._library.data_received(unread)

    # --- the transport calls these ---

    def data_received(self, data: bytes) -> None:
        """Take whole messages, pass on pings and pongs, keep the beginning of a short one."""
        try:
            self._read(data)
        except Exception:
            # A mistake of ours ends the connection, and not without a word.
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
    """Return the frame's first byte, or _OTHER, and where its payload begins and ends.

    None where it is not whole yet, and worth waiting for here.
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
        # The highest bit is that of a mask, which no server may use.
        usual = length <= 125 and first in (_TEXT, _PING, _PONG)
    end = begin + length
    if usual and end <= len(data):
        return first, begin, end
    return None if usual and length <= SHORT_BYTES else (_OTHER, start, start)
