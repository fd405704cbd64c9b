"""Pings every WebSocket of a server and cuts those that do not answer; the heartbeat is the hub's.

Knows no bytes except its pings, and of a connection only that it can be pinged and cut.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterable
from typing import Protocol

from websockets.frames import Opcode

from slm.server.transport.ws_frames import encode_frame


class Pinged(Protocol):
    """A connection whose peer must answer pings."""

    def ping(self, frame: bytes) -> None:
        """Write a ping, unless the connection is closing."""

    def abort(self) -> None:
        """Cut the connection."""


class Keepalive:
    """Pings a server's connections and cuts those that do not answer, using one timer for all.

    Args:
        interval_seconds: how long after the handshake or the last pong a peer is pinged.
        timeout_seconds: how long it may take to answer.
    """

    def __init__(self, interval_seconds: float, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._interval_seconds = interval_seconds
        # Both are in time order, because what is added last is due last.
        self._due: dict[Pinged, float] = {}
        self._asked: dict[Pinged, tuple[float, bytes]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, connection: Pinged) -> None:
        """Start pinging this peer."""
        at = asyncio.get_running_loop().time() + self._interval_seconds
        self._due[connection] = at
        self._look_at(at)

    def forget(self, connection: Pinged) -> None:
        """Stop pinging this peer."""
        self._due.pop(connection, None)
        self._asked.pop(connection, None)

    def answered(self, connection: Pinged, payload: bytes) -> None:
        """Handle a pong; unsolicited pongs are ignored (RFC 6455 section 5.5.3)."""
        asked = self._asked.get(connection)
        if asked is not None and asked[1] == payload:
            del self._asked[connection]
            self.watch(connection)

    def _tick(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for connection in _until(now, ((c, at) for c, (at, _) in self._asked.items())):
            # A close frame would never get through its full buffer.
            connection.abort()
        # Ping some slightly early, so that thousands of connections share a few timer runs.
        payload = os.urandom(4)
        ping = encode_frame(Opcode.PING, payload)
        for connection in _until(now + self._interval_seconds / 50, self._due.items()):
            del self._due[connection]
            self._asked[connection] = (now + self.timeout_seconds, payload)
            connection.ping(ping)
        for at in self._due.values():
            self._look_at(at)
            break
        for at, _ in self._asked.values():
            self._look_at(at)
            break

    def _look_at(self, at: float) -> None:
        """Schedule a run at this time, unless one is scheduled earlier."""
        if self._timer is None or at < self._timer.when():
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_at(at, self._tick)


def _until(end: float, times: Iterable[tuple[Pinged, float]]) -> list[Pinged]:
    """Return the connections up to the first with a time after `end`."""
    return [each for each, _ in itertools.takewhile(lambda item: item[1] <= end, times)]
