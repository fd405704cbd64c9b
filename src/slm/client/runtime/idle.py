"""Quiet: detects when an event loop has nothing urgent left to do.

Shared per loop: hundreds of clients in one loop check once, not each on its own.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Final

TURN_SECONDS: Final = 0.001
"""An event loop whose turn takes longer than this is busy."""


class Quiet:
    """Calls back after a short turn of the loop, or when waiting for one took too long.

    While something is waiting, it checks every turn of a busy loop and one turn of an idle loop. It
    does not keep its loop alive.
    """

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []
        self._late_at = 0.0

    @classmethod
    def of_running_loop(cls) -> Quiet:
        """Return the instance of the running loop."""
        loop = asyncio.get_running_loop()
        quiet = _of_loop.get(loop)
        if quiet is None:
            quiet = _of_loop[loop] = cls()
        return quiet

    def then(self, callback: Callable[[], None], late_seconds: float) -> None:
        """Call back at the end of this turn of the loop if it is short, or of the next short one.

        Args:
            callback: must be fast and must not raise.
            late_seconds: the longest wait for a busy loop; the first caller's value applies.
        """
        self._waiting.append(callback)
        if len(self._waiting) == 1:
            loop = asyncio.get_running_loop()
            now = loop.time()
            self._late_at = now + late_seconds
            loop.call_soon(self._tick, now)

    def _tick(self, began: float) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        if now - began >= TURN_SECONDS and now < self._late_at:
            loop.call_soon(self._tick, now)
            return
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback()


_of_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Quiet] = weakref.WeakKeyDictionary()
