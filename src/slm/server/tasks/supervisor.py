"""Keeps the server's background tasks alive: logs one that ends and restarts it with backoff.

Every task that lives as long as the server is supervised here; `tests/server/test_supervisor.py`
searches the source for others. Does not know what a task does.
"""

from __future__ import annotations

import asyncio
import logging
import random
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS: Final = 0.05
MAX_BACKOFF_SECONDS: Final = 5.0

STEADY_SECONDS: Final = 2.0
"""After a restart, a task that has run for this long is steady again."""

DOWN_SECONDS: Final = 3.0
"""A needed task that has been restarting for longer makes `/readyz` fail."""


@dataclass(frozen=True)
class TaskState:
    """What `/readyz` and `/metrics` report about one task.

    Attributes:
        name: such as `feed`.
        needed: whether the server is not ready without it.
        running: whether it runs; also False while it keeps ending soon after each start.
        restarting_seconds: how long it has not run steadily.
        restarts: how many times it was restarted.
        last_error: the class of the last error that ended it; empty if there was none.
    """

    name: str
    needed: bool
    running: bool
    restarting_seconds: float
    restarts: int
    last_error: str


class SupervisedTask:
    """A task that is restarted whenever it ends before `stop`.

    Args:
        name: its name in logs and in `/readyz`; the asyncio task is named `slm-NAME`.
        work: creates the coroutine, once per start; it must not rely on the last run's cleanup.
        needed: whether the server is not ready without it.
    """

    def __init__(
        self, name: str, work: Callable[[], Coroutine[Any, Any, None]], *, needed: bool = True
    ) -> None:
        self.name = name
        self.needed = needed
        self.restarts = 0
        self.last_error = ""
        self._work = work
        self._task: asyncio.Task[None] | None = None
        self._again: asyncio.TimerHandle | None = None
        self._stopping = True
        self._backoff = FIRST_BACKOFF_SECONDS
        self._began_at = 0.0
        self._failing_since: float | None = None

    @property
    def stopped(self) -> bool:
        """Whether it should not be running: before `start` and after `stop`."""
        return self._stopping

    @property
    def running(self) -> bool:
        """Whether the task is running now."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Start; does nothing if already started."""
        if self._stopping:
            self._stopping = False
            self._failing_since = None
            self._begin()

    def cancel(self) -> None:
        """End the task permanently, without waiting for it."""
        self._stopping = True
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self._task is not None:
            self._task.cancel()

    async def stop(self) -> None:
        """End the task permanently and wait for it."""
        self.cancel()
        task, self._task = self._task, None
        if task is not None:
            await asyncio.gather(task, return_exceptions=True)

    def state(self) -> TaskState:
        """Return its current state."""
        now = asyncio.get_running_loop().time()
        self._note_steady(now)
        failing = self._failing_since
        return TaskState(
            self.name,
            self.needed,
            self.running and failing is None,
            0.0 if failing is None else now - failing,
            self.restarts,
            self.last_error,
        )

    def _begin(self) -> None:
        loop = asyncio.get_running_loop()
        self._again = None
        self._began_at = loop.time()
        self._task = loop.create_task(self._work(), name=f"slm-{self.name}")
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Restart the task after a delay, even if it returned or was cancelled unexpectedly."""
        # Always retrieve it, or asyncio logs the whole exception, including data in its text.
        error = None if task.cancelled() else task.exception()
        if self._stopping or task is not self._task:
            return
        loop = task.get_loop()
        self._note_steady(loop.time())
        what = "a stray cancellation" if task.cancelled() else "a return"
        if error is not None:
            what = type(error).__name__
        if self._failing_since is None or what != self.last_error:
            text = "the task %s ended with %s%s; it is started again"
            logger.error(text, self.name, what, _at(error))
        if self._failing_since is None:
            self._failing_since = loop.time()
        self.restarts += 1
        self.last_error = what
        # Spread out, so that servers that lost the same database don't retry at one moment.
        delay = random.uniform(self._backoff / 2, self._backoff)  # noqa: S311 - jitter, no secret # nosec B311
        self._backoff = min(2 * self._backoff, MAX_BACKOFF_SECONDS)
        self._again = loop.call_later(delay, self._begin)

    def _note_steady(self, now: float) -> None:
        """Reset the backoff once the task has run for long enough."""
        if self._failing_since is None or now - self._began_at < STEADY_SECONDS or self._again:
            return
        logger.info("the task %s runs again, after %d starts", self.name, self.restarts)
        self._failing_since = None
        self._backoff = FIRST_BACKOFF_SECONDS


class Supervisor:
    """All background tasks of a server, by name."""

    def __init__(self) -> None:
        self._tasks: dict[str, SupervisedTask] = {}

    def task(
        self, name: str, work: Callable[[], Coroutine[Any, Any, None]], *, needed: bool = True
    ) -> SupervisedTask:
        """Create a task and include it in `states` from now on; does not start it.

        Args:
            name: its name.
            work: creates its coroutine, once per start.
            needed: whether the server is not ready without it.
        """
        made = self._tasks[name] = SupervisedTask(name, work, needed=needed)
        return made

    def states(self) -> list[TaskState]:
        """Return the state of each task that was started and not stopped."""
        return [task.state() for task in self._tasks.values() if not task.stopped]

    @property
    def down(self) -> list[str]:
        """The needed tasks that have not run for more than `DOWN_SECONDS`."""
        return [
            state.name
            for state in self.states()
            if state.needed and state.restarting_seconds > DOWN_SECONDS
        ]


def _at(error: BaseException | None) -> str:
    """Return where in the source an error was raised; its text may contain data that was read."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    return f" in {frames[-1].name}, line {frames[-1].lineno}" if frames else ""
