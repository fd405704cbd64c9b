"""Errors as RFC 9457 `application/problem+json`, with nothing from the request's input in them.

`ProblemError`, FastAPI's validation errors and Starlette's own errors are all translated here into
the one format of docs/protocol.md section 3.
"""

from __future__ import annotations

import http
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from slm.errors import (
    BadRequest,
    Behind,
    ContentTooLarge,
    DatabaseUnavailable,
    EncryptionKeyMissing,
    Forbidden,
    InsufficientStorage,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    OutcomeUnknown,
    ProblemError,
    TlsRequired,
    TooManyRequests,
    Unauthorized,
    UnsupportedMediaType,
    problem_classes,
)
from slm.server.agents.schemas import AgentCreate
from slm.server.transport.http_protocol import REFUSALS

MEDIA_TYPE: Final = "application/problem+json"

_KNOWN_FIELDS: Final = frozenset(AgentCreate.model_fields) | {
    "agent_id",
    "search",
    "provider",
    "is_active",
    "limit",
    "offset",
    "min_revision",
    "scopes",
    "agents",
    "expires_in_seconds",
    "fingerprint",
}
_PLACES: Final = frozenset({"body", "query", "path", "header"})


class Problem(BaseModel):
    """Why a request failed (RFC 9457)."""

    type: Literal["about:blank"] = "about:blank"
    title: str = Field(description="the kind of problem; the same for each occurrence")
    status: int
    detail: str = Field(description="what happened this time and what to do")
    code: str = Field(description="a stable name of the kind of problem; safe to match on")


class BrokenRule(BaseModel):
    """One rule that the request breaks, without the offending value or an unknown field's name."""

    loc: list[str]
    msg: str
    type: str


class InvalidRequestProblem(Problem):
    """The problem for status 422, with each broken rule."""

    errors: list[BrokenRule]


class ProblemResponse(JSONResponse):
    """A response of type `application/problem+json`."""

    media_type = MEDIA_TYPE


def problem_response(error: ProblemError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the response for this error."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
    }
    if isinstance(error, InvalidRequest):
        body["errors"] = error.errors
    sent = {"cache-control": "no-store"} | dict(headers or {})
    if isinstance(error, Unauthorized):
        sent["www-authenticate"] = "Bearer"
    retry_after = error.retry_after_seconds
    if retry_after is None and error.status == 503:
        retry_after = 1.0
    if retry_after is not None:
        sent["retry-after"] = str(max(1, math.ceil(retry_after)))
    return ProblemResponse(body, error.status, sent)


async def on_problem(_: Request, error: Exception) -> JSONResponse:
    """Respond to one of our own errors."""
    assert isinstance(error, ProblemError)  # noqa: S101 - registered for these alone
    return problem_response(error)


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Respond to what the router refuses: an unknown path or a wrong method."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for these alone
    headers = dict(error.headers or {})
    if error.status_code == MethodNotAllowed.status:
        # The router lists only the methods of the first route with this path.
        allowed = request.app.allowed_methods(request.scope["path"])
        headers["Allow"] = ", ".join(sorted(allowed)) or headers.get("Allow", "")
    return problem_response(_of_status(error.status_code), headers)


async def on_validation_error(_: Request, error: Exception) -> JSONResponse:
    """Respond to a parameter or a body that breaks a rule."""
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for these alone
    return problem_response(InvalidRequest(errors=broken_rules(error.errors())))


def broken_rules(errors: Sequence[Any]) -> list[dict[str, Any]]:
    """Return pydantic's errors without anything that the caller sent.

    A location is cut off at the first name that we do not know: an unknown field's name may be a
    key that was put in the wrong place, and so may a name inside llm_options.
    """
    return [
        {
            "loc": _known_location(error["loc"]),
            "msg": _message(error),
            "type": "unknown_field" if error["type"] == "extra_forbidden" else error["type"],
        }
        for error in errors
    ]


def _known_location(location: Sequence[Any]) -> list[str]:
    known = []
    for index, part in enumerate(location):
        if part not in (_PLACES if index == 0 else _KNOWN_FIELDS) or index > 1:
            break
        known.append(part)
    return known or ["body"]


def _message(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        of_query = error["loc"][:1] == ("query",)
        return f"a {'parameter' if of_query else 'field'} that is not known"
    return str(error["msg"]).removeprefix("Value error, ")


def _of_status(status: int) -> ProblemError:
    for cls in (BadRequest, NotFound, MethodNotAllowed, ContentTooLarge, InternalError):
        if cls.status == status:
            return cls()
    problem = BadRequest() if status < 500 else InternalError()
    problem.status = status  # type: ignore[misc]
    problem.title = http.HTTPStatus(status).phrase  # type: ignore[misc]
    return problem


def every_code() -> list[str]:
    """Return every code that a response of this server may have, for the OpenAPI document."""
    return sorted({*problem_classes(), *(code for code, _ in REFUSALS.values())})


def documented(*classes: type[ProblemError]) -> dict[int | str, dict[str, Any]]:
    """Return these problems for a route's `responses`, so that the OpenAPI document is accurate."""
    by_status: dict[int | str, list[type[ProblemError]]] = {}
    for cls in classes:
        by_status.setdefault(cls.status, []).append(cls)
    return {
        status: {
            "description": "; ".join(f"`{cls.code}`: {cls.title}" for cls in of_status),
            "content": {MEDIA_TYPE: {"schema": {"$ref": _schema_of(of_status[0])}}},
        }
        for status, of_status in by_status.items()
    }


def _schema_of(cls: type[ProblemError]) -> str:
    model = InvalidRequestProblem if issubclass(cls, InvalidRequest) else Problem
    return f"#/components/schemas/{model.__name__}"


def problem_responses(*classes: type[ProblemError]) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of these problems and of those that every route can have."""
    return documented(
        *dict.fromkeys((*classes, Unauthorized, Forbidden, TooManyRequests, InternalError))
    )


READ_PROBLEMS: Final = (
    Unauthorized,
    Forbidden,
    InvalidRequest,
    InternalError,
    Behind,
    DatabaseUnavailable,
)
# A key read writes an audit row, so it can fail like a write.
KEYED_PROBLEMS: Final = (
    *READ_PROBLEMS,
    EncryptionKeyMissing,
    InsufficientStorage,
    OutcomeUnknown,
)

WRITE_PROBLEMS: Final = (
    BadRequest,
    TlsRequired,
    InvalidRequest,
    DatabaseUnavailable,
    EncryptionKeyMissing,
    OutcomeUnknown,
    InsufficientStorage,
)
BODY_PROBLEMS: Final = (*WRITE_PROBLEMS, ContentTooLarge, UnsupportedMediaType)
