"""The outermost layer: the headers that every answer carries, and what nobody else caught.

Pure ASGI, since it is in the way of every request. Knows no route but by the name that it is given.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Final
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from slm.errors import DatabaseUnavailable, InternalError, NotFound, ProblemError
from slm.server.api.problems import problem_response
from slm.server.db.errors import is_altered
from slm.server.metrics import UNKNOWN_ROUTE
from slm.server.services import Services
from slm.server.tasks.turnstile import Turnstile

logger = logging.getLogger(__name__)

STAMP: Final = "slm.stamp"
"""The key of the scope that holds the request's `Stamp`."""

ENCODED_SLASH: Final = "\udc2f"
"""What stands in the scope's path for a %2F, so that it divides nothing; no path has it itself."""

_ENCODED_SLASH: Final = re.compile("%2f", re.IGNORECASE)

_ALWAYS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
)


_METHODS: Final = frozenset({"GET", "POST", "PUT", "DELETE"})

# RFC 6797: a browser that was here over TLS never comes back without.
_TLS_ONLY: Final = (b"strict-transport-security", b"max-age=31536000")


_KEY_READS: Final = ("/llm", "/api/snapshot")


@dataclass
class Stamp:
    """What an answer that names no revision of its own is at least as new as."""

    revision: int
    epoch: str


class Edge:
    """Names revision and epoch on every answer, and answers 500 to what was not foreseen.

    An answer that names no revision of its own gets the catalog's from before the request was
    looked at: whatever was read since is at least as new.

    Args:
        app: what answers the requests.
        services: whose revision and epoch are named.
        streams: what answers a WebSocket at each path. It is called from here: the frames of the
            frameworks' layers below would be kept for as long as a stream lives, 10 KiB each.
    """

    def __init__(
        self,
        app: ASGIApp,
        services: Services,
        streams: Mapping[str, Callable[[WebSocket], Awaitable[None]]],
    ) -> None:
        self.app = app
        self.services = services
        self.streams = streams
        self._key_reads = Turnstile()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] == "websocket":
            send = self._handshake_send(scope, receive, send)
            stream = self.streams.get(scope["path"])
            if stream is not None:
                await stream(WebSocket(scope, receive, send))
            else:
                await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        catalog = self.services.catalog
        # A copy, in which a HEAD is a GET; the server still sees a HEAD and drops the body.
        scope = {**scope, STAMP: Stamp(catalog.revision, catalog.epoch)}
        if scope["method"] == "HEAD":
            scope["method"] = "GET"
        raw_path = scope.get("raw_path") or b""
        if b"%2" in raw_path:
            # An adopted agent_id may hold a slash; decoded, /agents/a%2Fllm would be a's key.
            parts = _ENCODED_SLASH.split(raw_path.decode("ascii", "replace"))
            scope["path"] = ENCODED_SLASH.join(map(unquote, parts))
        started, status, begun = False, 500, perf_counter()
        if scope["path"].endswith(_KEY_READS) and scope["method"] == "GET":
            # After a change every backend asks at the same moment: whoever writes does not wait
            # for all of them.
            await self._key_reads.enter()

        async def stamped_send(message: Message) -> None:
            nonlocal started, status
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
                self._stamp(message, scope)
            await send(message)

        try:
            await self.app(scope, receive, stamped_send)
        except Exception as error:
            # The place and the class, never the message: it may hold what was being handled.
            place = "".join(traceback.format_tb(error.__traceback__))
            logger.error("a request failed with %s\n%s", type(error).__name__, place)
            problem: ProblemError = InternalError()
            if is_altered(error):
                problem = DatabaseUnavailable(
                    "The database is not as this server left it, so this cannot be done; the log"
                    " says where."
                )
            else:
                self.services.counts.failures += 1
            if started:
                raise RuntimeError("the answer was cut off") from None
            await problem_response(problem)(scope, receive, stamped_send)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            route = getattr(scope.get("route"), "path", UNKNOWN_ROUTE)
            self.services.metrics.answered(method, route, status, perf_counter() - begun)

    def _handshake_send(self, scope: Scope, receive: Receive, send: Send) -> Send:
        """Stamp a refused handshake too, and tell an unknown path as such: 404 and not 403."""
        catalog = self.services.catalog
        scope[STAMP] = Stamp(catalog.revision, catalog.epoch)
        accepted = False

        async def stamped_send(message: Message) -> None:
            nonlocal accepted
            kind = message["type"]
            if kind == "websocket.accept":
                accepted = True
            elif kind == "websocket.http.response.start":
                self._stamp(message, scope)
            elif kind == "websocket.close" and not accepted and _can_deny(scope):
                # Our own route never closes before it accepts; this is the router's.
                await problem_response(NotFound())(scope, receive, stamped_send)
                return
            await send(message)

        return stamped_send

    @staticmethod
    def _stamp(message: Message, scope: Scope) -> None:
        # On the raw list: it is in the way of every answer.
        headers = list(message.get("headers", ()))
        given = {name for name, _ in headers}
        stamp: Stamp = scope[STAMP]
        headers += _ALWAYS
        if scope["scheme"] == "https":
            headers.append(_TLS_ONLY)
        if b"cache-control" not in given:
            headers.append((b"cache-control", b"no-cache"))
        if b"slm-revision" not in given:
            headers.append((b"slm-revision", b"%d" % stamp.revision))
        if b"slm-epoch" not in given:
            headers.append((b"slm-epoch", stamp.epoch.encode()))
        message["headers"] = headers


def _can_deny(scope: Scope) -> bool:
    return "websocket.http.response" in scope.get("extensions", {})
