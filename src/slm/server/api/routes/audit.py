"""The audit routes, scope `admin`: read the audit and verify its chain."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from slm.errors import Conflict, DatabaseUnavailable, InvalidRequest, Overloaded
from slm.server.api.access import Admin, Asking
from slm.server.api.parameters import Audit, Data, FilterText, QueryModel
from slm.server.api.problems import BODY_PROBLEMS, problem_responses
from slm.server.api.responses import json_response, model_response
from slm.server.api.route import SLMRoute
from slm.server.lifecycle.audit_retention import note_exported
from slm.server.security.audit_chain import parse_link
from slm.server.security.audit_reader import AuditFilter
from slm.server.strict_json import MAX_INTEGER

router = APIRouter(prefix="/api/admin/audit", route_class=SLMRoute, tags=["administration"])


class AuditEntry(BaseModel):
    """Who did what, to which agent, when and from where."""

    seq: int
    at: str
    actor: str
    action: str
    agent_id: str | None
    address: str | None
    detail: dict[str, Any]
    hash: str


class AuditPage(BaseModel):
    """Entries, newest first; `next` is the `before` of the next page, null at the end."""

    entries: list[AuditEntry]
    next: int | None


class AuditQuery(QueryModel):
    """Which entries to return."""

    before: int | None = Field(None, ge=0, le=MAX_INTEGER)
    limit: int = Field(100, ge=1, le=1000)
    actor: FilterText | None = None
    agent: FilterText | None = None
    action: FilterText | None = None


class ExportQuery(QueryModel):
    """Which entries to export."""

    after: int | None = Field(None, ge=0, le=MAX_INTEGER)
    upto: int | None = Field(None, ge=0, le=MAX_INTEGER)
    everything: bool = Field(False, alias="all")


class VerifyQuery(QueryModel):
    """What to verify the chain against."""

    expect: FilterText | None = None


class AuditVerdict(BaseModel):
    """Whether the chain is as it was written."""

    whole: bool
    rows: int
    head: str
    broken_at: int | None
    reason: str
    cut: str | None


@router.get(
    "",
    response_model=AuditPage,
    responses=problem_responses(DatabaseUnavailable, InvalidRequest, Overloaded),
)
async def list_audit(audit: Audit, _: Admin, query: Annotated[AuditQuery, Query()]) -> Response:
    """List entries, newest first; `before` continues where a page ended."""
    wanted = AuditFilter(query.before, query.actor, query.agent, query.action)
    page = await audit.page(wanted, query.limit)
    found = [
        {name: _shown(value) for name, value in vars(entry).items()}
        | {"detail": _detail(entry.detail)}
        for entry in page.entries
    ]
    return _answer({"entries": found, "next": page.following})


class ExportedEntry(BaseModel):
    """An entry as it is stored, which is what its hash covers."""

    seq: int
    at: str
    actor: str
    action: str
    agent_id: str | None
    address: str | None
    detail: str
    hash: str


class ExportPage(BaseModel):
    """Entries in the order of the chain.

    `after` is the `seq:hash` of the entry before them, `head` that of the audit's current last
    entry, and `next` the `after` of the next page, null at the end.
    """

    after: str
    entries: list[ExportedEntry]
    head: str
    next: int | None


class Exported(BaseModel):
    """The body of POST /api/admin/audit/exported: the entries up to this one are in a file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    head: Annotated[str, Field(pattern=r"^[0-9]{1,19}:[0-9a-f]{64}$")]


@router.get(
    "/export",
    response_model=ExportPage,
    responses=problem_responses(DatabaseUnavailable, InvalidRequest, Conflict, Overloaded),
)
async def export_audit(audit: Audit, _: Admin, query: Annotated[ExportQuery, Query()]) -> Response:
    """List entries in order, from where the last export ended; with `all`, from the start."""
    page = await audit.export_page(query.after, query.upto, everything=query.everything)
    return _answer(
        {
            "after": str(page.after),
            "entries": [vars(entry) for entry in page.entries],
            "head": str(page.head),
            "next": page.following,
        }
    )


@router.post(
    "/exported",
    response_model=Exported,
    responses=problem_responses(*BODY_PROBLEMS, DatabaseUnavailable, Conflict),
)
async def note_export(body: Exported, database: Data, _: Admin, who: Asking) -> Response:
    """Record that the entries up to this one were exported; once old, they may be removed."""
    head = parse_link(body.head)
    assert head is not None  # noqa: S101 - the pattern is that of a link # nosec B101
    await database.run(lambda connection: note_exported(connection, head, who))
    return model_response(body)


@router.get(
    "/verify",
    response_model=AuditVerdict,
    responses=problem_responses(DatabaseUnavailable, InvalidRequest, Overloaded),
)
async def verify_audit(audit: Audit, _: Admin, query: Annotated[VerifyQuery, Query()]) -> Response:
    """Verify the whole chain; `expect` is the `head` of an earlier verification."""
    verdict = await audit.verify(query.expect)
    return model_response(AuditVerdict(whole=verdict.whole, **vars(verdict)))


def _shown(value: object) -> str | int | None:
    """Return a column's value in a form that can be shown: tampering may change its type."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if value is None or isinstance(value, int) else str(value)


def _detail(text: object) -> dict[str, Any]:
    shown = _shown(text)
    try:
        detail = json.loads(str(shown))
    except ValueError:
        detail = None
    # It may have been altered; show it anyway, `verify` reports it.
    return detail if isinstance(detail, dict) else {"unreadable": shown}


def _answer(body: dict[str, Any]) -> Response:
    # Not with the model, which would refuse to show a value that was altered to another type.
    return json_response(
        json.dumps(body, separators=(",", ":")).encode(), 200, {"cache-control": "no-store"}
    )
