"""Checks that PostgreSQL suits this server: UTF-8, and a session for each connection.

Uses connections that it is given; opens none.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import Any

from slm.errors import StartupError


def behind_a_pooler(name: str) -> StartupError:
    """Return the error for a pooler that gives each transaction another session."""
    return StartupError(
        f"The database {name} is behind a connection pooler in transaction or statement mode; SLM"
        " needs sessions of its own (LISTEN, time-outs, prepared statements): set pool_mode ="
        " session for it, or give the address of PostgreSQL itself."
    )


def refuse_unfit(one: Any, other: Any, name: str) -> None:
    """Refuse a database that is not in UTF-8, or is behind a pooler in transaction mode.

    Args:
        one: a psycopg connection, outside a transaction.
        other: another one, opened beside it.
        name: the database's name in messages, without a password.

    Raises:
        StartupError: one sentence says what to do.
    """
    with _autocommit(one), _autocommit(other):
        encoding = one.execute("SHOW server_encoding").fetchone()[0]
        if _shares_sessions(one, other):
            raise behind_a_pooler(name)
    if encoding != "UTF8":
        raise StartupError(
            f"The database {name} has the encoding {encoding}; SLM needs UTF8: create it again with"
            " CREATE DATABASE … TEMPLATE template0 ENCODING 'UTF8'."
        )


def _shares_sessions(one: Any, other: Any) -> bool:
    """Return whether two connections take turns with PostgreSQL's sessions.

    While the other is in a transaction, either it has what was the first one's session, or, if
    sessions rotate, the first one now has another.
    """
    mark = secrets.token_hex(8)
    one.execute("SELECT set_config('slm.session', %s, false)", (mark,))
    before = _session(one)
    with other.transaction():
        taken = _session(other)
        if taken[0] == before[0] or taken[1] == mark or before[1] != mark:
            return True
        return _session(one) != before


def _session(connection: Any) -> tuple[int, str]:
    row = connection.execute(
        "SELECT pg_backend_pid(), current_setting('slm.session', true)"
    ).fetchone()
    return row[0], row[1]


@contextlib.contextmanager
def _autocommit(connection: Any) -> Any:
    before, connection.autocommit = connection.autocommit, True
    try:
        yield
    finally:
        connection.autocommit = before
