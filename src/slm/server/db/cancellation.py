"""One transaction, between the loop that waits for it and the thread that runs it.

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
from typing import Any, Protocol

from slm.errors import DatabaseUnavailable


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
        late: it was given up.
        entered: its thread has taken it up.
        begun: one of its statements was run.
        committing: its commit has begun, so nobody can say that nothing was changed.
    """

    def __init__(self, seconds: float | None) -> None:
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


def shut_down(connection: HasSocket) -> None:
    """End a connection, whatever waits on it; its driver notices and closes it."""
    # The socket is not closed: its number belongs to the driver.
    with (
        contextlib.suppress(Exception),
        socket.socket(fileno=os.dup(connection.fileno())) as own,
    ):
        own.shutdown(socket.SHUT_RDWR)
