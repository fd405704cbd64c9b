"""AgentRegistry: the only writer of agents. Row, change and revision share one transaction.

Applies the rules of docs/protocol.md sections 1 to 3. Pushes nothing: the feed reads what is
committed here. Knows no HTTP.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from sqlalchemy import Connection

from slm.common import tracing
from slm.endpoints import EndpointPolicy, origin
from slm.errors import (
    AgentExists,
    AgentIsDefault,
    AgentNotFound,
    InvalidRequest,
    PreconditionFailed,
)
from slm.schemas import Agent
from slm.server import failpoints
from slm.server.agents.changes import CHANGED, CREATED, DELETED, CommittedChange, Written
from slm.server.agents.columns import altered_values, created_values, place_key
from slm.server.agents.credentials import KeyedReads
from slm.server.agents.mapping import agent_of
from slm.server.agents.repository import (
    Author,
    agent_row,
    default_row,
    delete_agent,
    insert_agent,
    record_change,
    update_agent,
)
from slm.server.agents.schemas import AgentCreate, AgentUpdate
from slm.server.db import state
from slm.server.db.database import Database
from slm.server.db.state import Head
from slm.server.db.tables import utc_now
from slm.server.encryption.keyring import Keyring
from slm.server.encryption.vault import KeyBinding, Vault
from slm.server.security.audit import AuditEvent, Who, append

IfMatch = int | Collection["Version"] | None
"""The revision that an agent must have, or several of which it must have one; None: any."""


class Version(NamedTuple):
    """What an If-Match names: an agent's revision, and its epoch; None: the current epoch."""

    revision: int
    epoch: str | None = None


class _Unchanged(Exception):
    """Not an error: raised to roll back the revision."""

    def __init__(self, written: Written) -> None:
        self.written = written


