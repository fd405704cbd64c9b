"""Who calls and what they may do: bearer tokens and scopes, from a table in memory.

In memory, so that plain reads go on when the database is away; the feed replaces the table when
tokens change. Knows agents by their names alone (docs/protocol.md section 3).
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
from slm.server.models import TOKENS
from slm.server.tokens import digest
from slm.server.view import EVERYTHING, View

_MAX_TOKEN_LENGTH: Final = 512


@dataclass(frozen=True)
class Caller:
    """A token that is known, as its row in the database describes it.

    Attributes:
        token_id: the row's id.
        name: what the token is called; the actor of its writes.
        scopes: what it may do, each literally; `admin` does not imply the others.
        expires_at: after this it is refused; None: never.
        view: the agents that it can see and write.
    """

    token_id: int
    name: str
    scopes: frozenset[str]
    digest: str
    expires_at: datetime | None = None
    view: View = EVERYTHING

    def require(self, scope: str) -> None:
        """Refuse a caller whose token has not this scope.

        Raises:
            Forbidden: it has not.
        """
        if scope not in self.scopes:
            raise Forbidden(f"The token lacks the scope {scope}.")

    def require_writable(self, agent_id: str, *, makes_default: bool = False) -> None:
        """Refuse a write that a limited token may not make, whether the agent is there or not.

        Args:
            agent_id: the agent that is written.
            makes_default: whether the write would make it the default, which is everyone's.

        Raises:
            Forbidden: the agent is not among the token's, or it would become the default.
        """
        if not self.view.covers(agent_id):
            raise Forbidden("The token is limited to other agents.")
        if makes_default and self.view.is_limited:
            raise Forbidden("A token limited to some agents cannot set is_default.")


class TokenTable:
    """Every token that counts, by digest.

    Attributes:
        used: when each token was last used, since somebody last took note of it.
    """

    def __init__(self, callers: Iterable[Caller] = ()) -> None:
        self._callers = {caller.digest: caller for caller in callers}
        self._by_id = {caller.token_id: caller for caller in self._callers.values()}
        self.used: dict[int, datetime] = {}

    def __len__(self) -> int:
        return len(self._callers)

    def replace(self, other: TokenTable) -> None:
        """Take over the other table's tokens."""
        self._callers, self._by_id = other._callers, other._by_id

    def caller(self, token: str) -> Caller | None:
        """Return whose token this is, or None where it is unknown, revoked or expired."""
        wanted = digest(token)
        caller = self._callers.get(wanted)
        # The look-up is by digest, so its timing says nothing of the token; this makes it plain.
        if caller is None or not hmac.compare_digest(caller.digest, wanted):
            return None
        now = datetime.now(UTC)
        if caller.expires_at is not None and caller.expires_at <= now:
            return None
        self.used[caller.token_id] = now
        return caller

    def name_of(self, token_id: int | None) -> str:
        """Return what a token is called; one that does not count any more has no name."""
        caller = None if token_id is None else self._by_id.get(token_id)
        return "" if caller is None else caller.name

    def why_gone(self, token_id: int) -> str | None:
        """Say why this token does not count any more, or None where it does."""
        caller = self._by_id.get(token_id)
        if caller is None:
            return "token revoked"
        if caller.expires_at is not None and caller.expires_at <= datetime.now(UTC):
            return "token expired"
        return None

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
    """Read every token that is not revoked."""
    rows = connection.execute(
        select(
            TOKENS.c.id,
            TOKENS.c.name,
            TOKENS.c.scopes,
            TOKENS.c.digest,
            TOKENS.c.expires_at,
            TOKENS.c.agents,
        ).where(TOKENS.c.revoked_at.is_(None))
    )
    return TokenTable(
        Caller(
            token_id=row.id,
            name=row.name,
            scopes=frozenset(scope.strip() for scope in row.scopes.split(",")),
            digest=row.digest,
            expires_at=_as_utc(row.expires_at),
            view=View.from_text(row.agents),
        )
        for row in rows
    )


def _as_utc(time: datetime | None) -> datetime | None:
    # SQLite keeps no zone; what we write is UTC.
    return time if time is None or time.tzinfo is not None else time.replace(tzinfo=UTC)
