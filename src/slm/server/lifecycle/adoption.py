"""Adopts rows of `agents` that another program wrote: gives them revisions and binds their keys.

Runs once, inside the transaction of the first migration, and later only for keys that no key
has decrypted yet (docs/protocol.md section 1, "Adoption"). Knows no file and no setting.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import SecretStr
from sqlalchemy import Connection, bindparam, insert, update

from slm.errors import KeyUndecryptable
from slm.server.agents.changes import CHANGED, CREATED
from slm.server.agents.credentials import binding_of
from slm.server.agents.mapping import agent_of
from slm.server.db import state
from slm.server.db.tables import AGENTS, CHANGES, SELECT_AGENTS, utc_now
from slm.server.encryption.vault import KeyBinding, Vault

ACTOR: Final = "slm"
"""The author of the changes that a start makes."""

_UPDATE: Final = (
    update(AGENTS)
    .where(AGENTS.c.id == bindparam("row_id"))
    .values(
        revision=bindparam("new_revision"),
        api_key_revision=bindparam("key_revision"),
        llm_api_key_encrypted=bindparam("token"),
        key_state=bindparam("state"),
    )
)


@dataclass
class Adoption:
    """What a start found.

    Attributes:
        rows: how many rows got their first revision.
        bound: the agents with a key that was re-encrypted for its place.
        kept: the agents with a stored key that none of the given keys decrypts.
    """

    rows: int = 0
    bound: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def adopt(connection: Connection, vault: Vault, *, first_time: bool) -> Adoption:
    """Give a revision and a change to every row without one, and bind the keys that can be bound.

    Args:
        connection: in a transaction that holds the state row, or that locks it here first.
        vault: the keys that were given; the first one encrypts.
        first_time: the table was adopted just now. Only then may a bare token be bound unasked:
            later, anyone who writes to the database could put an old one next to their endpoint.
    """
    found = Adoption()
    # With its lock: while one replica starts the others keep writing, and a revision read without
    # it would overwrite theirs.
    before, *_, last_id = state.lock(connection)
    rows = connection.execute(
        SELECT_AGENTS.where((AGENTS.c.revision == 0) | AGENTS.c.key_state.is_not(None)).order_by(
            AGENTS.c.id
        )
    ).all()
    revision, ids = before, [last_id]
    for row in rows:
        is_new = row.revision == 0
        values = dict(row._mapping)
        bound = _bind_key(values, vault, found, may_bind=first_time and is_new)
        if not (is_new or bound):
            continue
        revision += 1
        values["revision"] = revision
        has_key = bool(values["llm_api_key_encrypted"])
        values["api_key_revision"] = revision if has_key else None
        connection.execute(
            _UPDATE,
            {
                "row_id": row.id,
                "new_revision": revision,
                "key_revision": values["api_key_revision"],
                "token": values["llm_api_key_encrypted"],
                "state": values["key_state"],
            },
        )
        ids.append(state.new_change_id())
        _record(connection, CREATED if is_new else CHANGED, values, ids[-1])
        found.rows += is_new
    if revision != before:
        state.take_revisions(connection, revision, head_id=ids[-1], before_id=ids[-2])
    return found


def _bind_key(values: dict[str, Any], vault: Vault, found: Adoption, *, may_bind: bool) -> bool:
    """Bind the row's key if allowed and possible; return whether that changed the row."""
    agent = agent_of(values)
    if not agent.has_api_key:
        return False
    token = str(values["llm_api_key_encrypted"])
    binding = binding_of(agent)
    try:
        vault.decrypt(token, binding)
    except KeyUndecryptable:
        pass
    else:
        changed = values["key_state"] is not None
        values["key_state"] = None
        return changed
    if not may_bind and not _is_marked(values, vault, binding):
        return False
    try:
        key = vault.decrypt_unbound(token)
    except KeyUndecryptable:
        found.kept.append(agent.agent_id)
        values["key_state"] = values["key_state"] or _mark(token, vault, binding)
        return False
    values["llm_api_key_encrypted"] = vault.encrypt(key, binding)
    values["key_state"] = None
    found.bound.append(agent.agent_id)
    return True


def _mark(token: str, vault: Vault, binding: KeyBinding) -> str:
    """Return the proof that exactly this token was adopted for this place.

    Encrypted, so that write access to the database alone is not enough to make one.
    """
    return vault.encrypt(SecretStr(_digest(token)), binding)


def _is_marked(values: dict[str, Any], vault: Vault, binding: KeyBinding) -> bool:
    if values["key_state"] is None:
        return False
    try:
        digest = vault.decrypt(str(values["key_state"]), binding)
    except KeyUndecryptable:
        return False
    return digest.get_secret_value() == _digest(str(values["llm_api_key_encrypted"]))


def _digest(token: str) -> str:
    return "adopted:" + hashlib.sha256(token.encode()).hexdigest()


def _record(connection: Connection, kind: str, values: dict[str, Any], change_id: str) -> None:
    agent = agent_of(values)
    connection.execute(
        insert(CHANGES),
        {
            "revision": agent.revision,
            "change_id": change_id,
            "type": kind,
            "agent_id": agent.agent_id,
            "agent": agent.model_dump_json(),
            "was_default": kind == CHANGED and agent.is_default,
            "actor": ACTOR,
            "comment": None,
            "created_at": utc_now(),
        },
    )
