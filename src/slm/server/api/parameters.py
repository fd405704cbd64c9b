"""How each kind of parameter is parsed; an impossible value is a 422, whatever its form.

Knows no route and no database.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from fastapi import Depends, Path, Query, Request
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from slm.errors import AgentNotFound, Behind
from slm.schemas import WITHOUT_NUL, check_storable
from slm.server.agents.catalog import Catalog
from slm.server.api.access import Given
from slm.server.api.scope import STAMP
from slm.server.db.database import Database
from slm.server.db.leases import Lease
from slm.server.encryption.rotation import KeyRotation
from slm.server.security.audit import AuditLog
from slm.server.security.token_store import TokenStore
from slm.server.security.token_table import Caller
from slm.server.services import Services
from slm.server.settings import Settings
from slm.server.strict_json import MAX_INTEGER

MAX_ROW_ID: Final = 2**31 - 1
"""The highest id that a row of an INTEGER column can have."""

_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}([T ]|$)")


def _iso_8601(value: object) -> object:
    # pydantic would accept any number as seconds since 1970.
    if isinstance(value, str) and not _DATE.match(value):
        raise ValueError("is not a date and time of ISO 8601")
    return value


def _in_utc(at: datetime) -> datetime:
    try:
        return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except OverflowError:
        # The first and the last day of the calendar do not exist in every time zone.
        raise ValueError("is outside the calendar in UTC") from None


FilterText = Annotated[
    str,
    Field(max_length=256, json_schema_extra={"pattern": WITHOUT_NUL}),
    AfterValidator(check_storable),
]
BackendName = Annotated[
    str,
    Field(max_length=512, json_schema_extra={"pattern": WITHOUT_NUL}),
    AfterValidator(check_storable),
]
"""How a backend is identified: its name, its instance and perhaps its token's name."""

Revision = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
RevisionPath = Annotated[int, Path(ge=1, le=MAX_INTEGER)]
RowIdPath = Annotated[int, Path(ge=0, le=MAX_INTEGER)]
Time = Annotated[
    datetime,
    BeforeValidator(_iso_8601),
    AfterValidator(_in_utc),
    Field(description="ISO 8601; without a zone it is UTC"),
]

MAX_WAIT_SECONDS: Final = 60.0

_DURATION: Final = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)(ms|s|)")

# The same pattern with the limit in it, for the OpenAPI document.
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
    Field(
        description="Wait until every backend has answered for the change, such as 5s or 500ms,"
        f" at most {MAX_WAIT_SECONDS:g}s; the answer then has a `receipt`.",
        json_schema_extra={"pattern": _DOCUMENTED},
    ),
]


def _known_agent_id(agent_id: str) -> str:
    # A database may reject such a query; no agent can have that name.
    if "\x00" in agent_id:
        raise AgentNotFound
    return agent_id


AgentIdPath = Annotated[str, Path(), AfterValidator(_known_agent_id)]


class QueryModel(BaseModel):
    """A route's query string: what the parser reads and the OpenAPI document shows."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class NoQuery(QueryModel):
    """The query string of a route that accepts none."""


class WaitQuery(QueryModel):
    """The query string of a write: whether the response waits for the fleet."""

    wait: Wait = None


class UpToDateQuery(QueryModel):
    """The query string of a read that can wait until this replica has reached a revision."""

    min_revision: int | None = Field(
        None, ge=0, le=MAX_INTEGER, description="wait until the answer is at least this new"
    )


Waiting = Annotated[WaitQuery, Query()]
UpToDate = Annotated[UpToDateQuery, Query()]


async def at_least(request: Request, services: Services, min_revision: int) -> None:
    """Wait until the catalog has `min_revision`.

    Raises:
        Behind: the catalog did not reach it within min_revision_wait_seconds.
    """
    seconds = services.settings.min_revision_wait_seconds
    if not await services.feed.passed(min_revision, seconds):
        raise Behind(f"This replica is at revision {services.feed.position}.")
    stamp = request.scope[STAMP]
    stamp.revision, stamp.epoch = services.catalog.revision, services.catalog.epoch


class Part(Given):
    """One part of the server, for an endpoint that uses it."""

    def __init__(self, part: Callable[[Services], object]) -> None:
        self._part = part

    def take(self, request: Request, services: Services, caller: Caller | None) -> object:
        """Return the part."""
        return self._part(services)


Parts = Annotated[Services, Depends(Part(lambda services: services))]
"""All parts, for an endpoint that passes them on."""

Agents = Annotated[Catalog, Depends(Part(lambda services: services.catalog))]
Audit = Annotated[AuditLog, Depends(Part(lambda services: services.audit))]
Data = Annotated[Database, Depends(Part(lambda services: services.database))]
OwnLease = Annotated[Lease, Depends(Part(lambda services: services.caretaker.lease))]
Options = Annotated[Settings, Depends(Part(lambda services: services.settings))]
Rotation = Annotated[KeyRotation, Depends(Part(lambda services: services.rotation))]
Tokens = Annotated[TokenStore, Depends(Part(lambda services: services.token_store))]
