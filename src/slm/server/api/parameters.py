"""How each kind of parameter is read; what cannot be meant is 422, whatever its form.

Values only: knows no route, no service and no database.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Final

from fastapi import Path, Query
from pydantic import AfterValidator, BeforeValidator

from slm.schemas import WITHOUT_NUL, check_storable
from slm.server.strict_json import MAX_INTEGER

MAX_ROW_ID: Final = 2**31 - 1
"""The highest id that a row of an INTEGER column can have."""

_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}([T ]|$)")


def _iso_8601(value: object) -> object:
    # pydantic would take any number for seconds since 1970.
    if isinstance(value, str) and not _DATE.match(value):
        raise ValueError("is not a date and time of ISO 8601")
    return value


def _in_utc(at: datetime) -> datetime:
    try:
        return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except OverflowError:
        # The first and the last day of the calendar are not there in every zone.
        raise ValueError("is outside the calendar in UTC") from None


FilterText = Annotated[
    str,
    Query(max_length=256, json_schema_extra={"pattern": WITHOUT_NUL}),
    AfterValidator(check_storable),
]
BackendName = Annotated[
    str,
    Query(max_length=512, json_schema_extra={"pattern": WITHOUT_NUL}),
    AfterValidator(check_storable),
]
"""What a backend is shown as: its name, its instance and perhaps its token's name."""

Revision = Annotated[int, Query(ge=0, le=MAX_INTEGER)]
RevisionPath = Annotated[int, Path(ge=1, le=MAX_INTEGER)]
RowIdPath = Annotated[int, Path(ge=0, le=MAX_INTEGER)]
Time = Annotated[
    datetime,
    BeforeValidator(_iso_8601),
    AfterValidator(_in_utc),
    Query(description="ISO 8601; without a zone it is UTC"),
]
