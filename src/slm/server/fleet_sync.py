"""FleetSync: tells the other replicas of this one's backends, and reads what they tell.

By way of one table of PostgreSQL, a row a backend and replica, and one row a replica that says how
far its stream has come; a NOTIFY makes who has news write at once while a receipt waits anywhere.
On SQLite there is one server and none of this runs. Knows no connection and no route.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection, and_, delete, func, or_, select, true
from sqlalchemy.dialects.postgresql import insert

from slm.errors import ProblemError
from slm.server.backends import Backend
from slm.server.database import Database
from slm.server.fleet import KEEP_GONE_SECONDS, Fleet
from slm.server.models import BACKENDS, REPLICAS
from slm.server.replicas import database_time
from slm.server.supervisor import Supervisor

logger = logging.getLogger(__name__)

CHANNEL: Final = "slm_fleet"
"""A receipt waits somewhere: who has news of backends writes it now."""

URGENT_SECONDS: Final = 0.02
"""How soon news is written while a receipt waits."""

LOOK_SECONDS: Final = 0.05
"""How often a server that waits looks for news."""

CALL_AGAIN_SECONDS: Final = 1.0
"""How often it says that it still waits; others hurry for twice as long after each time."""

_CLEAN_SECONDS: Final = 60.0
_HEAD: Final = ""
"""The id of the row that says how far a replica's stream has come; no backend has it."""


@dataclass
class _News:
    """What one look found.

    Attributes:
        live: the replicas whose lease has not run out.
        heads: how far each one's stream had come when it last wrote.
        seqs: of its last row.
        rows: (replica, id, data) of backends that changed.
        offset: what makes our times the database's.
    """

    live: set[str]
    heads: dict[str, int] = field(default_factory=dict)
    seqs: dict[str, int] = field(default_factory=dict)
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    offset: float = 0.0


