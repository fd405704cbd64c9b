"""The routes under /api/agents (docs/protocol.md section 3)."""

from __future__ import annotations

import re
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from slm.errors import (
    AgentExists,
    AgentInactive,
    AgentIsDefault,
    AgentNotFound,
    KeyUndecryptable,
    PreconditionFailed,
    TlsRequired,
)
from slm.schemas import Agent, AgentList, LLMConfigWithKey
from slm.server.agents.catalog import EVERY_AGENT, AgentFilter
from slm.server.agents.schemas import AgentCreate, AgentUpdate
from slm.server.api.access import Asking, KeyReader, Reader, Writer, sees_today
from slm.server.api.parameters import (
    AgentIdPath,
    FilterText,
    Parts,
    UpToDate,
    UpToDateQuery,
    Waiting,
    WaitQuery,
)
from slm.server.api.peer import require_private
from slm.server.api.problems import (
    BODY_PROBLEMS,
    KEYED_PROBLEMS,
    READ_PROBLEMS,
    WRITE_PROBLEMS,
    problem_responses,
)
from slm.server.api.responses import (
    NOT_MODIFIED,
    WrittenAgent,
    catalog_headers,
    catch_up,
    compact_json,
    json_response,
    none_match,
    not_modified,
    revision_headers,
    versions_matched,
    written_answer,
)
from slm.server.api.route import SLMRoute
from slm.server.security.token_table import Caller
from slm.server.services import Services
from slm.server.strict_json import MAX_INTEGER

router = APIRouter(prefix="/api", route_class=SLMRoute, tags=["agents"])


_NO_WEIGHT: Final = re.compile(r"\s*q\s*=\s*0(\.0*)?\s*")


class AgentListQuery(UpToDateQuery):
    """Which agents to list."""

    agent_id: FilterText | None = None
    search: FilterText | None = None
    provider: FilterText | None = None
    is_active: bool | None = None
    limit: int | None = Field(None, ge=1, le=MAX_INTEGER)
    offset: int = Field(0, ge=0, le=MAX_INTEGER)


class DeleteQuery(WaitQuery):
    """The query string of a DELETE, which has no body."""

    comment: FilterText | None = None


@router.get(
    "/agents",
    response_model=AgentList,
    responses=NOT_MODIFIED | problem_responses(*READ_PROBLEMS),
)
async def list_agents(
    request: Request, services: Parts, caller: Reader, query: Annotated[AgentListQuery, Query()]
) -> Response:
    """List the agents, without keys, in order of creation."""
    catalog = services.catalog
    wanted = AgentFilter(query.agent_id, query.search, query.provider, query.is_active, caller.view)
    headers = catalog_headers(services) | {"vary": "accept-encoding"}
    whole = wanted == EVERY_AGENT and query.limit is None and not query.offset
    compressed = whole and _takes_gzip(request)
    # A compressed response is another representation, with its own tag (RFC 9110 8.8.3).
    coding = "-gzip" if compressed else ""
    etag = f'"{catalog.epoch}-{catalog.revision}{coding}"'
    if not none_match(request.headers, etag):
        return not_modified(etag, headers)
    headers["etag"] = etag
    if compressed:
        headers["content-encoding"] = "gzip"
        return json_response(await catalog.compressed_list(), headers=headers)
    return json_response(
        catalog.list_body(wanted, limit=query.limit, offset=query.offset), headers=headers
    )


def _takes_gzip(request: Request) -> bool:
    """Return whether the caller prefers gzip to the plain form (RFC 9110 section 12.5.3)."""
    for coding in request.headers.get("accept-encoding", "").lower().split(","):
        name, _, weight = coding.partition(";")
        if name.strip() == "gzip":
            return _NO_WEIGHT.fullmatch(weight) is None
    return False


@router.get(
    "/agents/default",
    response_model=Agent,
    responses=NOT_MODIFIED | problem_responses(*READ_PROBLEMS, AgentNotFound),
)
async def get_default_agent(
    request: Request, services: Parts, caller: Reader, _: UpToDate
) -> Response:
    """Return the current default agent, whatever its agent_id."""
    return _agent_answer(request, services, caller, services.catalog.default_id)


