"""Prepared: a Core statement compiled once, for what every write does.

Core's own path from `execute` to the driver is long: a write to an idle server spends most of its
transaction there. Knows no table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, Dialect
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.compiler import SQLCompiler

_NOTHING: Final[Mapping[str, Any]] = {}


class Prepared:
    """One statement; on SQLite its text and type conversions are worked out on the first run.

    On PostgreSQL Core runs it as usual: a statement is a round trip, which takes longer than Core
    does, and Core recognises a lost connection. Results are not converted, so do not use this for a
    column with a type that needs it.

    Args:
        statement: all its values are bound by name; the names are the same each time.
    """

    def __init__(self, statement: Executable) -> None:
        self._statement = statement
        self._compiled: tuple[str, list[_Bind]] | None = None

    def run(
        self, connection: Connection, values: Mapping[str, Any] = _NOTHING
    ) -> Sequence[Sequence[Any]]:
        """Run it within the connection's transaction and return its rows.

        Raises:
            sqlite3.Error: it failed on SQLite.
            DBAPIError: it failed on PostgreSQL.
        """
        if connection.dialect.name != "sqlite":
            result = connection.execute(self._statement, values)
            return result.all() if result.returns_rows else ()
        if self._compiled is None:
            self._compiled = _compile(self._statement, connection.dialect, values)
        text, binds = self._compiled
        driver: Any = connection.connection.dbapi_connection
        rows: Sequence[Sequence[Any]] = driver.execute(
            text, [bind(values) for bind in binds]
        ).fetchall()
        return rows

    def run_each(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run it once for each row, in a single round trip over a network.

        Raises:
            sqlite3.Error: it failed on SQLite.
            DBAPIError: it failed on PostgreSQL.
        """
        if connection.dialect.name == "sqlite":
            for values in rows:
                self.run(connection, values)
        else:
            connection.execute(self._statement, list(rows))


_Bind = Callable[[Mapping[str, Any]], Any]


def _compile(
    statement: Executable, dialect: Dialect, values: Mapping[str, Any]
) -> tuple[str, list[_Bind]]:
    assert isinstance(statement, ClauseElement)  # noqa: S101 - for the type checker
    compiled = statement.compile(dialect=dialect, column_keys=list(values))
    assert isinstance(compiled, SQLCompiler)  # noqa: S101 - for the type checker
    names = compiled.positiontup or ()
    return compiled.string, [_bind(compiled, name, dialect, values) for name in names]


def _bind(compiled: SQLCompiler, name: str, dialect: Dialect, values: Mapping[str, Any]) -> _Bind:
    """Return a function that picks one placeholder's value and converts it for the driver."""
    convert = compiled.binds[name].type.dialect_impl(dialect).bind_processor(dialect)
    if name not in values:
        fixed = compiled.params[name]
        fixed = fixed if convert is None else convert(fixed)
        return lambda _: fixed
    if convert is None:
        return lambda given: given[name]
    return lambda given: convert(given[name])
