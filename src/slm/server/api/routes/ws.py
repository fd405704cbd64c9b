"""The WebSocket at /ws: who may connect, and the messages (docs/protocol.md section 4)."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Final

from starlette.websockets import WebSocket

from slm import protocol
from slm.errors import (
    Forbidden,
    NotJSON,
    Overloaded,
    ProblemError,
    ProtocolError,
    TooManyRequests,
    UnclearAnswer,
)
from slm.protocol import MAX_FRAME_BYTES, Ack, ClientMessage, Explained, Subscribe
from slm.server.api.access import Requires, services_of
from slm.server.api.peer import has_foreign_origin, is_private
from slm.server.api.problems import problem_response
from slm.server.fleet.ack_queue import Waiting
from slm.server.security.agent_scope import View
from slm.server.security.token_table import Caller
from slm.server.services import Services
from slm.server.stream.encoding import Frames
from slm.server.stream.openings import Opening
from slm.server.stream.subscriber import Sink, Subscriber
from slm.server.stream.subscription import open_stream
from slm.server.transport.ws_connection import WebSocketConnection
from slm.server.transport.ws_handshake import TAKE_OVER

logger = logging.getLogger(__name__)

_REQUIREMENT: Final = Requires("config:read")

_BEGINS_AN_ACK: Final = re.compile(r'\s*\{\s*"ack"')


async def stream(websocket: WebSocket) -> None:
    """Refuse a connection before the upgrade, or start a stream, which then runs by itself."""
    services = services_of(websocket)
    # Our own server offers it with every handshake; no other server can serve streams.
    take_over = websocket.scope["extensions"][TAKE_OVER]
    try:
        if has_foreign_origin(websocket):
            raise Forbidden("The Origin is not this server's own.")
        caller = _REQUIREMENT.check(websocket, services)
        if services.connections.has_too_many_streams:
            raise Overloaded("The server has reached its limit of open streams.")
        if not services.streams.take(caller.token_id):
            raise TooManyRequests(
                "This token has as many streams open as it may.", retry_after_seconds=5
            )
        try:
            place = await services.openings.place(caller.token_id)
        except BaseException:
            services.streams.release(caller.token_id)
            raise
    except ProblemError as problem:
        await websocket.send_denial_response(problem_response(problem))
        return
    plain_http = not is_private(websocket, services.settings.trusted_proxies)
    conversation = _Conversation(services, caller, place, plain_http=plain_http)
    try:
        await websocket.accept()
    except BaseException:
        conversation.gone()
        raise
    connection: WebSocketConnection = take_over()
    conversation.begin(connection, caller.view)
    connection.listen(conversation, conversation.note_waiting)


class _Conversation:
    """The messages from one peer and the answers to it; holds one of its token's stream places."""

    __slots__ = (
        "_opening",
        "_place",
        "_plain_http",
        "_services",
        "_subscribed",
        "_token_id",
        "subscriber",
    )

    def __init__(
        self, services: Services, caller: Caller, place: Opening, *, plain_http: bool
    ) -> None:
        self._services = services
        self._token_id = caller.token_id
        self._place: Opening | None = place
        self._plain_http = plain_http
        self._subscribed = False
        self._opening: asyncio.Task[None] | None = None
        self.subscriber: Subscriber

    def begin(self, sink: Sink, view: View) -> None:
        """Attach the connection to the hub, now that it is accepted."""
        self.subscriber = self._services.hub.attach(sink, view, self._token_id)
        self.subscriber.plain_http = self._plain_http

    def heard(self, message: str | bytes) -> None:
        """Handle one message."""
        if isinstance(message, bytes):
            self._end(1003, "text frames only", "a message is not text")
        elif _BEGINS_AN_ACK.match(message):
            self._services.acks.put(self, message)
        else:
            self._take(message)

    def note_waiting(self, unsent_bytes: int) -> None:
        """Record how many bytes are buffered to or from this peer."""
        self._services.hub.buffers.note(self.subscriber, unsent_bytes)

    def gone(self) -> None:
        """Stop what is running for this peer and forget it."""
        self._opened(was_silent=not self._subscribed)
        if self._opening is not None:
            self._opening.cancel()
        if hasattr(self, "subscriber"):
            self._services.acks.finish(self)
            self._services.explanations.left(self.subscriber)
            self._services.hub.detach(self.subscriber)
        self._services.streams.release(self._token_id)

    def _opened(self, *, was_silent: bool = False) -> None:
        """Give back the place among the opening streams, once."""
        place, self._place = self._place, None
        if place is not None:
            place.end(was_silent=was_silent)

    def take_ack(self, ack: Waiting) -> None:
        """Process an ack that has waited."""
        self._take(ack.text, ack)

    def _take(self, text: str, waited: Waiting | None = None) -> None:
        said: ClientMessage | None = None
        wrong = "a message is neither a subscription nor an ack"
        try:
            said = protocol.parse_client_message(text)
        except NotJSON:
            self._end(1007, "not JSON", "a message is not JSON")
            return
        except ProtocolError as error:
            wrong = str(error)
            if waited is None:
                question = error.question if isinstance(error, UnclearAnswer) else None
                self._services.explanations.unclear(self.subscriber, wrong, question)
        if isinstance(said, Ack):
            if waited is None:
                self._services.acks.finish(self)
                self._services.fleet.acked(self.subscriber, said)
            else:
                self._services.fleet.acked(self.subscriber, said, waited.at, missed=waited.missed)
        elif waited is None and len(text.encode()) > MAX_FRAME_BYTES:
            self._end(1009, "too big", "a message is too big")
        elif said is None:
            self._complain(wrong)
        elif isinstance(said, Explained):
            self._services.explanations.answered(self.subscriber, said)
        else:
            self._subscribe(said)

    def _subscribe(self, wanted: Subscribe) -> None:
        if self._subscribed:
            self._complain("this connection is subscribed already")
            return
        self._subscribed = True
        if self._place is not None:
            self._place.subscribed()
        services = self._services
        self._opening = asyncio.create_task(
            open_stream(
                self.subscriber,
                wanted,
                hub=services.hub,
                feed=services.feed,
                settings=services.settings,
            ),
            name="slm-open-stream",
        )
        self._opening.add_done_callback(self._stream_is_open)

    def _stream_is_open(self, _: object) -> None:
        self._opening = None
        self._opened()

    def _end(self, code: int, reason: str, wrong: str) -> None:
        """Close the stream because of what the peer sent, which may have been an answer."""
        self._services.explanations.unclear(self.subscriber, wrong)
        self.subscriber.sink.end(code, reason)

    def _complain(self, detail: str) -> None:
        text = protocol.encode(protocol.Error(code="bad-message", detail=detail))
        self._services.hub.send(self.subscriber, Frames((text,), self.subscriber.position))
