"""Answers: their headers, conditional requests, and what a write is answered.

Translates what the services return; decides nothing about it (docs/protocol.md section 3).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from fastapi import Response
from pydantic import BaseModel
from starlette.datastructures import Headers

from slm.errors import BadRequest, PreconditionFailed, Unauthorized
from slm.server.agents.catalog import Catalog, agent_etag
from slm.server.agents.changes import Written
from slm.server.agents.registry import Version
from slm.server.fleet.receipts import subject_of
from slm.server.security.token_table import Caller
from slm.server.services import Services


def json_response(
    body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an answer whose JSON is ready."""
    return Response(body, status, headers, media_type="application/json")


def model_response(answer: BaseModel, status: int = 200) -> Response:
    """Return an answer that nothing on the way keeps."""
    headers = {"cache-control": "no-store"}
    return json_response(answer.model_dump_json().encode(), status, headers)


NOT_MODIFIED: Final[dict[int | str, dict[str, Any]]] = {
    304: {"description": "Not modified: If-None-Match has the tag of the present state"}
}
"""For the `responses` of a route that answers with an ETag."""


def not_modified(etag: str, headers: Mapping[str, str]) -> Response:
    """Return 304: the caller has it already."""
    return Response(None, 304, {**headers, "etag": etag})


async def catch_up(services: Services, revision: int, change_id: str | None = None) -> bool:
    """Wait until this replica's other answers are not older than one that is of `revision`.

    With the id of the change: until they are of the database that it was committed to, too.
    """
    return await services.feed.settled(revision, change_id)


def revision_headers(revision: int, epoch: str) -> dict[str, str]:
    """Return the headers that name what an answer is of."""
    return {"slm-revision": str(revision), "slm-epoch": epoch}


def catalog_headers(services: Services) -> dict[str, str]:
    """Return the headers of an answer from the catalog as it is now."""
    catalog: Catalog = services.catalog
    headers = revision_headers(catalog.revision, catalog.epoch)
    if not services.feed.current:
        headers["slm-stale"] = "true"
    return headers


_ETAGS: Final = re.compile(r'\s*(?:(W/)?"([\x21\x23-\x7e\x80-\xff]*)"\s*(?:,|$)\s*)+')
_ETAG: Final = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
# As `catalog.agent_etag` makes it; without an epoch it is what a person types. A proxy that
# compresses writes its coding after it: Apache `-gzip`, others `--gzip` or `;br`.
_AGENT_ETAG: Final = re.compile(
    r"(?:([0-9A-Za-z._-]{1,64})-)?([0-9]{1,18})(?:(?:--?|;)(?:gzip|br|deflate|zstd))?"
)


def none_match(headers: Headers, etag: str) -> bool:
    """Say whether If-None-Match lets a full answer through (RFC 9110 section 13.1.2).

    A weak tag is as good as a strong one here; several headers count as one list.
    """
    values = headers.getlist("if-none-match")
    if not values:
        return True
    header = ", ".join(values)
    if header.strip() == "*":
        return False
    return etag.strip('"') not in (tag for _, tag in _ETAG.findall(header))


def versions_matched(headers: Headers) -> list[Version] | None:
    """Return the versions of an agent that If-Match allows (RFC 9110 section 13.1.1); None: any.

    Raises:
        BadRequest: it is not a list of entity tags.
        PreconditionFailed: no tag of it can be an agent's.
    """
    # Strictly, a weak tag never matches here. But it is what a proxy that compresses makes of ours
    # (nginx `W/"…"`), and it names one revision all the same: it is no digest of a text.
    values = headers.getlist("if-match")
    header = ", ".join(values)
    if not values or header.strip() == "*":
        return None
    if not _ETAGS.fullmatch(header):
        raise BadRequest("If-Match takes entity tags, such as an ETag with its quotes.")
    named = [
        Version(int(found[2]), found[1])
        for _, tag in _ETAG.findall(header)
        if (found := _AGENT_ETAG.fullmatch(tag))
    ]
    if not named:
        raise PreconditionFailed
    return named


class WrittenAgent(BaseModel):
    """The answer of a write to a token without the scope config:read: only that it was made."""

    agent_id: str
    revision: int


async def written_answer(
    services: Services,
    caller: Caller,
    written: Written,
    status: int,
    wait: float | None = None,
    **more: object,
) -> Response:
    """Answer once the feed has passed the write on, so that whoever wrote reads what it wrote.

    Args:
        services: the parts of the server.
        caller: who wrote.
        written: what the registry did.
        status: of the answer.
        wait: how long to wait for every backend's answer; None: not at all, and no receipt.
        more: fields to add to the agent in the body.
    """
    services.counts.writes += written.changed
    headers = revision_headers(written.revision, written.epoch)
    if not await catch_up(services, written.revision, written.change_id):
        # It is committed; only this replica's reads do not know of it yet.
        headers["slm-stale"] = "true"
    agent = written.agent
    if wait is not None:
        more["receipt"] = await receipt_of(services, caller, written, wait)
    if agent is None:
        if status == 204:
            return Response(None, status, headers)
        return json_response(json.dumps(more, ensure_ascii=False).encode(), status, headers)
    headers["etag"] = agent_etag(written.epoch, agent.revision)
    if status == 201:
        headers["location"] = f"/api/agents/{quote(agent.agent_id, safe='')}"
    if written.api_key_cleared:
        more["api_key_cleared"] = True
    if "config:read" not in caller.scopes:
        # Else an empty PUT would read what the scope does not cover.
        more = WrittenAgent.model_validate(agent, from_attributes=True).model_dump() | more
        return json_response(json.dumps(more, ensure_ascii=False).encode(), status, headers)
    if not more:
        return json_response(agent.model_dump_json().encode(), status, headers)
    body = agent.model_dump(mode="json") | more
    return json_response(json.dumps(body, ensure_ascii=False).encode(), status, headers)


async def receipt_of(
    services: Services, caller: Caller, written: Written, wait: float
) -> dict[str, Any] | None:
    """Return the receipt of a write, after waiting for it.

    The write is made, so it is answered even if its token is revoked meanwhile: then with what is
    known by that time.
    """
    subject = subject_of(written)
    if subject is None:
        return None
    with contextlib.suppress(Unauthorized):
        async with services.doorkeeper.while_it_counts(caller):
            return await services.receipts.receipt(subject, wait, named=named_for(caller))
    return await services.receipts.receipt(subject, named=named_for(caller))


def named_for(caller: Caller) -> str | None:
    """Return the token whose backends a receipt may name to this caller; None: everyone's.

    Who may not read the fleet, for want of a scope or because the token is limited, sees by name
    only the backends that use the same token.
    """
    return None if caller.sees_fleet else caller.name
