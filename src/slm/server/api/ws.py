"""The WebSocket at /ws: who may connect, and what it says (docs/protocol.md section 4)."""

from __future__ import annotations

import asyncio
import logging
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
)
from slm.protocol import MAX_FRAME_BYTES, Ack, ClientMessage, Explained, Subscribe
from slm.server.api.common import Requires, services_of
from slm.server.auth import Caller
from slm.server.frames import Frames
from slm.server.hub import Subscriber
from slm.server.peer import has_foreign_origin
from slm.server.problems import problem_response
from slm.server.replay import open_stream
from slm.server.services import Services
from slm.server.sinks import sink_for

logger = logging.getLogger(__name__)

_REQUIREMENT: Final = Requires("config:read")


async def stream(websocket: WebSocket) -> None:
    """Serve one connection: refused before the upgrade, or a stream until it closes."""
    services = services_of(websocket)
    try:
        if has_foreign_origin(websocket):
            raise Forbidden("The Origin is not this server's own.")
        caller = _REQUIREMENT.check(websocket)
        if not services.streams.take(caller.token_id):
            raise TooManyRequests(
                "This token has as many streams open as it may.", retry_after_seconds=5
            )
        if not services.openings.take(None):
            services.streams.release(caller.token_id)
            raise Overloaded("As many streams are being opened as may be at once.")
    except ProblemError as problem:
        await _refuse(websocket, problem)
        return
    try:
        await _serve(websocket, services, caller)
    finally:
        services.streams.release(caller.token_id)


async def _serve(websocket: WebSocket, services: Services, caller: Caller) -> None:
    opening = _Opening(services)
    try:
        await websocket.accept()
    except BaseException:
        opening.end()
        raise
    sink = sink_for(websocket)
    subscriber = services.hub.attach(sink, caller.view, caller.token_id)
    conversation = _Conversation(services, subscriber, opening)
    try:
        await conversation.listen(websocket)
    finally:
        conversation.close()
        services.hub.detach(subscriber)


async def _refuse(websocket: WebSocket, problem: ProblemError) -> None:
    if "websocket.http.response" in websocket.scope.get("extensions", {}):
        await websocket.send_denial_response(problem_response(problem))
    else:
        # Before `accept` this is a plain 403 (ASGI), the most that such a server can say.
        await websocket.close()


class _Opening:
    """A place among the streams that may be opened at once; given back when it is live.

    A peer that was let in and says nothing gives it back too, so that it keeps nobody out.
    """

    def __init__(self, services: Services) -> None:
        self._openings = services.openings
        self._held = True
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(services.settings.header_timeout_seconds, self.end)

    def end(self, *_: object) -> None:
        """Give the place back, once."""
        self._timer.cancel()
        if self._held:
            self._held = False
            self._openings.release(None)


class _Conversation:
    """What one peer says, and what it is answered."""

    def __init__(self, services: Services, subscriber: Subscriber, opening: _Opening) -> None:
        self.subscriber = subscriber
        self._place = opening
        self._services = services
        self._opening: asyncio.Task[None] | None = None

    async def listen(self, websocket: WebSocket) -> None:
        """Take messages until the connection closes."""
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            if text is None:
                self.subscriber.sink.end(1003, "text frames only")
            else:
                self._take(text)

    def close(self) -> None:
        """Stop what is under way for this peer."""
        self._place.end()
        if self._opening is not None:
            self._opening.cancel()

    def _take(self, text: str) -> None:
        said: ClientMessage | None = None
        wrong = "a message is neither a subscription nor an ack"
        try:
            said = protocol.parse_client_message(text)
        except NotJSON:
            self.subscriber.sink.end(1007, "not JSON")
            return
        except ProtocolError as error:
            wrong = str(error)
        if isinstance(said, Ack):
            self.subscriber.last_ack = said
            self._services.fleet.acked(self.subscriber, said)
        elif len(text.encode()) > MAX_FRAME_BYTES:
            self.subscriber.sink.end(1009, "too big")
        elif said is None:
            self._complain(wrong)
        elif isinstance(said, Explained):
            self._services.explanations.answered(self.subscriber, said)
        else:
            self._subscribe(said)

    def _subscribe(self, wanted: Subscribe) -> None:
        if self._opening is not None:
            self._complain("this connection is subscribed already")
            return
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
        self._opening.add_done_callback(self._place.end)

    def _complain(self, detail: str) -> None:
        text = protocol.encode(protocol.Error(code="bad-message", detail=detail))
        self._services.hub.send(self.subscriber, Frames((text,), self.subscriber.position))
