"""Refuses a SQLite file with a schema that could act by itself.

A file that is adopted or restored may come from anyone. A trigger could add a token at our next
write, and a view or a virtual table could stand in for one of our tables. The server creates none
of these, so a file with one is refused before anything is read from it. Knows no row.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection

from slm.errors import StartupError
from slm.server.db.tables import Base

_VERSION_TABLE: Final = "alembic_version"
_OURS: Final = frozenset(Base.metadata.tables) | {_VERSION_TABLE}
_HIDDEN_COLUMN: Final = 1
"""From this value on, table_xinfo's `hidden` means a virtual table's or a generated column."""
_AN_EXPRESSION: Final = -2
"""index_xinfo's `cid` for an expression, which is not a column."""


def refuse_odd_schema(connection: Connection, name: str) -> None:
    """Accept only ordinary tables and indices.

    Args:
        connection: to a SQLite database; others are left alone.
        name: the database's name in messages.

    Raises:
        StartupError: it contains something else; the message names it.
    """
    if connection.dialect.name != "sqlite":
        return
    rows = connection.exec_driver_sql("SELECT type, name, tbl_name, sql FROM sqlite_master").all()
    tables = {str(row.name).lower() for row in rows if row.type == "table"}
    for row in rows:
        sql = " ".join(str(row.sql or "").upper().split())
        if row.type not in ("table", "index"):
            _refuse(name, f"the {row.type} {_shown(row.name)}")
        if row.type == "table" and not sql.startswith("CREATE TABLE"):
            _refuse(name, f"the virtual table {_shown(row.name)}")
    for table in sorted(tables & _OURS):
        if table != "agents" and _VERSION_TABLE not in tables:
            _refuse(name, f"a table {_shown(table)}")
        _check_table(connection, name, table)


def _check_table(connection: Connection, name: str, table: str) -> None:
    """Check a table of ours; its name may therefore be put into a statement as it is."""
    for column in connection.exec_driver_sql(f'PRAGMA table_xinfo("{table}")'):
        if column.hidden >= _HIDDEN_COLUMN:
            _refuse(name, f"the generated column {_shown(column.name)} of {table}")
    if connection.exec_driver_sql(f'PRAGMA foreign_key_list("{table}")').first() is not None:
        _refuse(name, f"a foreign key of {table}")
    for index in connection.exec_driver_sql(f'PRAGMA index_list("{table}")').all():
        columns = connection.exec_driver_sql(
            "SELECT cid FROM pragma_index_xinfo(?)", (index.name,)
        ).scalars()
        if _AN_EXPRESSION in columns.all():
            _refuse(name, f"the index {_shown(index.name)} on an expression")


def _shown(text: object) -> str:
    return ascii(str(text)[:64])


def _refuse(name: str, what: str) -> None:
    raise StartupError(
        f"{name} cannot be used: it holds {what}, which SLM did not make and which could act in its"
        " name; if you trust the file, drop that first, else use another one."
    )
