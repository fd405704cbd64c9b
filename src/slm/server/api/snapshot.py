"""GET /api/snapshot: everything that a backend needs to start, at one revision."""

from __future__ import annotations

import asyncio
import json

from fastapi import APIRouter, Request, Response

from slm.errors import Overloaded, TlsRequired
from slm.schemas import Snapshot
from slm.server.api.common import (
    KEYED_PROBLEMS,
    KeyReader,
    SLMRoute,
    UpToDate,
    catch_up,
    json_response,
    problem_responses,
    revision_headers,
    who_of,
)
from slm.server.auth import Caller
from slm.server.peer import require_private
from slm.server.services import Services

router = APIRouter(prefix="/api", route_class=SLMRoute, tags=["agents"])


@router.get(
    "/snapshot",
    response_model=Snapshot,
    responses=problem_responses(*KEYED_PROBLEMS, TlsRequired, Overloaded),
)
async def get_snapshot(request: Request, services: UpToDate, caller: KeyReader) -> Response:
    """Return every agent that the token sees, with its key, read in one transaction."""
    require_private(request, services.settings.trusted_proxies)
    if not services.snapshots.take(None):
        raise Overloaded("As many snapshots are being made as may be at once.")
    try:
        return await _snapshot(request, services, caller)
    finally:
        services.snapshots.release(None)


async def _snapshot(request: Request, services: Services, caller: Caller) -> Response:
    snapshot = await services.registry.snapshot(who=who_of(request, caller), view=caller.view)
    services.counts.key_reads += len(snapshot.agents)
    await catch_up(services, snapshot.revision, snapshot.change_id)
    # In a thread: thousands of agents take long enough to hold up the streams.
    body = await asyncio.to_thread(_encode, snapshot)
    headers = revision_headers(snapshot.revision, snapshot.epoch)
    return json_response(body, headers=headers | {"cache-control": "no-store"})


def _encode(snapshot: Snapshot) -> bytes:
    data = {
        "revision": snapshot.revision,
        "epoch": snapshot.epoch,
        "change_id": snapshot.change_id,
        "agents": [agent.to_wire() for agent in snapshot.agents],
    }
    return json.dumps(data, ensure_ascii=False).encode()
