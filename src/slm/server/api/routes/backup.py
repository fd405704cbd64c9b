"""The backup route, scope `admin`."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable
from typing import BinaryIO, Final

from fastapi import APIRouter, Request
from starlette.responses import StreamingResponse

from slm.errors import DatabaseUnavailable, InsufficientStorage, InvalidRequest, TlsRequired
from slm.server.api.access import Admin, Asking
from slm.server.api.parameters import Parts
from slm.server.api.peer import require_private
from slm.server.api.problems import problem_responses
from slm.server.api.route import SLMRoute
from slm.server.lifecycle.backup import backup
from slm.server.security.audit import AuditEvent

router = APIRouter(prefix="/api/admin", route_class=SLMRoute, tags=["administration"])

_CHUNK_BYTES: Final = 256 * 1024


@router.post(
    "/backup",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"application/vnd.sqlite3": {}}, "description": "The database's copy"},
        **problem_responses(TlsRequired, InvalidRequest, DatabaseUnavailable, InsufficientStorage),
    },
)
async def make_backup(
    request: Request, services: Parts, caller: Admin, who: Asking
) -> StreamingResponse:
    """Return a consistent copy of the SQLite database, made while the server runs.

    The server keeps no copy of its own.
    """
    require_private(request, services.settings)
    place = services.database.path
    if place is None:
        raise InvalidRequest("This backup is for a SQLite file; use pg_dump for PostgreSQL.")
    await services.audit.record(AuditEvent(who, "database.backup"))
    # Next to the database: on another disk the copy might not fit.
    path = place.with_name(f".backup-{secrets.token_hex(8)}")
    try:
        await backup(services.database, path)
        copy = await asyncio.to_thread(path.open, "rb")
    finally:
        # The open file remains readable without a name, so nothing is left behind.
        await asyncio.to_thread(path.unlink, missing_ok=True)
    size = os.fstat(copy.fileno()).st_size
    headers = {"cache-control": "no-store", "content-length": str(size)}
    chunks = _chunks(copy, lambda: services.tokens.require(caller))
    return StreamingResponse(chunks, headers=headers, media_type="application/vnd.sqlite3")


async def _chunks(copy: BinaryIO, check: Callable[[], None]) -> AsyncIterator[bytes]:
    """Yield the copy; `check` raises, and so cuts it off, once the token is no longer valid."""
    with copy:
        while chunk := await asyncio.to_thread(copy.read, _CHUNK_BYTES):
            check()
            yield chunk
