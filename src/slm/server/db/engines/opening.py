"""Opens SQLite and PostgreSQL, and sets the options of each once for every connection."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.pool import QueuePool, StaticPool

from slm.errors import StartupError
from slm.server.db.column_types import tolerant_times
from slm.server.db.engines.sqlite_file import SqliteFile
from slm.server.db.errors import primary_code

logger = logging.getLogger(__name__)

MIN_SQLITE: Final = (3, 35, 0)
"""The first SQLite version with RETURNING."""


WAL_BYTES: Final = 64 * 2**20
"""How large the WAL stays once all of it was copied into the database."""


_ANOTHER_SESSION: Final = ("26000", "42P05")
"""A prepared statement is missing, or exists already: the session is not ours alone."""

_READ_ONLY: Final = "25006"


def sqlite_path(url: URL) -> Path | None:
    """Return the file that a SQLite URL names; None if it is in memory."""
    return Path(url.database) if url.database not in (None, "", ":memory:") else None


_NO_SHARED_MEMORY: Final = (
    *(sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY),
)


@dataclass(frozen=True)
class Engines:
    """The two ways to access a database.

    Attributes:
        writing: for every transaction except long reads; on SQLite its one connection.
        reading: for long reads, beside those; None if SQLite cannot have a second connection:
            in memory, or on a file system without shared memory.
    """

    writing: Engine
    reading: Engine | None


def open_engines(
    url: URL,
    file: SqliteFile | None,
    *,
    lock_timeout_seconds: float,
    idle_in_transaction_seconds: float,
    writers: int,
    readers: int,
) -> Engines:
    """Open a database.

    Args:
        url: `sqlite:///…` or `postgresql+psycopg://…`.
        file: holds a SQLite file.
        lock_timeout_seconds: how long a statement waits for a lock, and an opening for a file.
        idle_in_transaction_seconds: after this PostgreSQL ends an idle transaction.
        writers: how many connections there are for anything except long reads; SQLite has one.
        readers: how many there are for long reads.

    Raises:
        StartupError: there is no driver, SQLite is too old, or the file cannot be opened.
        sqlite3.Error: the file is not a database, or is damaged.
    """
    if url.get_backend_name() == "sqlite":
        return sqlite_engines(url, file, lock_timeout_seconds=lock_timeout_seconds, readers=readers)
    writing, reading = (
        postgresql_engine(
            url,
            lock_timeout_seconds=lock_timeout_seconds,
            idle_in_transaction_seconds=idle_in_transaction_seconds,
            pool_size=size,
        )
        for size in (writers, readers)
    )
    return Engines(writing, reading)


def for_writes(url: URL) -> URL:
    """Choose, of several hosts, the one that accepts writes, unless the URL says otherwise."""
    hosts = url.query.get("host", "")
    several = "," in hosts or not isinstance(hosts, str)
    if not several or "target_session_attrs" in url.query:
        return url
    return url.update_query_dict({"target_session_attrs": "read-write"})


def sqlite_engines(
    url: URL, file: SqliteFile | None, *, lock_timeout_seconds: float, readers: int
) -> Engines:
    """Open a SQLite file; from then on no other process can open it.

    Args:
        url: `sqlite:///…`.
        file: holds it; None if it is in memory. A missing file is created.
        lock_timeout_seconds: how long opening waits for another process to release the file.
        readers: how many connections may read beside the one that writes.

    Raises:
        StartupError: this SQLite is too old, or the file cannot be opened.
        sqlite3.Error: the file is not a database, or is damaged.
    """
    if sqlite3.sqlite_version_info < MIN_SQLITE:
        raise StartupError(f"SQLite {sqlite3.sqlite_version} is too old; 3.35 or newer is needed.")
    path = sqlite_path(url)
    if file is None or path is None:
        return Engines(_sqlite_engine(url, _writer(":memory:", 0.0, shared=True)), None)
    file.make()
    shared = True
    try:
        connection = _writer(str(path), lock_timeout_seconds, shared=True)
    except sqlite3.OperationalError as error:
        if primary_code(error) not in _NO_SHARED_MEMORY:
            raise
        # No shared memory, as on some network file systems: the WAL's index is in the memory of
        # this connection, so there can be no other.
        shared = False
        connection = _writer(str(path), lock_timeout_seconds, shared=False)
    file.hold(lock_timeout_seconds)
    writing = _sqlite_engine(url, connection)
    if not shared:
        return Engines(writing, None)
    return Engines(writing, _sqlite_reading_engine(url, path, readers))


def _writer(path: str, timeout: float, *, shared: bool) -> sqlite3.Connection:
    # Used by one thread at a time, not necessarily the one that opened it.
    connection = sqlite3.connect(path, timeout=timeout, check_same_thread=False)
    try:
        # The driver would open deferred transactions, which lose updates; we begin them ourselves.
        connection.isolation_level = None
        # Otherwise text that is not UTF-8 would fail the whole SELECT.
        connection.text_factory = _decoded
        for pragma in (
            # Before the first access: only then is the WAL's index in the connection's memory.
            f"locking_mode={'NORMAL' if shared else 'EXCLUSIVE'}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            # A file may come from anyone: its schema must not call anything with side effects.
            "trusted_schema=OFF",
            # A WAL that grew during a long read or a backup shrinks again.
            f"journal_size_limit={WAL_BYTES}",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        # The first access: it takes the lock that `SqliteFile.hold` makes exclusive, and fails
        # without shared memory.
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


def _sqlite_engine(url: URL, connection: sqlite3.Connection) -> Engine:
    engine = create_engine(
        url, poolclass=StaticPool, hide_parameters=True, creator=lambda: connection
    )
    # The dialect's own hook: an event listener would make every statement look for listeners.
    engine.dialect.do_begin = _begin_immediate  # type: ignore[method-assign,assignment]
    return engine


def sqlite_reader(path: Path) -> sqlite3.Connection:
    """Return a connection that cannot write, and so neither commits nor checkpoints.

    Only for a file that this process holds with shared memory.
    """
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?mode=ro", uri=True, check_same_thread=False
    )
    connection.isolation_level = None
    connection.text_factory = _decoded
    return connection


def _sqlite_reading_engine(url: URL, path: Path, readers: int) -> Engine:
    engine = create_engine(
        url,
        poolclass=QueuePool,
        pool_size=readers,
        max_overflow=0,
        hide_parameters=True,
        creator=lambda: sqlite_reader(path),
    )
    engine.dialect.do_begin = _begin  # type: ignore[method-assign,assignment]
    return engine


def postgresql_engine(
    url: URL, *, lock_timeout_seconds: float, idle_in_transaction_seconds: float, pool_size: int
) -> Engine:
    """Return an engine with a pool of connections that give up in bounded time.

    Args:
        url: `postgresql+psycopg://…`.
        lock_timeout_seconds: how long a statement waits for a lock, and a call for a connection.
        idle_in_transaction_seconds: after this PostgreSQL ends an idle transaction.
        pool_size: the largest number of connections.

    Raises:
        StartupError: there is no driver.
    """
    try:
        engine = create_engine(
            url,
            hide_parameters=True,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=lock_timeout_seconds,
            isolation_level="READ COMMITTED",
            connect_args={
                "connect_timeout": 5,
                # Overrides what a role, a database or PGCLIENTENCODING has set.
                "client_encoding": "utf8",
                # A peer that vanished silently is given up in about ten seconds.
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
    warn_of_pooler = _once_a_minute(
        "PostgreSQL lost our prepared statements: is there a pooler in transaction mode in front"
        " of it now? Set it to session mode, or connect to PostgreSQL itself."
    )
    settings = {
        "lock_timeout": f"{round(lock_timeout_seconds * 1000)}ms",
        "idle_in_transaction_session_timeout": (f"{round(idle_in_transaction_seconds * 1000)}ms"),
        "timezone": "UTC",
    }

    @event.listens_for(engine, "after_cursor_execute")
    def _executed(connection: Connection, *_: object) -> None:
        if (attempt := connection.info.get("attempt")) is not None:
            attempt.begun = True

    @event.listens_for(engine, "handle_error")
    def _failed(context: ExceptionContext) -> None:
        state = getattr(context.original_exception, "sqlstate", None)
        if state in _ANOTHER_SESSION or state == _READ_ONLY:
            # The next connection may reach a session, or a host, that works.
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = False
        if state in _ANOTHER_SESSION:
            warn_of_pooler()

    read_times = tolerant_times()

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _: object) -> None:
        connection.adapters.register_loader("timestamptz", read_times)
        autocommit, connection.autocommit = connection.autocommit, True
        for name, value in settings.items():
            connection.execute("SELECT set_config(%s, %s, false)", (name, value))
        connection.autocommit = autocommit

    return engine


def _once_a_minute(sentence: str) -> Callable[[], None]:
    """Return a function that logs the sentence at most once a minute."""
    told_at = float("-inf")

    def tell() -> None:
        nonlocal told_at
        if time.monotonic() - told_at > 60:
            told_at = time.monotonic()
            logger.error(sentence)

    return tell


def _begin_immediate(connection: Any) -> None:
    connection.execute("BEGIN IMMEDIATE")


def _begin(connection: Any) -> None:
    connection.execute("BEGIN")


def _decoded(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
