"""The routes under /api/agents (docs/protocol.md section 3)."""

from __future__ import annotations

import json
import re
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request, Response

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
from slm.server.agents.catalog import AgentFilter
from slm.server.agents.schemas import AgentCreate, AgentUpdate
from slm.server.api.access import KeyReader, Reader, Writer, sees_today, who_of
from slm.server.api.parameters import AgentIdPath, FilterText, Parts, UpToDate, Wait
from slm.server.api.peer import require_private
from slm.server.api.problems import (
    BODY_PROBLEMS,
    KEYED_PROBLEMS,
    READ_PROBLEMS,
    WRITE_PROBLEMS,
    problem_responses,
)
from slm.server.api.responses import (
    WrittenAgent,
    catalog_headers,
    catch_up,
    json_response,
    none_match,
    not_modified,
    revision_headers,
    versions_matched,
    written_answer,
)
from slm.server.api.route import SLMRoute, answered_at_once, body_of
from slm.server.security.agent_scope import EVERYTHING
from slm.server.security.token_table import Caller
from slm.server.services import Services
from slm.server.strict_json import MAX_INTEGER

router = APIRouter(prefix="/api", route_class=SLMRoute, tags=["agents"])


_NO_WEIGHT: Final = re.compile(r"\s*q\s*=\s*0(\.0*)?\s*")


async def _whole_list(request: Request, services: Services, caller: Caller) -> Response:
    catalog = services.catalog
    if caller.view is not EVERYTHING or not _takes_gzip(request):
        return _list_answer(request, services, AgentFilter(view=caller.view))
    # What is sent compressed is another representation, with a tag of its own (RFC 9110 8.8.3).
    etag = f'"{catalog.epoch}-{catalog.revision}-gzip"'
    headers = catalog_headers(services) | {"vary": "accept-encoding"}
    if not none_match(request.headers, etag):
        return not_modified(etag, headers)
    body = await catalog.compressed_list()
    return json_response(body, headers=headers | {"etag": etag, "content-encoding": "gzip"})


def _takes_gzip(request: Request) -> bool:
    """Say whether the caller prefers gzip to the plain form (RFC 9110 section 12.5.3)."""
    for coding in request.headers.get("accept-encoding", "").lower().split(","):
        name, _, weight = coding.partition(";")
        if name.strip() == "gzip":
            return _NO_WEIGHT.fullmatch(weight) is None
    return False


def _list_answer(
    request: Request,
    services: Services,
    wanted: AgentFilter,
    limit: int | None = None,
    offset: int = 0,
) -> Response:
    catalog = services.catalog
    headers = catalog_headers(services) | {"vary": "accept-encoding"}
    etag = f'"{catalog.epoch}-{catalog.revision}"'
    if not none_match(request.headers, etag):
        return not_modified(etag, headers)
    body = catalog.list_body(wanted, limit=limit, offset=offset)
    return json_response(body, headers=headers | {"etag": etag})


@router.get(
    "/agents",
    response_model=AgentList,
    responses=problem_responses(*READ_PROBLEMS),
)
@answered_at_once(_whole_list)
async def list_agents(
    request: Request,
    services: UpToDate,
    caller: Reader,
    agent_id: FilterText | None = None,
    search: FilterText | None = None,
    provider: FilterText | None = None,
    is_active: bool | None = None,
    limit: Annotated[int | None, Query(ge=1, le=MAX_INTEGER)] = None,
    offset: Annotated[int, Query(ge=0, le=MAX_INTEGER)] = 0,
) -> Response:
    """List the agents, without keys, in the order in which they were made."""
    wanted = AgentFilter(agent_id, search, provider, is_active, caller.view)
    return _list_answer(request, services, wanted, limit, offset)


async def _default_at_once(request: Request, services: Services, caller: Caller) -> Response:
    default_id = services.catalog.default_id
    if default_id is None:
        raise AgentNotFound
    return _agent_answer(request, services, caller, default_id)


@router.get(
    "/agents/default",
    response_model=Agent,
    responses=problem_responses(*READ_PROBLEMS, AgentNotFound),
)
@answered_at_once(_default_at_once)
async def get_default_agent(request: Request, services: UpToDate, caller: Reader) -> Response:
    """Return the agent that is the default now, whatever its agent_id."""
    return await _default_at_once(request, services, caller)


