"""Transactions, each between the loop that waits for it and the thread that runs it.

Knows neither SQL nor an engine. It exists so that a transaction that was given up is not committed
afterwards, and so that a network that swallows everything does not hold a thread for ever.
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
    """A driver's connection that goes over a network."""

    def fileno(self) -> int:
        """Return the descriptor of its socket."""


class Attempt:
    """Whoever comes first decides: the loop that gives it up, or the thread that commits.

    Args:
        seconds: after how long it may not be committed any more, even by a process that was
            stopped meanwhile; None: it may always.

    Attributes:
        seconds: the same.
        late: it was given up.
        entered: its thread has taken it up.
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
        """Wait no longer; a thread that hangs on a dead network is freed."""
        with self._lock:
            self.late = True
            self._cut()
        future.cancel()

    def cut(self) -> None:
        """End the connection under way, so that its thread comes back and does not begin anew."""
        with self._lock:
            self.late = True
            self._cut()

    # --- the thread ---

    def check(self) -> None:
        """Raise where it was given up; nothing may begin then.

        Raises:
            DatabaseUnavailable: it was.
        """
        overdue = self._deadline is not None and time.monotonic() > self._deadline
        if self.late or overdue:
            raise DatabaseUnavailable("The database did not answer in time.")

    @property
    def seconds_left(self) -> float | None:
        """How long it may still take, a little at least; None: as long as it takes."""
        return None if self._deadline is None else max(0.001, self._deadline - time.monotonic())

    def hold(self, connection: HasSocket | sqlite3.Connection | None) -> None:
        """Say which connection is in use; None: none any more, another may use it next."""
        with self._lock:
            self._connection = connection

    def begin_commit(self) -> None:
        """Raise, and so roll back, where it was given up; from here on it cannot be."""
        with self._lock:
            self.check()
            self.committing = True

    def _cut(self) -> None:
        connection = self._connection
        if connection is None:
            return
        if isinstance(connection, sqlite3.Connection):
            # A commit is one append and its fsync: to wait for it is to know how it ended.
            if not self.committing:
                connection.interrupt()
            return
        shut_down(connection)


class Attempts:
    """All transactions of one database that somebody waits for.

    Attributes:
        timeout_seconds: how long each may take; None: as long as it takes, as a migration may.
    """

    def __init__(self) -> None:
        self.timeout_seconds: float | None = None
        self._waited_for: dict[Attempt, asyncio.Future[Any]] = {}
        self._giving_up: asyncio.TimerHandle | None = None

    def begin(self, seconds: float | None = None) -> Attempt:
        """Return a new one, which may take `seconds` at most where others may take longer."""
        limits = [each for each in (seconds, self.timeout_seconds) if each is not None]
        return Attempt(min(limits, default=None))

    async def outcome(self, attempt: Attempt, running: Future[T]) -> T:
        """Wait for what the thread returns, for as long as the attempt may take.

        Raises:
            DatabaseUnavailable: it was given up.
            OutcomeUnknown: it was given up while it committed.
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
                # Whoever waited went, but on a silent network the thread hangs: it is still to be
                # cut, by the timer or by `cut_all`, or it never comes back.
                running.add_done_callback(lambda _: _in_loop(loop, over))

    def give_up_in(self, seconds: float) -> None:
        """By then each is over or is given up, and new ones are given up at once."""
        self._giving_up = asyncio.get_running_loop().call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        self.timeout_seconds = 0
        for attempt, future in list(self._waited_for.items()):
            attempt.give_up(future)

    def cut_all(self) -> None:
        """End those that are left; nobody waits for them any more."""
        if self._giving_up is not None:
            self._giving_up.cancel()
        for attempt in list(self._waited_for):
            attempt.cut()


def shut_down(connection: HasSocket) -> None:
    """End a connection, whatever waits on it; its driver notices and closes it."""
    # The socket is not closed: its number belongs to the driver.
    with (
        contextlib.suppress(Exception),
        socket.socket(fileno=os.dup(connection.fileno())) as own,
    ):
        own.shutdown(socket.SHUT_RDWR)


def _in_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call it in the loop, unless that has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)