class AgentRegistry:
    """Creates, changes and deletes agents, each call in one transaction.

    Every call writes its audit row in the same transaction.

    Args:
        database: where the agents are stored.
        vault: encrypts their keys.
        reads: forgets what it knows about an agent's key once that is written.
        keyring: knows which of the vault's keys is active.
        endpoints: which endpoints may be saved.
        committed: called with each write that changed something, in the database's thread.
    """

    def __init__(
        self,
        database: Database,
        vault: Vault,
        reads: KeyedReads,
        keyring: Keyring,
        endpoints: EndpointPolicy | None = None,
        committed: Callable[[Written], None] | None = None,
    ) -> None:
        self._database = database
        self._vault = vault
        self._reads = reads
        self._keyring = keyring
        self._endpoints = endpoints or EndpointPolicy()
        self.committed = committed

    async def create(
        self,
        agent: AgentCreate,
        *,
        who: Who,
        comment: str | None = None,
    ) -> Written:
        """Create an agent; the arguments are those of `update`.

        Raises:
            AgentExists: its agent_id is taken.
            AgentIsDefault: it would be both the default and inactive.
        """
        return await self._write(
            functools.partial(self._create, agent=agent, author=Author(who, comment))
        )

    async def update(
        self,
        agent_id: str,
        update: AgentUpdate,
        *,
        who: Who,
        comment: str | None = None,
        if_match: IfMatch = None,
    ) -> Written:
        """Change the fields that were sent; the others stay.

        Args:
            agent_id: taken literally: an adopted id need not match our pattern.
            update: `model_fields_set` says which fields were sent.
            who: who makes the change, and from where; their token must still be valid inside the
                transaction.
            comment: why, for the change's row.
            if_match: the revision that the agent must still have, or several.

        Raises:
            Unauthorized: the token is no longer valid.
            AgentNotFound: there is no such agent.
            PreconditionFailed: it has another revision.
            InvalidRequest: the body names another agent, or an endpoint that is refused here.
            AgentIsDefault: the change would deactivate the default agent or clear its flag, or make
                an inactive agent the default.
        """
        written = await self._write(
            functools.partial(
                self._update,
                agent_id=agent_id,
                update=update,
                author=Author(who, comment),
                if_match=if_match,
            )
        )
        # If its key is still unusable, the next read or check finds out.
        self._reads.forget(agent_id)
        return written

    async def delete(
        self,
        agent_id: str,
        *,
        who: Who,
        comment: str | None = None,
        if_match: IfMatch = None,
    ) -> Written:
        """Delete an agent; the arguments are those of `update`.

        Raises:
            AgentNotFound: there is no such agent.
            PreconditionFailed: it has another revision.
            AgentIsDefault: it is the default.
        """
        author = Author(who, comment)
        written = await self._write(
            functools.partial(self._delete, agent_id=agent_id, author=author, if_match=if_match)
        )
        self._reads.forget(agent_id)
        return written

    # --- writing; everything below runs inside one transaction, in the database's thread ---

    async def _write(self, work: Callable[[Connection], Written]) -> Written:
        traceparent = tracing.traceparent()

        def transaction(connection: Connection) -> Written:
            written = work(connection)
            if traceparent is not None:
                self._database.traces[written.revision] = traceparent
            failpoints.reach("before_commit")
            return written

        try:
            with tracing.span("slm.commit"):
                return await self._database.run(transaction, committed=self.committed)
        except _Unchanged as nothing:
            return nothing.written

    def _next(self, connection: Connection, author: Author) -> Head:
        """Begin a write: lock the state row, take the next revision, and load the active key.

        The writer must still be allowed to write: no token can be revoked while the row is locked.
        """
        head = state.next_revision(connection)
        author.who.require_counts(connection, head.tokens_version)
        self._keyring.follow(connection, head.keyring_version)
        return head

    def _create(self, connection: Connection, *, agent: AgentCreate, author: Author) -> Written:
        head = self._next(connection, author)
        if agent_row(connection, agent.agent_id) is not None:
            raise AgentExists(
                "This agent_id is taken; `slm agents set` (PUT) changes an agent that is there."
            )
        if agent.is_default and not agent.is_active:
            raise AgentIsDefault("The default agent must be active.")
        demotion = _demote(connection, agent_after=head) if agent.is_default else None
        now = utc_now()
        values = created_values(agent) | {
            "revision": head.revision,
            "created_at": now,
            "updated_at": now,
            "llm_api_key_encrypted": None,
            "api_key_revision": None,
            "key_state": None,
        }
        self._check_endpoint(agent.llm_provider, agent.llm_endpoint)
        if agent.llm_api_key is not None:
            binding = KeyBinding(
                agent.agent_id, agent.llm_provider, origin(agent.llm_provider, agent.llm_endpoint)
            )
            values["llm_api_key_encrypted"] = self._vault.encrypt(agent.llm_api_key, binding)
            values["api_key_revision"] = head.revision
        values["id"] = insert_agent(connection, values)
        created = agent_of(values)
        change = record_change(connection, CREATED, created, head, False, author)
        _audit(connection, "agent.create", agent.agent_id, head, author, agent.model_fields_set)
        return _written(connection, change, head, demotion, author)

    def _update(
        self,
        connection: Connection,
        *,
        agent_id: str,
        update: AgentUpdate,
        author: Author,
        if_match: IfMatch,
    ) -> Written:
        head = self._next(connection, author)
        row = _found(connection, agent_id, if_match, head.epoch)
        before = agent_of(row)
        sent = update.judged_beside(before)
        if sent.get("agent_id", agent_id) != agent_id:
            raise InvalidRequest(
                "The body names another agent than the path.",
                [{"loc": ["body", "agent_id"], "msg": "is not the path's", "type": "mismatch"}],
            )
        values = row | altered_values(before, sent)
        after = agent_of(values)
        _check_default(before, after)
        place = before.llm_provider, before.llm_endpoint
        if (after.llm_provider, after.llm_endpoint) != place:
            self._check_endpoint(after.llm_provider, after.llm_endpoint)
        cleared = place_key(values, before, after, sent, head.revision, self._vault)
        if values == row:
            raise _Unchanged(Written(before, head.revision - 1, head.epoch, changed=False))
        values["revision"] = head.revision
        values["updated_at"] = utc_now()
        promoted = after.is_default and not before.is_default
        demotion = _demote(connection, agent_after=head) if promoted else None
        update_agent(connection, values)
        after = agent_of(values)
        change = record_change(connection, CHANGED, after, head, before.is_default, author)
        _audit(connection, "agent.update", agent_id, head, author, update.model_fields_set)
        return _written(connection, change, head, demotion, author, cleared)

    def _delete(
        self, connection: Connection, *, agent_id: str, author: Author, if_match: IfMatch
    ) -> Written:
        head = self._next(connection, author)
        row = _found(connection, agent_id, if_match, head.epoch)
        agent = agent_of(row)
        if agent.is_default:
            raise AgentIsDefault("The default agent cannot be deleted; make another the default.")
        delete_agent(connection, agent.id)
        change = record_change(connection, DELETED, agent, head, False, author)
        _audit(connection, "agent.delete", agent_id, head, author)
        return Written(None, head.revision, head.epoch, changes=(change,), follows=head.before_id)

    def _check_endpoint(self, provider: str, endpoint: str | None) -> None:
        reason = self._endpoints.refused(provider, endpoint)
        if reason is not None:
            rule = {"loc": ["body", "llm_endpoint"], "msg": reason, "type": "endpoint_refused"}
            raise InvalidRequest("The endpoint is refused on this server.", [rule])


