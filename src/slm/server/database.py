"""The database: opens it, and runs one plain function as one transaction.

Knows the manners of SQLite and PostgreSQL, and no rule about agents. The tables are in `models`,
what an error of theirs means in `database_errors`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import StaticPool

from slm.errors import (
    DatabaseUnavailable,
    OutcomeUnknown,
    StartupError,
)
from slm.server import failpoints
from slm.server.attempt import Attempt
from slm.server.database_errors import problem_of, why_not_opened

T = TypeVar("T")

MIN_SQLITE: Final = (3, 35, 0)
"""The first SQLite that has RETURNING."""


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
        if self.dialect != "sqlite" or self.url.database in (None, "", ":memory:"):
            return None
        return Path(str(self.url.database))

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
            self._engine = self._sqlite() if self.dialect == "sqlite" else self._postgresql()
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

    def _sqlite(self) -> Engine:
        if sqlite3.sqlite_version_info < MIN_SQLITE:
            raise StartupError(
                f"SQLite {sqlite3.sqlite_version} is too old; 3.35 or newer is needed."
            )
        if self.path is not None:
            _make_private(self.path)
        engine = create_engine(
            self.url,
            poolclass=StaticPool,
            hide_parameters=True,
            connect_args={"timeout": self._lock_timeout_seconds},
        )

        @event.listens_for(engine, "connect")
        def _connected(connection: sqlite3.Connection, _: object) -> None:
            # The driver opens deferred transactions by itself, which lose updates; we begin.
            connection.isolation_level = None
            # Text that is not UTF-8 would otherwise fail the whole SELECT.
            connection.text_factory = _decoded
            for pragma in (
                # Before the first access: then the WAL needs no shared memory, and no other
                # process can open the file (docs/decisions/0001-sqlite-journal.md).
                "locking_mode=EXCLUSIVE",
                "journal_mode=WAL",
                "synchronous=FULL",
                "foreign_keys=ON",
            ):
                connection.execute(f"PRAGMA {pragma}").fetchall()

        # The dialect's own place for it: a listener would have every statement look for listeners.
        engine.dialect.do_begin = _begin_immediate  # type: ignore[method-assign,assignment]
        return engine

    def _postgresql(self) -> Engine:
        try:
            engine = create_engine(
                self.url,
                hide_parameters=True,
                pool_size=self._workers,
                max_overflow=0,
                pool_timeout=self._lock_timeout_seconds,
                isolation_level="READ COMMITTED",
                connect_args={
                    "connect_timeout": 5,
                    # A peer that vanished without a word is given up in about ten seconds.
                    "keepalives_idle": 5,
                    "keepalives_interval": 2,
                    "keepalives_count": 3,
                    "tcp_user_timeout": 10_000,
                },
            )
        except ImportError:
            raise StartupError(
                "PostgreSQL needs a driver: pip install 'autobot-slm[server,postgres]'."
            ) from None
        settings = {
            "lock_timeout": f"{round(self._lock_timeout_seconds * 1000)}ms",
            "idle_in_transaction_session_timeout": (
                f"{round(self._idle_in_transaction_seconds * 1000)}ms"
            ),
            "timezone": "UTC",
        }

        @event.listens_for(engine, "after_cursor_execute")
        def _executed(connection: Connection, *_: object) -> None:
            if (attempt := connection.info.get("attempt")) is not None:
                attempt.begun = True

        @event.listens_for(engine, "connect")
        def _connected(connection: Any, _: object) -> None:
            autocommit, connection.autocommit = connection.autocommit, True
            for name, value in settings.items():
                connection.execute("SELECT set_config(%s, %s, false)", (name, value))
            connection.autocommit = autocommit

        return engine

    def _first_look(self) -> None:
        assert self._engine is not None  # noqa: S101 - for the type checker
        try:
            with self._engine.begin() as connection:
                connection.exec_driver_sql("SELECT 1")
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise why_not_opened(error, self.name) from None


def _make_private(path: Path) -> None:
    """Make the file with mode 0600 if it is not there; SQLite gives its WAL the same mode."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except IsADirectoryError:
        raise StartupError(f"{path} is a folder, not a SQLite database.") from None
    except FileNotFoundError:
        raise StartupError(f"The folder of {path} does not exist.") from None
    except OSError as error:
        raise StartupError(
            f"{path} cannot be opened for writing: {error.strerror or error}."
        ) from None


def _begin_immediate(connection: Any) -> None:
    connection.execute("BEGIN IMMEDIATE")


def _decoded(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _in_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call it in the loop, unless that has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)
