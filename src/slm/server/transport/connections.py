"""All open connections of a server: how many are allowed, and which one is closed for another.

Knows no route and no token; a connection itself says whether a token was shown on it
(docs/decisions/0025-who-makes-room.md).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection, Iterator
from typing import Final, Protocol

KEPT_FOR_HTTP: Final = 256
"""Connections reserved from streams: operators must get in while the streams are full."""

KEPT_DESCRIPTORS: Final = 100
"""How many descriptors are reserved for files, the database and connections being closed."""

UNLIMITED: Final = 1_000_000
"""The limit if none is set."""

LOOK_AT_ONCE: Final = 500
"""After this many connections, other tasks in the event loop get a turn."""

TOKEN_SHOWN: Final = "slm.token_shown"  # noqa: S105 - the name of a flag
"""The key in a request's `scope["state"]` that says that it carried a valid token."""


class HttpConnection(Protocol):
    """A connection that speaks plain HTTP, or has not sent anything yet."""

    @property
    def is_stranger(self) -> bool:
        """Whether no request on it has carried a valid token."""

    @property
    def is_idle(self) -> bool:
        """Whether no request is in progress."""

    def is_stuck(self, now: float) -> bool:
        """Return whether the peer has stopped reading its responses."""

    def cut(self) -> None:
        """Close the connection now and discard what is waiting."""


def connection_limit(wanted: int | None, open_files: int | None) -> int:
    """Return how many connections a server may have.

    Args:
        wanted: the operator's setting; None for as many as there are descriptors.
        open_files: how many files the process may have open; None if unlimited.
    """
    most = UNLIMITED if open_files is None else open_files - KEPT_DESCRIPTORS
    return max(2, most if wanted is None else min(wanted, most))


class Connections:
    """The connections of one server.

    Args:
        limit: how many may be open at once.

    Attributes:
        arriving: connections being opened, such as in a TLS handshake, the oldest first.
        max_streams: how many of the connections may be streams.
    """

    def __init__(self, limit: int = UNLIMITED) -> None:
        self.limit = limit
        self.max_streams = limit - min(KEPT_FOR_HTTP, limit // 2)
        self._open: Collection[object] = ()
        self.arriving: dict[asyncio.Task[None], float] = {}
        self._http: dict[HttpConnection, float] = {}
        self._cut: set[HttpConnection] = set()
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None

    def __len__(self) -> int:
        return len(self._open) + len(self.arriving) - len(self._cut)

    # --- called by connections ---

    def begins_http(self, connection: HttpConnection) -> None:
        """Note a new connection."""
        self._http[connection] = asyncio.get_running_loop().time()

    def ends_http(self, connection: HttpConnection) -> None:
        """Note that a connection was closed or becomes a stream."""
        self._http.pop(connection, None)
        self._cut.discard(connection)

    # --- limits ---

    @property
    def http(self) -> int:
        """The number of plain HTTP connections."""
        return len(self._http)

    @property
    def has_too_many_streams(self) -> bool:
        """Whether streams, including those being opened, exceed their limit."""
        return len(self._open) - len(self._http) > self.max_streams

    @property
    def can_take_one_more(self) -> bool:
        """Whether there is a free slot, or a connection that can be closed for one."""
        return len(self) < self.limit or self._dispensable() is not None

    def make_room(self) -> None:
        """Close a connection if there are too many."""
        if len(self) > self.limit:
            self.close_one()

    def close_one(self) -> None:
        """Close the oldest that has shown no valid token, or else the oldest idle one."""
        found = self._dispensable()
        if isinstance(found, asyncio.Task):
            self.arriving.pop(found, None)
            found.cancel()
        elif found is not None:
            self._cut.add(found)
            found.cut()

    def _dispensable(self) -> HttpConnection | asyncio.Task[None] | None:
        stranger = next((each for each in self._present() if each.is_stranger), None)
        arriving = next(iter(self.arriving), None)
        if arriving is not None and (
            stranger is None or self.arriving[arriving] < self._http[stranger]
        ):
            return arriving
        return stranger or next((each for each in self._present() if each.is_idle), None)

    def _present(self) -> Iterator[HttpConnection]:
        return (each for each in self._http if each not in self._cut)

    # --- peers that do not read ---

    def watch(self, connections: Collection[object], every_seconds: float) -> None:
        """Count these connections and cut peers that do not read their responses, from now on.

        Args:
            connections: all that have a transport, including streams; uvicorn's own set.
            every_seconds: how often to check for such peers.
        """
        self._open = connections
        self._look_later(every_seconds)

    def _look_later(self, every_seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(every_seconds, self._tick, list(self._http), every_seconds)

    def stop_watching(self) -> None:
        """Stop watching the connections."""
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self, connections: list[HttpConnection], every_seconds: float) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for each in itertools.islice(connections, LOOK_AT_ONCE):
            if each in self._http and each.is_stuck(now):
                each.cut()
        if len(connections) > LOOK_AT_ONCE:
            self._timer = loop.call_soon(self._tick, connections[LOOK_AT_ONCE:], every_seconds)
        else:
            self._look_later(every_seconds)
