"""Removes old audit entries once they were exported (SLM_AUDIT_KEEP_DAYS).

The chain then starts at a cut: the number and hash of the last row that was removed, sealed by the
active encryption key, which someone who can only write to the database does not have. Any replica
may trim at any time; the state row's lock makes them take turns.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
from datetime import timedelta
from typing import Final

from sqlalchemy import Connection, delete, update

from slm.errors import Conflict
from slm.server.db import state
from slm.server.db.database import Database
from slm.server.db.tables import AUDIT, AUDIT_HEAD, utc_now
from slm.server.encryption.keyring import Keyring
from slm.server.security.audit import AuditEvent, Who, append
from slm.server.security.audit_chain import Link, Walk
from slm.server.security.audit_reader import EXPORTED, ends, entries_after, exported_upto, link_at

logger = logging.getLogger(__name__)

BATCH: Final = 500
"""The most entries removed in one transaction; writers wait for the state row meanwhile."""

CUT: Final = "audit.cut"

_PAUSE_SECONDS: Final = 0.02


async def trim(database: Database, keyring: Keyring, *, keep_days: int) -> int:
    """Remove entries that are older and were exported; return how many.

    Raises:
        Conflict: the chain is broken there, or is not the one that was exported.
        DatabaseUnavailable: the database does not answer; earlier batches are done.
    """
    before = (utc_now() - timedelta(days=keep_days)).isoformat(timespec="microseconds")
    upto = await database.read(exported_upto)
    removed = 0
    if upto is None:
        return 0
    while True:
        batch = functools.partial(_batch, keyring=keyring, upto=upto, before=before)
        gone = await database.run(batch)
        removed += gone
        if not gone:
            break
        await asyncio.sleep(_PAUSE_SECONDS)
    if removed:
        await database.run(_note_cut)
        logger.info("audit: removed %d exported entries", removed)
    return removed


def note_exported(connection: Connection, head: Link, who: Who) -> None:
    """Record that everything up to this row is in a file of the operator.

    Raises:
        Conflict: the audit has no such row.
    """
    who.require_counts(connection)
    if link_at(connection, head.seq) != head:
        raise Conflict("The audit has no entry of this number and hash.")
    append(connection, AuditEvent(who, EXPORTED, detail={"head": str(head)}))


def _batch(connection: Connection, *, keyring: Keyring, upto: Link, before: str) -> int:
    """Move the cut by at most BATCH rows and remove the rows below it, both or neither."""
    keyring.follow(connection, state.lock(connection).keyring_version)
    if link_at(connection, upto.seq) != upto:
        raise Conflict("the exported entries are not those in the audit; nothing more is removed.")
    cut = ends(connection).cut
    entries = entries_after(connection, cut.seq, upto.seq, BATCH)
    old = list(itertools.takewhile(lambda entry: str(entry.at) < before, entries))
    walk = Walk(cut)
    if not walk.go(old):
        # Altered rows are evidence.
        raise Conflict(f"entry {walk.at.seq + 1}: {walk.reason}; nothing more is removed.")
    if old:
        connection.execute(delete(AUDIT).where(AUDIT.c.seq <= walk.at.seq))
        connection.execute(
            update(AUDIT_HEAD)
            .where(AUDIT_HEAD.c.id == 1)
            .values(
                cut_seq=walk.at.seq,
                cut_hash=walk.at.hash,
                cut_seal=keyring.vault.seal(str(walk.at)),
            )
        )
    return len(old)


def _note_cut(connection: Connection) -> None:
    cut = ends(connection).cut
    append(connection, AuditEvent(Who("slm"), CUT, detail={"cut": str(cut)}))
