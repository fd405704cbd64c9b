"""FleetSync: reports this replica's backends to the other replicas, and reads their reports.

Uses one PostgreSQL table, written in batches: nothing while no other replica is alive, everything
once one appears, then only what changed, at most once per interval. While a receipt is waiting on
any replica, a NOTIFY makes replicas write their news at once. With SQLite there is only one server,
and none of this runs. Knows no connection and no route.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Coroutine
from typing import Any, Final

from sqlalchemy import Connection, func, select

from slm.errors import ProblemError
from slm.server.db.database import Database
from slm.server.db.leases import database_time, is_live
from slm.server.db.tables import REPLICAS
from slm.server.fleet.backend import Backend
from slm.server.fleet.elsewhere import Account, Lapse
from slm.server.fleet.outcome import Subject
from slm.server.fleet.replication_rows import ReportPage, TellTale, page_text
from slm.server.fleet.tracker import KEEP_GONE_SECONDS, Fleet
from slm.server.tasks.slices import in_slices
from slm.server.tasks.supervisor import Supervisor

logger = logging.getLogger(__name__)

CHANNEL: Final = "slm_fleet"
"""The NOTIFY that a receipt is waiting or a replica has started: write news of backends now."""

URGENT_SECONDS: Final = 0.02
"""How soon news is written while a receipt is waiting."""

LOOK_SECONDS: Final = 0.05
"""How often a waiting server checks for news."""

CALL_AGAIN_SECONDS: Final = 1.0
"""How often it repeats that it is waiting; others hurry for twice as long after each time."""

CATCH_UP_SECONDS: Final = 2.0
"""How long a server that has just started waits for reports from the others."""

MAX_BATCHES: Final = 500
MAX_BATCH_BYTES: Final = 4 * 1024 * 1024
"""After this many batches, or bytes in them, everything is written again in their place."""

PAGE_BYTES: Final = 256 * 1024
MAX_PAGES: Final = 500

_CLEAN_SECONDS: Final = 60.0
_CHECK_AGAIN_SECONDS: Final = 0.2


class FleetSync:
    """Two tasks: one writes this replica's reports, one reads the others' while a receipt waits.

    Args:
        database: the database shared by all replicas.
        fleet: the source of what is written and the target of what is read.
        interval_seconds: how often news is written while no receipt is waiting.
        lease_seconds: a replica that is silent for this long is considered gone.

    Attributes:
        accounts: what each other replica has reported.
        rows: reads and writes the table.
    """

    def __init__(
        self,
        database: Database,
        fleet: Fleet,
        interval_seconds: float,
        lease_seconds: float,
        supervisor: Supervisor | None = None,
    ) -> None:
        self.accounts: dict[str, Account] = {}
        self.rows = TellTale(fleet.replica)
        self._database = database
        self._fleet = fleet
        self._interval_seconds = interval_seconds
        self._lease_seconds = lease_seconds
        self._hurry = asyncio.Event()
        self._hurry_until = 0.0
        # Writing.
        self._others_live = False
        self._full = True
        self._seq = 0
        self._batches = 0
        self._batch_bytes = 0
        self._full_bytes = 0
        self._told_head = -1
        self._told: dict[str, int] = {}
        self._offset = 0.0
        self._checked_at = float("-inf")
        self._cleaned_at = 0.0
        # Reading.
        self._seen: dict[str, int] = {}
        self._reading = asyncio.Lock()
        self._looks = 0
        supervisor = supervisor or Supervisor()
        self._tasks = [
            supervisor.task("fleet-write", lambda: self._for_ever(self._write), needed=False),
            supervisor.task(
                "fleet-read", lambda: self._for_ever(self._read_while_waiting), needed=False
            ),
        ]

    async def start(self) -> None:
        """Start, and let the other replicas know that this server is here."""
        for task in self._tasks:
            task.start()
        with contextlib.suppress(ProblemError):
            await self._call()

    async def stop(self) -> None:
        """Stop after a final report: this server's backends are gone."""
        for task in self._tasks:
            await task.stop()
        # Even if no other server is there to read it: the next one to start will.
        with contextlib.suppress(ProblemError):
            await self._flush(last=True)

    def hear(self, _: str = "") -> None:
        """Handle a NOTIFY: a receipt is waiting somewhere, or a replica has started."""
        now = asyncio.get_running_loop().time()
        self._hurry_until = now + 2 * CALL_AGAIN_SECONDS
        self._hurry.set()

    async def refresh(self) -> None:
        """Read what other replicas have reported; without the database, keep what is known."""
        with contextlib.suppress(ProblemError):
            await self._look()

    async def covers(self, subject: Subject) -> bool:
        """Whether the others have reported everything about a change older than this server.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + CATCH_UP_SECONDS
        await self._call()
        while True:
            await self._look()
            accounts = self.accounts.values()
            behind = [
                each
                for each in accounts
                if each.head < subject.revision
                and not each.last
                and (each.live or each.ends_at >= subject.committed_at)
            ]
            if not behind:
                return any(each.head >= subject.revision for each in accounts)
            if not all(each.live for each in behind) or loop.time() >= until:
                return False
            await asyncio.sleep(LOOK_SECONDS)

    # --- writing ---

    async def _write(self) -> None:
        fleet, loop = self._fleet, asyncio.get_running_loop()
        written_at = float("-inf")
        while True:
            await self._until_due()
            if self._others_live:
                gap = URGENT_SECONDS if self._is_urgent() else self._interval_seconds
                await self._sleep_unless_called(written_at + gap - loop.time())
            called = self._hurry.is_set() and not self._others_live
            self._hurry.clear()
            if called or loop.time() >= self._checked_at + self._check_seconds:
                await self._check()
            if not self._others_live:
                continue
            fleet.news.clear()
            head_is_news = self._is_urgent() and fleet.head != self._told_head
            if self._full or fleet.dirty or head_is_news:
                await self._flush()
                written_at = loop.time()

    @property
    def _check_seconds(self) -> float:
        return min(self._lease_seconds / 3, _CLEAN_SECONDS)

    def _is_urgent(self) -> bool:
        return asyncio.get_running_loop().time() < self._hurry_until

    async def _until_due(self) -> None:
        """Wait for news, a NOTIFY or the next check."""
        loop = asyncio.get_running_loop()
        waits = [self._hurry.wait()]
        if self._others_live:
            waits.append(self._fleet.news.wait())
        await _first_of(self._checked_at + self._check_seconds - loop.time(), *waits)
        # Repeated notifications must not cause as many checks.
        await asyncio.sleep(
            0.0
            if self._others_live
            else max(0.0, self._checked_at + _CHECK_AGAIN_SECONDS - loop.time())
        )

    async def _sleep_unless_called(self, seconds: float) -> None:
        if seconds > 0:
            self._hurry.clear()
            await _first_of(seconds, self._hurry.wait())

    async def _check(self) -> None:
        """Check for other live servers and for our own rows, and clean up."""

        def work(connection: Connection) -> tuple[int, tuple[int, int]]:
            now, self._offset = _clock(connection)
            others = select(func.count()).where(
                REPLICAS.c.seen_at.between(now - self._lease_seconds, now + self._lease_seconds),
                REPLICAS.c.id != self._fleet.replica,
            )
            if now - self._cleaned_at >= _CLEAN_SECONDS:
                self._cleaned_at = now
                self.rows.clean(connection, now - KEEP_GONE_SECONDS)
            return connection.execute(others).scalar_one(), self.rows.own(connection)

        self._checked_at = asyncio.get_running_loop().time()
        others, own = await self._database.run(work)
        # Others may have deleted our rows while our lease had lapsed.
        self._full = self._full or not others or own != (self._seq, self._batches)
        self._others_live = others > 0

    async def _flush(self, *, last: bool = False) -> None:
        """Write what changed and how far our stream has come, in one transaction."""
        fleet = self._fleet
        full = (
            last
            or self._full
            or self._batches >= MAX_BATCHES
            or self._batch_bytes > max(MAX_BATCH_BYTES, 2 * self._full_bytes)
        )
        # Cleared only once written: later reports build on it.
        self._full = True
        head, changed = fleet.head, fleet.take_dirty()
        pages = await self._pages(head, fleet.own() if full else changed, full=full)
        # A new sequence each time: after a failed transaction we may not know whether it committed.
        self._seq += 1
        seq = self._seq
        await self._database.run(
            lambda connection: self.rows.write(connection, seq, pages, full=full, last=last)
        )
        self._full = False
        self._told_head = head
        size = sum(map(len, pages))
        if full:
            self._batches, self._batch_bytes, self._full_bytes = len(pages), 0, size
        else:
            self._batches, self._batch_bytes = self._batches + len(pages), self._batch_bytes + size

    async def _pages(self, head: int, backends: list[Backend], *, full: bool) -> list[str]:
        """Return the rows' JSON, and note what it reports of each backend."""
        pages: list[str] = []
        texts: list[str] = []
        size = 0
        told = {} if full else self._told
        async for backend in in_slices(backends):
            text = json.dumps(backend.to_json(self._offset, told.get(backend.id)))
            told[backend.id] = backend.acks.number
            texts.append(f"{json.dumps(backend.id)}:{text}")
            size += len(text)
            if size > PAGE_BYTES:
                pages.append(page_text(head, texts))
                texts, size = [], 0
        if texts or not pages:
            pages.append(page_text(head, texts))
        self._told = told
        return pages

    # --- reading ---

    async def _read_while_waiting(self) -> None:
        fleet, loop = self._fleet, asyncio.get_running_loop()
        await fleet.asked.wait()
        called_at = float("-inf")
        while fleet.waiters:
            if loop.time() - called_at >= CALL_AGAIN_SECONDS:
                called_at = loop.time()
                await self._call()
            await self._look()
            live = [each for each in self.accounts.values() if each.live]
            for waiter in tuple(fleet.waiters):
                if all(each.head >= waiter.subject.revision for each in live):
                    await fleet.look(waiter)
            await asyncio.sleep(LOOK_SECONDS)
        fleet.asked.clear()

    async def _call(self) -> None:
        call = select(func.pg_notify(CHANNEL, ""))
        await self._database.run(lambda connection: connection.execute(call) and None)

    async def _look(self) -> None:
        """Read what is new. Callers that arrive during a read share the next one.

        No turn of the event loop is long, however much there is to read.
        """
        wanted = self._looks + (2 if self._reading.locked() else 1)
        async with self._reading:
            if self._looks >= wanted:
                return
            page = await self._read_page(None)
            for _ in range(MAX_PAGES):
                await self._take(page)
                if page.after is None:
                    break
                # A transaction's remaining rows may be on the next page, which may never be read.
                replica, seq, _ = page.after
                self._seen[replica] = seq - 1
                page = await self._read_page(page.after)
            self._looks += 1

    async def _read_page(self, after: tuple[str, int, str] | None) -> ReportPage:
        seen = dict(self._seen)

        def work(connection: Connection) -> tuple[ReportPage, float]:
            before = time.time()
            page = self.rows.read(connection, seen, KEEP_GONE_SECONDS, after)
            return page, page.now - before

        page, offset = await self._database.run(work)
        self._offset = offset
        return page

    async def _take(self, page: ReportPage) -> None:
        fleet, offset = self._fleet, self._offset
        self._take_leases(page, offset)
        async for batch in in_slices(page.batches):
            account = self.accounts.setdefault(batch.replica, Account())
            if batch.head is not None:
                account.head = batch.head
            account.last = account.last or batch.last
            account.written_at = batch.written_at - offset
            if batch.replica not in page.leases:
                account.ends_at = account.written_at
            async for key, told in in_slices(batch.backends.items()):
                fleet.merge(batch.replica, key, told, offset)
            self._seen[batch.replica] = max(batch.seq, self._seen.get(batch.replica, -1))
        self._keep_replicas()

    def _take_leases(self, page: ReportPage, offset: float) -> None:
        for replica, seen_at in page.leases.items():
            account = self.accounts.setdefault(replica, Account())
            account.live = is_live(seen_at, page.now, self._lease_seconds)
            account.ends_at = min(seen_at + self._lease_seconds, page.now) - offset
        long_ago = page.now - offset - KEEP_GONE_SECONDS
        for replica, account in list(self.accounts.items()):
            if replica not in page.leases:
                account.live = False
                if max(account.written_at, account.ends_at) < long_ago:
                    del self.accounts[replica]
                    self._seen.pop(replica, None)
                    self._fleet.forget_replica(replica)

    def _keep_replicas(self) -> None:
        self._fleet.keep_replicas(
            {replica for replica, account in self.accounts.items() if account.live},
            {
                replica: Lapse(account.head, account.ends_at)
                for replica, account in self.accounts.items()
                if not account.live
            },
        )

    async def _for_ever(self, work: Any) -> None:
        """Repeat the work after a database outage; the supervisor handles other errors."""
        while True:
            try:
                await work()
            except ProblemError as error:
                logger.debug("not now: %s", error.code)
                await asyncio.sleep(self._interval_seconds)


def _clock(connection: Connection) -> tuple[float, float]:
    """Return the database's time, and the offset from our clock to it."""
    before = time.time()
    now = database_time(connection)
    return now, now - (before + time.time()) / 2


async def _first_of(seconds: float, *waits: Coroutine[Any, Any, Any]) -> None:
    """Wait until one of them finishes, at most `seconds`."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
