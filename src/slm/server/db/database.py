"""The database: runs one plain function as one transaction, in one hop to a thread.

Knows no rule about agents. `engines.opening` opens SQLite and PostgreSQL, `tables` has the tables,
and `errors` interprets their errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, TypeVar

from sqlalchemy import Connection
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from slm.errors import (
    DatabaseUnavailable,
    InsufficientStorage,
    OutcomeUnknown,
    Overloaded,
    ProblemError,
)
from slm.server import failpoints
from slm.server.db import state
from slm.server.db.cancellation import Attempt, Attempts
from slm.server.db.engines.opening import for_writes, open_engines, sqlite_path
from slm.server.db.engines.postgresql import refuse_unfit
from slm.server.db.engines.sqlite_file import SqliteFile
from slm.server.db.errors import is_read_only, problem_of, why_not_opened
from slm.server.db.lane import Lane

T = TypeVar("T")

logger = logging.getLogger(__name__)

LONG_READERS: Final = 2
"""How many long reads run at once, each on its own connection."""

LONG_READS: Final = 32
"""How many long reads may be running or waiting."""


class Database:
    """One database, SQLite or PostgreSQL, with one operation: run a function as one transaction.

    Args:
        url: `sqlite:///…` or `postgresql+psycopg://…`.
        lock_timeout_seconds: how long a transaction waits for a lock, and an opening for a file.
        idle_in_transaction_seconds: after this PostgreSQL ends an idle transaction: a suspended
            replica holds the state row, and every other writer would wait for it.
        pool_size: how many transactions run at once on PostgreSQL; SQLite runs one.

    Attributes:
        traces: by revision, the trace of a write that the feed has not passed on yet.
        unwritable: why the last write failed if the database can be read but not written, such as
            a standby or a full disk; None if it did not fail.
        read_only: whether the reason is that it is read-only; a newer one may exist elsewhere.
    """

    def __init__(
        self,
        url: str | URL,
        *,
        lock_timeout_seconds: float = 2.0,
        idle_in_transaction_seconds: float = 5.0,
        pool_size: int = 8,
    ) -> None:
        self.url = for_writes(make_url(url))
        self.dialect: Literal["sqlite", "postgresql"] = (
            "sqlite" if self.url.get_backend_name() == "sqlite" else "postgresql"
        )
        self._lock_timeout_seconds = lock_timeout_seconds
        self._idle_in_transaction_seconds = idle_in_transaction_seconds
        self._workers = 1 if self.dialect == "sqlite" else pool_size
        self.traces: dict[int, str] = {}
        self.unwritable: str | None = None
        self.read_only = False
        self._attempts = Attempts()
        self._file: SqliteFile | None = None
        self._main: Lane | None = None
        self._long: Lane | None = None
        self._long_reads = 0
        self._copying = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<Database {self.name}>"

    @property
    def name(self) -> str:
        """The name of this database in messages: the file, or the URL without its password."""
        if self.dialect == "sqlite":
            return self.url.database or ":memory:"
        hosts = self.url.query.get("host", ())
        hosts = hosts if isinstance(hosts, str) else ",".join(hosts)
        named = self.url.set(query={}, host=self.url.host or hosts or None)
        return named.render_as_string(hide_password=True)

    @property
    def path(self) -> Path | None:
        """The SQLite file, if there is one."""
        return sqlite_path(self.url) if self.dialect == "sqlite" else None

    def answer_within(self, seconds: float) -> None:
        """From now on give up transactions that take longer, such as on a lost network."""
        self._attempts.timeout_seconds = seconds

    def give_up_in(self, seconds: float) -> None:
        """For a server that stops: after this time give up every transaction that is not over."""
        self._attempts.give_up_in(seconds)

    async def open(self) -> None:
        """Open the database; a missing SQLite file is created, readable only by us.

        Raises:
            StartupError: it cannot be used; one sentence says why.
        """
        self._file = None if self.path is None else SqliteFile(self.path)
        wait_seconds = self._lock_timeout_seconds
        self._main = Lane(self._workers, "slm-database", wait_seconds)
        self._long = Lane(LONG_READERS, "slm-database-long", wait_seconds)
        try:
            await self._main.run(self._open)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close every connection; a transaction that hangs on a dead network is cut."""
        lanes = [lane for lane in (self._long, self._main) if lane is not None]
        self._main = self._long = None
        self._attempts.cut_all()
        # The lane that writes comes last: it folds the WAL into the file.
        for lane in lanes:
            await asyncio.to_thread(lane.close)
        if self._file is not None:
            self._file.release()

    async def run(
        self, fn: Callable[[Connection], T], *, committed: Callable[[T], None] | None = None
    ) -> T:
        """Run `fn` as one transaction, in one hop to a thread; it is rolled back on any error.

        Args:
            fn: a plain function; it must not keep the connection. On PostgreSQL it runs under READ
                COMMITTED, so a writer locks the state row first.
            committed: called in the same thread with what `fn` returned, once that is durable; its
                exceptions are suppressed.

        Raises:
            DatabaseUnavailable: the database is unreachable, or a lock was not obtained in time.
            InsufficientStorage: its disk is full.
            OutcomeUnknown: the connection was lost during the commit.
        """
        attempt, lane = self._attempts.begin(), self._lane()
        work = functools.partial(self._transaction, lane, fn, False, attempt, committed)
        return await self._attempts.outcome(attempt, lane.submit(work))

    async def read(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn`, which only reads, on one consistent view of the whole database.

        It may be run twice, if the connection is lost the first time.

        Raises:
            DatabaseUnavailable: the database is unreachable.
        """
        attempt, lane = self._attempts.begin(), self._lane()
        work = functools.partial(self._transaction, lane, fn, True, attempt)
        return await self._attempts.outcome(attempt, lane.submit(work))

    async def read_long(self, fn: Callable[[Connection], T], *, seconds: float | None = None) -> T:
        """Run `fn`, which only reads and may take long, beside the writers: none waits for it.

        It has its own connections, at most `LONG_READERS`, and sees one consistent view. Use it for
        a page of the history or the audit, an export, or a check of the whole chain; not for what a
        write must see. If SQLite cannot have a second connection (`Engines`) it runs between the
        writes, so keep it short even then: ask for pages.

        Args:
            fn: a plain function; it must not keep the connection. It may be run twice.
            seconds: the time after which it is interrupted, including the wait for its turn; None:
                the same as for any transaction.

        Raises:
            Overloaded: too many are waiting already, or its turn did not come in time.
            DatabaseUnavailable: it took too long, or the database is unreachable.
        """
        if self._long_reads >= LONG_READS:
            raise Overloaded("Too many long reads are under way. Try again.")
        attempt = self._attempts.begin(seconds)
        lane = self._long if self._long is not None and self._long.engine is not None else None
        lane = lane or self._lane()
        work = functools.partial(self._transaction, lane, fn, True, attempt)
        self._long_reads += 1
        try:
            return await self._attempts.outcome(attempt, lane.submit(work))
        except DatabaseUnavailable:
            if attempt.late and not attempt.entered:
                raise Overloaded("Too many long reads are under way. Try again.") from None
            raise
        finally:
            self._long_reads -= 1

    def _lane(self) -> Lane:
        if self._main is None:
            raise DatabaseUnavailable("The database is closed.")
        return self._main

    async def copy_into(self, path: Path) -> None:
        """Write a consistent copy of a SQLite database into an empty file, while it is in use.

        No writer waits for it, unless SQLite cannot have a second connection (`Engines`). It works
        even if the file was removed: the copy is then all that is left of it.

        Raises:
            InsufficientStorage: the disk is full.
            DatabaseUnavailable: the database cannot be read or the copy cannot be written.
        """
        lane = self._lane()
        async with self._copying:
            if self._long is None or self._long.engine is None:
                await lane.run(lambda: lane.outside("VACUUM INTO ?", str(path)))
            else:
                await self._long.run(functools.partial(self._long.copy_into, path))

    async def leave_wal(self) -> None:
        """Fold the WAL into the SQLite file for good, so that the file alone is the database."""
        lane, long = self._lane(), self._long
        self._long = None
        if long is not None:
            # Its connections use the WAL.
            await asyncio.to_thread(long.close)
        await lane.run(functools.partial(self._leave_wal, lane))

    def _leave_wal(self, lane: Lane) -> None:
        lane.outside("PRAGMA journal_mode=DELETE")
        if self._file is not None:
            # SQLite released the file, but other processes must still be kept out.
            self._file.hold(self._lock_timeout_seconds)
            self._file.note()

    def _transaction(
        self,
        lane: Lane,
        fn: Callable[[Connection], T],
        read_only: bool,
        attempt: Attempt,
        committed: Callable[[T], None] | None = None,
    ) -> T:
        try:
            try:
                return self._once(lane, fn, read_only, attempt, committed)
            except DBAPIError as error:
                if not error.connection_invalidated or (attempt.begun and not read_only):
                    raise
                # Try once more, on a new connection. The old one died in the pool before any
                # statement ran (a retry is free, whereas a ping before each transaction is a round
                # trip), or during a read, which changed nothing, such as when this process was
                # suspended and PostgreSQL ended the transaction.
                return self._once(lane, fn, read_only, attempt, committed)
        except (DBAPIError, PoolTimeout, sqlite3.Error) as error:
            problem = problem_of(error, committing=attempt.committing)
            if problem is None:
                raise
            if not read_only:
                self._note_unwritable(error, problem)
            raise problem from error

    def _note_unwritable(self, error: Exception, problem: ProblemError) -> None:
        """Remember that the database can be read but not written, until a write succeeds again."""
        read_only = is_read_only(error)
        if not read_only and not isinstance(problem, InsufficientStorage):
            return
        if self.unwritable != problem.detail:
            logger.error("the database cannot be written: %s", problem.detail)
        self.unwritable, self.read_only = problem.detail, read_only

    async def try_writing(self) -> None:
        """Write without changing anything, to see whether the database accepts writes again.

        Raises:
            DatabaseUnavailable: it does not.
            InsufficientStorage: its disk is still full.
        """
        await self.run(state.write_nothing)
        logger.info("the database can be written again")
        self.unwritable, self.read_only = None, False

    def _once(
        self,
        lane: Lane,
        fn: Callable[[Connection], T],
        read_only: bool,
        attempt: Attempt,
        committed: Callable[[T], None] | None,
    ) -> T:
        attempt.check()
        attempt.entered = True
        failpoints.reach("database")
        file = self._file
        if file is not None:
            file.check()
        if file is not None and lane is self._main:
            # This lane has one thread, and is the only one that writes.
            file.check_content()
            try:
                return self._begun(lane, fn, read_only, attempt, committed)
            finally:
                file.note()
        return self._begun(lane, fn, read_only, attempt, committed)

    def _begun(
        self,
        lane: Lane,
        fn: Callable[[Connection], T],
        read_only: bool,
        attempt: Attempt,
        committed: Callable[[T], None] | None,
    ) -> T:
        with lane.connect() as connection, contextlib.ExitStack() as stack:
            attempt.hold(connection.connection.dbapi_connection)  # type: ignore[arg-type]
            stack.callback(attempt.hold, None)
            if self.dialect == "postgresql":
                connection.info["attempt"] = attempt
                if read_only:
                    # READ COMMITTED could show each statement a different revision.
                    connection.execution_options(
                        isolation_level="REPEATABLE READ", postgresql_readonly=True
                    )
                else:
                    # SQLAlchemy leaves False, which begins READ WRITE even if the operator has made
                    # the database read-only.
                    connection.connection.dbapi_connection.read_only = None  # type: ignore[union-attr]
            with contextlib.closing(connection.begin()) as transaction:
                if lane is self._long and self.dialect == "postgresql":
                    # If only the connection were cut, PostgreSQL would keep working for nobody.
                    left = round(attempt.seconds_left * 1000) if attempt.seconds_left else 0
                    connection.exec_driver_sql(f"SET LOCAL statement_timeout = {left}")
                result = fn(connection)
                if not read_only:
                    attempt.begin_commit()
                transaction.commit()
            if self._file is not None and not read_only:
                self._check_committed(self._file)
            if committed is not None:
                with contextlib.suppress(Exception):
                    committed(result)
        return result

    @staticmethod
    def _check_committed(file: SqliteFile) -> None:
        try:
            file.check()
        except DatabaseUnavailable as error:
            # It was committed to a file that no longer has a name.
            raise OutcomeUnknown(error.detail) from None

    def _open(self) -> None:
        """Create the engines and access the database once."""
        assert self._main is not None and self._long is not None  # noqa: S101, PT018 - for mypy
        try:
            engines = open_engines(
                self.url,
                self._file,
                lock_timeout_seconds=self._lock_timeout_seconds,
                idle_in_transaction_seconds=self._idle_in_transaction_seconds,
                writers=self._workers,
                readers=LONG_READERS,
            )
            self._main.engine, self._long.engine = engines.writing, engines.reading
            with self._main.connect() as connection, connection.begin():
                connection.exec_driver_sql("SELECT 1")
            if self.dialect == "postgresql":
                with self._main.connect() as one, self._main.connect() as other:
                    refuse_unfit(
                        one.connection.dbapi_connection,
                        other.connection.dbapi_connection,
                        self.name,
                    )
            if self._file is not None and self._long.engine is not None:
                # Opened later, it might find another file with this name, or none.
                with self._long.engine.begin() as connection:
                    connection.exec_driver_sql("SELECT count(*) FROM sqlite_master")
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise why_not_opened(error, self.name) from None
