"""Silence: pings a connection that has gone quiet, and gives up one that stays so.

One timer a connection, and a frame does no more than note the time. Knows the WebSocket, and
nothing of what is said over it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial

import aiohttp


class Silence:
    """When something was last heard over one connection, and for how long nothing may be.

    Args:
        ws: the connection, not pinging by itself.
        ping_seconds: after how long without a frame it is pinged; it has as long to answer.
        message_seconds: how long it may go on without a message, until `allow` says otherwise.

    Attributes:
        heard_at: when the last frame of any kind came, on the loop's clock.
        told_at: when the last message came.
        seconds: for how long nothing had come, once it was given up.
    """

    def __init__(
        self, ws: aiohttp.ClientWebSocketResponse, ping_seconds: float, message_seconds: float
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._ws = ws
        self._ping_seconds = ping_seconds
        self._message_seconds = message_seconds
        self.heard_at = self.told_at = self._loop.time()
        self.seconds = 0.0
        self._deadline = asyncio.timeout(None)
        self._timer: asyncio.Handle | None = None
        self._ping: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def limited(self) -> AsyncIterator[None]:
        """Ping while the block waits, and end its wait once nothing came for too long.

        Raises:
            TimeoutError: no answer to a ping, or no message (docs/protocol.md section 4).
        """
        async with self._deadline:
            self._look()
            try:
                yield
            finally:
                if self._timer is not None:
                    self._timer.cancel()
                if self._ping is not None:
                    self._ping.cancel()

    def allow(self, message_seconds: float) -> None:
        """Change how long the connection may go on without a message."""
        self._message_seconds = message_seconds
        if self._timer is not None:
            self._timer.cancel()
        self._look()

    def _look(self, *, again: bool = False) -> None:
        now = self._loop.time()
        ping_at = self.heard_at + self._ping_seconds
        for since, seconds in (
            (self.told_at, self._message_seconds),
            (self.heard_at, 2 * self._ping_seconds),
        ):
            if now >= since + seconds:
                if not again:
                    # Where it was this loop that stood still, what came meanwhile is read first.
                    self._timer = self._loop.call_soon(partial(self._look, again=True))
                    return
                self.seconds = seconds
                self._deadline.reschedule(now)
                return
        if now >= ping_at:
            self._ping = self._loop.create_task(self._send_ping())
            ping_at += self._ping_seconds
        look_at = min(ping_at, self.told_at + self._message_seconds)
        self._timer = self._loop.call_at(look_at, self._look)

    async def _send_ping(self) -> None:
        with contextlib.suppress(aiohttp.ClientError, OSError):
            await self._ws.ping()  # where it fails, the reader finds out by itself
