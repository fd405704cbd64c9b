"""GET /api/snapshot: everything that a backend needs to start, at one revision."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from slm.errors import Overloaded, TlsRequired
from slm.schemas import Snapshot
from slm.server.agents.snapshots import CHUNK_BYTES, SealedSnapshot
from slm.server.api.access import Asking, KeyReader
from slm.server.api.parameters import Parts, UpToDate
from slm.server.api.peer import require_private
from slm.server.api.problems import KEYED_PROBLEMS, problem_responses
from slm.server.api.responses import catch_up, json_response, revision_headers
from slm.server.api.route import SLMRoute
from slm.server.security.audit import Who
from slm.server.security.token_table import Caller
from slm.server.services import Services

router = APIRouter(prefix="/api", route_class=SLMRoute, tags=["agents"])


@router.get(
    "/snapshot",
    response_model=Snapshot,
    responses=problem_responses(*KEYED_PROBLEMS, TlsRequired, Overloaded),
)
async def get_snapshot(
    request: Request,
    services: Parts,
    caller: KeyReader,
    who: Asking,
    _: UpToDate,
) -> Response:
    """Return every agent that the token can see, with its key, read in one transaction."""
    require_private(request, services.settings)
    if not services.snapshots.take(None):
        raise Overloaded("Too many snapshots are being requested at once.")
    try:
        return await _snapshot(services, caller, who)
    finally:
        services.snapshots.release(None)


async def _snapshot(services: Services, caller: Caller, who: Who) -> Response:
    sealed = await services.reads.sealed_snapshot(who=who, view=caller.view)
    services.counts.key_reads += sealed.agents
    await catch_up(services, sealed.head.revision, sealed.head.change_id)
    headers = revision_headers(sealed.head.revision, sealed.head.epoch)
    headers["cache-control"] = "no-store"
    if sealed.size <= CHUNK_BYTES:
        return json_response(b"".join(sealed.chunks()), headers=headers)
    headers["content-length"] = str(sealed.size)
    pieces = _stream(sealed, lambda: services.tokens.require(caller))
    return StreamingResponse(pieces, headers=headers, media_type="application/json")


async def _stream(sealed: SealedSnapshot, check: Callable[[], None]) -> AsyncIterator[bytes]:
    """Decrypt one piece after the other: a slow reader has no more than one in memory.

    `check` raises, and so cuts the response off, once the token is no longer valid.
    """
    for chunk in sealed.chunks():
        check()
        yield chunk
