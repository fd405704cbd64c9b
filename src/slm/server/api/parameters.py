"""How each kind of parameter is read; what cannot be meant is 422, whatever its form.

Knows no route and no database.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from fastapi import Depends, Path, Query, Request
from pydantic import AfterValidator, BeforeValidator

from slm.errors import AgentNotFound, Behind
from slm.schemas import WITHOUT_NUL, check_storable
from slm.server.api.access import services_of
from slm.server.api.middleware import STAMP
from slm.server.services import Services
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

MAX_WAIT_SECONDS: Final = 60.0

_DURATION: Final = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)(ms|s|)")

# The same with the limit in it, for the API's document.
_DOCUMENTED: Final = (
    r"^(([0-5]?[0-9](\.[0-9]{1,6})?|60(\.0{1,6})?)s?"
    r"|([0-5]?[0-9]{1,4}(\.[0-9]{1,6})?|60000(\.0{1,6})?)ms)$"
)


def _seconds(text: Any) -> float:
    found = _DURATION.fullmatch(str(text))
    seconds = float(found[1]) / (1000 if found[2] == "ms" else 1) if found else -1.0
    if not 0 <= seconds <= MAX_WAIT_SECONDS:
        raise ValueError(f"a duration such as 5s or 500ms, at most {MAX_WAIT_SECONDS:g}s")
    return seconds


Wait = Annotated[
    float | None,
    BeforeValidator(_seconds, json_schema_input_type=str),
    Query(
        description="Wait until every backend has answered for the change, such as 5s or 500ms,"
        f" at most {MAX_WAIT_SECONDS:g}s; the answer then has a `receipt`.",
        json_schema_extra={"pattern": _DOCUMENTED},
    ),
]


def _known_agent_id(agent_id: str) -> str:
    # A database may refuse to be asked for it; there can be no agent of that name.
    if "\x00" in agent_id:
        raise AgentNotFound
    return agent_id


async def _at_least(
    request: Request,
    min_revision: Annotated[
        int | None,
        Query(ge=0, le=MAX_INTEGER, description="wait until the answer is at least this new"),
    ] = None,
) -> Services:
    """Return the services once the catalog has `min_revision`.

    Raises:
        Behind: it has not within min_revision_wait_seconds.
    """
    services = services_of(request)
    if min_revision is not None:
        seconds = services.settings.min_revision_wait_seconds
        if not await services.feed.passed(min_revision, seconds):
            raise Behind(f"This replica is at revision {services.feed.position}.")
        stamp = request.scope[STAMP]
        stamp.revision, stamp.epoch = services.catalog.revision, services.catalog.epoch
    return services


async def _services(request: Request) -> Services:
    # Not a plain function: FastAPI would run that in a thread.
    return services_of(request)


Parts = Annotated[Services, Depends(_services)]
UpToDate = Annotated[Services, Depends(_at_least)]
AgentIdPath = Annotated[str, Path(), AfterValidator(_known_agent_id)]
