"""The audit: who did what, to which agent, when and from where, as a chain of hashes.

`append` is part of the caller's transaction, so what cannot be recorded does not happen. Holds no
secret: a detail names fields, never their values. Knows no HTTP.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection, Integer, bindparam, insert, select, update

from slm.server.auth import Caller
from slm.server.database import Database
from slm.server.models import AUDIT, AUDIT_HEAD, utc_now
from slm.server.prepared import Prepared

GENESIS: Final = "0" * 64
"""What stands for the hash before the first row."""

_NEXT: Final = Prepared(
    update(AUDIT_HEAD)
    .where(AUDIT_HEAD.c.id == 1)
    .values(seq=AUDIT_HEAD.c.seq + bindparam("count", type_=Integer))
    .returning(AUDIT_HEAD.c.seq, AUDIT_HEAD.c.hash)
)
_INSERT: Final = Prepared(insert(AUDIT))
_MOVE: Final = Prepared(
    update(AUDIT_HEAD).where(AUDIT_HEAD.c.id == 1).values(hash=bindparam("new_hash"))
)
_PAGE: Final = 1000


@dataclass(frozen=True)
class Who:
    """Who does something, and from where.

    Attributes:
        actor: the token's name.
        address: the peer's IP address; None for what the server does by itself.
        caller: the token, which must still count when the transaction is under way; None for what
            the server does by itself.
    """

    actor: str
    address: str | None = None
    caller: Caller | None = field(default=None, compare=False)

    def require_counts(self, connection: Connection, tokens_version: int | None = None) -> None:
        """Refuse what a token does that was revoked meanwhile; see `Caller.require_counts`.

        Raises:
            Unauthorized: it does not count any more.
        """
        if self.caller is not None:
            self.caller.require_counts(connection, tokens_version)


@dataclass(frozen=True)
class Event:
    """One thing to record.

    Attributes:
        who: who does it, and from where.
        action: `agent.create`, `key.read`, `token.revoke`, …
        agent_id: the agent that it is about; None for another thing or for all of them.
        detail: what else; names and numbers, never a value that may be secret.
    """

    who: Who
    action: str
    agent_id: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One row of the audit, as it is read."""

    seq: int
    at: str
    actor: str
    action: str
    agent_id: str | None
    address: str | None
    detail: str
    hash: str

    def hash_after(self, before: str) -> str:
        """Return the hash that this row must have after the row whose hash is `before`."""
        told = (self.seq, self.at, self.actor, self.action, self.agent_id, self.address)
        text = json.dumps([before, *told, self.detail], ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Attributes:
        rows: how many rows the chain has up to its head, or up to where it breaks.
        head: `seq:hash` of the last row; noted elsewhere, it proves later that nothing before it
            was altered.
        broken_at: the first row that is not what was written there; None where all are.
        reason: in what way; empty where nothing is wrong.
    """

    rows: int
    head: str
    broken_at: int | None = None
    reason: str = ""

    @property
    def whole(self) -> bool:
        """Whether nothing was altered."""
        return self.broken_at is None


def append(connection: Connection, event: Event) -> None:
    """Record an event within the caller's transaction; the last thing it does before it commits.

    The row that is locked here orders all appends, so the chain has one end on any number of
    replicas. It is always locked last, after `state`, so nobody waits in a circle.
    """
    append_all(connection, (event,))


def append_all(connection: Connection, events: Sequence[Event]) -> None:
    """Record several events, in their order; as `append`, with one look at the chain's end."""
    if not events:
        return
    [(last, before)] = _NEXT.run(connection, {"count": len(events)})
    at = utc_now().isoformat(timespec="microseconds").replace("+00:00", "Z")
    rows = []
    for seq, event in enumerate(events, last - len(events) + 1):
        entry = Entry(
            seq=seq,
            at=at,
            actor=event.who.actor,
            action=event.action,
            agent_id=event.agent_id,
            address=event.who.address,
            detail=json.dumps(event.detail, ensure_ascii=True, sort_keys=True),
            hash="",
        )
        before = entry.hash_after(before)
        rows.append(vars(entry) | {"hash": before})
    _INSERT.run_each(connection, rows)
    _MOVE.run(connection, {"new_hash": before})


class AuditLog:
    """Reads the audit and checks its chain."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(self, event: Event) -> None:
        """Record an event in a transaction of its own, for what writes nothing else.

        Raises:
            DatabaseUnavailable: it cannot be recorded, so it must not be done.
            InsufficientStorage: the same.
        """

        def work(connection: Connection) -> None:
            event.who.require_counts(connection)
            append(connection, event)

        await self._database.run(work)

    async def entries(
        self,
        *,
        before: int | None = None,
        limit: int = 100,
        actor: str | None = None,
        agent_id: str | None = None,
        action: str | None = None,
    ) -> list[Entry]:
        """Return the newest entries first, those of a seq below `before`.

        Args:
            before: where the page before ended.
            limit: how many.
            actor: only what this token did.
            agent_id: only what was about this agent.
            action: only this, or with a trailing dot every action that begins so.
        """
        wanted = select(AUDIT).order_by(AUDIT.c.seq.desc()).limit(limit)
        if before is not None:
            wanted = wanted.where(AUDIT.c.seq < before)
        if actor is not None:
            wanted = wanted.where(AUDIT.c.actor == actor)
        if agent_id is not None:
            wanted = wanted.where(AUDIT.c.agent_id == agent_id)
        if action is not None and action.endswith("."):
            wanted = wanted.where(AUDIT.c.action.startswith(action, autoescape=True))
        elif action is not None:
            wanted = wanted.where(AUDIT.c.action == action)
        return await self._database.read(lambda connection: _entries(connection, wanted))

    async def verify(self, expect: str | None = None) -> Verdict:
        """Walk the whole chain in pages and say whether it is what was written.

        Whoever can write to the database can also compute a new chain. A head noted elsewhere tells
        that, too.

        Args:
            expect: a `seq:hash` that an earlier verify gave; it must still be in the chain.
        """
        seq_wanted, _, hash_wanted = (expect or "").partition(":")
        wanted = int(seq_wanted) if seq_wanted.isdigit() else None
        last, head = await self._database.read(
            lambda connection: connection.execute(
                select(AUDIT_HEAD.c.seq, AUDIT_HEAD.c.hash).where(AUDIT_HEAD.c.id == 1)
            ).one()
        )
        seq, before = 0, GENESIS
        if expect is not None and (wanted is None or not 0 < wanted <= last):
            return Verdict(last, f"{last}:{head}", last, "the head that was noted is not there")
        while seq < last:
            page = select(AUDIT).where(AUDIT.c.seq > seq, AUDIT.c.seq <= last)
            page = page.order_by(AUDIT.c.seq).limit(_PAGE)
            entries = await self._database.read(lambda c, page=page: _entries(c, page))  # type: ignore[misc]
            if not entries:
                return Verdict(seq, f"{seq}:{before}", seq + 1, "a row is missing")
            for entry in entries:
                reason = _wrong(entry, seq + 1, before)
                if not reason and entry.seq == wanted and entry.hash != hash_wanted:
                    reason = "the chain was written anew: the head that was noted is another one"
                if reason:
                    return Verdict(seq, f"{seq}:{before}", seq + 1, reason)
                seq, before = entry.seq, entry.hash
        if before != head:
            return Verdict(seq, f"{seq}:{before}", seq, "the chain does not end where it says")
        return Verdict(seq, f"{seq}:{before}")


def _wrong(entry: Entry, expected: int, before: str) -> str:
    if entry.seq != expected:
        return "a row is missing"
    if entry.hash_after(before) != entry.hash:
        return "the row was altered"
    return ""


def _entries(connection: Connection, wanted: Any) -> list[Entry]:
    rows: Iterable[Any] = connection.execute(wanted)
    return [Entry(**row._mapping) for row in rows]
