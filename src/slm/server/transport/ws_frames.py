"""WebSocket frames as bytes: what the server sends, and its variant of the library's parser.

Knows no transport, no timer and no message's meaning (RFC 6455 section 5).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final, Protocol

from websockets import protocol as sans_io
from websockets.frames import Frame, Opcode

MAX_FRAGMENTS: Final = 1024
"""The maximum number of fragments in a message; even empty ones take memory."""

logger = logging.getLogger(__name__)


def text_frames(messages: Sequence[str]) -> bytes:
    """Return the WebSocket text frames for these messages, concatenated and ready to send.

    A server's frames are not masked (RFC 6455 section 5.1), so one encoding fits all connections.
    """
    return b"".join(encode_frame(Opcode.TEXT, message.encode()) for message in messages)


def encode_frame(opcode: Opcode, payload: bytes) -> bytes:
    """Return one unmasked frame that holds a whole message."""
    return Frame(opcode, payload).serialize(mask=False, extensions=[])


class Encoded(Protocol):
    """What can be pushed: WebSocket frames, ready for any connection."""

    @property
    def encoded(self) -> bytes:
        """The frames, concatenated."""


class Parser(sans_io.Protocol):
    """The library's protocol, fixed to answer a close frame between two fragments.

    The library treats that as a protocol error (1002), so plain uvicorn fails Autobahn's case
    7.1.5; but a control frame is allowed there (RFC 6455 section 5.4), and every close must be
    answered (5.5.1).

    It does not answer pings: the connection decides what is sent.

    Attributes:
        opcode: the opcode of the current message.
        parts: the parts received so far.
    """

    def __init__(self, max_message_bytes: int) -> None:
        super().__init__(sans_io.Side.SERVER, max_size=max_message_bytes, logger=logger)
        # The library's debug log would contain every frame.
        self.debug = False
        self.opcode = Opcode.TEXT
        self.parts: list[bytes] = []

    def frames_received(self) -> list[Frame]:
        """Return the frames since the last call; after the handshake all events are frames."""
        return [event for event in self.events_received() if isinstance(event, Frame)]

    def add(self, frame: Frame) -> bytes | None:
        """Add a fragment; return the message once it is complete."""
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
        """How many bytes are waiting for the rest of their frame or message."""
        return len(self.reader.buffer) + (self.current_size or 0)

    def send_frame(self, frame: Frame) -> None:
        """Send the parser's own answers, except pongs."""
        if frame.opcode is not Opcode.PONG:
            super().send_frame(frame)

    def recv_frame(self, frame: Frame) -> None:
        """Process a frame; a close may come between the fragments of a message."""
        if frame.opcode is Opcode.CLOSE:
            self.current_size = None
        super().recv_frame(frame)
