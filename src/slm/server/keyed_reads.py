"""Hands out agents with their keys: from the database, decrypted now, and never unrecorded.

Every key that is handed out is in the audit before it leaves. Nothing keyed is kept
(docs/protocol.md section 3). Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from pydantic import SecretStr
from sqlalchemy import Connection, bindparam, func, select

from slm.endpoints import origin
from slm.errors import AgentInactive, AgentNotFound, KeyUndecryptable
from slm.schemas import Agent, LLMConfig, LLMConfigWithKey, Snapshot
from slm.server.audit import Event, Who, append
from slm.server.database import Database
from slm.server.keyring import Keyring
from slm.server.models import AGENTS, CHANGES, SELECT_AGENTS, STATE, agent_of
from slm.server.vault import KeyBinding
from slm.server.view import View

_HEAD: Final = select(
    STATE.c.revision,
    STATE.c.epoch,
    STATE.c.keyring_version,
    STATE.c.tokens_version,
    func.coalesce(
        select(CHANGES.c.change_id)
        .where(CHANGES.c.revision == STATE.c.revision)
        .correlate(STATE)
        .scalar_subquery(),
        STATE.c.head_id,
    ).label("change_id"),
)
_ALL: Final = SELECT_AGENTS.order_by(AGENTS.c.id)
# One statement is one view of the database even under READ COMMITTED, where a read may also write.
_ONE: Final = (
    select(
        STATE.c.revision.label("head_revision"),
        STATE.c.epoch.label("head_epoch"),
        STATE.c.keyring_version,
        STATE.c.tokens_version,
        *SELECT_AGENTS.selected_columns,
    )
    .select_from(STATE.outerjoin(AGENTS, AGENTS.c.agent_id == bindparam("agent_id")))
    .where(STATE.c.id == 1)
)


class _Found(NamedTuple):
    config: LLMConfigWithKey
    revision: int
    epoch: str


def binding_of(agent: LLMConfig) -> KeyBinding:
    """Return the one place this agent's key may be sent to."""
    return KeyBinding(
        agent.agent_id, agent.llm_provider, origin(agent.llm_provider, agent.llm_endpoint)
    )


class KeyedReads:
    """One agent with its key, or all of them.

    Attributes:
        undecryptable: the agents whose stored key could not be used when it was last tried.
    """

    def __init__(self, database: Database, keyring: Keyring) -> None:
        self.undecryptable: frozenset[str] = frozenset()
        self._database = database
        self._keyring = keyring

    async def llm(
        self, agent_id: str, *, who: Who, view: View
    ) -> tuple[LLMConfigWithKey, int, str]:
        """Return an agent with its key, and the revision and epoch it was read at.

        Raises:
            Unauthorized: the token does not count any more.
            AgentNotFound: there is no such agent, or the view does not see it.
            AgentInactive: it is switched off.
            KeyUndecryptable: its key does not decrypt, or belongs to another place.
            EncryptionKeyMissing: this replica has not the encryption key that is in use now.
            DatabaseUnavailable: it cannot be read, or the audit cannot be written.
        """
        if "\x00" in agent_id or any("\ud800" <= c <= "\udfff" for c in agent_id):
            raise AgentNotFound  # no database can even be asked for it

        def work(connection: Connection) -> _Found:
            row = connection.execute(_ONE, {"agent_id": agent_id}).one()
            who.require_counts(connection, row.tokens_version)
            if row.id is None:
                raise AgentNotFound
            agent = agent_of(row)
            if not view.sees(agent.agent_id, agent.is_default):
                raise AgentNotFound
            if not agent.is_active:
                raise AgentInactive
            self._keyring.follow(connection, row.keyring_version)
            config = self._with_key(agent, row)
            if config.llm_api_key is not None:
                detail = {"revision": agent.revision, "api_key_revision": agent.api_key_revision}
                append(connection, Event(who, "key.read", agent.agent_id, detail))
            return _Found(config, row.head_revision, row.head_epoch)

        try:
            found = await self._database.run(work)
        except KeyUndecryptable:
            self.undecryptable |= {agent_id}
            raise
        self.undecryptable -= {agent_id}
        return found

    async def snapshot(self, *, who: Who, view: View) -> Snapshot:
        """Return every agent that the view sees, with its key, all read at one revision.

        Raises:
            EncryptionKeyMissing: this replica has not the encryption key that is in use now.
            DatabaseUnavailable: it cannot be read, or the audit cannot be written.
        """
        head, rows = await self._database.read(functools.partial(self._read_all, who))
        revision, epoch = head.revision, head.epoch
        # Decrypting thousands of keys takes a while, and nothing may wait for it.
        agents = await asyncio.to_thread(self._all_with_keys, rows, view)
        keys = sum(agent.llm_api_key is not None for agent in agents)
        if keys:
            detail = {"revision": revision, "agents": len(agents), "keys": keys}
            detail |= {"limited_to": view.patterns} if view.is_limited else {}
            event = Event(who, "key.read_all", detail=detail)

            def record(connection: Connection) -> None:
                who.require_counts(connection)
                append(connection, event)

            await self._database.run(record)
        if not view.is_limited:
            self._note(agents)
        return Snapshot(revision=revision, epoch=epoch, change_id=head.change_id, agents=agents)

    async def check(self) -> None:
        """Try every stored key, so that `undecryptable` is right; hands none out.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        _, rows = await self._database.read(functools.partial(self._read_all, None))
        self._note(await asyncio.to_thread(self._all_with_keys, rows, View()))

    def _read_all(self, who: Who | None, connection: Connection) -> tuple[Any, Sequence[Any]]:
        head = connection.execute(_HEAD).one()
        if who is not None:
            who.require_counts(connection, head.tokens_version)
        self._keyring.follow(connection, head.keyring_version)
        return head, connection.execute(_ALL).all()

    def _all_with_keys(self, rows: Sequence[Any], view: View) -> list[LLMConfigWithKey]:
        found = []
        for row in rows:
            agent = agent_of(row)
            if not view.sees(agent.agent_id, agent.is_default):
                continue
            try:
                found.append(self._with_key(agent, row))
            except KeyUndecryptable:
                found.append(_config(agent, None, "undecryptable"))
        return found

    def _with_key(self, agent: Agent, row: Any) -> LLMConfigWithKey:
        key = None
        if agent.has_api_key:
            token = str(row.llm_api_key_encrypted)
            key = self._keyring.vault.decrypt(token, binding_of(agent))
        return _config(agent, key, None)

    def _note(self, agents: Sequence[LLMConfigWithKey]) -> None:
        self.undecryptable = frozenset(a.agent_id for a in agents if a.key_error is not None)


def _config(agent: Agent, key: SecretStr | None, error: str | None) -> LLMConfigWithKey:
    values = agent.__dict__
    fields = {name: values[name] for name in LLMConfig.model_fields}
    # Built from a row that was read already: not validated again, thousands at a time.
    return LLMConfigWithKey.model_construct(**fields, llm_api_key=key, key_error=error)
