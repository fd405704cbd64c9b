"""Pages of an append-only table, each with a limit on the rows it examines and on its size.

Keyset pages: a page ends at a key, and the next one starts there. Knows no table by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Connection,
    Row,
    Select,
    Table,
    any_,
    bindparam,
    select,
)

from slm.server.strict_json import MAX_INTEGER

MAX_EXAMINED: Final = 2000
"""The most rows that one page examines, however few of them belong to it."""

MAX_PAGE_BYTES: Final = 4 * 1024 * 1024
"""A page ends early if its rows have more text than this; it always has one row."""

_FETCHED_AT_ONCE: Final = 100


@dataclass(frozen=True)
class Window:
    """The rows to page through, in the order of one key.

    Attributes:
        table: the table of the rows.
        key: the unique number that orders them.
        after: only rows with a greater key.
        upto: only rows with this key or a smaller one.
        newest_first: the order, and the end at which the page starts.
        equal: a column and its one value; the table has an index of this column and the key.
        filters: further conditions; each is written so that no index serves it (`opaque`).
    """

    table: Table
    key: ColumnElement[int]
    after: int = 0
    upto: int = MAX_INTEGER
    newest_first: bool = False
    equal: tuple[ColumnElement[str], str] | None = None
    filters: tuple[ColumnElement[bool], ...] = ()

    @property
    def order(self) -> ColumnElement[int]:
        """The expression that orders the rows."""
        return self.key.desc() if self.newest_first else self.key.asc()


class Page(NamedTuple):
    """Some rows of a window, and the last key that was examined; None if there are no more."""

    rows: list[Row[Any]]
    last: int | None

    def following(self, window: Window) -> int | None:
        """Return the `after` of the next page, or its `upto` with the newest first."""
        if self.last is None or not window.newest_first:
            return self.last
        return self.last - 1


def opaque(column: ColumnElement[str]) -> ColumnElement[str]:
    """Return the column as an expression that no index serves.

    This leaves the planner one way to read a window: by its key. Otherwise a filter that looks rare
    may tempt it to read and sort every row that matches.
    """
    return column.concat("")


def read_page(
    connection: Connection,
    window: Window,
    limit: int,
    size_of: Callable[[Row[Any]], int],
    examined: int = MAX_EXAMINED,
) -> Page:
    """Return at most `limit` rows of a window; fewer if a bound ends the page earlier.

    Args:
        connection: used only for reading.
        window: which rows.
        limit: the most rows to return.
        size_of: how much text a row has, in bytes or characters.
        examined: the most rows to examine, if some are left out.
    """
    if window.after >= window.upto:
        return Page([], None)
    if connection.dialect.name == "postgresql":
        _never_sort(connection)
    narrowed, edge = window, None
    if window.filters:
        # Half of them are counted in the index; then those rows themselves are examined.
        edge = _edge(connection, window, examined // 2)
        if edge is not None:
            newest_first = window.newest_first
            narrowed = (
                replace(window, after=edge - 1) if newest_first else replace(window, upto=edge)
            )
    sqlite = connection.dialect.name == "sqlite"
    wanted = _rows(narrowed, sqlite).where(*window.filters).limit(limit + 1)
    rows: list[Row[Any]] = []
    size = 0
    # A PostgreSQL cursor costs four more round trips.
    options = {"yield_per": _FETCHED_AT_ONCE} if limit > _FETCHED_AT_ONCE else {}
    with connection.execute(wanted, execution_options=options) as found:
        for row in found:
            if type(row._mapping[window.key]) is not int:
                # Another program wrote it; no page could continue from there.
                continue
            size += size_of(row)
            if len(rows) == limit or (rows and size > MAX_PAGE_BYTES):
                return Page(rows, rows[-1]._mapping[window.key])
            rows.append(row)
    return Page(rows, edge)


def _never_sort(connection: Connection) -> None:
    """Read rows in index order or not at all, for the rest of the transaction.

    With few statistics, such as after a restore, PostgreSQL's planner considers reading and sorting
    all rows just as cheap.
    """
    transaction = connection.get_transaction()
    if connection.info.get("never_sorts_in") is not transaction:
        connection.exec_driver_sql("SET LOCAL enable_sort = off; SET LOCAL jit = off")
        connection.info["never_sorts_in"] = transaction


def _edge(connection: Connection, window: Window, stride: int) -> int | None:
    """Return the last key that this page examines; None if fewer rows are left."""
    last: int | None = connection.execute(
        _rows(window, connection.dialect.name == "sqlite")
        .with_only_columns(window.key)
        .limit(1)
        .offset(stride - 1)
    ).scalar_one_or_none()
    return None if last is None else int(last)


def _rows(window: Window, sqlite: bool) -> Select[Any]:
    query = select(window.table)
    if window.equal is None:
        # Drop bounds that exclude nothing: to a planner without statistics they look narrow.
        if window.after > 0:
            query = query.where(window.key > window.after)
        # In SQLite a text, which another program may have stored there, is greater than any number.
        if window.upto < MAX_INTEGER or sqlite:
            query = query.where(window.key <= window.upto)
        return query.order_by(window.order)
    column, value = window.equal
    one = column == value
    if not sqlite:
        # With `column = value` PostgreSQL knows that ordering by the key alone is the same, and if
        # it takes the value to be common it walks the primary key past all the other rows.
        # Not as pairs, (column, key) <= (value, upto): neither database ends a walk along the index
        # when the key passes its bound, only when the column does.
        one = column == any_(bindparam(None, [value], ARRAY(column.type)))
    query = query.where(one, window.key > window.after, window.key <= window.upto)
    return query.order_by(column.desc() if window.newest_first else column.asc(), window.order)
