"""Quiet: when an event loop has nothing urgent left to do.

One for each loop, whoever asks: hundreds of clients in one loop look once, not each for itself.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Final

TURN_SECONDS: Final = 0.001
"""A loop that takes longer than this to come round has work to do."""


class Quiet:
    """Calls back when one loop came round quickly, or when that took too long to wait for.

    While somebody waits it looks at every turn of a busy loop; in an idle one it looks once. It
    does not hold its loop.
    """

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []
        self._late_at = 0.0

    @classmethod
    def of_running_loop(cls) -> Quiet:
        """Return the running loop's own."""
        loop = asyncio.get_running_loop()
        quiet = _of_loop.get(loop)
        if quiet is None:
            quiet = _of_loop[loop] = cls()
        return quiet

    def then(self, callback: Callable[[], None], late_seconds: float) -> None:
        """Call back at the end of this turn of the loop if it is short, else of the next short one.

        Args:
            callback: must be quick, and not raise.
            late_seconds: a loop that is busy for longer is not waited for. Who came first counts.
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
