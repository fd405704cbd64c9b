"""The table of tokens: creates, lists and revokes them, each with its audit row.

A new token is returned once and only its digest is stored. Knows no HTTP; the routes check who may
do this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from pydantic import SecretStr
from sqlalchemy import Connection, insert, select, update

from slm.errors import Conflict, TokenNotFound
from slm.server.db import state
from slm.server.db.database import Database
from slm.server.db.tables import TOKENS, utc_now
from slm.server.security.agent_scope import View
from slm.server.security.audit import AuditEvent, Who, append
from slm.server.security.token_table import TokenTable, read_tokens
from slm.server.security.tokens import digest, mint

_SELECT: Final = select(
    TOKENS.c.id,
    TOKENS.c.name,
    TOKENS.c.scopes,
    TOKENS.c.agents,
    TOKENS.c.created_at,
    TOKENS.c.expires_at,
    TOKENS.c.revoked_at,
    TOKENS.c.last_used_at,
).order_by(TOKENS.c.id)


@dataclass(frozen=True)
class TokenInfo:
    """What is known about a token, without the token itself.

    Attributes:
        id: the number to revoke it by.
        name: the actor of whatever it does; unique among the valid tokens.
        scopes: what it may do.
        view: the agents it is limited to.
        created_at: when it was created.
        expires_at: after this it is refused; None: never.
        revoked_at: when it was revoked; None: it was not.
        last_used_at: roughly when it was last used; None: not yet.
    """

    id: int
    name: str
    scopes: tuple[str, ...]
    view: View
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None

    @property
    def counts(self) -> bool:
        """Whether it is neither revoked nor expired."""
        expired = self.expires_at is not None and self.expires_at <= utc_now()
        return self.revoked_at is None and not expired


@dataclass(frozen=True)
class TokenWritten:
    """A token after a write.

    Attributes:
        token: what is known about it.
        version: the tokens_version from which a replica knows of it.
        known: every token that is valid from then on.
    """

    token: TokenInfo
    version: int
    known: TokenTable


class TokenStore:
    """Creates, lists and revokes tokens; other replicas notice through the state row.

    Args:
        database: where the tokens are stored.
        tokens: what this server checks tokens with; it has each write before that is answered.
    """

    def __init__(self, database: Database, tokens: TokenTable) -> None:
        self._database = database
        self._tokens = tokens

    async def create(
        self,
        name: str,
        scopes: Sequence[str],
        view: View,
        *,
        expires_in_seconds: int | None = None,
        who: Who,
    ) -> tuple[TokenWritten, SecretStr]:
        """Create a token and return it, the only time that it can be seen.

        Raises:
            Conflict: another valid token has this name.
        """
        token = mint()
        now = utc_now()
        lifetime = expires_in_seconds and timedelta(seconds=expires_in_seconds)

        def work(connection: Connection) -> TokenWritten:
            version = _notice(connection, who)
            if any(known.name == name and known.counts for known in _all(connection)):
                raise Conflict("A token of this name is there already; revoke it first.")
            values = {
                "name": name,
                "digest": digest(token.get_secret_value()),
                "scopes": ",".join(scopes),
                "agents": view.to_text(),
                "created_at": now,
                "expires_at": now + lifetime if lifetime else None,
            }
            statement = insert(TOKENS).values(values).returning(TOKENS.c.id)
            token_id = connection.execute(statement).scalar_one()
            detail = {"token_id": token_id, "name": name, "scopes": list(scopes)}
            detail |= {"agents": view.patterns, "expires_in_seconds": expires_in_seconds}
            append(connection, AuditEvent(who, "token.create", detail=detail))
            return _written(connection, token_id, version)

        return await self._write(work), token

    async def all(self) -> list[TokenInfo]:
        """Return every token ever created, in order of creation."""
        return await self._database.read(_all)

    async def revoke(self, token_id: int, *, who: Who) -> TokenWritten:
        """Refuse a token from now on; its open streams are closed on every replica.

        Raises:
            TokenNotFound: there is no such token.
            Conflict: nobody could administer this server any more.
        """

        def work(connection: Connection) -> TokenWritten:
            version = _notice(connection, who)
            token = _one(connection, token_id)
            if token.revoked_at is not None:
                return _written(connection, token_id, version)
            others = [t for t in _all(connection) if t.id != token_id and t.counts]
            if token.counts and _administers(token) and not any(map(_administers, others)):
                raise Conflict(
                    "This is the last token of scope admin; make another one before you revoke it."
                )
            statement = update(TOKENS).where(TOKENS.c.id == token_id).values(revoked_at=utc_now())
            connection.execute(statement)
            detail = {"token_id": token_id, "name": token.name}
            append(connection, AuditEvent(who, "token.revoke", detail=detail))
            return _written(connection, token_id, version)

        return await self._write(work)

    async def _write(self, work: Callable[[Connection], TokenWritten]) -> TokenWritten:
        """Run the transaction and apply its tokens here, whatever state the feed is in."""
        asked_at = time.monotonic()
        written = await self._database.run(work)
        self._tokens.take(written.known, asked_at)
        return written

    async def note_used(self, used: Mapping[int, datetime]) -> None:
        """Save when tokens were last used; of several replicas' times the latest is kept."""

        def work(connection: Connection) -> None:
            for token_id, at in sorted(used.items()):
                later = TOKENS.c.last_used_at.is_(None) | (TOKENS.c.last_used_at < at)
                connection.execute(
                    update(TOKENS).where(TOKENS.c.id == token_id, later).values(last_used_at=at)
                )

        await self._database.run(work)


def _administers(token: TokenInfo) -> bool:
    return "admin" in token.scopes and token.expires_at is None


def _written(connection: Connection, token_id: int, version: int) -> TokenWritten:
    return TokenWritten(_one(connection, token_id), version, read_tokens(connection, version))


def _notice(connection: Connection, who: Who) -> int:
    """Lock the state row, as every writer does first, and let every replica see the change.

    Raises:
        Unauthorized: the caller's token is no longer valid.
    """
    version, before = state.bump_tokens(connection)
    # The previous version: this transaction itself raised it.
    who.require_counts(connection, before)
    return version


def _all(connection: Connection) -> list[TokenInfo]:
    return [_info(row) for row in connection.execute(_SELECT)]


def _one(connection: Connection, token_id: int) -> TokenInfo:
    row = connection.execute(_SELECT.where(TOKENS.c.id == token_id)).one_or_none()
    if row is None:
        raise TokenNotFound
    return _info(row)


def _info(row: Any) -> TokenInfo:
    return TokenInfo(
        id=row.id,
        name=row.name,
        scopes=tuple(scope.strip() for scope in row.scopes.split(",")),
        view=View.from_text(row.agents),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
    )
