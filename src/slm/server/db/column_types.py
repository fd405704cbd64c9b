"""The types of columns, which read whatever another program may have stored there.

SQLite keeps any value in any column, and anyone who can write to a database may alter a row. One
such row must not hide the others, so an unreadable value becomes one of the right type: bytes
become text, and an invalid time becomes 1970, when every token has expired. Knows no table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from sqlalchemy import DateTime, Dialect, Double, String, Text
from sqlalchemy.dialects.sqlite import DATETIME
from sqlalchemy.exc import NoResultFound
from sqlalchemy.types import TypeDecorator, TypeEngine

from slm.errors import DatabaseUnavailable

T = TypeVar("T")

EPOCH_START: Final = datetime(1970, 1, 1, tzinfo=UTC)

_EPOCH: Final = re.compile(r"[0-9A-Za-z._-]{1,64}")
"""An epoch appears in headers and ETags."""

UNREADABLE: Final = (ValueError, TypeError, OverflowError, RecursionError, OSError)
"""What reading a value of the wrong type raises."""


def text_of(value: Any) -> str:
    """Return a stored value as text."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else str(value)


def time_of(value: Any) -> datetime:
    """Return a stored time; without a zone it is UTC, as CURRENT_TIMESTAMP and we write it.

    Raises:
        ValueError, TypeError, OverflowError, OSError: it is not a time (`UNREADABLE`).
    """
    if isinstance(value, int | float):
        return datetime.fromtimestamp(value, UTC)
    time = value if isinstance(value, datetime) else datetime.fromisoformat(value.strip())
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def require_state(*numbers: object, epoch: str = "0") -> None:
    """Refuse an invalid number or epoch in the row of `state`: nothing can continue from there.

    Raises:
        DatabaseUnavailable: another program wrote it.
    """
    if not all(type(each) is int for each in numbers) or not _EPOCH.fullmatch(epoch):
        raise DatabaseUnavailable(
            "The database's row of state was altered by another program and cannot be read."
        )


def the_row(rows: Sequence[T]) -> T:
    """Return the one row of a table that always has one.

    Raises:
        NoResultFound: another program removed it.
    """
    if not rows:
        raise NoResultFound
    return rows[0]


def _readable_text(value: Any) -> str | None:
    return value if value is None or type(value) is str else text_of(value)


def _readable_time(value: Any) -> datetime | None:
    if value is None:
        return None
    try:
        return time_of(value)
    except UNREADABLE:
        return EPOCH_START


def _readable_number(value: Any) -> float | None:
    if value is None:
        return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def tolerant_times() -> Any:
    """Return a driver's loader of PostgreSQL times that also reads those Python cannot represent.

    `infinity`, and years beyond 9999, become the latest possible time; those before Christ, 1970.
    """
    from psycopg import DataError
    from psycopg.types.datetime import TimestamptzLoader

    class TolerantLoader(TimestamptzLoader):
        def load(self, data: Any) -> datetime:
            try:
                return super().load(data)
            except (DataError, *UNREADABLE):
                text = bytes(data)
                past = text.startswith(b"-") or text.endswith(b"BC")
                return EPOCH_START if past else datetime.max.replace(tzinfo=UTC)

    return TolerantLoader


class StoredString(String):
    """A VARCHAR. PostgreSQL has its own type for it, and stores nothing else there."""

    def result_processor(self, dialect: Dialect, _: object) -> Callable[[Any], Any]:
        """Return the function that converts a stored value to text."""
        return _readable_text


class StoredText(Text):
    """A TEXT; like `StoredString`."""

    def result_processor(self, dialect: Dialect, _: object) -> Callable[[Any], Any]:
        """Return the function that converts a stored value to text."""
        return _readable_text


class StoredDouble(Double[float]):
    """Seconds, or another finite number."""

    def result_processor(self, dialect: Dialect, _: object) -> Callable[[Any], Any]:
        """Return the function that converts a stored value to a finite number."""
        return _readable_number


class _SqliteTime(DATETIME):
    def result_processor(self, dialect: Dialect, _: object) -> Callable[[Any], Any]:
        return _readable_time


class StoredTime(TypeDecorator[datetime]):
    """A time, in UTC and with its time zone on both engines."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return the engine's own type."""
        if dialect.name == "sqlite":
            return dialect.type_descriptor(_SqliteTime())  # type: ignore[no-untyped-call]
        return dialect.type_descriptor(DateTime(timezone=True))
