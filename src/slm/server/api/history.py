"""The routes of the history: what was, who did it, and getting it back (docs/protocol.md 3)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BeforeValidator

from slm.errors import AgentIsDefault, AgentNotFound, PreconditionFailed, RevisionNotFound
from slm.schemas import Agent, ChangeList
from slm.server.api.agents import BODY_PROBLEMS, FilterText, written_answer
from slm.server.api.common import (
    KEYED_PROBLEMS,
    AgentIdPath,
    Parts,
    Reader,
    SLMRoute,
    Writer,
    json_response,
    problem_responses,
    revision_headers,
    versions_matched,
    who_of,
)
from slm.server.api.waiting import Wait
from slm.server.auth import Caller
from slm.server.bodies import Rollback
from slm.server.history import (
    MAX_PAGE,
    ChangeFilter,
    History,
    restoring_create,
    restoring_update,
)
from slm.server.services import Services
from slm.server.strict_json import MAX_INTEGER

router = APIRouter(prefix="/api", route_class=SLMRoute, tags=["history"])

Revision = Annotated[int, Query(ge=0, le=MAX_INTEGER)]


def _iso_8601(value: object) -> object:
    # pydantic would take any number for seconds since 1970.
    if isinstance(value, str) and not re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}([T ]|$)", value):
        raise ValueError("is not a date and time of ISO 8601")
    return value


Time = Annotated[
    datetime,
    BeforeValidator(_iso_8601),
    Query(description="ISO 8601; without a zone it is UTC"),
]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]


@router.get(
    "/changes",
    response_model=ChangeList,
    responses=problem_responses(*KEYED_PROBLEMS),
)
async def list_changes(
    services: Parts,
    caller: Reader,
    since: Revision = 0,
    agent: FilterText | None = None,
    actor: FilterText | None = None,
    newest_first: bool = False,
    limit: Limit = 100,
) -> Response:
    """List changes after a revision, oldest first unless asked otherwise."""
    wanted = ChangeFilter(
        agent_id=agent,
        actor=actor,
        since=since,
        newest_first=newest_first,
        sees=_visible(services, caller),
    )
    return await _list(services, wanted, limit)


@router.get(
    "/agents/{agent_id}/history",
    response_model=ChangeList,
    responses=problem_responses(*KEYED_PROBLEMS, AgentNotFound),
)
async def agent_history(
    services: Parts,
    caller: Reader,
    agent_id: AgentIdPath,
    upto: Revision | None = None,
    at: Time | None = None,
    limit: Limit = 100,
) -> Response:
    """List an agent's changes, newest first; with `at`, the first is what it ran then."""
    if at is not None:
        at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    sees = _visible(services, caller)
    if not sees(agent_id):
        raise AgentNotFound
    wanted = ChangeFilter(agent_id=agent_id, upto=upto, at=at, newest_first=True, sees=sees)
    return await _list(services, wanted, limit)


def _visible(services: Services, caller: Caller) -> Callable[[str], bool]:
    """Return which agents' past the caller may see, by agent_id: those it may see now."""
    default = services.catalog.default()
    default_id = None if default is None else default.agent.agent_id
    return lambda agent_id: caller.view.sees(agent_id, agent_id == default_id)


async def _list(services: Services, wanted: ChangeFilter, limit: int) -> Response:
    found = await History(services.database).changes(wanted, limit)
    return json_response(
        found.model_dump_json().encode(), headers=revision_headers(found.revision, found.epoch)
    )


@router.post(
    "/agents/{agent_id}/rollback",
    response_model=Agent,
    responses=problem_responses(
        *BODY_PROBLEMS, AgentNotFound, AgentIsDefault, PreconditionFailed, RevisionNotFound
    ),
)
async def roll_back(
    request: Request,
    agent_id: AgentIdPath,
    rollback: Rollback,
    services: Parts,
    caller: Writer,
    wait: Wait = None,
) -> Response:
    """Give an agent back what it was at a revision, as a new change; a key is never restored."""
    caller.require_writable(agent_id)
    await services.database.read(caller.require_counts)
    who = who_of(request, caller)
    old = (await History(services.database).agent_before(agent_id, rollback.to)).agent
    comment = f"restores revision {old.revision}"
    if rollback.comment is not None:
        comment += f": {rollback.comment}"
    if_match = versions_matched(request.headers)
    registry = services.registry
    try:
        written = await registry.update(
            agent_id,
            restoring_update(old, comment),
            actor=who.actor,
            comment=comment,
            if_match=if_match,
            address=who.address,
            caller=caller,
        )
    except AgentNotFound:
        written = await registry.create(
            restoring_create(old, comment),
            actor=who.actor,
            comment=comment,
            address=who.address,
            caller=caller,
        )
    if old.has_api_key and written.agent is not None and not written.agent.has_api_key:
        written = replace(written, api_key_cleared=True)
    return await written_answer(
        services, caller, written, 200, wait, restored_revision=old.revision
    )
