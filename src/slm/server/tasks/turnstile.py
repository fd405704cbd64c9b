"""Turnstile: admits waiting callers a few per turn of the event loop, so that others get turns.

Knows neither requests nor keys.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

AT_A_TURN: Final = 4
"""How many are admitted per turn of the loop; a read of keys takes about a millisecond of it."""

MOST_A_TURN: Final = 16
"""The maximum when turns are long: waiting callers get half of the loop, whatever else runs."""

_SECONDS_EACH: Final = 0.001


class Turnstile:
    """A single caller passes at once; a crowd passes in order of arrival."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._turn_began = 0.0
        self._places = AT_A_TURN
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._turn: asyncio.Handle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    async def enter(self) -> None:
        """Return when it is the caller's turn."""
        loop = asyncio.get_running_loop()
        if self._turn is None:
            self._places, self._turn_began = AT_A_TURN, self._clock()
            self._turn = loop.call_soon(self._next_turn)
        if self._places and not self._waiting:
            self._places -= 1
            return
        mine = loop.create_future()
        self._waiting.append(mine)
        await mine

    def _next_turn(self) -> None:
        if not self._waiting:
            self._turn = None
            return
        now = self._clock()
        took, self._turn_began = now - self._turn_began, now
        self._places = min(max(AT_A_TURN, int(took / _SECONDS_EACH)), MOST_A_TURN)
        while self._waiting and self._places:
            first = self._waiting.popleft()
            if not first.done():
                first.set_result(None)
                self._places -= 1
        self._turn = asyncio.get_running_loop().call_soon(self._next_turn)
