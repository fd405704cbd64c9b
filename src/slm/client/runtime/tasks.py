"""The tasks of one owner: failures are logged or restarted, and all end together.

Does not know what runs in them.
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
        again_seconds: how long to wait before restarting a failed task.
    """

    def __init__(self, again_seconds: float) -> None:
        self._again_seconds = again_seconds
        self._running: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Run work once."""
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def keep_up(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run work that must not end: one of our errors must not stop it for good."""
        self.spawn(self._kept_up(work))

    async def close(self) -> None:
        """Cancel all tasks and wait until they have ended."""
        while self._running:
            for task in self._running:
                task.cancel()
            await asyncio.wait(self._running)
            await asyncio.sleep(0)  # a callback removes them from the set

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
