"""AgentRegistry: the only writer of agents. Row, change and revision are one transaction.

Holds the rules of docs/protocol.md sections 1 to 3. Pushes nothing: the feed reads what was
committed here. Knows no HTTP.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from pydantic import SecretStr
from sqlalchemy import Connection

from slm.common import tracing
from slm.endpoints import EndpointPolicy, origin
from slm.errors import (
    AgentExists,
    AgentIsDefault,
    AgentNotFound,
    InvalidRequest,
    KeyUndecryptable,
    PreconditionFailed,
)
from slm.schemas import Agent, LLMConfigWithKey, Snapshot
from slm.server import failpoints
from slm.server.agents.catalog import CommittedChange
from slm.server.agents.credentials import KeyedReads, binding_of
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
from slm.server.db.tables import agent_of, utc_now
from slm.server.encryption.keyring import Keyring
from slm.server.encryption.vault import KeyBinding, Vault
from slm.server.security.agent_scope import EVERYTHING, View
from slm.server.security.audit import Event, Who, append
from slm.server.security.token_table import Caller

IfMatch = int | Collection["Version"] | None
"""The revision that an agent must be at, or several of which it must be one; None: any."""

ITSELF: Final = Who("slm")
"""The actor of what nobody asked for over HTTP."""

CREATED: Final = "agent_created"
CHANGED: Final = "agent_config_changed"
DELETED: Final = "agent_deleted"

_PLAIN: Final = (
    "name",
    "description",
    "llm_provider",
    "llm_endpoint",
    "llm_model",
    "llm_timeout",
    "llm_temperature",
    "llm_max_tokens",
    "is_default",
    "is_active",
)


@dataclass(frozen=True)
class Written:
    """What a write did.

    Attributes:
        agent: the agent as it now is; None after a delete.
        revision: of the last change that this write made, or the current one if it made none.
        epoch: the epoch of that revision.
        changed: False where nothing was altered, so that there is no revision and no change.
        api_key_cleared: the stored key was dropped, since it was bound to another place.
        changes: what it wrote into the history, in order.
        follows: the change id of the revision before the first of them.
    """

    agent: Agent | None
    revision: int
    epoch: str
    changed: bool = True
    api_key_cleared: bool = False
    changes: tuple[CommittedChange, ...] = ()
    follows: str = ""

    @property
    def change_id(self) -> str | None:
        """The id of the last change that this write made; None where it made none."""
        return self.changes[-1].change_id if self.changes else None


class Version(NamedTuple):
    """What an If-Match names: the revision of an agent, in an epoch; None: in that of now."""

    revision: int
    epoch: str | None = None


class _Unchanged(Exception):
    """No error, but the way out that rolls the revision back."""

    def __init__(self, written: Written) -> None:
        self.written = written


class AgentRegistry:
    """Creates, changes, deletes and hands out agents, each call in one transaction.

    Every call has its row in the audit, in the same transaction.

    Args:
        database: where the agents are.
        vault: what their keys are encrypted with.
        keyring: which of the vault's keys is active; None: nobody ever rotates.
        endpoints: which endpoints may be saved.

    Attributes:
        reads: hands out agents with their keys.
        committed: told of each write that changed something, in the database's thread.
    """

    def __init__(
        self,
        database: Database,
        vault: Vault,
        keyring: Keyring | None = None,
        endpoints: EndpointPolicy | None = None,
    ) -> None:
        self._database = database
        self._vault = vault
        self._keyring = keyring or Keyring(vault, tuple)
        self._endpoints = endpoints or EndpointPolicy()
        self.reads = KeyedReads(database, self._keyring)
        self.committed: Callable[[Written], None] | None = None

    async def create(
        self,
        agent: AgentCreate,
        *,
        actor: str,
        comment: str | None = None,
        address: str | None = None,
        caller: Caller | None = None,
    ) -> Written:
        """Create an agent; the arguments are those of `update`.

        Raises:
            AgentExists: its agent_id is taken.
            AgentIsDefault: it would be the default and inactive.
        """
        return await self._write(
            functools.partial(
                self._create, agent=agent, author=Author(Who(actor, address, caller), comment)
            )
        )

    async def update(
        self,
        agent_id: str,
        update: AgentUpdate,
        *,
        actor: str,
        comment: str | None = None,
        if_match: IfMatch = None,
        address: str | None = None,
        caller: Caller | None = None,
    ) -> Written:
        """Change the fields that were sent; the others stay.

        Args:
            agent_id: taken literally: an adopted id need not be of our pattern.
            update: `model_fields_set` says which fields were sent.
            actor: who does it, for the change's row.
            comment: why, for the change's row.
            if_match: the revision that the agent must still have, or several.
            address: where it came from, for the audit.
            caller: whose token must still count inside the transaction; None: nobody's.

        Raises:
            Unauthorized: the token does not count any more.
            AgentNotFound: there is no such agent.
            PreconditionFailed: its revision is another one.
            InvalidRequest: the body names another agent, or an endpoint that is refused here.
            AgentIsDefault: the default would be deactivated or un-defaulted, or an inactive agent
                made the default.
        """
        written = await self._write(
            functools.partial(
                self._update,
                agent_id=agent_id,
                update=update,
                author=Author(Who(actor, address, caller), comment),
                if_match=if_match,
            )
        )
        # If its key is still of no use, the next read or check finds it again.
        self.reads.undecryptable -= {agent_id}
        return written

    async def delete(
        self,
        agent_id: str,
        *,
        actor: str,
        comment: str | None = None,
        if_match: IfMatch = None,
        address: str | None = None,
        caller: Caller | None = None,
    ) -> Written:
        """Delete an agent; the arguments are those of `update`.

        Raises:
            AgentNotFound: there is no such agent.
            PreconditionFailed: its revision is another one.
            AgentIsDefault: it is the default.
        """
        author = Author(Who(actor, address, caller), comment)
        written = await self._write(
            functools.partial(self._delete, agent_id=agent_id, author=author, if_match=if_match)
        )
        self.reads.undecryptable -= {agent_id}
        return written

    async def llm(
        self, agent_id: str, *, who: Who = ITSELF, view: View = EVERYTHING
    ) -> tuple[LLMConfigWithKey, int, str]:
        """Return an agent's configuration with its key, and the revision and epoch it was read at.

        Args:
            agent_id: the agent.
            who: who asks, for the audit.
            view: what they may see.

        Raises:
            AgentNotFound: there is no such agent, or the view does not see it.
            AgentInactive: it is switched off.
            KeyUndecryptable: its key does not decrypt, or belongs to another place.
        """
        return await self.reads.llm(agent_id, who=who, view=view)

    async def snapshot(self, *, who: Who = ITSELF, view: View = EVERYTHING) -> Snapshot:
        """Return every agent that the view sees, with its key, all read at one revision."""
        return await self.reads.snapshot(who=who, view=view)

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
                written = await self._database.run(transaction, committed=self.committed)
        except _Unchanged as nothing:
            return nothing.written
        return written

    def _next(self, connection: Connection, author: Author) -> Head:
        """Begin a write: the state row locked, the next revision taken, the active key at hand.

        Whoever writes must still be allowed to: no token can be revoked while the row is locked.
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
        values = {name: getattr(agent, name) for name in _PLAIN} | {
            "agent_id": agent.agent_id,
            "llm_options": _options_text(agent.llm_options),
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
        values = row | _altered(before, sent)
        after = agent_of(values)
        _check_default(before, after)
        place = before.llm_provider, before.llm_endpoint
        if (after.llm_provider, after.llm_endpoint) != place:
            self._check_endpoint(after.llm_provider, after.llm_endpoint)
        cleared = self._place_key(values, before, after, sent, head.revision)
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

    def _place_key(
        self,
        values: dict[str, Any],
        before: Agent,
        after: Agent,
        sent: Mapping[str, Any],
        revision: int,
    ) -> bool:
        """Set, keep or clear the key in `values`; return whether it was cleared unasked."""
        moved = binding_of(after) != binding_of(before)
        if "llm_api_key" in sent:
            key: SecretStr | None = sent["llm_api_key"]
            if key is not None and not moved and self._holds(values, before, key):
                return False
            if key is None and not before.has_api_key:
                return False
            values["key_state"] = None
            values["llm_api_key_encrypted"] = key and self._vault.encrypt(key, binding_of(after))
            values["api_key_revision"] = key and revision
            return False
        if not (moved and before.has_api_key):
            return False
        values["key_state"] = values["llm_api_key_encrypted"] = values["api_key_revision"] = None
        return True

    def _holds(self, values: Mapping[str, Any], agent: Agent, key: SecretStr) -> bool:
        if not agent.has_api_key:
            return False
        try:
            held = self._vault.decrypt(str(values["llm_api_key_encrypted"]), binding_of(agent))
        except KeyUndecryptable:
            return False
        return held.get_secret_value() == key.get_secret_value()

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
        # After a failover another change may have the number that the caller has seen.
        raise PreconditionFailed("The database runs elsewhere now; its next epoch is being made.")
    return row


def _altered(before: Agent, sent: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns whose value, as served, is another one than was sent."""
    altered = {
        name: sent[name] for name in _PLAIN if name in sent and sent[name] != getattr(before, name)
    }
    if "llm_options" in sent:
        options = _options_text(sent["llm_options"])
        if options != _options_text(before.llm_options):
            altered["llm_options"] = options
    return altered


def _options_text(options: Mapping[str, Any]) -> str:
    """Return the options as they are stored: in the order given, so 1, 1.0 and true differ."""
    return json.dumps(options, ensure_ascii=False, separators=(",", ":"))


def _check_default(before: Agent, after: Agent) -> None:
    if before.is_default and not after.is_default:
        raise AgentIsDefault("There is always a default; make another agent the default instead.")
    if after.is_default and not after.is_active:
        raise AgentIsDefault("The default agent must be active.")


def _demote(connection: Connection, *, agent_after: Head) -> _Demotion | None:
    """Take the flag from the default of now; before the promotion, or the unique index refuses.

    Its revision is the one after the promoted agent's, so that whoever reads the changes in order
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
    """Record a write: which fields were sent, and never what they held."""
    detail: dict[str, Any] = {"revision": head.revision}
    if fields:
        detail["fields"] = sorted(set(fields) - {"comment"})
    append(connection, Event(author.who, action, agent_id, detail))
