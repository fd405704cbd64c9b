"""The history routes: what changed, who changed it, and rollback (docs/protocol.md 3)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from slm.errors import (
    AgentIsDefault,
    AgentNotFound,
    Overloaded,
    PreconditionFailed,
    RevisionNotFound,
)
from slm.schemas import Agent, ChangeList
from slm.server.agents.history import (
    MAX_PAGE,
    ChangeFilter,
    History,
    restoring_create,
    restoring_update,
)
from slm.server.agents.schemas import Rollback
from slm.server.api.access import Asking, Reader, Writer, sees_today
from slm.server.api.parameters import (
    AgentIdPath,
    Agents,
    Data,
    FilterText,
    Parts,
    QueryModel,
    Revision,
    Time,
    Waiting,
)
from slm.server.api.problems import BODY_PROBLEMS, KEYED_PROBLEMS, problem_responses
from slm.server.api.responses import (
    WrittenAgent,
    json_response,
    revision_headers,
    versions_matched,
    written_answer,
)
from slm.server.api.route import SLMRoute
from slm.server.db.database import Database

router = APIRouter(prefix="/api", route_class=SLMRoute, tags=["history"])


class HistoryQuery(QueryModel):
    """Which changes of an agent to return."""

    upto: Revision | None = None
    at: Time | None = None
    limit: int = Field(100, ge=1, le=MAX_PAGE)


class ChangesQuery(QueryModel):
    """Which changes to return."""

    since: Revision = 0
    upto: Revision | None = None
    agent: FilterText | None = None
    actor: FilterText | None = None
    newest_first: bool = False
    limit: int = Field(100, ge=1, le=MAX_PAGE)


@router.get(
    "/changes",
    response_model=ChangeList,
    responses=problem_responses(*KEYED_PROBLEMS, Overloaded),
)
async def list_changes(
    database: Data, caller: Reader, query: Annotated[ChangesQuery, Query()]
) -> Response:
    """List changes after a revision, oldest first unless asked otherwise.

    `next` is the `since` of the next page, or its `upto` with the newest first.
    """
    wanted = ChangeFilter(
        agent_id=query.agent,
        actor=query.actor,
        since=query.since,
        upto=query.upto,
        newest_first=query.newest_first,
        view=caller.view,
    )
    return await _list(database, wanted, query.limit)


@router.get(
    "/agents/{agent_id}/history",
    response_model=ChangeList,
    responses=problem_responses(*KEYED_PROBLEMS, AgentNotFound, Overloaded),
)
async def agent_history(
    database: Data,
    catalog: Agents,
    caller: Reader,
    agent_id: AgentIdPath,
    query: Annotated[HistoryQuery, Query()],
) -> Response:
    """List an agent's changes, newest first; with `at`, the first is what it ran at that time.

    `next` is the `upto` of the next page.
    """
    if not sees_today(catalog, caller, agent_id):
        raise AgentNotFound
    wanted = ChangeFilter(
        agent_id=agent_id, upto=query.upto, at=query.at, newest_first=True, view=caller.view
    )
    return await _list(database, wanted, query.limit)


async def _list(database: Database, wanted: ChangeFilter, limit: int) -> Response:
    found = await History(database).changes(wanted, limit)
    return json_response(
        found.model_dump_json().encode(), headers=revision_headers(found.revision, found.epoch)
    )


@router.post(
    "/agents/{agent_id}/rollback",
    response_model=Agent | WrittenAgent,
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
    who: Asking,
    query: Waiting,
) -> Response:
    """Restore an agent to a revision, as a new change; a key is never restored."""
    caller.require_writable(agent_id)
    await services.database.read(caller.require_counts)
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
            who=who,
            comment=comment,
            if_match=if_match,
        )
    except AgentNotFound:
        written = await registry.create(
            restoring_create(old, comment),
            who=who,
            comment=comment,
        )
    if old.has_api_key and written.agent is not None and not written.agent.has_api_key:
        written = replace(written, api_key_cleared=True)
    return await written_answer(
        services, caller, written, 200, query.wait, restored_revision=old.revision
    )
