"""Trims `changes` to what resuming needs (SLM_CHANGES_KEEP), and moves the floor with the rows.

Knows the state row and the table of changes. Any replica may do this at any time: the state row's
lock makes them take turns, and a client below the floor gets a resync (docs/protocol.md section 4).
"""

from __future__ import annotations

import functools
import logging
from typing import Final

from sqlalchemy import Connection, delete, select

from slm.server import failpoints
from slm.server.db import state
from slm.server.db.database import Database
from slm.server.db.tables import CHANGES

logger = logging.getLogger(__name__)

BATCH: Final = 1000
"""The most changes in one transaction: writers wait for the state row meanwhile."""


async def compact(database: Database, *, keep: int, batch: int = BATCH) -> int:
    """Remove all but the newest `keep` changes, `batch` per transaction; return how many.

    Raises:
        DatabaseUnavailable: the database does not answer; earlier batches are done.
    """
    removed = 0
    while moved := await database.run(functools.partial(_batch, keep=keep, batch=batch)):
        removed += moved
    if removed:
        logger.info("compaction: removed %d changes", removed)
    return removed


def _batch(connection: Connection, *, keep: int, batch: int) -> int:
    """Move the floor by at most `batch` and remove the rows below it, both or neither."""
    locked = state.lock(connection)
    floor = min(locked.revision - keep, locked.floor + batch)
    if floor <= locked.floor:
        return 0
    # Its row goes, and a client at this revision must still be able to tell which change it was.
    floor_id = connection.execute(
        select(CHANGES.c.change_id).where(CHANGES.c.revision == floor)
    ).scalar_one_or_none()
    connection.execute(delete(CHANGES).where(CHANGES.c.revision <= floor))
    failpoints.reach("in_compaction")
    state.move_floor(connection, floor, floor_id or "")
    return floor - locked.floor
