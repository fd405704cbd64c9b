"""Returns agents with their keys, as they are in the database now, and records every such read.

Every key is in the audit before it leaves the server. What is kept of a key in memory is sealed and
valid only for this exact row (docs/protocol.md section 3). Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from pydantic import SecretStr
from sqlalchemy import Connection, bindparam, func, select

from slm.endpoints import origin
from slm.errors import AgentInactive, AgentNotFound, KeyUndecryptable, ProblemError
from slm.schemas import Agent, LLMConfig, LLMConfigWithKey, Snapshot
from slm.server.agents.mapping import agent_of
from slm.server.agents.read_batches import MAX_ROWS, Asked, Batches
from slm.server.agents.snapshots import Piece, SealedSnapshot, SnapshotHead, SnapshotStore
from slm.server.db.column_types import require_state, text_of
from slm.server.db.database import Database
from slm.server.db.tables import AGENTS, CHANGES, SELECT_AGENTS, STATE
from slm.server.encryption.keyring import Keyring
from slm.server.encryption.sealed import SealedTexts
from slm.server.encryption.vault import KeyBinding
from slm.server.security.agent_scope import EVERYTHING, View
from slm.server.security.audit import AuditEvent, Who, append_all

_KEYED: Final = "+"
_KEYLESS: Final = "-"
"""How a stored piece begins, depending on whether it contains a key."""

_LARGE: Final = 2000
"""A table with more agents than this is read where no write waits for it."""

_PIECES_BYTES: Final = 16 * 1024 * 1024

_HEAD: Final = select(
    STATE.c.revision.label("head_revision"),
    STATE.c.epoch.label("head_epoch"),
    STATE.c.keyring_version,
    func.coalesce(
        select(CHANGES.c.change_id)
        .where(CHANGES.c.revision == STATE.c.revision)
        .correlate(STATE)
        .scalar_subquery(),
        STATE.c.head_id,
    ).label("head_change_id"),
    STATE.c.tokens_version,
).where(STATE.c.id == 1)
_PAGE_OF_AGENTS: Final = (
    SELECT_AGENTS.where(AGENTS.c.id > bindparam("after")).order_by(AGENTS.c.id).limit(_LARGE)
)
_ALL: Final = SELECT_AGENTS.order_by(AGENTS.c.id)
# Even under READ COMMITTED, where a read may also write, one statement sees one state of the
# database.
_SOME: Final = (
    select(
        *_HEAD.selected_columns,
        *SELECT_AGENTS.selected_columns,
    )
    .select_from(
        STATE.outerjoin(AGENTS, AGENTS.c.agent_id.in_(bindparam("agent_ids", expanding=True)))
    )
    .where(STATE.c.id == 1)
)


ITSELF: Final = Who("slm")
"""The actor of what nobody requested over HTTP."""


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
    """Reads one agent with its key, or all of them.

    Attributes:
        undecryptable: the agents with a stored key that was unusable when last tried.
    """

    def __init__(self, database: Database, keyring: Keyring) -> None:
        self.undecryptable: frozenset[str] = frozenset()
        self._database = database
        self._keyring = keyring
        self._snapshots = SnapshotStore(self._read_for_snapshot)
        # The pieces of small snapshots: after a change, all but one are still the same.
        self._pieces = SealedTexts(_PIECES_BYTES)
        self._pieces_under: tuple[str, ...] = ()
        self._batches = Batches(database, self._read_batch)

    def forget(self, agent_id: str) -> None:
        """Note that the agent's key was written: the next read finds out whether it is usable."""
        self.undecryptable -= {agent_id}

    async def llm(
        self, agent_id: str, *, who: Who = ITSELF, view: View = EVERYTHING
    ) -> tuple[LLMConfigWithKey, int, str]:
        """Return an agent with its key, and the revision and epoch it was read at.

        Raises:
            Unauthorized: the token is no longer valid.
            AgentNotFound: there is no such agent, or the view does not include it.
            AgentInactive: it is inactive.
            KeyUndecryptable: its key does not decrypt, or belongs to another place.
            EncryptionKeyMissing: this replica does not have the active encryption key.
            DatabaseUnavailable: the database cannot be read, or the audit cannot be written.
        """
        if "\x00" in agent_id or any("\ud800" <= c <= "\udfff" for c in agent_id):
            raise AgentNotFound  # no database can even be asked for it
        try:
            found: _Found = await self._batches.ask(Asked(who, view, agent_id))
        except KeyUndecryptable:
            self.undecryptable |= {agent_id}
            raise
        if agent_id in self.undecryptable:
            self.forget(agent_id)
        return found

    async def sealed_snapshot(self, *, who: Who, view: View) -> SealedSnapshot:
        """Return every agent that the view includes, with its key, all read at one revision.

        Raises:
            Unauthorized: the token is no longer valid.
            EncryptionKeyMissing: this replica does not have the active encryption key.
            DatabaseUnavailable: the database cannot be read, or the audit cannot be written.
        """
        found: SealedSnapshot | SnapshotHead = await self._batches.ask(Asked(who, view))
        if isinstance(found, SealedSnapshot):
            return found
        made = await self._snapshots.make(view, found)
        if not view.is_limited:
            self.undecryptable = made.undecryptable
        answered: SealedSnapshot = await self._batches.ask(Asked(who, view, made=made))
        return answered

    async def snapshot(self, *, who: Who = ITSELF, view: View = EVERYTHING) -> Snapshot:
        """Return the snapshot as a value; see `sealed_snapshot`."""
        sealed = await self.sealed_snapshot(who=who, view=view)
        return Snapshot.model_validate_json(b"".join(sealed.chunks()))

    # --- one transaction for everyone who asks at the same time ---

    def _read_batch(self, connection: Connection, batch: Sequence[Asked]) -> list[Any]:
        """Return an outcome for as many requests as fit into one transaction; some may be problems.

        What was read is in the audit before this transaction commits, or no request gets anything.
        """
        ids = sorted({each.agent_id for each in batch if each.agent_id is not None})
        if ids:
            rows = connection.execute(_SOME, {"agent_ids": ids}).all()
        else:
            rows = connection.execute(_HEAD).all()
        head, tokens_version = _head_of(rows[0]), rows[0].tokens_version
        found: dict[str, tuple[Agent, Any]] = {}
        for row in rows if ids else ():
            if row.id is not None:
                agent = agent_of(row)
                found[agent.agent_id] = agent, row
        outcomes: list[Any] = []
        events: list[AuditEvent] = []
        for each in batch:
            if len(events) >= MAX_ROWS:
                break  # the rest comes with the next transaction
            try:
                each.who.require_counts(connection, tokens_version)
                if each.agent_id is None:
                    outcome, of_it = self._snapshot_for(each, head)
                else:
                    read = found.get(each.agent_id)
                    outcome, of_it = self._llm_for(connection, each, read, head)
            except ProblemError as problem:
                outcomes.append(problem)
                continue
            outcomes.append(outcome)
            events += of_it
        append_all(connection, events)
        return outcomes

    def _snapshot_for(self, asked: Asked, head: SnapshotHead) -> tuple[Any, list[AuditEvent]]:
        """Return the snapshot, or the state that one must be made for."""
        ready = asked.made or self._snapshots.kept(asked.view, head)
        if ready is None:
            return head, []
        return ready, ready.events(asked.who)

    def _llm_for(
        self,
        connection: Connection,
        asked: Asked,
        read: tuple[Agent, Any] | None,
        head: SnapshotHead,
    ) -> tuple[_Found, list[AuditEvent]]:
        if read is None:
            raise AgentNotFound
        agent, row = read
        if not asked.view.sees(agent.agent_id, agent.is_default):
            raise AgentNotFound
        if not agent.is_active:
            raise AgentInactive
        self._keyring.follow(connection, head.keyring_version)
        config = self._with_key(agent, row)
        found = _Found(config, head.revision, head.epoch)
        if config.llm_api_key is None:
            return found, []
        detail = {"revision": agent.revision, "api_key_revision": agent.api_key_revision}
        return found, [AuditEvent(asked.who, "key.read", agent.agent_id, detail)]

    # --- all agents ---

    async def _read_for_snapshot(self, view: View) -> tuple[SnapshotHead, Iterator[Piece]]:
        some = functools.partial(self._read_all, limit=_LARGE + 1)
        head, rows = await self._database.read(some)
        if len(rows) > _LARGE:
            # Beside the writers: none of them may wait for a hundred thousand rows.
            head, rows = await self._database.read_long(self._read_all)
            return head, map(_piece_of, self._all_with_keys(rows, view))
        return head, self._pieces_of(rows, view)

    async def check(self) -> None:
        """Try to decrypt every stored key, to update `undecryptable`; returns none of them.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        after, lost = 0, set[str]()
        while True:
            rows = await self._database.read(functools.partial(self._read_page, after=after))
            if not rows:
                break
            lost |= await asyncio.to_thread(self._undecryptable_of, rows)
            after = rows[-1].id
        self.undecryptable = frozenset(lost)

    def _read_page(self, connection: Connection, after: int) -> Sequence[Any]:
        self._keyring.follow(connection)
        return connection.execute(_PAGE_OF_AGENTS, {"after": after}).all()

    def _undecryptable_of(self, rows: Sequence[Any]) -> set[str]:
        agents = self._all_with_keys(rows, View())
        return {agent.agent_id for agent in agents if agent.key_error is not None}

    def _read_all(
        self, connection: Connection, limit: int | None = None
    ) -> tuple[SnapshotHead, Sequence[Any]]:
        head = _head_of(connection.execute(_HEAD).one())
        self._keyring.follow(connection, head.keyring_version)
        return head, connection.execute(_ALL if limit is None else _ALL.limit(limit)).all()

    def _all_with_keys(self, rows: Sequence[Any], view: View) -> Iterator[LLMConfigWithKey]:
        for row in rows:
            agent = agent_of(row)
            if not view.sees(agent.agent_id, agent.is_default):
                continue
            try:
                yield self._with_key(agent, row)
            except KeyUndecryptable:
                yield _config(agent, None, "undecryptable")

    def _pieces_of(self, rows: Sequence[Any], view: View) -> Iterator[Piece]:
        """Yield the pieces of a snapshot; decrypts only what is new since the last one."""
        under = self._keyring.vault.fingerprints
        if under != self._pieces_under:
            # Nothing that was decrypted with a key removed since is handed out.
            self._pieces, self._pieces_under = SealedTexts(_PIECES_BYTES), under
        for row in rows:
            name = hashlib.sha256(repr(tuple(row)).encode()).digest()
            known = None if view.is_limited else self._pieces.get(name)
            if known is not None:
                text = known[len(_KEYED) :].encode()
                yield Piece(text_of(row.agent_id), text, known.startswith(_KEYED))
                continue
            for agent in self._all_with_keys((row,), view):
                piece = _piece_of(agent)
                if not piece.undecryptable:
                    mark = _KEYED if piece.with_key else _KEYLESS
                    self._pieces.put(name, mark + piece.json.decode())
                yield piece

    def _with_key(self, agent: Agent, row: Any) -> LLMConfigWithKey:
        key = None
        if agent.has_api_key:
            token = str(row.llm_api_key_encrypted)
            key = self._keyring.vault.decrypt(token, binding_of(agent))
        return _config(agent, key, None)


def _piece_of(agent: LLMConfigWithKey) -> Piece:
    text = json.dumps(agent.to_wire(), ensure_ascii=False).encode()
    lost = agent.key_error is not None
    return Piece(agent.agent_id, text, agent.llm_api_key is not None, lost)


def _head_of(row: Any) -> SnapshotHead:
    require_state(row.head_revision, epoch=row.head_epoch)
    return SnapshotHead(row.head_revision, row.head_epoch, row.keyring_version, row.head_change_id)


def _config(agent: Agent, key: SecretStr | None, error: str | None) -> LLMConfigWithKey:
    values = agent.__dict__
    fields = {name: values[name] for name in LLMConfig.model_fields}
    # Built from a row that was already read: thousands are not validated again.
    return LLMConfigWithKey.model_construct(**fields, llm_api_key=key, key_error=error)
