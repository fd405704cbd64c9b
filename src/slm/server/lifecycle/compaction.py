"""Trims `changes` to what resuming needs (SLM_CHANGES_KEEP); the floor moves with the rows.

Knows the state row and the table of changes. Any replica may do it at any time: the state row's
lock makes them take turns, and a client below the floor gets a resync (docs/protocol.md section 4).
"""

from __future__ import annotations

import functools
import logging
from typing import Final

from sqlalchemy import Connection, delete, select, update

from slm.server import failpoints
from slm.server.db.database import Database
from slm.server.db.tables import CHANGES, STATE

logger = logging.getLogger(__name__)

BATCH: Final = 1000
"""So many changes in one transaction: writers wait for the state row as long as it takes."""


async def compact(database: Database, *, keep: int, batch: int = BATCH) -> int:
    """Remove all but the newest `keep` changes, `batch` in a transaction; return how many.

    Raises:
        DatabaseUnavailable: the database does not answer; the batches before are done.
    """
    removed = 0
    while moved := await database.run(functools.partial(_batch, keep=keep, batch=batch)):
        removed += moved
    if removed:
        logger.info("compaction: removed %d changes", removed)
    return removed


def _batch(connection: Connection, *, keep: int, batch: int) -> int:
    """Move the floor by at most `batch` and remove what is under it, both or neither."""
    state = connection.execute(
        # The lock that every writer takes first; SQLite has it by its BEGIN IMMEDIATE.
        select(STATE.c.revision, STATE.c.floor).where(STATE.c.id == 1).with_for_update()
    ).one()
    floor = min(state.revision - keep, state.floor + batch)
    if floor <= state.floor:
        return 0
    # Its row goes, and whoever stands there must still find which change it was.
    floor_id = connection.execute(
        select(CHANGES.c.change_id).where(CHANGES.c.revision == floor)
    ).scalar_one_or_none()
    connection.execute(delete(CHANGES).where(CHANGES.c.revision <= floor))
    failpoints.reach("in_compaction")
    moved = {"floor": floor, "floor_id": floor_id or ""}
    connection.execute(update(STATE).where(STATE.c.id == 1).values(moved))
    return int(floor - state.floor)
