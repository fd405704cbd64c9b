"""Lane: some threads of a database and the connections they use.

Knows no transaction and no table.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

from slm.errors import DatabaseUnavailable, InsufficientStorage
from slm.server.db.engines.sqlite_copy import copy_in_steps
from slm.server.db.errors import is_full, problem_of

T = TypeVar("T")

ASK_AGAIN_SECONDS: Final = 0.2
"""How soon PostgreSQL is asked again for a connection when it had none left."""


class Lane:
    """Threads and their connections.

    Args:
        workers: the largest number of threads.
        name: the threads' name.
        wait_seconds: how long a thread waits for a connection if the server has none left.

    Attributes:
        wait_seconds: the same.
        engine: None before it is opened, if there is none, and after it was closed.
    """

    def __init__(self, workers: int, name: str, wait_seconds: float) -> None:
        self.engine: Engine | None = None
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix=name)
        self.wait_seconds = wait_seconds

    def close(self) -> None:
        """Wait for the threads, then close every connection."""
        engine, self.engine = self.engine, None
        self._threads.shutdown()
        if engine is not None:
            engine.dispose()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run it in one of the threads.

        Raises:
            DatabaseUnavailable: the lane is closed.
        """
        try:
            return self._threads.submit(work)
        except RuntimeError as error:
            if "after shutdown" not in str(error):
                raise
            raise _closed() from None

    async def run(self, work: Callable[[], T]) -> T:
        """Run it in one of the threads, and wait for as long as it takes."""
        return await asyncio.wrap_future(self.submit(work))

    # --- in a thread ---

    def connect(self) -> Connection:
        """Return a connection; if the server has none left, wait for one of ours.

        Raises:
            DatabaseUnavailable: the lane is closed.
            DBAPIError: no connection was available.
        """
        engine = self.engine
        if engine is None:
            raise _closed()
        until = time.monotonic() + self.wait_seconds
        while True:
            try:
                return engine.connect()
            except DBAPIError as error:
                if not is_full(error) or time.monotonic() > until:
                    raise
            # Until one of ours is returned, or PostgreSQL may have another.
            pool, again_at = engine.pool, time.monotonic() + ASK_AGAIN_SECONDS
            while isinstance(pool, QueuePool) and not pool.checkedin():
                if time.monotonic() > min(again_at, until):
                    break
                time.sleep(0.005)

    @contextlib.contextmanager
    def sqlite(self) -> Iterator[sqlite3.Connection]:
        """Yield SQLite's own connection, outside a transaction; its errors become problems."""
        if self.engine is None:
            raise _closed()
        try:
            connection = self.engine.raw_connection()
            try:
                yield connection.dbapi_connection  # type: ignore[misc]
            finally:
                connection.close()
        except (SQLAlchemyError, sqlite3.Error) as error:
            problem = problem_of(error, committing=False)
            if problem is None:
                raise
            raise problem from error

    def outside(self, statement: str, *parameters: str) -> None:
        """Run an SQLite statement that only works outside a transaction."""
        with self.sqlite() as connection:
            connection.execute(statement, parameters)

    def copy_into(self, path: Path) -> None:
        """Copy a SQLite database into an empty file, in small steps, without blocking writers."""

        def go_on() -> None:
            if self.engine is None:
                raise _closed()

        with self.sqlite() as connection:
            try:
                copy_in_steps(connection, path, go_on)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise InsufficientStorage from error
                raise DatabaseUnavailable("The copy cannot be written.") from error


def _closed() -> DatabaseUnavailable:
    return DatabaseUnavailable("The database is closed.")
