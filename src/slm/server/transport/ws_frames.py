"""WebSocket frames as bytes: what a server sends, and the library's parser as this server uses it.

Knows no transport, no timer and no message's meaning (RFC 6455 section 5).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final, Protocol

from websockets import protocol as sans_io
from websockets.frames import Frame, Opcode

MAX_FRAGMENTS: Final = 1024
"""How many pieces a message may come in; empty ones take memory too."""

logger = logging.getLogger(__name__)


def text_frames(messages: Sequence[str]) -> bytes:
    """Return the WebSocket text frames of these messages, one after the other, ready to be sent.

    A server's frames carry no mask (RFC 6455 section 5.1), so one encoding fits every connection.
    """
    return b"".join(encode_frame(Opcode.TEXT, message.encode()) for message in messages)


def encode_frame(opcode: Opcode, payload: bytes) -> bytes:
    """Return one frame that is a whole message, without a mask."""
    return Frame(opcode, payload).serialize(mask=False, extensions=[])


class Encoded(Protocol):
    """What is pushed: WebSocket frames, ready for any connection."""

    @property
    def encoded(self) -> bytes:
        """The frames, one after the other."""


class Parser(sans_io.Protocol):
    """The library's protocol, which answers a close frame between two fragments as it must.

    The library calls it a protocol error (1002), so plain uvicorn fails Autobahn's case 7.1.5; a
    control frame may stand there (RFC 6455 section 5.4), and each close is answered (5.5.1).

    It answers no pings: what is sent is the connection's to decide.

    Attributes:
        opcode: of the message under way.
        parts: what came of it.
    """

    def __init__(self, max_message_bytes: int) -> None:
        super().__init__(sans_io.Side.SERVER, max_size=max_message_bytes, logger=logger)
        # Its log has every frame.
        self.debug = False
        self.opcode = Opcode.TEXT
        self.parts: list[bytes] = []

    def frames_received(self) -> list[Frame]:
        """Return what came since the last call; after the handshake all events are frames."""
        return [event for event in self.events_received() if isinstance(event, Frame)]

    def add(self, frame: Frame) -> bytes | None:
        """Take a piece of a message; return the message once it is whole."""
        if frame.opcode is not Opcode.CONT:
            self.opcode = frame.opcode
        if frame.fin and not self.parts:
            return bytes(frame.data)
        self.parts.append(bytes(frame.data))
        if not frame.fin:
            return None
        whole, self.parts = b"".join(self.parts), []
        return whole

    @property
    def held_bytes(self) -> int:
        """How many bytes wait for the rest of their frame or message."""
        return len(self.reader.buffer) + (self.current_size or 0)

    def send_frame(self, frame: Frame) -> None:
        """Send what the parser answers, but for pongs."""
        if frame.opcode is not Opcode.PONG:
            super().send_frame(frame)

    def recv_frame(self, frame: Frame) -> None:
        """Take a frame; a close may come between the pieces of a message."""
        if frame.opcode is Opcode.CLOSE:
            self.current_size = None
        super().recv_frame(frame)