class FleetSync:
    """Two tasks: one writes what others should know, one reads while somebody waits here.

    Args:
        database: that of all replicas.
        fleet: told from and told to.
        interval_seconds: how often news is written while nobody waits.
        lease_seconds: after how long without a word a replica counts as gone.
    """

    def __init__(
        self,
        database: Database,
        fleet: Fleet,
        interval_seconds: float,
        lease_seconds: float,
        supervisor: Supervisor | None = None,
    ) -> None:
        self._database = database
        self._fleet = fleet
        self._interval_seconds = interval_seconds
        self._lease_seconds = lease_seconds
        self._hurry = asyncio.Event()
        self._hurry_until = 0.0
        self._told_head = -1
        self._seq = 0
        self._cleaned_at = 0.0
        self._seen: dict[str, int] = {}
        self._reading = asyncio.Lock()
        supervisor = supervisor or Supervisor()
        self._tasks = [
            supervisor.task("fleet-write", lambda: self._for_ever(self._write), needed=False),
            supervisor.task(
                "fleet-read", lambda: self._for_ever(self._read_while_waiting), needed=False
            ),
        ]

    async def start(self) -> None:
        """Begin."""
        for task in self._tasks:
            task.start()

    async def stop(self) -> None:
        """Stop, after telling that this server's backends are gone."""
        for task in self._tasks:
            await task.stop()
        with contextlib.suppress(ProblemError):
            await self._flush()

    def hear(self, _: str = "") -> None:
        """Take the call: somebody waits somewhere."""
        now = asyncio.get_running_loop().time()
        self._hurry_until = now + 2 * CALL_AGAIN_SECONDS
        self._hurry.set()

    async def refresh(self) -> None:
        """Read what other replicas have told so far; without the database, what is known stays."""
        with contextlib.suppress(ProblemError):
            await self._look()

    # --- writing ---

    async def _write(self) -> None:
        fleet, loop = self._fleet, asyncio.get_running_loop()
        written_at = float("-inf")
        while True:
            await _first_of(fleet.news.wait(), self._hurry.wait())
            urgent = loop.time() < self._hurry_until
            gap = URGENT_SECONDS if urgent else self._interval_seconds
            left = written_at + gap - loop.time()
            if left > 0:
                # A call in the meantime is answered at once.
                self._hurry.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._hurry.wait()
            fleet.news.clear()
            self._hurry.clear()
            urgent = loop.time() < self._hurry_until
            if fleet.dirty or (urgent and fleet.head != self._told_head):
                await self._flush()
                written_at = loop.time()

    async def _flush(self) -> None:
        """Write what changed, and how far our stream has come, in one transaction."""
        fleet = self._fleet
        head, dirty = fleet.head, fleet.take_dirty()
        seq = self._seq + 1
        try:
            await self._database.run(lambda connection: self._tell(connection, seq, head, dirty))
        except BaseException:
            fleet.dirty.update(backend.id for backend in dirty)
            raise
        self._seq, self._told_head = seq, head

    def _tell(self, connection: Connection, seq: int, head: int, dirty: list[Backend]) -> None:
        now, offset = _clock(connection)
        rows = [
            _row(b.id, b.replica, seq, b.to_json(offset), b.connected, now)
            for b in dirty
        ]  # fmt: skip
        rows.append(_row(_HEAD, self._fleet.replica, seq, {"head": head}, True, now))
        statement = insert(BACKENDS)
        changed = {
            name: getattr(statement.excluded, name)
            for name in ("seq", "data", "connected", "written_at")
        }
        upsert = statement.on_conflict_do_update(index_elements=["id", "replica"], set_=changed)
        connection.execute(upsert, rows)

    # --- reading ---

    async def _read_while_waiting(self) -> None:
        fleet, loop = self._fleet, asyncio.get_running_loop()
        await fleet.asked.wait()
        called_at = float("-inf")
        while fleet.waiters:
            if loop.time() - called_at >= CALL_AGAIN_SECONDS:
                called_at = loop.time()
                await self._call()
            news = await self._look()
            for waiter in tuple(fleet.waiters):
                if all(news.heads.get(r, -1) >= waiter.subject.revision for r in news.live):
                    fleet.look(waiter)
            await asyncio.sleep(LOOK_SECONDS)
        fleet.asked.clear()

    async def _call(self) -> None:
        call = select(func.pg_notify(CHANNEL, ""))
        await self._database.run(lambda connection: connection.execute(call) and None)

    async def _look(self) -> _News:
        async with self._reading:
            news = await self._database.run(self._read)
            for replica, key, data in news.rows:
                self._fleet.merge(replica, key, json.loads(data), news.offset)
            self._seen.update(news.seqs)
            self._fleet.keep_replicas(news.live)
        return news

    def _read(self, connection: Connection) -> _News:
        now, offset = _clock(connection)
        mine = self._fleet.replica
        lease = select(REPLICAS.c.id).where(
            REPLICAS.c.seen_at >= now - self._lease_seconds, REPLICAS.c.id != mine
        )
        news = _News(set(connection.execute(lease).scalars()), offset=offset)
        b = BACKENDS.c
        heads = select(b.replica, b.seq, b.data).where(b.id == _HEAD, b.replica != mine)
        for row in connection.execute(heads):
            if row.seq > self._seen.get(row.replica, 0):
                news.seqs[row.replica] = row.seq
            news.heads[row.replica] = json.loads(row.data)["head"]
        if news.seqs:
            # One replica writes its rows one transaction after the other: what is up to its last
            # head is all there, and what comes later has a higher number.
            newer = or_(
                *(
                    and_(b.replica == r, b.seq > self._seen.get(r, 0), b.seq <= seq)
                    for r, seq in news.seqs.items()
                )
            )
            rows = select(b.replica, b.id, b.data).where(newer, b.id != _HEAD)
            news.rows = [(r.replica, r.id, r.data) for r in connection.execute(rows)]
        if now - self._cleaned_at > _CLEAN_SECONDS:
            self._cleaned_at = now
            old = b.written_at < now - KEEP_GONE_SECONDS
            # Of a server that died the row stays as long as its lease can be seen: what it said
            # last may be older than its end.
            gone = or_(b.connected != true(), b.replica.not_in(select(REPLICAS.c.id)))
            connection.execute(delete(BACKENDS).where(old, gone))
        return news

    async def _for_ever(self, work: Any) -> None:
        while True:
            try:
                await work()
            except ProblemError as error:
                logger.debug("not now: %s", error.code)
                await asyncio.sleep(self._interval_seconds)
            except Exception as error:
                # The class alone: a driver's text may hold what was read.
                logger.error("sharing the fleet failed with %s", type(error).__name__)
                await asyncio.sleep(self._interval_seconds)


def _row(
    key: str, replica: str, seq: int, data: dict[str, Any], connected: bool, now: float
) -> dict[str, Any]:
    return {
        "id": key,
        "replica": replica,
        "seq": seq,
        "data": json.dumps(data, ensure_ascii=False),
        "connected": connected,
        "written_at": now,
    }


def _clock(connection: Connection) -> tuple[float, float]:
    """Return the database's time, and what makes ours the same."""
    before = time.time()
    now = database_time(connection)
    return now, now - (before + time.time()) / 2


async def _first_of(*waits: Coroutine[Any, Any, Any]) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
