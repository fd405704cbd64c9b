"""What SQLite's and PostgreSQL's errors mean, to a caller or to whoever starts the server.

Knows result codes and SQLSTATEs; runs no statement.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    MultipleResultsFound,
    NoResultFound,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

from slm.errors import (
    DatabaseUnavailable,
    InsufficientStorage,
    OutcomeUnknown,
    ProblemError,
    StartupError,
)
from slm.server.db.engines.postgresql import behind_a_pooler

_PERCENT: Final = (
    "; special characters of a password are percent-encoded in the URL: @ is %40, % itself %25"
)


class DatabaseHeld(StartupError):
    """Another process holds the SQLite file."""

    @classmethod
    def of(cls, name: str) -> DatabaseHeld:
        """Return the error for the file with this name."""
        return cls(
            f"Another process holds {name}: a SQLite database has one server; stop the other,"
            " or use PostgreSQL."
        )


def why_not_opened(error: SQLAlchemyError | sqlite3.Error, name: str) -> StartupError:
    """Return an error that says in one sentence why a database cannot be opened.

    Args:
        error: the error of the first statement.
        name: the database's name in messages, without a password.
    """
    cause = getattr(error, "orig", None) or error
    if not isinstance(cause, sqlite3.Error):
        # libpq's own message: it names host, user and reason, but no password.
        words = str(cause).strip().splitlines() or [type(cause).__name__]
        if "pooling mode" in words[0]:
            return behind_a_pooler(name)
        hint = _PERCENT if "password authentication failed" in words[0] else ""
        return StartupError(f"The database {name} cannot be opened: {words[0]}{hint}")
    match primary_code(cause):
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return DatabaseHeld.of(name)
        case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
            return StartupError(f"{name} is not a SQLite database, or is damaged.")
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_CANTOPEN:
            return StartupError(f"{name} cannot be opened for writing: check it and its folder.")
        case sqlite3.SQLITE_FULL:
            return StartupError(f"{name} cannot be opened: its disk is full.")
    return StartupError(f"{name} cannot be opened: {cause}.")


def problem_of(error: SQLAlchemyError | sqlite3.Error, *, committing: bool) -> ProblemError | None:
    """Return what a database error means to a caller, or None if it is our own fault.

    Args:
        error: SQLAlchemy's, or the driver's own.
        committing: whether the commit was running, so that nobody knows whether it happened.
    """
    if isinstance(error, PoolTimeout):
        return DatabaseUnavailable("Every connection to the database is in use.")
    cause = getattr(error, "orig", error)
    if isinstance(cause, sqlite3.Error):
        return _sqlite_problem(cause, committing)
    return _postgresql_problem(error, cause, committing)


# For a refused connection libpq has no SQLSTATE, only text; pgbouncer's come last.
_FULL: Final = (
    *("too many clients", "too many connections", "remaining connection slots"),
    "no more connections allowed",
)


def is_full(error: DBAPIError) -> bool:
    """Return whether PostgreSQL refused a connection because all of its connections are in use."""
    words = str(error.orig)
    return any(each in words for each in _FULL)


def is_read_only(error: Exception) -> bool:
    """Return whether a write failed because the database, or its file, is read-only."""
    cause = getattr(error, "orig", error)
    if isinstance(cause, sqlite3.Error):
        return primary_code(cause) == sqlite3.SQLITE_READONLY
    return getattr(cause, "sqlstate", None) == "25006"


_SQLITE_AWAY: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PROTOCOL,
    }
)


def _sqlite_problem(cause: sqlite3.Error, committing: bool) -> ProblemError | None:
    code = primary_code(cause)
    if code == sqlite3.SQLITE_INTERRUPT:
        # Interrupted by `Attempt` when its time was over.
        return DatabaseUnavailable("The database did not answer in time.")
    if code == sqlite3.SQLITE_FULL:
        return InsufficientStorage()
    if code == sqlite3.SQLITE_IOERR and committing:
        # The commit may be in the WAL, and only its fsync may have failed.
        return OutcomeUnknown()
    return DatabaseUnavailable() if code in _SQLITE_AWAY else None


def _postgresql_problem(
    error: Exception, cause: BaseException | None, committing: bool
) -> ProblemError | None:
    # https://www.postgresql.org/docs/current/errcodes-appendix.html
    state = getattr(cause, "sqlstate", None) or ""
    if state == "53100":
        return InsufficientStorage()
    if state == "57014":
        return DatabaseUnavailable("The database did not answer in time.")
    if state == "55P03":
        return DatabaseUnavailable("Another write holds the database. Try again.")
    lost = not state or state[:2] == "08" or state[:3] == "57P"
    if isinstance(error, DBAPIError) and error.connection_invalidated and committing and lost:
        return OutcomeUnknown()
    if state in ("26000", "42P05"):
        return DatabaseUnavailable(
            "The database connection was switched to another session. Try again."
        )
    if state == "25006":
        return DatabaseUnavailable("The database is read-only.")
    # 25P03 idle in transaction, 40 retry, 53 out of resources.
    if state == "25P03" or state[:2] in ("40", "53", "57"):
        return DatabaseUnavailable()
    if isinstance(error, DBAPIError) and (error.connection_invalidated or state[:2] == "08"):
        return DatabaseUnavailable()
    if not state and type(cause).__name__ in ("OperationalError", "ConnectionTimeout"):
        return DatabaseUnavailable()
    return None


def is_altered(error: Exception) -> bool:
    """Return whether a row of ours is missing, or another program's row is in the way."""
    return isinstance(
        error,
        (IntegrityError, DataError, NoResultFound, MultipleResultsFound, sqlite3.IntegrityError),
    )


def primary_code(error: sqlite3.Error) -> int | None:
    """Return SQLite's primary result code: the low byte of the extended one."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
