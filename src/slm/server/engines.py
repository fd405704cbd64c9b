"""How SQLite and PostgreSQL are opened: the manners of each, set once for every connection."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.pool import StaticPool

from slm.errors import StartupError

MIN_SQLITE: Final = (3, 35, 0)
"""The first SQLite that has RETURNING."""


def sqlite_path(url: URL) -> Path | None:
    """Return the file that a SQLite URL names; None where it is in memory."""
    return Path(url.database) if url.database not in (None, "", ":memory:") else None


def sqlite_engine(url: URL, lock_timeout_seconds: float) -> Engine:
    """Return an engine of one connection that holds the file to itself.

    A file that is not there is made, readable by us alone.

    Args:
        url: `sqlite:///…`.
        lock_timeout_seconds: how long opening waits for another process to let go of the file.

    Raises:
        StartupError: this SQLite is too old, or the file cannot be opened.
    """
    if sqlite3.sqlite_version_info < MIN_SQLITE:
        raise StartupError(f"SQLite {sqlite3.sqlite_version} is too old; 3.35 or newer is needed.")
    if (path := sqlite_path(url)) is not None:
        _make_private(path)
    engine = create_engine(
        url,
        poolclass=StaticPool,
        hide_parameters=True,
        connect_args={"timeout": lock_timeout_seconds},
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
            # A file may come from anybody: its schema may call nothing that does something.
            "trusted_schema=OFF",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()

    # The dialect's own place for it: a listener would have every statement look for listeners.
    engine.dialect.do_begin = _begin_immediate  # type: ignore[method-assign,assignment]
    return engine


def postgresql_engine(
    url: URL, *, lock_timeout_seconds: float, idle_in_transaction_seconds: float, pool_size: int
) -> Engine:
    """Return an engine with a pool whose connections give up in bounded time.

    Args:
        url: `postgresql+psycopg://…`.
        lock_timeout_seconds: how long a statement waits for a lock, and a call for a connection.
        idle_in_transaction_seconds: after this PostgreSQL ends a transaction that says nothing.
        pool_size: how many connections there are at most.

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
        "lock_timeout": f"{round(lock_timeout_seconds * 1000)}ms",
        "idle_in_transaction_session_timeout": (f"{round(idle_in_transaction_seconds * 1000)}ms"),
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
