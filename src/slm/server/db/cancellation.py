"""Transactions, each shared by the loop that waits for it and the thread that runs it.

Knows neither SQL nor an engine. It ensures that a transaction that was given up is not committed
afterwards, and that a network that drops every packet does not hold a thread forever.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from slm.errors import DatabaseUnavailable, OutcomeUnknown

T = TypeVar("T")


class HasSocket(Protocol):
    """A driver's connection over a network."""

    def fileno(self) -> int:
        """Return the descriptor of its socket."""


class Attempt:
    """One transaction: the loop gives it up or the thread commits it, whichever comes first.

    Args:
        seconds: the time after which it may no longer be committed, even by a process that was
            suspended meanwhile; None: no limit.

    Attributes:
        seconds: the same.
        late: it was given up.
        entered: its thread has started on it.
        begun: one of its statements was run.
        committing: its commit has begun, so nobody can say that nothing was changed.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.late = False
        self.entered = False
        self.begun = False
        self.committing = False
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._connection: HasSocket | sqlite3.Connection | None = None
        self._lock = threading.Lock()

    # --- the loop ---

    def give_up(self, future: asyncio.Future[Any]) -> None:
        """Stop waiting; a thread that hangs on a dead network is freed."""
        with self._lock:
            self.late = True
            self._cut()
        future.cancel()

    def cut(self) -> None:
        """End the current connection, so that its thread returns and does not start again."""
        with self._lock:
            self.late = True
            self._cut()

    # --- the thread ---

    def check(self) -> None:
        """Raise if it was given up; then nothing may begin.

        Raises:
            DatabaseUnavailable: it was given up.
        """
        overdue = self._deadline is not None and time.monotonic() > self._deadline
        if self.late or overdue:
            raise DatabaseUnavailable("The database did not answer in time.")

    @property
    def seconds_left(self) -> float | None:
        """How many seconds it may still take, at least a little; None: no limit."""
        return None if self._deadline is None else max(0.001, self._deadline - time.monotonic())

    def hold(self, connection: HasSocket | sqlite3.Connection | None) -> None:
        """Set the connection in use; None: it is no longer in use, and others may use it next."""
        with self._lock:
            self._connection = connection

    def begin_commit(self) -> None:
        """Raise, and so roll back, if it was given up; after this it cannot be given up."""
        with self._lock:
            self.check()
            self.committing = True

    def _cut(self) -> None:
        connection = self._connection
        if connection is None:
            return
        if isinstance(connection, sqlite3.Connection):
            # A commit is one append and its fsync: waiting for it shows how it ended.
            if not self.committing:
                connection.interrupt()
            return
        shut_down(connection)


class Attempts:
    """All transactions of one database that someone waits for.

    Attributes:
        timeout_seconds: how long each may take; None: no limit, as for a migration.
    """

    def __init__(self) -> None:
        self.timeout_seconds: float | None = None
        self._waited_for: dict[Attempt, asyncio.Future[Any]] = {}
        self._giving_up: asyncio.TimerHandle | None = None

    def begin(self, seconds: float | None = None) -> Attempt:
        """Return a new one; `seconds` limits it further than `timeout_seconds`, if shorter."""
        limits = [each for each in (seconds, self.timeout_seconds) if each is not None]
        return Attempt(min(limits, default=None))

    async def outcome(self, attempt: Attempt, running: Future[T]) -> T:
        """Wait for the thread's result, for as long as the attempt may take.

        Raises:
            DatabaseUnavailable: it was given up.
            OutcomeUnknown: it was given up during its commit.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = asyncio.wrap_future(running)
        self._waited_for[attempt] = future
        timer = None
        if attempt.seconds is not None:
            timer = loop.call_later(attempt.seconds, attempt.give_up, future)
        try:
            return await future
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not attempt.late or (task is not None and task.cancelling()):
                raise
            if attempt.committing:
                raise OutcomeUnknown from None
            raise DatabaseUnavailable("The database did not answer in time.") from None
        finally:

            def over() -> None:
                if timer is not None:
                    timer.cancel()
                self._waited_for.pop(attempt, None)

            if running.done():
                over()
            else:
                # Nobody waits any more, but on a dead network the thread hangs: the timer or
                # `cut_all` must still cut it, or it never returns.
                running.add_done_callback(lambda _: _in_loop(loop, over))

    def give_up_in(self, seconds: float) -> None:
        """After this time give up those still running, and new ones at once."""
        self._giving_up = asyncio.get_running_loop().call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        self.timeout_seconds = 0
        for attempt, future in list(self._waited_for.items()):
            attempt.give_up(future)

    def cut_all(self) -> None:
        """End the ones that are left; nobody waits for them any more."""
        if self._giving_up is not None:
            self._giving_up.cancel()
        for attempt in list(self._waited_for):
            attempt.cut()


def shut_down(connection: HasSocket) -> None:
    """End a connection, whatever waits on it; its driver notices and closes it."""
    # Do not close the socket: its descriptor belongs to the driver.
    with (
        contextlib.suppress(Exception),
        socket.socket(fileno=os.dup(connection.fileno())) as own,
    ):
        own.shutdown(socket.SHUT_RDWR)


def _in_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call it in the loop, unless the loop has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)
