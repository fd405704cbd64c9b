"""Trims `changes` to what resuming needs (SLM_CHANGES_KEEP); the floor moves with the rows.

Knows the state row and the table of changes. Any replica may do it at any time: the state row's
lock makes them take turns, and a client below the floor gets a resync (docs/protocol.md section 4).
"""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import Final

from sqlalchemy import Connection, delete, select, update

from slm.errors import ProblemError
from slm.server import failpoints
from slm.server.database import Database
from slm.server.models import CHANGES, STATE
from slm.server.supervisor import Supervisor

logger = logging.getLogger(__name__)

BATCH: Final = 1000
"""So many changes in one transaction: writers wait for the state row as long as it takes."""


class Compaction:
    """Compacts now and then in the background.

    Args:
        database: where the changes are.
        keep: how many of the newest changes stay.
        interval_seconds: how often to look.
        supervisor: of the server's tasks.
    """

    def __init__(
        self,
        database: Database,
        *,
        keep: int,
        interval_seconds: float,
        supervisor: Supervisor | None = None,
    ) -> None:
        self._database = database
        self._keep = keep
        self._interval_seconds = interval_seconds
        supervisor = supervisor or Supervisor()
        self._task = supervisor.task("compaction", self._run, needed=False)

    async def start(self) -> None:
        """Begin; the first look is at once."""
        self._task.start()

    async def stop(self) -> None:
        """Stop; a batch under way is committed or rolled back as a whole."""
        await self._task.stop()

    async def _run(self) -> None:
        while True:
            try:
                removed = await compact(self._database, keep=self._keep)
                if removed:
                    logger.info("compaction: removed %d changes", removed)
            except ProblemError as error:
                logger.warning("compaction: %s", error.detail)
            except Exception as error:
                # The class alone: a driver's text may hold what was read.
                logger.error("compaction failed: %s", type(error).__name__)
            await asyncio.sleep(self._interval_seconds)


async def compact(database: Database, *, keep: int, batch: int = BATCH) -> int:
    """Remove all but the newest `keep` changes, `batch` in a transaction; return how many.

    Raises:
        DatabaseUnavailable: the database does not answer; the batches before are done.
    """
    removed = 0
    while moved := await database.run(functools.partial(_batch, keep=keep, batch=batch)):
        removed += moved
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