class _Demotion(NamedTuple):
    agent: Agent
    head: Head


def _found(connection: Connection, agent_id: str, if_match: IfMatch, epoch: str) -> dict[str, Any]:
    row = agent_row(connection, agent_id)
    if row is None:
        raise AgentNotFound
    if if_match is None:
        return row
    wanted = (Version(if_match),) if isinstance(if_match, int) else if_match
    if not any(each.revision == row["revision"] and each.epoch in (None, epoch) for each in wanted):
        raise PreconditionFailed(f"The agent is at revision {row['revision']} of epoch {epoch}.")
    if state.has_moved(connection):
        # After a failover another change may have the revision that the caller has seen.
        raise PreconditionFailed("The database runs elsewhere now; its next epoch is being made.")
    return row


def _check_default(before: Agent, after: Agent) -> None:
    if before.is_default and not after.is_default:
        raise AgentIsDefault("There is always a default; make another agent the default instead.")
    if after.is_default and not after.is_active:
        raise AgentIsDefault("The default agent must be active.")


def _demote(connection: Connection, *, agent_after: Head) -> _Demotion | None:
    """Take the flag from the current default, before the promotion: the unique index requires it.

    Its revision is the one after the promoted agent's, so that a reader of the changes in order
    is never without a default.
    """
    row = default_row(connection)
    if row is None:
        return None
    head = state.next_revision(connection)
    values = dict(row._mapping) | {
        "is_default": False,
        "revision": head.revision,
        "updated_at": utc_now(),
    }
    update_agent(connection, values)
    assert head.revision == agent_after.revision + 1  # noqa: S101 - nobody else writes meanwhile
    return _Demotion(agent_of(values), head)


def _written(
    connection: Connection,
    change: CommittedChange,
    head: Head,
    demotion: _Demotion | None,
    author: Author,
    api_key_cleared: bool = False,
) -> Written:
    changes = [change]
    if demotion is not None:
        changes.append(
            record_change(connection, CHANGED, demotion.agent, demotion.head, True, author)
        )
    return Written(
        change.agent,
        changes[-1].revision,
        head.epoch,
        api_key_cleared=api_key_cleared,
        changes=tuple(changes),
        follows=head.before_id,
    )


def _audit(
    connection: Connection,
    action: str,
    agent_id: str,
    head: Head,
    author: Author,
    fields: Iterable[str] = (),
) -> None:
    """Record a write: which fields were sent, and never their values."""
    detail: dict[str, Any] = {"revision": head.revision}
    if fields:
        detail["fields"] = sorted(set(fields) - {"comment"})
    append(connection, AuditEvent(author.who, action, agent_id, detail))
