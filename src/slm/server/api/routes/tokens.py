"""The token routes, scope `admin`: create, list and revoke."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, model_validator

from slm.errors import (
    Conflict,
    ContentTooLarge,
    DatabaseUnavailable,
    InsufficientStorage,
    InvalidRequest,
    OutcomeUnknown,
    TlsRequired,
    TokenNotFound,
    UnsupportedMediaType,
)
from slm.schemas import Name
from slm.server.api.access import Admin, Asking
from slm.server.api.parameters import MAX_ROW_ID, Options, OwnLease, RowIdPath, Tokens
from slm.server.api.peer import require_private
from slm.server.api.problems import problem_responses
from slm.server.api.responses import model_response
from slm.server.api.route import SLMRoute
from slm.server.security.agent_scope import EVERYTHING, parse_patterns
from slm.server.security.token_store import TokenInfo

router = APIRouter(prefix="/api/admin", route_class=SLMRoute, tags=["administration"])

CONFIRM_SECONDS = 2.0
"""How long the response to a revocation waits for every other replica to refuse the token."""

_MAX_LIFE_SECONDS = 100 * 366 * 86_400
_WRITE_PROBLEMS = (DatabaseUnavailable, InsufficientStorage, OutcomeUnknown, InvalidRequest)

Scope = Literal["config:read", "key:read", "agents:write", "admin"]


def _patterns(texts: list[str]) -> list[str]:
    parse_patterns(texts)
    return texts


class TokenCreate(BaseModel):
    """The body of POST /api/admin/tokens."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    name: Name = Field(description="the actor of whatever it does")
    scopes: list[Scope] = Field(min_length=1, max_length=4)
    agents: Annotated[list[str], AfterValidator(_patterns)] | None = Field(
        default=None, description="agent_ids it is limited to; * stands for any text"
    )
    expires_in_seconds: Annotated[StrictInt, Field(ge=1, le=_MAX_LIFE_SECONDS)] | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> TokenCreate:
        if self.agents is not None and "admin" in self.scopes:
            raise ValueError("a token limited to some agents cannot have the scope admin")
        return self


class TokenRead(BaseModel):
    """What is known about a token, without the token itself."""

    id: int
    name: str
    scopes: list[str]
    agents: list[str] | None
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    last_used_at: str | None


class TokenMade(TokenRead):
    """A new token, with its text, which is shown only this once."""

    token: str


class TokenRevoked(TokenRead):
    """A revoked token, and the servers that have not confirmed that they refuse it."""

    unconfirmed: list[str] | None = Field(
        description="servers that may go on accepting it until they reach the database again;"
        " null where they could not be asked"
    )


class TokenList(BaseModel):
    """Every token ever created."""

    tokens: list[TokenRead]


@router.get("/tokens", response_model=TokenList, responses=problem_responses(DatabaseUnavailable))
async def list_tokens(tokens: Tokens, _: Admin) -> Response:
    """List the tokens, including revoked and expired ones."""
    return model_response(TokenList(tokens=[_read(token) for token in await tokens.all()]))


@router.post(
    "/tokens",
    status_code=201,
    response_model=TokenMade,
    responses=problem_responses(
        *_WRITE_PROBLEMS, Conflict, TlsRequired, ContentTooLarge, UnsupportedMediaType
    ),
)
async def create_token(
    request: Request,
    wanted: TokenCreate,
    tokens: Tokens,
    settings: Options,
    _: Admin,
    who: Asking,
) -> Response:
    """Create a token; this response is the only place that shows it."""
    require_private(request, settings)
    written, token = await tokens.create(
        wanted.name,
        list(dict.fromkeys(wanted.scopes)),
        EVERYTHING if wanted.agents is None else parse_patterns(wanted.agents),
        expires_in_seconds=wanted.expires_in_seconds,
        who=who,
    )
    made = TokenMade(**_read(written.token).model_dump(), token=token.get_secret_value())
    return model_response(made, 201)


@router.delete(
    "/tokens/{token_id}",
    response_model=TokenRevoked,
    responses=problem_responses(*_WRITE_PROBLEMS, TokenNotFound, Conflict),
)
async def revoke_token(
    token_id: RowIdPath,
    tokens: Tokens,
    lease: OwnLease,
    settings: Options,
    _: Admin,
    who: Asking,
) -> Response:
    """Refuse a token from now on, and close its streams.

    `unconfirmed` names the servers that have not confirmed yet that they refuse it; usually none.
    """
    if token_id > MAX_ROW_ID:
        raise TokenNotFound
    written = await tokens.revoke(token_id, who=who)
    unconfirmed = await lease.unconfirmed(
        written.version,
        wait_seconds=CONFIRM_SECONDS,
        heard_within_seconds=settings.max_outage_seconds,
    )
    return model_response(
        TokenRevoked(**_read(written.token).model_dump(), unconfirmed=unconfirmed)
    )


def _read(token: TokenInfo) -> TokenRead:
    patterns = token.view.patterns
    return TokenRead(
        id=token.id,
        name=token.name,
        scopes=list(token.scopes),
        agents=None if patterns is None else list(patterns),
        created_at=_text(token.created_at),
        expires_at=token.expires_at and _text(token.expires_at),
        revoked_at=token.revoked_at and _text(token.revoked_at),
        last_used_at=token.last_used_at and _text(token.last_used_at),
    )


def _text(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")
