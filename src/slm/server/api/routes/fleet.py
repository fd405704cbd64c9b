"""The fleet routes: connected backends, and how they took each change (docs/protocol.md 3)."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from slm.errors import (
    BackendNotFound,
    BackendSilent,
    BackendUnclear,
    Forbidden,
    RevisionNotFound,
)
from slm.protocol import Explanation
from slm.server.api.access import Reader, sees_today
from slm.server.api.parameters import (
    BackendName,
    FilterText,
    Parts,
    QueryModel,
    RevisionPath,
    Waiting,
)
from slm.server.api.problems import KEYED_PROBLEMS, READ_PROBLEMS, problem_responses
from slm.server.api.responses import catalog_headers, compact_json, json_response, named_for
from slm.server.api.route import SLMRoute

router = APIRouter(prefix="/api", route_class=SLMRoute, tags=["fleet"])


class ExplainQuery(QueryModel):
    """Which backend to ask, by its full name, and about which agent."""

    agent_id: FilterText
    backend: BackendName


@router.get("/fleet", responses=problem_responses(*READ_PROBLEMS))
async def get_fleet(services: Parts, caller: Reader) -> Response:
    """List every connected backend, and those that disconnected within the last hour."""
    if caller.view.is_limited:
        raise Forbidden("The token is limited to some agents; backends serve others as well.")
    await services.receipts.refresh()
    head, epoch = services.fleet.head, services.catalog.epoch
    headers = catalog_headers(services)
    backends = await services.fleet.described()
    # An epoch is hexadecimal and needs no escaping.
    tail = f',"revision":{head},"epoch":"{epoch}"}}'.encode()
    body = b'{"backends":' + backends + tail
    return json_response(body, headers=headers)


@router.get(
    "/explain",
    response_model=Explanation,
    responses=problem_responses(*KEYED_PROBLEMS, BackendNotFound, BackendSilent, BackendUnclear),
)
async def explain(
    services: Parts, caller: Reader, query: Annotated[ExplainQuery, Query()]
) -> Response:
    """Ask a connected backend how it resolves an agent now, with every step of its chain."""
    if caller.view.is_limited:
        raise Forbidden("The token is limited to some agents; backends serve others as well.")
    await services.receipts.refresh()
    report = await services.explanations.ask(query.backend, query.agent_id)
    return json_response(report.model_dump_json().encode())


@router.get(
    "/changes/{revision}/receipt",
    response_model=dict[str, Any],
    responses=problem_responses(*KEYED_PROBLEMS, RevisionNotFound),
)
async def get_receipt(
    revision: RevisionPath, services: Parts, caller: Reader, query: Waiting
) -> Response:
    """Return how every backend took a change; with `wait`, once all have answered."""
    subject = await services.receipts.subject(
        revision, lambda agent_id: sees_today(services.catalog, caller, agent_id)
    )
    receipt = await services.receipts.receipt(subject, query.wait or 0.0, named=named_for(caller))
    return json_response(compact_json(receipt))
