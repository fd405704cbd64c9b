"""The audit: who did what, to which agent, when and from where, as a chain of hashes.

`append` is part of the caller's transaction, so what cannot be recorded does not happen. Contains
no secret: a detail names fields, never their values. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from sqlalchemy import (
    BigInteger,
    Connection,
    Integer,
    bindparam,
    case,
    cast,
    func,
    insert,
    select,
    update,
)

from slm.errors import Overloaded
from slm.server.db.column_types import text_of, the_row
from slm.server.db.database import Database
from slm.server.db.statements import Prepared
from slm.server.db.tables import AUDIT, AUDIT_HEAD, utc_now
from slm.server.security.audit_chain import GENESIS as GENESIS
from slm.server.security.audit_chain import START, ChainEntry, Verdict, Walk, parse_link
from slm.server.security.audit_reader import (
    WALK_PAGE,
    AuditFilter,
    EntryPage,
    ExportedPage,
    ends,
    entries_after,
    entry_page,
    export_page,
)
from slm.server.security.token_table import Caller

_MOST: Final = 2**62
_LAST_ROW: Final = func.coalesce(
    select(func.max(AUDIT.c.seq)).where(AUDIT.c.seq <= _MOST).scalar_subquery(), 0
)
# Updates and locks the head. If another program altered it, recording must still work: then the
# last row is used instead, and `verify` finds where it was altered.
_NEXT: Final = Prepared(
    update(AUDIT_HEAD)
    .where(AUDIT_HEAD.c.id == 1)
    .values(
        seq=case(
            (AUDIT_HEAD.c.seq.between(_LAST_ROW, _MOST), cast(AUDIT_HEAD.c.seq, BigInteger)),
            else_=_LAST_ROW,
        )
        + bindparam("count", type_=Integer)
    )
    .returning(AUDIT_HEAD.c.seq, AUDIT_HEAD.c.hash)
)
_INSERT: Final = Prepared(insert(AUDIT))
_MOVE: Final = Prepared(
    update(AUDIT_HEAD).where(AUDIT_HEAD.c.id == 1).values(hash=bindparam("new_hash"))
)

_TRIES: Final = 100
_PAUSE_SECONDS: Final = 0.1

T = TypeVar("T")


@dataclass(frozen=True)
class Who:
    """Who does something, and from where.

    Attributes:
        actor: the token's name.
        address: the peer's IP address; None for what the server does by itself.
        caller: the token, which must still be valid during the transaction; None for what the
            server does by itself.
    """

    actor: str
    address: str | None = None
    caller: Caller | None = field(default=None, compare=False)

    def require_counts(self, connection: Connection, tokens_version: int | None = None) -> None:
        """Refuse the request if the token was revoked meanwhile; see `Caller.require_counts`.

        Raises:
            Unauthorized: it is no longer valid.
        """
        if self.caller is not None:
            self.caller.require_counts(connection, tokens_version)


@dataclass(frozen=True)
class AuditEvent:
    """One thing to record.

    Attributes:
        who: who does it, and from where.
        action: `agent.create`, `key.read`, `token.revoke`, …
        agent_id: the agent concerned; None for something else or for all agents.
        detail: anything else; names and numbers, never a value that may be secret.
    """

    who: Who
    action: str
    agent_id: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


def append(connection: Connection, event: AuditEvent) -> None:
    """Record an event within the caller's transaction, as the last thing before it commits.

    The row locked here orders all appends, so the chain has one end on any number of replicas. It
    is always locked last, after `state`, so there are no deadlocks.
    """
    append_all(connection, (event,))


def append_all(connection: Connection, events: Sequence[AuditEvent]) -> None:
    """Record several events, in order; like `append`, with one look at the chain's end."""
    if not events:
        return
    last, stored = the_row(_NEXT.run(connection, {"count": len(events)}))
    before = text_of(stored)
    at = utc_now().isoformat(timespec="microseconds").replace("+00:00", "Z")
    rows = []
    for seq, event in enumerate(events, last - len(events) + 1):
        entry = ChainEntry(
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


def reseal(connection: Connection, reencrypt: Callable[[str], str | None]) -> bool:
    """Seal the cut with the active encryption key if another one sealed it; return whether it did.

    Args:
        connection: inside a transaction that writes.
        reencrypt: returns the seal under the active key; None if there is nothing to do.
    """
    seal = connection.execute(select(AUDIT_HEAD.c.cut_seal)).scalar_one_or_none()
    renewed = None if seal is None else reencrypt(seal)
    if renewed is None:
        return False
    connection.execute(update(AUDIT_HEAD).where(AUDIT_HEAD.c.id == 1).values(cut_seal=renewed))
    return True


class AuditLog:
    """Reads the audit and checks its chain.

    Args:
        database: where it is stored.
        unseal: opens a cut's seal, or returns None if it is not one; by default no cut is accepted.
    """

    def __init__(
        self, database: Database, unseal: Callable[[str], str | None] = lambda seal: None
    ) -> None:
        self._database = database
        self._unseal = unseal

    async def record(self, event: AuditEvent) -> None:
        """Record an event in its own transaction, for actions that write nothing else.

        Raises:
            DatabaseUnavailable: it cannot be recorded, so the action must not happen.
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
    ) -> list[ChainEntry]:
        """Return entries with a seq below `before`, newest first.

        Args:
            before: where the previous page ended.
            limit: how many.
            actor: only what this token did.
            agent_id: only what concerned this agent.
            action: only this action, or with a trailing dot every action that starts with it.
        """
        wanted = AuditFilter(before, actor, agent_id, action)
        return (await self.page(wanted, limit)).entries

    async def page(self, wanted: AuditFilter, limit: int) -> EntryPage:
        """Return at most `limit` entries, newest first, and where the next page starts.

        A page may be short, even empty, and still have a following one: each page examines a
        bounded number of rows, whatever the filter.

        Raises:
            DatabaseUnavailable: the database does not answer, or not in time.
            Overloaded: too many such reads are running.
        """
        return await self._database.read_long(
            lambda connection: entry_page(connection, wanted, limit)
        )

    async def _when_free(self, fn: Callable[[Connection], T]) -> T:
        """Run one step of a long walk; if others are reading, it waits for its turn."""
        for _ in range(_TRIES):
            with contextlib.suppress(Overloaded):
                return await self._database.read_long(fn)
            await asyncio.sleep(_PAUSE_SECONDS)
        return await self._database.read_long(fn)

    async def export_page(
        self, after: int | None, upto: int | None, *, everything: bool = False
    ) -> ExportedPage:
        """Return some entries in the order of the chain, from where the last export ended.

        Raises:
            Conflict: the audit has no row `after`, or no longer has it.
            DatabaseUnavailable: the database does not answer.
        """
        return await self._database.read_long(
            lambda connection: export_page(connection, after, upto, everything=everything)
        )

    async def verify(self, expect: str | None = None) -> Verdict:
        """Check the whole chain in pages and say whether it is as it was written.

        Someone who can write to the database can also compute a new chain. Comparing with a head
        that was noted elsewhere detects that, too.

        Args:
            expect: the `seq:hash` from an earlier verify; it must still be in the chain.
        """
        noted = None if expect is None else parse_link(expect)
        cut, head, seal = await self._database.read(ends)
        if cut != START and self._unseal(seal or "") != str(cut):
            reason = "the beginning was cut off by somebody without the encryption key"
            return Verdict(0, str(cut), cut.seq + 1, reason, str(cut))
        if expect is not None and (noted is None or not cut.seq <= noted.seq <= head.seq):
            reason = "the noted head is not in the audit"
            return Verdict(head.seq, str(head), head.seq, reason)
        walk = Walk(cut, noted)

        def go_on(connection: Connection) -> bool:
            entries = entries_after(connection, walk.at.seq, head.seq, WALK_PAGE)
            if not entries:
                walk.reason = "a row is missing"
            # Hashed here, in the database's thread: a million rows take seconds.
            return bool(entries) and walk.go(entries)

        while walk.at.seq < head.seq:
            if not await self._when_free(go_on):
                if (await self._database.read(ends)).cut != cut:
                    # It was trimmed meanwhile.
                    return await self.verify(expect)
                return walk.verdict()
        if walk.at != head:
            return walk.verdict(walk.at.seq, "the chain does not end at its recorded head")
        return walk.verdict()
