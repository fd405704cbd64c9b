"""What a request's ASGI scope has beyond the server's own fields: the routed path and a stamp.

Pure functions of an ASGI scope and a message; they know no route and no part of the server.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

from starlette.types import Message, Scope

STAMP: Final = "slm.stamp"
"""The key in the scope for the request's `Stamp`."""

ENCODED_SLASH: Final = "\udc2f"
"""Stands for a %2F in the scope's path, so that it separates nothing; no real path has it."""

_ENCODED_SLASH: Final = re.compile("%2f", re.IGNORECASE)

_ALWAYS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
)

# RFC 6797: a browser that came over TLS once never comes back without it.
_TLS_ONLY: Final = (b"strict-transport-security", b"max-age=31536000")


@dataclass
class Stamp:
    """A response without a revision of its own is at least as new as this."""

    revision: int
    epoch: str


def routed(scope: Scope, stamp: Stamp) -> Scope:
    """Return the scope that the routes see: stamped, HEAD as GET, and %2F kept apart from `/`."""
    # A copy: the server must still see HEAD, so that it drops the body.
    scope = {**scope, STAMP: stamp}
    if scope["method"] == "HEAD":
        scope["method"] = "GET"
    raw_path = scope.get("raw_path") or b""
    if b"%2" in raw_path:
        # An adopted agent_id may contain a slash; decoded, /agents/a%2Fllm would return a's key.
        parts = _ENCODED_SLASH.split(raw_path.decode("ascii", "replace"))
        scope["path"] = ENCODED_SLASH.join(map(unquote, parts))
    return scope


def add_headers(message: Message, scope: Scope) -> None:
    """Add the headers of every response to its first message."""
    # On the raw list, because every response passes here.
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
