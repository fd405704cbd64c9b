"""Pages of a table that only grows, each with a bound on the rows it looks at and on its size.

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
"""How many rows one page looks at, at most, however few of them belong to it."""

MAX_PAGE_BYTES: Final = 4 * 1024 * 1024
"""A page ends early where its rows have more text than this; it always has one row."""

_FETCHED_AT_ONCE: Final = 100


@dataclass(frozen=True)
class Window:
    """Which rows a page is of, in the order of one key.

    Attributes:
        table: where they are.
        key: the unique number that orders them.
        after: only rows of a greater key.
        upto: only rows of this key or a smaller one.
        newest_first: the order, and at which end the page starts.
        equal: a column and its one value; the table has an index of this column and the key.
        filters: what else a row must be; each is written so that no index serves it (`opaque`).
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
        """What the rows are ordered by."""
        return self.key.desc() if self.newest_first else self.key.asc()


class Page(NamedTuple):
    """Some rows of a window, and the last key that was looked at; None where there are no more."""

    rows: list[Row[Any]]
    last: int | None

    def following(self, window: Window) -> int | None:
        """Return the `after` of the next page, or its `upto` where the newest come first."""
        if self.last is None or not window.newest_first:
            return self.last
        return self.last - 1


def opaque(column: ColumnElement[str]) -> ColumnElement[str]:
    """Return the column as an expression that no index serves.

    The planner then has one way to read a window: by its key. Otherwise a filter that looks rare
    to it may tempt it to read every row that fits the filter, and to sort them.
    """
    return column.concat("")


def read_page(
    connection: Connection,
    window: Window,
    limit: int,
    size_of: Callable[[Row[Any]], int],
    examined: int = MAX_EXAMINED,
) -> Page:
    """Return at most `limit` rows of a window; fewer where the bounds end the page before.

    Args:
        connection: one that only reads.
        window: which rows.
        limit: how many at most.
        size_of: how much text a row has, in bytes or characters.
        examined: how many rows to look at, at most, where some are left out.
    """
    if window.after >= window.upto:
        return Page([], None)
    if connection.dialect.name == "postgresql":
        _never_sort(connection)
    narrowed, edge = window, None
    if window.filters:
        # Half of them are counted in the index; then those are looked at themselves.
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
    # A cursor of PostgreSQL's costs four more round trips.
    options = {"yield_per": _FETCHED_AT_ONCE} if limit > _FETCHED_AT_ONCE else {}
    with connection.execute(wanted, execution_options=options) as found:
        for row in found:
            if type(row._mapping[window.key]) is not int:
                # Another program wrote it; no page could go on from there.
                continue
            size += size_of(row)
            if len(rows) == limit or (rows and size > MAX_PAGE_BYTES):
                return Page(rows, rows[-1]._mapping[window.key])
            rows.append(row)
    return Page(rows, edge)


def _never_sort(connection: Connection) -> None:
    """Have the rows in the order of an index or not at all, for the rest of the transaction.

    With few statistics, such as after a restore, reading all of them and sorting looks no dearer to
    PostgreSQL's planner.
    """
    transaction = connection.get_transaction()
    if connection.info.get("never_sorts_in") is not transaction:
        connection.exec_driver_sql("SET LOCAL enable_sort = off; SET LOCAL jit = off")
        connection.info["never_sorts_in"] = transaction


def _edge(connection: Connection, window: Window, stride: int) -> int | None:
    """Return the last key that this page looks at; None where all that is left is fewer rows."""
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
        # Bounds that leave nothing out go: to a planner without statistics they look narrow.
        if window.after > 0:
            query = query.where(window.key > window.after)
        # To SQLite a text, which another program may have put there, is more than any number.
        if window.upto < MAX_INTEGER or sqlite:
            query = query.where(window.key <= window.upto)
        return query.order_by(window.order)
    column, value = window.equal
    one = column == value
    if not sqlite:
        # With `column = value` PostgreSQL knows that the order by the key alone is the same, and
        # walks the primary key past all that is not wanted where it takes the value for common.
        # Not as pairs, (column, key) <= (value, upto): neither database ends a walk along the index
        # where the key is beyond its bound, but only where the column is.
        one = column == any_(bindparam(None, [value], ARRAY(column.type)))
    query = query.where(one, window.key > window.after, window.key <= window.upto)
    return query.order_by(column.desc() if window.newest_first else column.asc(), window.order)
