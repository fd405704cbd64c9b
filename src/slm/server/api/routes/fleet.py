"""The routes of the fleet: who listens, and who took which change (docs/protocol.md section 3)."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from slm.errors import (
    BackendNotFound,
    BackendSilent,
    BackendUnclear,
    Forbidden,
    RevisionNotFound,
)
from slm.protocol import Explanation
from slm.server.api.access import Reader, sees_today
from slm.server.api.parameters import BackendName, FilterText, Parts, RevisionPath, Wait
from slm.server.api.problems import KEYED_PROBLEMS, READ_PROBLEMS, problem_responses
from slm.server.api.responses import catalog_headers, named_for
from slm.server.api.route import SLMRoute

router = APIRouter(prefix="/api", route_class=SLMRoute, tags=["fleet"])


@router.get("/fleet", responses=problem_responses(*READ_PROBLEMS))
async def get_fleet(services: Parts, caller: Reader) -> Response:
    """List every connected backend, and those that went away within the last hour."""
    if caller.view.is_limited:
        raise Forbidden("The token is limited to some agents; backends serve others as well.")
    await services.receipts.refresh()
    head, epoch = services.fleet.head, services.catalog.epoch
    headers = catalog_headers(services)
    backends = await services.fleet.described()
    # An epoch is hexadecimal and needs no escapes.
    tail = f',"revision":{head},"epoch":"{epoch}"}}'.encode()
    body = b'{"backends":' + backends + tail
    return Response(body, headers=headers, media_type="application/json")


@router.get(
    "/explain",
    response_model=Explanation,
    responses=problem_responses(*KEYED_PROBLEMS, BackendNotFound, BackendSilent, BackendUnclear),
)
async def explain(
    services: Parts, caller: Reader, agent_id: FilterText, backend: BackendName
) -> Explanation:
    """Ask a connected backend how it resolves an agent now, every step of its chain."""
    if caller.view.is_limited:
        raise Forbidden("The token is limited to some agents; backends serve others as well.")
    await services.receipts.refresh()
    return await services.explanations.ask(backend, agent_id)


@router.get(
    "/changes/{revision}/receipt",
    responses=problem_responses(*KEYED_PROBLEMS, RevisionNotFound),
)
async def get_receipt(
    revision: RevisionPath, services: Parts, caller: Reader, wait: Wait = None
) -> dict[str, Any]:
    """Say how every backend took a change; with `wait`, once all have answered."""
    subject = await services.receipts.subject(
        revision, lambda agent_id: sees_today(services, caller, agent_id)
    )
    return await services.receipts.receipt(subject, wait or 0.0, named=named_for(caller))
