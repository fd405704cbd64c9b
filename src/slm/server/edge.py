"""The outermost layer: the headers that every answer carries, and what nobody else caught.

Pure ASGI, since it is in the way of every request. Knows no route.
"""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slm.errors import InternalError, NotFound
from slm.server.problems import problem_response
from slm.server.services import Services

logger = logging.getLogger(__name__)

STAMP: Final = "slm.stamp"
"""The key of the scope that holds the request's `Stamp`."""

_ALWAYS: Final = (
    ("x-content-type-options", "nosniff"),
    ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
    ("referrer-policy", "no-referrer"),
)


@dataclass
class Stamp:
    """What an answer that names no revision of its own is at least as new as."""

    revision: int
    epoch: str


class Edge:
    """Names revision and epoch on every answer, and answers 500 to what was not foreseen.

    An answer that names no revision of its own gets the catalog's from before the request was
    looked at: whatever was read since is at least as new.
    """

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self.app = app
        self.services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] == "websocket":
            await self.app(scope, receive, self._handshake_send(scope, receive, send))
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        catalog = self.services.catalog
        # A copy, in which a HEAD is a GET; the server still sees a HEAD and drops the body.
        scope = {**scope, STAMP: Stamp(catalog.revision, catalog.epoch)}
        if scope["method"] == "HEAD":
            scope["method"] = "GET"
        started = False

        async def stamped_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._stamp(MutableHeaders(scope=message), scope)
            await send(message)

        try:
            await self.app(scope, receive, stamped_send)
        except Exception as error:
            # The place and the class, never the message: it may hold what was being handled.
            place = "".join(traceback.format_tb(error.__traceback__))
            logger.error("a request failed with %s\n%s", type(error).__name__, place)
            self.services.counts.failures += 1
            if started:
                raise RuntimeError("the answer was cut off") from None
            await problem_response(InternalError())(scope, receive, stamped_send)

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
                self._stamp(MutableHeaders(scope=message), scope)
            elif kind == "websocket.close" and not accepted and _can_deny(scope):
                # Our own route never closes before it accepts; this is the router's.
                await problem_response(NotFound())(scope, receive, stamped_send)
                return
            await send(message)

        return stamped_send

    @staticmethod
    def _stamp(headers: MutableHeaders, scope: Scope) -> None:
        stamp: Stamp = scope[STAMP]
        for name, value in _ALWAYS:
            headers[name] = value
        headers.setdefault("cache-control", "no-cache")
        headers.setdefault("slm-revision", str(stamp.revision))
        headers.setdefault("slm-epoch", stamp.epoch)


def _can_deny(scope: Scope) -> bool:
    return "websocket.http.response" in scope.get("extensions", {})
