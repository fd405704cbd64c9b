"""ChangeFeed: takes what was committed, in order, and moves the catalog and the hub.

The only reader of `changes` for the live stream, and the only one to move the catalog. What this
server itself committed it is told, and passes on where it is the very next change; all else it
reads. Knows no HTTP and no connection (docs/protocol.md sections 2 and 4).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from sqlalchemy import update

from slm import tracing
from slm.errors import ProblemError
from slm.server import failpoints
from slm.server.auth import TokenTable
from slm.server.catalog import Catalog, CommittedChange
from slm.server.database import Database
from slm.server.hub import Hub
from slm.server.metrics import Metrics
from slm.server.models import STATE, utc_now
from slm.server.news import Horizon, News, Page, read_horizon, read_news, read_page
from slm.server.pulse import Pulse
from slm.server.registry import Written
from slm.server.settings import Settings
from slm.server.supervisor import Supervisor
from slm.server.view import View

logger = logging.getLogger(__name__)

SETTLE_SECONDS: Final = 5.0
"""How long a write's answer waits for the feed; many writers at once make it queue."""


class ChangeFeed:
    """Follows the database: woken by a write, and looking by itself once every poll interval.

    Args:
        database: read only, but for a new epoch when the revision fell.
        catalog: moved by this feed alone.
        hub: given every change after the catalog has it.
        tokens: replaced when the database's tokens have changed.
        settings: poll_interval_seconds and behind_after_seconds count here.
        metrics: told how old each change was.
    """

    def __init__(
        self,
        database: Database,
        catalog: Catalog,
        hub: Hub,
        tokens: TokenTable,
        settings: Settings,
        metrics: Metrics | None = None,
        supervisor: Supervisor | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._database = database
        self._catalog = catalog
        self._hub = hub
        self._tokens = tokens
        self._poll_interval_seconds = settings.poll_interval_seconds
        self._behind_after_seconds = settings.behind_after_seconds
        self._last_good_look = float("-inf")
        self._told_behind = False
        self._failing = False
        self._failed_looks = 0
        self._wake = asyncio.Event()
        self._moved = Pulse()
        self._following = (supervisor or Supervisor()).task("feed", self._follow)
        self._loop: asyncio.AbstractEventLoop | None = None
        hub.is_behind = lambda: not self.current

    @property
    def position(self) -> int:
        """The revision up to which everything was passed on."""
        return self._catalog.revision

    @property
    def epoch(self) -> str:
        """The epoch of `position`."""
        return self._catalog.epoch

    def hides(self, view: View, agent_id: str) -> bool:
        """Whether a view does not see this agent now: neither by its patterns nor as default."""
        return not view.sees(agent_id, agent_id == self._catalog.default_id)

    @property
    def seconds_since_look(self) -> float:
        """How long ago the database was last seen."""
        return asyncio.get_running_loop().time() - self._last_good_look

    @property
    def current(self) -> bool:
        """Whether the last good look at the database is recent (protocol section 4, point 5)."""
        return self.seconds_since_look <= self._behind_after_seconds

    @property
    def running(self) -> bool:
        """Whether the feed is at work."""
        return self._following.running

    @property
    def _tokens_version(self) -> int:
        return self._tokens.version

    async def start(self) -> None:
        """Load everything, start the hub there, and begin to follow.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        self._loop = asyncio.get_running_loop()
        await self._look()
        self._hub.start(self.position, self.epoch)
        self.follow()

    def follow(self) -> None:
        """Follow the database from where the catalog is; `start` does it, and who has stopped."""
        self._following.start()

    async def stop(self) -> None:
        """Stop following."""
        await self._following.stop()

    def wake(self) -> None:
        """Look at the database now rather than at the next poll."""
        self._wake.set()

    def hear(self, revision: int | None) -> None:
        """Take a notification of the database; one of a revision that is here wakes nobody."""
        if revision is None or revision > self.position:
            self.wake()

    async def passed(self, revision: int, timeout: float) -> bool:
        """Wait until the catalog holds `revision`; return whether it does within `timeout` s."""
        if self.position >= revision:
            return True
        self.wake()
        return await self._moved.until(lambda: self.position >= revision, timeout)

    async def settled(self, revision: int) -> bool:
        """Wait for a revision that is known to be committed; return whether the catalog has it.

        Gives up when the database cannot be read, or does not answer for `SETTLE_SECONDS`.
        """
        if self.position < revision:
            self.wake()
            failed = self._failed_looks
            await self._moved.until(
                lambda: self.position >= revision or self._failed_looks > failed, SETTLE_SECONDS
            )
        return self.position >= revision

    async def horizon(self) -> Horizon:
        """Return the state row as it is now.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        return await self._database.read(read_horizon)

    async def read(self, since: int, limit: int, upto: int) -> Page:
        """Return at most `limit` changes after `since`, none after `upto`, for a replay.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        return await self._database.read(
            lambda connection: read_page(connection, since, limit, upto)
        )

    async def _follow(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._look()
            except Exception as error:
                self._note_failure(error)
            self._tell_behind()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_interval_seconds):
                    await self._wake.wait()

    async def _look(self) -> None:
        """Read what is new in one transaction and pass it on."""
        # Before the read: what is read is at least as new as this.
        looked_at = asyncio.get_running_loop().time()
        position, epoch, tokens_version = self.position, self.epoch, self._tokens_version
        news = await self._database.read(
            lambda connection: read_news(connection, position, epoch, tokens_version)
        )
        # Whatever becomes of the rest.
        self._take_tokens(news, looked_at, tokens_version)
        self._last_good_look = looked_at
        if (position, epoch) != (self.position, self.epoch):
            # What was committed here was faster. Where that is all there was, the look is over:
            # under steady writes each would otherwise ask for the next.
            if news.horizon.epoch != self.epoch or news.horizon.revision > self.position:
                self.wake()
            return
        if news.horizon.epoch == epoch and news.horizon.revision < position:
            await self._make_epoch_anew(epoch, position)
            self.wake()
            return
        if news.changes:
            await failpoints.reach_async("before_push")
            if (position, epoch) != (self.position, self.epoch):
                self.wake()
                return
        self._pass_on(news)
        if self._failing:
            self._failing = False
            logger.info("the database answers again, at revision %d", self.position)

    def _take_tokens(self, news: News, asked_at: float, asked_version: int) -> None:
        if news.tokens is not None:
            self._tokens.take(news.tokens, asked_at, asked_version)
        self._tokens.confirm(news.horizon.tokens_version, asked_at)

    def committed(self, written: Written) -> None:
        """Take what this server has just committed; called in the thread that did."""
        loop = self._loop
        if loop is not None and not failpoints.any_armed():
            loop.call_soon_threadsafe(self._take, written, loop.time())

    def _take(self, written: Written, committed_at: float) -> None:
        """Pass on what was committed here if it is what comes next; else the next look does."""
        if written.epoch == self.epoch and written.revision > self.position:
            self._hub.committed_at[written.revision] = committed_at
        comes_next = written.changes[0].revision == self.position + 1
        if written.epoch != self.epoch or not comes_next or not self.running:
            self.wake()
            return
        try:
            self._advance(written.changes)
        except Exception as error:
            self._note_failure(error)
            self.wake()

    def _pass_on(self, news: News) -> None:
        """Move the catalog at once, then hand the frames to the hub; one step of the loop."""
        head, epoch = news.horizon.revision, news.horizon.epoch
        if news.agents is not None:
            first, same_epoch = not self.epoch, self.epoch == epoch
            self._catalog.load(news.agents, head, epoch)
            if not first:
                logger.warning("everything was loaded anew, at revision %d", head)
                self._hub.restart(epoch, head, "compacted" if same_epoch else "epoch")
            self._moved.fire()
        elif news.changes:
            self._advance(news.changes)

    def _advance(self, changes: Sequence[CommittedChange]) -> None:
        """Move over the changes that come next."""
        changes = self._with_traces(changes)
        # Queued first: should the encoding fail, neither has moved and the next look tries again.
        # Nothing is sent before this step of the loop is over.
        with tracing.joined("slm.feed", changes[-1].traceparent):
            self._hub.publish(changes)
        self._catalog.apply(changes, changes[-1].revision)
        self._tell_ages(changes)
        self._moved.fire()

    def _with_traces(self, changes: Sequence[CommittedChange]) -> Sequence[CommittedChange]:
        """Return the changes with the traces that they were made in, where this server did it."""
        traces = self._database.traces
        if not traces:
            return changes
        traced = [replace(change, traceparent=traces.get(change.revision)) for change in changes]
        # What is older was passed on, or never committed.
        head = changes[-1].revision
        for revision in [each for each in list(traces) if each <= head]:
            traces.pop(revision, None)
        return traced

    def _tell_ages(self, changes: Sequence[CommittedChange]) -> None:
        now = utc_now()
        for change in changes:
            if change.created_at is not None:
                self._metrics.passed_on((now - change.created_at).total_seconds())

    async def _make_epoch_anew(self, epoch: str, position: int) -> None:
        """Give the database a new epoch: its revision fell, so positions mean nothing any more."""
        fresh = secrets.token_hex(8)
        # The conditions let only one of several replicas do it.
        anew = (
            update(STATE)
            .where(STATE.c.epoch == epoch, STATE.c.revision < position)
            .values(epoch=fresh)
        )
        logger.warning("the database's revision fell below %d: it gets a new epoch", position)
        await self._database.run(lambda connection: connection.execute(anew) and None)

    def _note_failure(self, error: Exception) -> None:
        self._failed_looks += 1
        self._moved.fire()
        if self._failing:
            return
        self._failing = True
        if isinstance(error, ProblemError):
            logger.warning("the database cannot be read: %s", error.detail)
        else:
            # The class alone: a driver's text may hold what was read.
            logger.error("the feed failed: %s", type(error).__name__)

    def _tell_behind(self) -> None:
        behind = not self.current
        if behind != self._told_behind:
            self._told_behind = behind
            self._hub.beat_now()
