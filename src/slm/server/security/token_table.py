"""Who calls and what they may do: bearer tokens and scopes, from a table in memory.

In memory, so that plain reads continue for a limited time when the database is unreachable.
Whatever writes or returns a key asks the database itself, in its own transaction
(`Caller.require_counts`). Knows agents only by their names (docs/protocol.md section 3).
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import Connection, bindparam, select
from starlette.datastructures import Headers

from slm.errors import DatabaseUnavailable, Forbidden, Unauthorized
from slm.server.db.tables import STATE, TOKENS
from slm.server.security.agent_scope import EVERYTHING, View
from slm.server.security.tokens import digest

_MAX_TOKEN_LENGTH: Final = 512
_VERSION: Final = select(STATE.c.tokens_version).where(STATE.c.id == 1)
_ONE: Final = select(TOKENS.c.revoked_at, TOKENS.c.expires_at).where(
    TOKENS.c.id == bindparam("token_id"), TOKENS.c.digest == bindparam("digest")
)


GONE: Final = "The token is unknown, expired or revoked; `slm tokens create` makes a new one."


@dataclass(frozen=True)
class Caller:
    """A known token, as its row in the database describes it.

    Attributes:
        token_id: the row's id.
        name: the token's name; the actor of its writes.
        scopes: what it may do, each literally; `admin` does not imply the others.
        expires_at: after this it is refused; None: never.
        view: the agents that it can see and write.
        version: the tokens_version that its row was read at.
    """

    token_id: int
    name: str
    scopes: frozenset[str]
    digest: str
    expires_at: datetime | None = None
    view: View = EVERYTHING
    version: int = -1

    @property
    def sees_fleet(self) -> bool:
        """Whether it may know of every backend, as GET /api/fleet lists them."""
        return "config:read" in self.scopes and not self.view.is_limited

    @property
    def has_expired(self) -> bool:
        """Whether it has expired, by this server's clock."""
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC)

    def require_counts(self, connection: Connection, tokens_version: int | None = None) -> None:
        """Refuse a token that was revoked or has expired since it was admitted.

        Called first in every transaction that writes or returns a key. Costs nothing while no token
        has changed: the database's version is then the one the token was read at.

        Args:
            connection: of that transaction.
            tokens_version: the state row's, as this transaction sees it; None: it is read here.

        Raises:
            Unauthorized: it is no longer valid.
        """
        if tokens_version is None:
            tokens_version = connection.execute(_VERSION).scalar_one()
        counts = not self.has_expired
        if counts and tokens_version != self.version:
            asked = {"token_id": self.token_id, "digest": self.digest}
            row = connection.execute(_ONE, asked).one_or_none()
            counts = row is not None and row.revoked_at is None
        if not counts:
            raise Unauthorized(GONE)

    def require(self, scope: str) -> None:
        """Refuse a caller whose token lacks this scope.

        Raises:
            Forbidden: the token lacks the scope.
        """
        if scope not in self.scopes:
            raise Forbidden(f"The token lacks the scope {scope}.")

    def require_writable(self, agent_id: str, *, makes_default: bool = False) -> None:
        """Refuse a write that a limited token may not make, whether or not the agent exists.

        Args:
            agent_id: the agent to write.
            makes_default: whether the write would make it the default, which is everyone's.

        Raises:
            Forbidden: the token does not cover the agent, or the agent would become the default.
        """
        if not self.view.covers(agent_id):
            raise Forbidden("The token is limited to other agents.")
        if makes_default and self.view.is_limited:
            raise Forbidden("A token limited to some agents cannot set is_default.")


