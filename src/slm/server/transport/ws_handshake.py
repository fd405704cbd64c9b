"""uvicorn's protocol class for WebSockets: only the handshake; then the route takes over.

`uvicorn.Config(ws=…)` takes a class; this subclasses that of the pinned version. What the handshake
needed is freed afterwards; what remains is in `ws_connection`.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from slm.server.transport.ws_connection import CLOSE_SECONDS, WebSocketConnection
from slm.server.transport.ws_pings import Keepalive

TAKE_OVER: Final = "slm.take_over"
"""The key in `scope["extensions"]` under which an application finds `Handshake.take_over`."""

logger = logging.getLogger(__name__)


class Handshake(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket until it is open; then the application must call `take_over`.

    Data sent before the handshake is answered is not read yet.

    Attributes:
        keepalive: the server's keepalive.
    """

    keepalive: Keepalive

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._taken_over = False
        # Its debug log would contain every header, including the token.
        self.conn.debug = False

    def take_over(self) -> WebSocketConnection:
        """Return the connection directly after it was accepted; nothing else may use it then."""
        connection = WebSocketConnection(
            self.transport, self.keepalive, self.connections, self.config.ws_max_size
        )
        self._taken_over = True
        self.connections.discard(self)
        self.transport.set_protocol(connection)
        # The parser refers to itself; breaking the cycle frees all of this without the collector.
        self.conn.parser.close()
        del self.scope
        return connection

    # --- called by uvicorn ---

    def handle_connect(self, event: Any) -> None:
        """Make `take_over` available to the application before its task starts."""
        super().handle_connect(event)
        if not self.close_sent:
            self.transport.pause_reading()
            self.scope["extensions"][TAKE_OVER] = self.take_over  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Parse the handshake; answer and close if the parser itself rejects it."""
        if self.handshake_initiated or self.close_sent:
            # Rejected: discard what the peer still sends.
            return
        super().data_received(data)
        if not self.handshake_initiated and self.conn.handshake_exc is not None:
            # uvicorn would leave the parser's own response unsent and the peer waiting.
            self.transport.write(b"".join(self.conn.data_to_send()) or _BAD_HANDSHAKE)
            self.close_sent = True
            self._abort_later()

    async def send(self, message: Any) -> None:
        """Pass on the application's response."""
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and self.close_sent:
            # A rejected handshake is complete too; uvicorn would log an error for each.
            self.handshake_complete = True

    async def run_asgi(self) -> None:
        """Run the application; unless it took over, the connection ends with it."""
        try:
            await self.app(self.scope, self.receive, self.send)
        except ClientDisconnected:
            pass
        except BaseException:
            logger.exception("the application failed in a WebSocket")
            self.send_500_response()
        if not self._taken_over:
            self.transport.close()
            self._abort_later()

    def _abort_later(self) -> None:
        # A closing transport waits forever if the peer does not read.
        if self.close_timer is None and not self.disconnected:
            self.close_timer = self.loop.call_later(CLOSE_SECONDS, self.transport.abort)


_BAD_HANDSHAKE: Final = (
    b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
)


def handshake_protocol(
    ping_interval_seconds: float, ping_timeout_seconds: float
) -> type[Handshake]:
    """Return the class with its own pings, for `uvicorn.Config(ws=…)` with uvicorn's pings off.

    Args:
        ping_interval_seconds: how long after the handshake or the last pong a peer is pinged.
        ping_timeout_seconds: how long it may take to answer.
    """
    keepalive = Keepalive(ping_interval_seconds, ping_timeout_seconds)
    return type("PingingHandshake", (Handshake,), {"keepalive": keepalive})