@router.get(
    "/agents/{agent_id}",
    response_model=Agent,
    responses=NOT_MODIFIED | problem_responses(*READ_PROBLEMS, AgentNotFound),
)
async def get_agent(
    request: Request,
    agent_id: AgentIdPath,
    services: Parts,
    caller: Reader,
    _: UpToDate,
) -> Response:
    """Return one agent, without its key."""
    return _agent_answer(request, services, caller, agent_id)


def _agent_answer(
    request: Request, services: Services, caller: Caller, agent_id: str | None
) -> Response:
    catalog = services.catalog
    # Check visibility first, so that a missing agent takes as long as one that is hidden.
    visible = agent_id is not None and sees_today(catalog, caller, agent_id)
    entry = catalog.get(agent_id) if agent_id is not None and visible else None
    if entry is None:
        raise AgentNotFound
    headers = catalog_headers(services)
    if not none_match(request.headers, entry.etag):
        return not_modified(entry.etag, headers)
    headers["etag"] = entry.etag
    return json_response(entry.body, headers=headers)


@router.get(
    "/agents/{agent_id}/llm",
    response_model=LLMConfigWithKey,
    responses=problem_responses(
        *KEYED_PROBLEMS, AgentNotFound, AgentInactive, KeyUndecryptable, TlsRequired
    ),
)
async def get_llm_config(
    request: Request,
    agent_id: AgentIdPath,
    services: Parts,
    caller: KeyReader,
    who: Asking,
    _: UpToDate,
) -> Response:
    """Return what an agent needs for a call, including its API key."""
    require_private(request, services.settings)
    if not sees_today(services.catalog, caller, agent_id):
        # No database lookup: how long it takes would reveal whether the agent exists.
        raise AgentNotFound
    config, revision, epoch = await services.reads.llm(agent_id, who=who, view=caller.view)
    services.counts.key_reads += 1
    await catch_up(services, revision)
    body = compact_json(config.to_wire())
    headers = revision_headers(revision, epoch) | {"cache-control": "no-store"}
    return json_response(body, headers=headers)


@router.post(
    "/agents",
    status_code=201,
    response_model=Agent | WrittenAgent,
    responses=problem_responses(*BODY_PROBLEMS, AgentExists, AgentIsDefault),
)
async def create_agent(
    request: Request,
    agent: AgentCreate,
    services: Parts,
    caller: Writer,
    who: Asking,
    query: Waiting,
) -> Response:
    """Create an agent; with is_default it replaces the current default."""
    caller.require_writable(agent.agent_id, makes_default=agent.is_default)
    if agent.llm_api_key is not None:
        require_private(request, services.settings)
    written = await services.registry.create(agent, who=who, comment=agent.comment)
    return await written_answer(services, caller, written, 201, query.wait)


@router.put(
    "/agents/{agent_id}",
    response_model=Agent | WrittenAgent,
    responses=problem_responses(*BODY_PROBLEMS, AgentNotFound, AgentIsDefault, PreconditionFailed),
)
async def update_agent(
    request: Request,
    agent_id: AgentIdPath,
    update: AgentUpdate,
    services: Parts,
    caller: Writer,
    who: Asking,
    query: Waiting,
) -> Response:
    """Change the fields that are sent; null clears a nullable field."""
    caller.require_writable(agent_id, makes_default=bool(update.is_default))
    if update.llm_api_key is not None:
        require_private(request, services.settings)
    written = await services.registry.update(
        agent_id,
        update,
        who=who,
        comment=update.comment,
        if_match=versions_matched(request.headers),
    )
    return await written_answer(services, caller, written, 200, query.wait)


@router.delete(
    "/agents/{agent_id}",
    status_code=204,
    responses={
        200: {"description": "Deleted, with the receipt that `wait` asks for"},
        **problem_responses(*WRITE_PROBLEMS, AgentNotFound, AgentIsDefault, PreconditionFailed),
    },
)
async def delete_agent(
    request: Request,
    agent_id: AgentIdPath,
    services: Parts,
    caller: Writer,
    who: Asking,
    query: Annotated[DeleteQuery, Query()],
) -> Response:
    """Delete an agent, unless it is the default. With `wait`, return 200 and a receipt."""
    caller.require_writable(agent_id)
    written = await services.registry.delete(
        agent_id,
        who=who,
        comment=query.comment,
        if_match=versions_matched(request.headers),
    )
    status = 204 if query.wait is None else 200
    return await written_answer(services, caller, written, status, query.wait)