class TokenTable:
    """Every valid token, by digest.

    Args:
        callers: the tokens.
        version: the tokens_version that they were read at.
        max_age_seconds: how long the table is trusted without reading the database.

    Attributes:
        version: the version of the tokens applied here.
        used: when each token was last used, since this was last saved.
        on_replaced: called each time the tokens were replaced.
    """

    def __init__(
        self,
        callers: Iterable[Caller] = (),
        version: int = -1,
        *,
        max_age_seconds: float = float("inf"),
    ) -> None:
        self._callers = {caller.digest: caller for caller in callers}
        self._by_id = {caller.token_id: caller for caller in self._callers.values()}
        self.version = version
        self.used: dict[int, datetime] = {}
        self._max_age_seconds = max_age_seconds
        self.on_replaced: list[Callable[[], None]] = []
        self._seen_at = float("-inf")

    def __len__(self) -> int:
        return len(self._callers)

    @property
    def age_seconds(self) -> float:
        """How long ago the database last confirmed that these are the tokens."""
        return time.monotonic() - self._seen_at

    @property
    def is_outdated(self) -> bool:
        """Whether a token may have been revoked too long ago for this table to be trusted."""
        return self.age_seconds > self._max_age_seconds

    def take(self, found: TokenTable, asked_at: float, asked_version: int | None = None) -> None:
        """Apply what was read from the database, unless something newer is applied.

        Args:
            found: what was read.
            asked_at: when the reading began (`time.monotonic`).
            asked_version: the version applied when it began. If that is still so, `found` is
                applied even if its version is lower: the database was restored.
        """
        if found.version > self.version or asked_version == self.version:
            self._callers, self._by_id = found._callers, found._by_id
            self.version = found.version
            self.confirm(found.version, asked_at)
            for call in self.on_replaced:
                call()

    def confirm(self, version: int, asked_at: float) -> None:
        """Record that the database had this version when it was asked."""
        if version == self.version:
            self._seen_at = max(self._seen_at, asked_at)

    def caller(self, token: str) -> Caller | None:
        """Return the caller with this token, or None if it is unknown, revoked or expired."""
        wanted = digest(token)
        caller = self._callers.get(wanted)
        # The lookup is by digest, so its timing reveals nothing about the token; this makes sure.
        if caller is None or not hmac.compare_digest(caller.digest, wanted):
            return None
        now = datetime.now(UTC)
        if caller.expires_at is not None and caller.expires_at <= now:
            return None
        self.used[caller.token_id] = now
        return caller

    def require(self, caller: Caller) -> None:
        """Refuse a caller that was admitted before if its token is no longer valid.

        Raises:
            Unauthorized: it was revoked or has expired.
        """
        if self.why_gone(caller.token_id) is not None:
            raise Unauthorized(GONE)

    def name_of(self, token_id: int | None) -> str:
        """Return a token's name; empty if the token is no longer valid."""
        caller = None if token_id is None else self._by_id.get(token_id)
        return "" if caller is None else caller.name

    def why_gone(self, token_id: int) -> str | None:
        """Return why this token is no longer valid, or None if it is."""
        caller = self._by_id.get(token_id)
        if caller is None:
            return "token revoked"
        return "token expired" if caller.has_expired else None

    def authenticate(self, headers: Headers) -> Caller:
        """Return the caller that the Authorization header names.

        Raises:
            Unauthorized: there is no such header, or no token of ours in it.
            DatabaseUnavailable: the table is too old to be trusted.
        """
        token = bearer_token(headers)
        if token is None:
            raise Unauthorized("Send the token as 'Authorization: Bearer …'.")
        caller = self.caller(token)
        if caller is None:
            raise Unauthorized(GONE)
        if self.is_outdated:
            raise DatabaseUnavailable(
                f"The database has not answered for {self._max_age_seconds:g} s, so this server"
                " cannot know which tokens were revoked."
            )
        return caller


def bearer_token(headers: Headers) -> str | None:
    """Return the token of `Authorization: Bearer …` (RFC 6750), or None if there is none."""
    values = headers.getlist("authorization")
    if len(values) != 1:
        return None
    scheme, _, token = values[0].partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or len(token) > _MAX_TOKEN_LENGTH:
        return None
    return token


def read_tokens(connection: Connection, version: int | None = None) -> TokenTable:
    """Read every token that is not revoked.

    Args:
        connection: inside a transaction.
        version: the tokens_version of this transaction; None: it is read here.

    Raises:
        DatabaseUnavailable: there are none.
    """
    at = connection.execute(_VERSION).scalar_one() if version is None else version
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
    callers = [
        Caller(
            token_id=row.id,
            name=row.name,
            scopes=frozenset(scope.strip() for scope in row.scopes.split(",")),
            digest=row.digest,
            expires_at=row.expires_at,
            view=View.from_text(row.agents),
            version=at,
        )
        for row in rows
    ]
    if not callers:
        # There always is one. The version says nothing about those that appear after this look.
        raise DatabaseUnavailable("The database has no tokens, as in the middle of a restore.")
    return TokenTable(callers, at)
