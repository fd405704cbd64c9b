"""Every open connection of a server: how many there may be, and which one makes room for another.

Knows no route and no token; a connection says by itself whether one was shown on it
(docs/decisions/0025-who-makes-room.md).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection, Iterator
from typing import Final, Protocol

KEPT_FOR_HTTP: Final = 256
"""How many connections no stream may take: an operator must get in while the streams are full."""

KEPT_DESCRIPTORS: Final = 100
"""How many descriptors are kept for files, the database and connections about to be closed."""

UNLIMITED: Final = 1_000_000
"""The limit where nobody sets one."""

LOOK_AT_ONCE: Final = 500
"""After how many connections everyone else in the loop has a turn."""

TOKEN_SHOWN: Final = "slm.token_shown"  # noqa: S105 - the name of a flag
"""The key of a request's `scope["state"]` that says that it carried a valid token."""


class HttpConnection(Protocol):
    """A connection that speaks plain HTTP, or nothing yet."""

    @property
    def is_stranger(self) -> bool:
        """Whether no request on it has carried a valid token."""

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""

    def is_stuck(self, now: float) -> bool:
        """Say whether the peer has stopped reading what it was answered."""

    def cut(self) -> None:
        """Close it now, and throw away what waits."""


def connection_limit(wanted: int | None, open_files: int | None) -> int:
    """Return how many connections a server may have.

    Args:
        wanted: what the operator set; None: as many as there are descriptors for.
        open_files: how many files the process may have open; None: any number.
    """
    most = UNLIMITED if open_files is None else open_files - KEPT_DESCRIPTORS
    return max(2, most if wanted is None else min(wanted, most))


class Connections:
    """The connections of one server.

    Args:
        limit: how many may be open at once.

    Attributes:
        arriving: the connections on their way there, such as in a TLS handshake, the oldest first.
        max_streams: how many of them may be streams.
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

    # --- what connections tell ---

    def begins_http(self, connection: HttpConnection) -> None:
        """Note a new connection."""
        self._http[connection] = asyncio.get_running_loop().time()

    def ends_http(self, connection: HttpConnection) -> None:
        """Note that a connection is closed, or becomes a stream."""
        self._http.pop(connection, None)
        self._cut.discard(connection)

    # --- limits ---

    @property
    def http(self) -> int:
        """How many speak plain HTTP."""
        return len(self._http)

    @property
    def has_too_many_streams(self) -> bool:
        """Whether the streams, and the connections that are becoming one, are over their limit."""
        return len(self._open) - len(self._http) > self.max_streams

    @property
    def can_take_one_more(self) -> bool:
        """Whether there is room, or a connection that can make some."""
        return len(self) < self.limit or self._dispensable() is not None

    def make_room(self) -> None:
        """Close a connection if there are too many."""
        if len(self) > self.limit:
            self.close_one()

    def close_one(self) -> None:
        """Close the oldest that has shown no valid token, or else the oldest that is idle."""
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
        """Count these, and cut the peers that do not read what they are answered, from now on.

        Args:
            connections: every one whose transport is there, streams included; uvicorn's own set.
            every_seconds: how often it is looked for such peers.
        """
        self._open = connections
        self._look_later(every_seconds)

    def _look_later(self, every_seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(every_seconds, self._tick, list(self._http), every_seconds)

    def stop_watching(self) -> None:
        """Stop watching them."""
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
