"""The database: runs one plain function as one transaction, in one hop to a thread.

Knows no rule about agents. How SQLite and PostgreSQL are opened is in `engines`, the tables in
`tables`, what an error of theirs means in `errors`.
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
"""How many long reads run at once, each on a connection of its own."""

LONG_READS: Final = 32
"""How many may be under way, those that wait included."""


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
        unwritable: why the last write failed where the database can be read and not written, such
            as a standby or a full disk; None where it did not.
        read_only: whether that is because it is read-only; there may be a newer one elsewhere.
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
        """What to call this database in a message: the file, or the URL without its password."""
        if self.dialect == "sqlite":
            return self.url.database or ":memory:"
        hosts = self.url.query.get("host", ())
        hosts = hosts if isinstance(hosts, str) else ",".join(hosts)
        named = self.url.set(query={}, host=self.url.host or hosts or None)
        return named.render_as_string(hide_password=True)

    @property
    def path(self) -> Path | None:
        """The SQLite file, where there is one."""
        return sqlite_path(self.url) if self.dialect == "sqlite" else None

    def answer_within(self, seconds: float) -> None:
        """From now on give a transaction up that takes longer, such as on a lost network."""
        self._attempts.timeout_seconds = seconds

    def give_up_in(self, seconds: float) -> None:
        """For a server that stops: by then each transaction is over, or is given up."""
        self._attempts.give_up_in(seconds)

    async def open(self) -> None:
        """Open the database; a SQLite file that is not there is made, readable by us alone.

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
        # The one that writes comes last: it folds the WAL into the file.
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
            committed: given what `fn` returned, in its thread, once that is durable; its exceptions
                are suppressed.

        Raises:
            DatabaseUnavailable: the database is away, or a lock was not had in time.
            InsufficientStorage: its disk is full.
            OutcomeUnknown: the connection was lost while committing.
        """
        attempt, lane = self._attempts.begin(), self._lane()
        work = functools.partial(self._transaction, lane, fn, False, attempt, committed)
        return await self._attempts.outcome(attempt, lane.submit(work))

    async def read(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn`, which only reads, on one consistent view of the whole database.

        It may be run twice: again where the connection was lost under it.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        attempt, lane = self._attempts.begin(), self._lane()
        work = functools.partial(self._transaction, lane, fn, True, attempt)
        return await self._attempts.outcome(attempt, lane.submit(work))

    async def read_long(self, fn: Callable[[Connection], T], *, seconds: float | None = None) -> T:
        """Run `fn`, which only reads and may take long, beside the writers: none waits for it.

        It has connections of its own, `LONG_READERS` at most, and sees one consistent view. For a
        page of the history or the audit, an export, a check of the whole chain; not for what a
        write must see. Where SQLite cannot have a second connection (`Engines`) it runs
        between the writes, so it is to be short even then: ask for pages.

        Args:
            fn: a plain function; it must not keep the connection. It may be run twice.
            seconds: after this it is interrupted, the time it waited for its turn included; None:
                as long as any transaction.

        Raises:
            Overloaded: too many wait already, or its turn did not come in time.
            DatabaseUnavailable: it took too long, or the database is away.
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

        No writer waits for it, unless SQLite cannot have a second connection (`Engines`). The
        copy is also made where the file was removed: it is what is left of it.

        Raises:
            InsufficientStorage: the disk is full.
            DatabaseUnavailable: it cannot be read or written.
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
            # SQLite let go of the file, and others are still to be kept out.
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
                # It died in the pool: not one statement was run; that costs nothing, where a ping
                # before each transaction is a round trip. Or under a read, which changed nothing,
                # such as when this process stood still and PostgreSQL ended the transaction. Once
                # more, on a new one.
                return self._once(lane, fn, read_only, attempt, committed)
        except (DBAPIError, PoolTimeout, sqlite3.Error) as error:
            problem = problem_of(error, committing=attempt.committing)
            if problem is None:
                raise
            if not read_only:
                self._note_unwritable(error, problem)
            raise problem from error

    def _note_unwritable(self, error: Exception, problem: ProblemError) -> None:
        """Remember a database that can be read and not written, until a write succeeds again."""
        read_only = is_read_only(error)
        if not read_only and not isinstance(problem, InsufficientStorage):
            return
        if self.unwritable != problem.detail:
            logger.error("the database cannot be written: %s", problem.detail)
        self.unwritable, self.read_only = problem.detail, read_only

    async def try_writing(self) -> None:
        """Write something that changes nothing, to see whether the database takes writes again.

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
            # The lane of one thread, and the only one that writes.
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
                    # READ COMMITTED would let each statement see another revision.
                    connection.execution_options(
                        isolation_level="REPEATABLE READ", postgresql_readonly=True
                    )
                else:
                    # SQLAlchemy leaves False behind, which begins READ WRITE even where the
                    # operator has made the database read-only.
                    connection.connection.dbapi_connection.read_only = None  # type: ignore[union-attr]
            with contextlib.closing(connection.begin()) as transaction:
                if lane is self._long and self.dialect == "postgresql":
                    # A cut connection alone would have PostgreSQL work on, for nobody.
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
            # It is in a file that no name stands for any more.
            raise OutcomeUnknown(error.detail) from None

    def _open(self) -> None:
        """Make the engines and look at the database once."""
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
                # Opened later, it might find another file under the name, or none.
                with self._long.engine.begin() as connection:
                    connection.exec_driver_sql("SELECT count(*) FROM sqlite_master")
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise why_not_opened(error, self.name) from None
