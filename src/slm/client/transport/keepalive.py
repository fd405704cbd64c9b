"""Silence: pings a connection that has gone quiet, and gives up one that stays quiet.

Uses one timer per connection; a frame only updates the time. Knows the WebSocket, and nothing about
the messages.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Final

import aiohttp

_HEAR_FIRST_SECONDS: Final = 0.01


class Silence:
    """Tracks when a connection last received something, and how long it may be silent.

    Args:
        ws: the connection, which must not send pings itself.
        ping_seconds: how long without a frame before a ping; it has as long to answer.
        message_seconds: how long it may go without a message, until `allow` changes it.

    Attributes:
        heard_at: when the last frame of any kind arrived, by the loop's clock.
        told_at: when the last message arrived.
        seconds: how long it had been silent when it was given up.
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
        self._pinged_at = float("-inf")
        self._deadline = asyncio.timeout(None)
        self._timer: asyncio.Handle | None = None
        self._ping: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def limited(self) -> AsyncIterator[None]:
        """Send pings while the block waits, and end the wait if nothing arrives for too long.

        Raises:
            TimeoutError: no answer to a ping, or no message (docs/protocol.md section 4).
        """
        async with self._deadline:
            self._tick()
            try:
                yield
            finally:
                if self._timer is not None:
                    self._timer.cancel()
                if self._ping is not None:
                    self._ping.cancel()

    def allow(self, message_seconds: float) -> None:
        """Change how long the connection may go without a message."""
        self._message_seconds = message_seconds
        if self._timer is not None:
            self._timer.cancel()
        self._tick()

    def give_up(self) -> None:
        """End the wait now."""
        with contextlib.suppress(RuntimeError):  # it has already ended
            self._deadline.reschedule(self._loop.time())

    def _tick(self, *, again: bool = False) -> None:
        now = self._loop.time()
        asked = self._pinged_at > self.heard_at
        answer_by = (self._pinged_at if asked else self.heard_at) + self._ping_seconds
        message_by = self.told_at + self._message_seconds
        gone = now >= message_by or (asked and now >= answer_by)
        if gone and again:
            self.seconds = self._message_seconds if now >= message_by else 2 * self._ping_seconds
            self._deadline.reschedule(now)
        elif gone:
            # This loop itself may have stalled: process what arrived meanwhile first.
            self._timer = self._loop.call_later(
                _HEAR_FIRST_SECONDS, partial(self._tick, again=True)
            )
        else:
            if now >= answer_by:
                self._pinged_at, answer_by = now, now + self._ping_seconds
                self._ping = self._loop.create_task(self._send_ping())
            self._timer = self._loop.call_at(min(answer_by, message_by), self._tick)

    async def _send_ping(self) -> None:
        with contextlib.suppress(aiohttp.ClientError, OSError):
            await self._ws.ping()  # if it fails, the reader notices
