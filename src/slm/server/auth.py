"""Who calls and what they may do: bearer tokens and scopes, from a table in memory.

In memory, so that plain reads go on when the database is away; the feed replaces the table when
tokens change. Knows no agent (docs/protocol.md section 3).
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import Connection, select
from starlette.datastructures import Headers

from slm.errors import Forbidden, Unauthorized
from slm.server.database import TOKENS
from slm.server.tokens import digest

_MAX_TOKEN_LENGTH: Final = 512


@dataclass(frozen=True)
class Caller:
    """A token that is known, as its row in the database describes it.

    Attributes:
        token_id: the row's id.
        name: what the token is called; the actor of its writes.
        scopes: what it may do, each literally; `admin` does not imply the others.
        expires_at: after this it is refused; None: never.
    """

    token_id: int
    name: str
    scopes: frozenset[str]
    digest: str
    expires_at: datetime | None = None

    def require(self, scope: str) -> None:
        """Refuse a caller whose token has not this scope.

        Raises:
            Forbidden: it has not.
        """
        if scope not in self.scopes:
            raise Forbidden(f"The token lacks the scope {scope}.")


class TokenTable:
    """Every token that counts, by digest."""

    def __init__(self, callers: Iterable[Caller] = ()) -> None:
        self._callers = {caller.digest: caller for caller in callers}

    def __len__(self) -> int:
        return len(self._callers)

    def replace(self, other: TokenTable) -> None:
        """Take over the other table's tokens."""
        self._callers = other._callers

    def caller(self, token: str) -> Caller | None:
        """Return whose token this is, or None where it is unknown, revoked or expired."""
        wanted = digest(token)
        caller = self._callers.get(wanted)
        # The look-up is by digest, so its timing says nothing of the token; this makes it plain.
        if caller is None or not hmac.compare_digest(caller.digest, wanted):
            return None
        if caller.expires_at is not None and caller.expires_at <= datetime.now(UTC):
            return None
        return caller

    def authenticate(self, headers: Headers) -> Caller:
        """Return the caller that the Authorization header names.

        Raises:
            Unauthorized: there is no such header, or no token of ours in it.
        """
        token = bearer_token(headers)
        if token is None:
            raise Unauthorized("Send the token as 'Authorization: Bearer …'.")
        caller = self.caller(token)
        if caller is None:
            raise Unauthorized("The token is unknown, expired or revoked.")
        return caller


def bearer_token(headers: Headers) -> str | None:
    """Return the token of `Authorization: Bearer …` (RFC 6750), or None where there is none."""
    values = headers.getlist("authorization")
    if len(values) != 1:
        return None
    scheme, _, token = values[0].partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or len(token) > _MAX_TOKEN_LENGTH:
        return None
    return token


def read_tokens(connection: Connection) -> TokenTable:
    """Read every token that is not revoked.

    A token limited to some agents is left out, and so refused, while views are not enforced.
    """
    rows = connection.execute(
        select(
            TOKENS.c.id, TOKENS.c.name, TOKENS.c.scopes, TOKENS.c.digest, TOKENS.c.expires_at
        ).where(TOKENS.c.revoked_at.is_(None), TOKENS.c.agents.is_(None))
    )
    return TokenTable(
        Caller(
            token_id=row.id,
            name=row.name,
            scopes=frozenset(scope.strip() for scope in row.scopes.split(",")),
            digest=row.digest,
            expires_at=_as_utc(row.expires_at),
        )
        for row in rows
    )


def _as_utc(time: datetime | None) -> datetime | None:
    # SQLite keeps no zone; what we write is UTC.
    return time if time is None or time.tzinfo is not None else time.replace(tzinfo=UTC)
