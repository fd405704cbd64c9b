"""The outermost layer: stamps every answer, answers what nobody else caught, and counts it.

One pass over the messages of a request, since each layer of ASGI costs every request a closure and
two calls; what is done to a scope or a message is in `scope`. Knows no route but by the name that
it is given.
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
    """Names revision and epoch on every answer, and answers 500 to what was not foreseen.

    An answer that names no revision of its own gets the catalog's from before the request was
    looked at: whatever was read since is at least as new.

    Args:
        app: what answers the requests.
        catalog: whose revision and epoch are named.
        metrics: told of each answer.
        counts: where what failed is counted.
        streams: what answers a WebSocket at each path. It is called from here, and nowhere else: on
            the way through the layers below our part of a handshake takes twice as long, which is a
            second of a server to which 10,000 backends come back.
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
        # After a change every backend asks at the same moment: whoever writes does not wait for all
        # of them, nor for what the layers below would do for each.
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
        """Return what is answered for an error that nobody foresaw; it is logged and counted."""
        # The place and the class, never the message: it may hold what was being handled.
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
        """Serve a stream; a refused handshake is stamped as any other answer."""
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
