"""PeriodicTask: work that is done at the start and then once every interval, such as a compaction.

Knows no work: what is done is a function, which says itself what it did.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from slm.errors import ProblemError
from slm.server.tasks.supervisor import Supervisor

logger = logging.getLogger(__name__)


class PeriodicTask:
    """One kind of work, again and again in the background; a failure waits for the next time.

    Args:
        name: what it is called in logs and in `/readyz`.
        work: does it once.
        interval_seconds: how long to rest after it.
        supervisor: of the server's tasks.
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
        """Begin; the work is done for the first time at once."""
        self._task.start()

    async def stop(self) -> None:
        """Stop; a transaction under way is committed or rolled back as a whole."""
        await self._task.stop()

    async def _run(self) -> None:
        while True:
            try:
                await self._work()
            except ProblemError as error:
                logger.warning("%s: %s", self._name, error.detail)
            except Exception as error:
                # The class alone: a driver's text may hold what was read.
                logger.error("%s failed: %s", self._name, type(error).__name__)
            await asyncio.sleep(self._interval_seconds)
