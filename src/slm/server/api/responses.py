"""Responses: their headers, conditional requests, and the response to a write.

Translates what the services return and makes no decisions (docs/protocol.md section 3).
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


def compact_json(value: Any) -> bytes:
    """Return a value as JSON without blanks, as every response is."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def json_response(
    body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a response from finished JSON."""
    return Response(body, status, headers, media_type="application/json")


def model_response(answer: BaseModel, status: int = 200) -> Response:
    """Return a response that no cache may store."""
    headers = {"cache-control": "no-store"}
    return json_response(answer.model_dump_json().encode(), status, headers)


NOT_MODIFIED: Final[dict[int | str, dict[str, Any]]] = {
    304: {"description": "Not modified: If-None-Match has the tag of the present state"}
}
"""For the `responses` of a route that returns an ETag."""


def not_modified(etag: str, headers: Mapping[str, str]) -> Response:
    """Return 304: the caller already has this version."""
    return Response(None, 304, {**headers, "etag": etag})


async def catch_up(services: Services, revision: int, change_id: str | None = None) -> bool:
    """Wait until this replica's other responses are at least as new as `revision`.

    With the change's id, wait also until they come from the database that it was committed to.
    """
    return await services.feed.settled(revision, change_id)


def revision_headers(revision: int, epoch: str) -> dict[str, str]:
    """Return the headers that name a response's revision and epoch."""
    return {"slm-revision": str(revision), "slm-epoch": epoch}


def catalog_headers(services: Services) -> dict[str, str]:
    """Return the headers of a response from the current catalog."""
    catalog: Catalog = services.catalog
    headers = revision_headers(catalog.revision, catalog.epoch)
    if not services.feed.current:
        headers["slm-stale"] = "true"
    return headers


_ETAGS: Final = re.compile(r'\s*(?:(W/)?"([\x21\x23-\x7e\x80-\xff]*)"\s*(?:,|$)\s*)+')
_ETAG: Final = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
# The form that `catalog.agent_etag` produces; people may type it without an epoch. A proxy that
# compresses appends its coding: Apache `-gzip`, others `--gzip` or `;br`.
_AGENT_ETAG: Final = re.compile(
    r"(?:([0-9A-Za-z._-]{1,64})-)?([0-9]{1,18})(?:(?:--?|;)(?:gzip|br|deflate|zstd))?"
)


def none_match(headers: Headers, etag: str) -> bool:
    """Return whether If-None-Match allows a full response (RFC 9110 section 13.1.2).

    A weak tag is as good as a strong one here; several headers are treated as one list.
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
        PreconditionFailed: none of its tags can be an agent's.
    """
    # Strictly, a weak tag never matches here. But a compressing proxy makes our tags weak (nginx
    # `W/"…"`), and a weak one still names one revision: it is not a digest of the body.
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
    """The response to a write whose token lacks config:read: only that the write was made."""

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
    """Respond once the feed has passed on the write, so that the writer can read what it wrote.

    Args:
        services: the parts of the server.
        caller: who wrote.
        written: what the registry did.
        status: the response's status.
        wait: how many seconds to wait for every backend's answer; None: no wait and no receipt.
        more: fields to add to the agent in the body.
    """
    services.counts.writes += written.changed
    headers = revision_headers(written.revision, written.epoch)
    if not await catch_up(services, written.revision, written.change_id):
        # It is committed, but this replica's reads do not include it yet.
        headers["slm-stale"] = "true"
    agent = written.agent
    if wait is not None:
        more["receipt"] = await receipt_of(services, caller, written, wait)
    if agent is None:
        if status == 204:
            return Response(None, status, headers)
        return json_response(compact_json(more), status, headers)
    headers["etag"] = agent_etag(written.epoch, agent.revision)
    if status == 201:
        headers["location"] = f"/api/agents/{quote(agent.agent_id, safe='')}"
    if written.api_key_cleared:
        more["api_key_cleared"] = True
    if "config:read" not in caller.scopes:
        # Otherwise an empty PUT would return what the scope does not cover.
        more = WrittenAgent.model_validate(agent, from_attributes=True).model_dump() | more
        return json_response(compact_json(more), status, headers)
    if not more:
        return json_response(agent.model_dump_json().encode(), status, headers)
    body = agent.model_dump(mode="json") | more
    return json_response(compact_json(body), status, headers)


async def receipt_of(
    services: Services, caller: Caller, written: Written, wait: float
) -> dict[str, Any] | None:
    """Wait for the receipt of a write and return it.

    The write is already made, so it gets its response even if its token is revoked meanwhile,
    with whatever is known by then.
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

    A caller that may not read the fleet, because the scope is missing or the token is limited,
    sees only the names of backends that use the same token.
    """
    return None if caller.sees_fleet else caller.name
