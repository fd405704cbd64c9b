"""PeriodicTask: work done at startup and then once per interval, such as a compaction.

Does not know the work: it is a function, which does its own logging.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from slm.errors import ProblemError
from slm.server.tasks.supervisor import Supervisor

logger = logging.getLogger(__name__)


class PeriodicTask:
    """Repeats one kind of work in the background; a failed run is retried at the next interval.

    Args:
        name: its name in logs and in `/readyz`.
        work: does the work once.
        interval_seconds: the pause after each run.
        supervisor: the supervisor of the server's tasks.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], Awaitable[object]],
        interval_seconds: float,
        supervisor: Supervisor,
    ) -> None:
        self._name = name
        self._work = work
        self._interval_seconds = interval_seconds
        self._task = supervisor.task(name, self._run, needed=False)

    async def start(self) -> None:
        """Start; the first run is immediate."""
        self._task.start()

    async def stop(self) -> None:
        """Stop; an open transaction is committed or rolled back as a whole."""
        await self._task.stop()

    async def _run(self) -> None:
        while True:
            try:
                await self._work()
            except ProblemError as error:
                logger.warning("%s: %s", self._name, error.detail)
            except Exception as error:
                # Only the class name: a driver's error text may contain data it read.
                logger.error("%s failed: %s", self._name, type(error).__name__)
            await asyncio.sleep(self._interval_seconds)