async def _agent_at_once(request: Request, services: Services, caller: Caller) -> Response:
    return _agent_answer(request, services, caller, request.path_params["agent_id"])


@router.get(
    "/agents/{agent_id}",
    response_model=Agent,
    responses=problem_responses(*READ_PROBLEMS, AgentNotFound),
)
@answered_at_once(_agent_at_once)
async def get_agent(
    request: Request, agent_id: AgentIdPath, services: UpToDate, caller: Reader
) -> Response:
    """Return one agent, without its key."""
    return _agent_answer(request, services, caller, agent_id)


def _agent_answer(request: Request, services: Services, caller: Caller, agent_id: str) -> Response:
    # Whether it may be seen is asked first, so that it takes as long for one that is not there.
    visible = sees_today(services, caller, agent_id)
    entry = services.catalog.get(agent_id) if visible else None
    if entry is None:
        raise AgentNotFound
    headers = catalog_headers(services)
    if not none_match(request.headers, entry.etag):
        return not_modified(entry.etag, headers)
    return json_response(entry.body, headers=headers | {"etag": entry.etag})


@router.get(
    "/agents/{agent_id}/llm",
    response_model=LLMConfigWithKey,
    responses=problem_responses(
        *KEYED_PROBLEMS, AgentNotFound, AgentInactive, KeyUndecryptable, TlsRequired
    ),
)
async def get_llm_config(
    request: Request, agent_id: AgentIdPath, services: UpToDate, caller: KeyReader
) -> Response:
    """Return what an agent needs for a call, its API key included."""
    require_private(request, services.settings)
    if not sees_today(services, caller, agent_id):
        # Without a look into the database, whose time would tell whether it is there.
        raise AgentNotFound
    config, revision, epoch = await services.reads.llm(
        agent_id, who=who_of(request, caller), view=caller.view
    )
    services.counts.key_reads += 1
    await catch_up(services, revision)
    body = json.dumps(config.to_wire(), ensure_ascii=False).encode()
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
    wait: Wait = None,
) -> Response:
    """Create an agent; with is_default it takes the flag from the default of now."""
    caller.require_writable(agent.agent_id, makes_default=agent.is_default)
    if agent.llm_api_key is not None:
        require_private(request, services.settings)
    who = who_of(request, caller)
    written = await services.registry.create(
        agent,
        who=who,
        comment=agent.comment,
    )
    return await written_answer(services, caller, written, 201, wait)


async def _update_at_once(request: Request, services: Services, caller: Caller) -> Response:
    update = await body_of(request, AgentUpdate)
    return await update_agent(request, request.path_params["agent_id"], update, services, caller)


@router.put(
    "/agents/{agent_id}",
    response_model=Agent | WrittenAgent,
    responses=problem_responses(*BODY_PROBLEMS, AgentNotFound, AgentIsDefault, PreconditionFailed),
)
@answered_at_once(_update_at_once)
async def update_agent(
    request: Request,
    agent_id: AgentIdPath,
    update: AgentUpdate,
    services: Parts,
    caller: Writer,
    wait: Wait = None,
) -> Response:
    """Change the fields that are sent; null clears a field that can be empty."""
    caller.require_writable(agent_id, makes_default=bool(update.is_default))
    if update.llm_api_key is not None:
        require_private(request, services.settings)
    who = who_of(request, caller)
    written = await services.registry.update(
        agent_id,
        update,
        who=who,
        comment=update.comment,
        if_match=versions_matched(request.headers),
    )
    return await written_answer(services, caller, written, 200, wait)


@router.delete(
    "/agents/{agent_id}",
    status_code=204,
    responses=problem_responses(*WRITE_PROBLEMS, AgentNotFound, AgentIsDefault, PreconditionFailed),
)
async def delete_agent(
    request: Request,
    agent_id: AgentIdPath,
    services: Parts,
    caller: Writer,
    comment: FilterText | None = None,
    wait: Wait = None,
) -> Response:
    """Delete an agent; the default cannot be. With `wait` the answer is 200 with a receipt."""
    caller.require_writable(agent_id)
    who = who_of(request, caller)
    written = await services.registry.delete(
        agent_id,
        who=who,
        comment=comment,
        if_match=versions_matched(request.headers),
    )
    return await written_answer(services, caller, written, 204 if wait is None else 200, wait)
