"""The database: runs one plain function as one transaction, in one hop to a thread.

Knows no rule about agents. How SQLite and PostgreSQL are opened is in `engines`, the tables in
`models`, what an error of theirs means in `database_errors`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from slm.errors import DatabaseUnavailable, OutcomeUnknown
from slm.server import failpoints
from slm.server.attempt import Attempt
from slm.server.database_errors import problem_of, why_not_opened
from slm.server.engines import postgresql_engine, sqlite_engine, sqlite_path

T = TypeVar("T")


class Database:
    """One database, SQLite or PostgreSQL, behind one verb: run a function as one transaction.

    Args:
        url: `sqlite:///…` or `postgresql+psycopg://…`.
        lock_timeout_seconds: how long a transaction waits for a lock, and an opening for a file.
        idle_in_transaction_seconds: after this PostgreSQL ends a transaction that says nothing: a
            stopped replica holds the state row, and every other writer would wait for it.
        pool_size: how many transactions run at once on PostgreSQL; SQLite has one.

    Attributes:
        traces: by revision, the trace of a write that the feed has not passed on yet.
    """

    def __init__(
        self,
        url: str | URL,
        *,
        lock_timeout_seconds: float = 2.0,
        idle_in_transaction_seconds: float = 5.0,
        pool_size: int = 8,
    ) -> None:
        self.url = make_url(url)
        self.dialect: Literal["sqlite", "postgresql"] = (
            "sqlite" if self.url.get_backend_name() == "sqlite" else "postgresql"
        )
        self._lock_timeout_seconds = lock_timeout_seconds
        self._idle_in_transaction_seconds = idle_in_transaction_seconds
        # None while a server is made ready: a migration takes as long as it takes.
        self._answer_timeout_seconds: float | None = None
        self._workers = 1 if self.dialect == "sqlite" else pool_size
        self.traces: dict[int, str] = {}
        self._attempts: dict[Attempt, asyncio.Future[Any]] = {}
        self._giving_up: asyncio.TimerHandle | None = None
        self._engine: Engine | None = None
        self._threads: ThreadPoolExecutor | None = None

    def __repr__(self) -> str:
        return f"<Database {self.name}>"

    @property
    def name(self) -> str:
        """What to call this database in a message: the file, or the URL without its password."""
        if self.dialect == "sqlite":
            return self.url.database or ":memory:"
        return self.url.set(query={}).render_as_string(hide_password=True)

    @property
    def path(self) -> Path | None:
        """The SQLite file, where there is one."""
        return sqlite_path(self.url) if self.dialect == "sqlite" else None

    def answer_within(self, seconds: float) -> None:
        """From now on give a transaction up that takes longer, such as on a lost network."""
        self._answer_timeout_seconds = seconds

    def give_up_in(self, seconds: float) -> None:
        """For a server that stops: by then each transaction is over, or is given up."""
        self._giving_up = asyncio.get_running_loop().call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        self._answer_timeout_seconds = 0
        for attempt, future in list(self._attempts.items()):
            attempt.give_up(future)

    async def open(self) -> None:
        """Open the database; a SQLite file that is not there is made, readable by us alone.

        Raises:
            StartupError: it cannot be used; one sentence says why.
        """
        self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix="slm-database")
        try:
            self._engine = self._make_engine()
            await self._hop(self._first_look)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close every connection; a transaction that hangs on a dead network is cut."""
        if self._giving_up is not None:
            self._giving_up.cancel()
        engine, self._engine = self._engine, None
        threads, self._threads = self._threads, None
        if threads is None:
            return
        for attempt in list(self._attempts):
            # Nobody waits for it any more: its caller went with the server.
            attempt.cut()
        if engine is not None:
            # In its own thread: a SQLite connection may not be closed from another.
            await asyncio.get_running_loop().run_in_executor(threads, engine.dispose)
        await asyncio.to_thread(threads.shutdown)

    async def run(
        self, fn: Callable[[Connection], T], *, committed: Callable[[T], None] | None = None
    ) -> T:
        """Run `fn` as one transaction, in one hop to a thread; it is rolled back on any error.

        Args:
            fn: a plain function; it must not keep the connection. On PostgreSQL it runs under READ
                COMMITTED, so a writer locks the state row first.
            committed: given what `fn` returned, in its thread, once that is durable; what it raises
                is the affair of nobody.

        Raises:
            DatabaseUnavailable: the database is away, or a lock was not had in time.
            InsufficientStorage: its disk is full.
            OutcomeUnknown: the connection was lost while committing.
        """
        attempt = Attempt(self._answer_timeout_seconds)
        work = functools.partial(self._transaction, fn, False, attempt, committed)
        return await self._hop(work, attempt)

    async def read(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn`, which only reads, on one consistent view of the whole database.

        It may be run twice: again where the connection was lost under it.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        attempt = Attempt(self._answer_timeout_seconds)
        return await self._hop(functools.partial(self._transaction, fn, True, attempt), attempt)

    async def vacuum_into(self, path: Path) -> None:
        """Write a consistent copy of a SQLite database into an empty file, while it is in use.

        Raises:
            InsufficientStorage: the disk is full.
            DatabaseUnavailable: it cannot be read or written.
        """
        await self._hop(functools.partial(self._outside, "VACUUM INTO ?", str(path)))

    async def leave_wal(self) -> None:
        """Fold the WAL into the SQLite file for good, so that the file alone is the database."""
        await self._hop(functools.partial(self._outside, "PRAGMA journal_mode=DELETE"))

    def _outside(self, statement: str, *parameters: str) -> None:
        """Run one of SQLite's statements that work outside a transaction only."""
        if self._engine is None:
            raise DatabaseUnavailable("The database is closed.")
        connection = self._engine.raw_connection()
        try:
            connection.cursor().execute(statement, parameters)
        except sqlite3.Error as error:
            problem = problem_of(error, committing=False)
            if problem is None:
                raise
            raise problem from error
        finally:
            connection.close()

    async def _hop(self, work: Callable[[], T], attempt: Attempt | None = None) -> T:
        if self._threads is None:
            raise DatabaseUnavailable("The database is closed.")
        loop = asyncio.get_running_loop()
        try:
            running = self._threads.submit(work)
        except RuntimeError as error:
            if "after shutdown" not in str(error):
                raise
            raise DatabaseUnavailable("The database is closed.") from None
        future = asyncio.wrap_future(running)
        if attempt is None or self._answer_timeout_seconds is None:
            return await future
        self._attempts[attempt] = future
        timer = loop.call_later(self._answer_timeout_seconds, attempt.give_up, future)
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
                timer.cancel()
                self._attempts.pop(attempt, None)

            if running.done():
                over()
            else:
                # Whoever waited went, but on a silent network the thread hangs: it is still to be
                # cut, by the timer or by `close`, or it never comes back.
                running.add_done_callback(lambda _: _in_loop(loop, over))

    def _transaction(
        self,
        fn: Callable[[Connection], T],
        read_only: bool,
        attempt: Attempt,
        committed: Callable[[T], None] | None = None,
    ) -> T:
        try:
            try:
                return self._once(fn, read_only, attempt, committed)
            except DBAPIError as error:
                if not error.connection_invalidated or (attempt.begun and not read_only):
                    raise
                # It died in the pool: not one statement was run; that costs nothing, where a ping
                # before each transaction is a round trip. Or under a read, which changed nothing,
                # such as when this process stood still and PostgreSQL ended the transaction. Once
                # more, on a new one.
                return self._once(fn, read_only, attempt, committed)
        except (DBAPIError, PoolTimeout, sqlite3.Error) as error:
            problem = problem_of(error, committing=attempt.committing)
            if problem is None:
                raise
            raise problem from error

    def _once(
        self,
        fn: Callable[[Connection], T],
        read_only: bool,
        attempt: Attempt,
        committed: Callable[[T], None] | None,
    ) -> T:
        attempt.check()
        engine = self._engine
        if engine is None:
            raise DatabaseUnavailable("The database is closed.")
        failpoints.reach("database")
        with engine.connect() as connection, contextlib.ExitStack() as stack:
            if self.dialect == "postgresql":
                attempt.hold(connection.connection.dbapi_connection)  # type: ignore[arg-type]
                connection.info["attempt"] = attempt
                stack.callback(attempt.hold, None)
                if read_only:
                    # READ COMMITTED would let each statement see another revision.
                    connection.execution_options(
                        isolation_level="REPEATABLE READ", postgresql_readonly=True
                    )
            with contextlib.closing(connection.begin()) as transaction:
                result = fn(connection)
                if not read_only:
                    attempt.begin_commit()
                transaction.commit()
            if committed is not None:
                with contextlib.suppress(Exception):
                    committed(result)
        return result

    def _make_engine(self) -> Engine:
        if self.dialect == "sqlite":
            return sqlite_engine(self.url, self._lock_timeout_seconds)
        return postgresql_engine(
            self.url,
            lock_timeout_seconds=self._lock_timeout_seconds,
            idle_in_transaction_seconds=self._idle_in_transaction_seconds,
            pool_size=self._workers,
        )

    def _first_look(self) -> None:
        assert self._engine is not None  # noqa: S101 - for the type checker
        try:
            with self._engine.begin() as connection:
                connection.exec_driver_sql("SELECT 1")
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise why_not_opened(error, self.name) from None


def _in_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call it in the loop, unless that has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)
