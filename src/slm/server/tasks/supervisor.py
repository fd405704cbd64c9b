"""Keeps the server's background tasks alive: one that ends is logged, backed off and started again.

Every task that lives as long as the server is one of these; `tests/server/test_supervisor.py` walks
the sources for others. Knows no task's work.
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
"""A task that has run for so long since it was started again counts as well."""

DOWN_SECONDS: Final = 3.0
"""A needed task that has been restarting for longer makes `/readyz` red."""


@dataclass(frozen=True)
class TaskState:
    """What `/readyz` and `/metrics` say of one task.

    Attributes:
        name: such as `feed`.
        needed: whether the server is not ready without it.
        running: whether it runs; False also while it keeps ending soon after each start.
        restarting_seconds: how long it has not run steadily.
        restarts: how many times it was started again.
        last_error: the class of what last ended it; empty where nothing did.
    """

    name: str
    needed: bool
    running: bool
    restarting_seconds: float
    restarts: int
    last_error: str


class SupervisedTask:
    """One task that is started again whenever it ends before `stop`.

    Args:
        name: what it is called in logs and in `/readyz`; the task itself is `slm-NAME`.
        work: makes the coroutine, anew for each start; it must not rely on having ended in order.
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
        """Whether it is meant to be at rest: before `start` and after `stop`."""
        return self._stopping

    @property
    def running(self) -> bool:
        """Whether the task is at work now."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Begin; does nothing where it has begun."""
        if self._stopping:
            self._stopping = False
            self._failing_since = None
            self._begin()

    def cancel(self) -> None:
        """End the task for good, without waiting for it."""
        self._stopping = True
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self._task is not None:
            self._task.cancel()

    async def stop(self) -> None:
        """End the task for good and wait for it."""
        self.cancel()
        task, self._task = self._task, None
        if task is not None:
            await asyncio.gather(task, return_exceptions=True)

    def state(self) -> TaskState:
        """Return how it is now."""
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
        """Start it again in a moment: also after a return or a stray cancellation."""
        # Asked for in any case, or asyncio logs the exception whole, with what its text holds.
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
        # Not at one moment on every server whose database went.
        delay = random.uniform(self._backoff / 2, self._backoff)  # noqa: S311 - jitter, no secret # nosec B311
        self._backoff = min(2 * self._backoff, MAX_BACKOFF_SECONDS)
        self._again = loop.call_later(delay, self._begin)

    def _note_steady(self, now: float) -> None:
        """Forget the failures of a task that has run long enough since."""
        if self._failing_since is None or now - self._began_at < STEADY_SECONDS or self._again:
            return
        logger.info("the task %s runs again, after %d starts", self.name, self.restarts)
        self._failing_since = None
        self._backoff = FIRST_BACKOFF_SECONDS


class Supervisor:
    """All background tasks of one server, by name."""

    def __init__(self) -> None:
        self._tasks: dict[str, SupervisedTask] = {}

    def task(
        self, name: str, work: Callable[[], Coroutine[Any, Any, None]], *, needed: bool = True
    ) -> SupervisedTask:
        """Return a new task, which `states` reports from now on; nothing runs yet.

        Args:
            name: what it is called.
            work: makes its coroutine, anew for each start.
            needed: whether the server is not ready without it.
        """
        made = self._tasks[name] = SupervisedTask(name, work, needed=needed)
        return made

    def states(self) -> list[TaskState]:
        """Return how each task is that was started and not stopped."""
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
    """Return where in the sources an error was raised; its own text may hold what was read."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    return f" in {frames[-1].name}, line {frames[-1].lineno}" if frames else ""
