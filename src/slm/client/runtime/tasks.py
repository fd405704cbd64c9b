"""The tasks of one owner: what fails is logged or started again, and all end together.

Knows nothing of what runs in them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from slm.client.runtime.log import quiet_logger

_T = TypeVar("_T")
_log = quiet_logger("slm.client")


class Tasks:
    """Belongs to one event loop.

    Args:
        again_seconds: how long to wait before what failed is started again.
    """

    def __init__(self, again_seconds: float) -> None:
        self._again_seconds = again_seconds
        self._running: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Run this once."""
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def keep_up(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run what must not end: a mistake of ours must not stop it for the process's life."""
        self.spawn(self._kept_up(work))

    async def close(self) -> None:
        """Cancel all, and return once they have ended."""
        while self._running:
            for task in self._running:
                task.cancel()
            await asyncio.wait(self._running)
            await asyncio.sleep(0)  # they are taken from the set by a callback

    async def _kept_up(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            try:
                await work()
            except Exception:
                _log.exception("a task of the client failed; starting it again")
            await asyncio.sleep(self._again_seconds)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a task of the client failed", exc_info=error)
