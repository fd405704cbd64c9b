"""The outermost layer: stamps every response, answers unexpected errors, and records metrics.

It makes a single pass over a request's messages, because each ASGI layer costs every request a
closure and two calls; `scope` has what is done to a scope or a message. Knows a route only by the
name it is given.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping
from time import perf_counter
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from slm.errors import DatabaseUnavailable, InternalError, NotFound, ProblemError
from slm.server.agents.catalog import Catalog
from slm.server.api.problems import problem_response
from slm.server.api.scope import STAMP, Stamp, add_headers, routed
from slm.server.db.errors import is_altered
from slm.server.metrics import UNKNOWN_ROUTE, Metrics
from slm.server.services import RequestCounts
from slm.server.tasks.turnstile import Turnstile

logger = logging.getLogger(__name__)

_METHODS: Final = frozenset({"GET", "POST", "PUT", "DELETE"})

_KEY_READS: Final = ("/llm", "/api/snapshot")


class Edge:
    """Adds revision and epoch to every response, and answers unexpected errors with 500.

    A response without a revision of its own gets the catalog's from before the request was
    processed: whatever was read since is at least as new.

    Args:
        app: answers the requests.
        catalog: supplies revision and epoch.
        metrics: records each response.
        counts: counts the failures.
        streams: answers a WebSocket at each path. It is called only from here: through the layers
            below, our part of a handshake takes twice as long, which costs a server a second when
            10,000 backends reconnect.
    """

    def __init__(
        self,
        app: ASGIApp,
        catalog: Catalog,
        metrics: Metrics,
        counts: RequestCounts,
        streams: Mapping[str, Callable[[WebSocket], Awaitable[None]]],
    ) -> None:
        self._app = app
        self._catalog = catalog
        self._metrics = metrics
        self._counts = counts
        self._streams = streams
        # After a change every backend reads at the same moment: a writer must not wait for all of
        # them, nor for what the layers below do for each.
        self._key_reads = Turnstile()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, or serve the stream until it ends."""
        if scope["type"] == "http":
            await self._answer(routed(scope, self._stamp()), receive, send)
        elif scope["type"] == "websocket":
            await self._serve(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _stamp(self) -> Stamp:
        return Stamp(self._catalog.revision, self._catalog.epoch)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, status, begun = False, 500, perf_counter()
        if scope["path"].endswith(_KEY_READS) and scope["method"] == "GET":
            await self._key_reads.enter()

        async def stamped_send(message: Message) -> None:
            nonlocal started, status
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
                add_headers(message, scope)
            await send(message)

        try:
            await self._app(scope, receive, stamped_send)
        except Exception as error:
            problem = self._problem_of(error)
            if started:
                raise RuntimeError("the answer was cut off") from None
            await problem_response(problem)(scope, receive, stamped_send)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            route = getattr(scope.get("route"), "path", UNKNOWN_ROUTE)
            self._metrics.answered(method, route, status, perf_counter() - begun)

    def _problem_of(self, error: Exception) -> ProblemError:
        """Log and count an unexpected error, and return the problem to answer with."""
        # Log the place and the class, never the message: it may contain request data.
        place = "".join(traceback.format_tb(error.__traceback__))
        logger.error("a request failed with %s\n%s", type(error).__name__, place)
        if is_altered(error):
            return DatabaseUnavailable(
                "The database is not as this server left it, so this cannot be done; the log"
                " says where."
            )
        self._counts.failures += 1
        return InternalError()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a stream; a refused handshake is stamped like any other response."""
        scope[STAMP] = self._stamp()

        async def stamped_send(message: Message) -> None:
            if message["type"] == "websocket.http.response.start":
                add_headers(message, scope)
            await send(message)

        websocket = WebSocket(scope, receive, stamped_send)
        stream = self._streams.get(scope["path"])
        if stream is None:
            await websocket.send_denial_response(problem_response(NotFound()))
        else:
            await stream(websocket)
