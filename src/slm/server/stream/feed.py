"""ChangeFeed: follows the database, and has the relay pass on what was committed, in order.

The only reader of `changes` for the live stream. What this server itself committed it is told, and
has passed on where it is the very next change; all else it reads. Knows no request and no
connection (docs/protocol.md sections 2 and 4).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
from dataclasses import replace
from typing import Final

from slm.errors import ProblemError
from slm.server import failpoints
from slm.server.agents.catalog import Catalog
from slm.server.agents.changes import Position, Written
from slm.server.db.database import Database
from slm.server.metrics import Metrics
from slm.server.security.agent_scope import View
from slm.server.security.token_table import TokenTable
from slm.server.settings import Settings
from slm.server.stream.change_reader import (
    ChangePage,
    Horizon,
    News,
    far_behind,
    read_horizon,
    read_news,
    read_page,
    renew_epoch,
    tells_timeline,
)
from slm.server.stream.hub import Hub
from slm.server.stream.relay import FeedTrouble, Relay
from slm.server.tasks.supervisor import Supervisor

logger = logging.getLogger(__name__)

SETTLE_SECONDS: Final = 5.0
"""How long a write's answer waits for the feed; many writers at once make it queue."""


class CannotRenewEpoch(FeedTrouble):
    """The database lost changes, and cannot be written to."""

    def __init__(self, detail: str) -> None:
        super().__init__(
            "the database lost changes or is on another timeline, and its new epoch cannot be"
            f" written: {detail}"
        )


class OnStandby(FeedTrouble):
    """What was read was passed on, and may be old: another server takes the writes."""

    def __init__(self) -> None:
        super().__init__("the database is a standby: it takes no writes and may be behind")


class ChangeFeed:
    """Follows the database: woken by a write, and looking by itself once every poll interval.

    Args:
        database: read only, but for a new epoch when the revision fell.
        catalog: moved by this feed's relay alone.
        hub: begun at the catalog's revision; its outbox is given every change.
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
        self._relay = Relay(catalog, hub.outbox, database.traces, metrics or Metrics())
        self._moved = self._relay.moved
        self._database = database
        self._catalog = catalog
        self._hub = hub
        self._tokens = tokens
        self._poll_interval_seconds = settings.poll_interval_seconds
        self._behind_after_seconds = settings.behind_after_seconds
        self._with_timeline = False
        self._last_answer = self._last_good_look = float("-inf")
        self._told_behind = False
        self._trouble: str | None = None
        # Looks are counted as they begin; `_good_look` is the last one that ended well.
        self._polls = self._good_look = self._failed_looks = 0
        self._wake = asyncio.Event()
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
    def held(self) -> Position:
        """The position up to which everything was passed on, and which change is there."""
        return self._relay.held

    @property
    def replay_limit(self) -> int:
        """More changes than this are not sent one by one: a snapshot is smaller."""
        return far_behind(len(self._catalog))

    @property
    def trouble(self) -> str | None:
        """Why the last look was not a good one, in a sentence; None where it was."""
        return self._trouble

    @property
    def database_answers(self) -> bool:
        """Whether the database was read recently, whatever became of what was read."""
        now = asyncio.get_running_loop().time()
        return now - self._last_answer <= self._behind_after_seconds

    @property
    def seconds_since_look(self) -> float:
        """How long ago everything in the database had been passed on."""
        return asyncio.get_running_loop().time() - self._last_good_look

    @property
    def current(self) -> bool:
        """Whether everything that a recent look found was passed on (protocol section 4).

        A database that has become read-only, such as a standby, may be behind another one.
        """
        recent = self.seconds_since_look <= self._behind_after_seconds
        return recent and not self._database.read_only

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
        self._with_timeline = await self._tells_timeline()
        while not self.epoch:  # a look that finds the database elsewhere makes a new epoch first
            await self._poll()
        self._hub.start(self.position, self.epoch, self._catalog.change_id)
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

    async def settled(self, revision: int, change_id: str | None = None) -> bool:
        """Wait for a revision that is known to be committed; return whether the catalog has it.

        Gives up when the database cannot be read, or does not answer for `SETTLE_SECONDS`.

        Args:
            revision: the revision.
            change_id: which change it is. Where another one of that revision was passed on, such
                as one that a failover lost, only a look at the database tells, and is waited for.
        """

        def passed() -> bool:
            if change_id is None:
                return self.position >= revision
            return self._relay.has_passed(revision, change_id)

        if passed():
            return True
        self.wake()
        looks, failed = self._polls, self._failed_looks
        await self._moved.until(
            lambda: passed() or self._good_look > looks or self._failed_looks > failed,
            SETTLE_SECONDS,
        )
        return passed() or (self._good_look > looks and self.position >= revision)

    async def look_again(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for a good look that begins from now on."""
        self.wake()
        looks = self._polls
        await self._moved.until(lambda: self._good_look > looks, timeout)

    async def horizon(self) -> Horizon:
        """Return the state row as it is now.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        return await self._database.read(read_horizon)

    async def read(self, since: int, limit: int, upto: int) -> ChangePage:
        """Return at most `limit` changes after `since`, none after `upto`, for a replay.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        return await self._database.read(
            lambda connection: read_page(connection, since, limit, upto)
        )

    async def _tells_timeline(self) -> bool:
        if self._database.dialect != "postgresql":
            return False
        try:
            return await self._database.read(tells_timeline)
        except ProblemError:
            raise
        except Exception as error:
            logger.info("the database does not tell its timeline (%s)", type(error).__name__)
            return False

    async def _follow(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._poll()
            except Exception as error:
                self._note_failure(error)
            self._tell_behind()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_interval_seconds):
                    await self._wake.wait()

    async def _poll(self) -> None:
        """Read what is new in one transaction and pass it on; it counts once all of it is done."""
        # Before the read: what is read is at least as new as this.
        looked_at = asyncio.get_running_loop().time()
        self._polls += 1
        look, held, tokens_version = self._polls, self._relay.held, self._tokens_version
        read = functools.partial(
            read_news,
            held=held,
            tokens_version=tokens_version,
            at_most=self.replay_limit,
            with_timeline=self._with_timeline,
        )
        news = await self._database.read(read)
        self._last_answer = looked_at
        # First, so that tokens are current even if the rest fails.
        self._take_tokens(news, looked_at, tokens_version)
        if news.agents is not None and held == self._relay.held:
            news = replace(news, lost=news.lost or self._relay.differs(news))
        if news.moved or (news.lost and news.horizon.epoch == held.epoch):
            await self._make_epoch_anew(news, held)
            self.wake()
            return
        if news.changes:
            await failpoints.reach_async("before_push")
        if held != self._relay.held:
            # What was committed here was faster. Where that is all there was, the look is over:
            # under steady writes each would otherwise ask for the next.
            rest = self._relay.rest(news)
            if rest is None:
                self.wake()
                return
            news = replace(news, changes=rest)
        self._relay.pass_on(news)
        if self._with_timeline and news.timeline is None:
            raise OnStandby
        self._last_good_look, self._good_look = looked_at, look
        self._moved.fire()
        if self._trouble is not None:
            self._trouble = None
            logger.info("the database answers again, at revision %d", self.position)

    def _take_tokens(self, news: News, asked_at: float, asked_version: int) -> None:
        if news.tokens is not None:
            self._tokens.take(news.tokens, asked_at, asked_version)
        self._tokens.confirm(news.horizon.tokens_version, asked_at)

    def committed(self, written: Written) -> None:
        """Take what this server has just committed; called in the thread that did."""
        loop = self._loop
        failpoints.reach("after_commit")
        if loop is not None:
            failpoints.reach_then("before_push", loop, self._take, written, loop.time())

    def _take(self, written: Written, committed_at: float) -> None:
        """Pass on what was committed here if it is what comes next; else the next look does."""
        self._relay.note_commit(written, committed_at)
        if not self.running or not self._relay.comes_next(written):
            self.wake()
            return
        try:
            self._relay.advance(written.changes)
        except Exception as error:
            self._note_failure(error)
            self.wake()

    async def _make_epoch_anew(self, news: News, held: Position) -> None:
        """Give the database a new epoch: it may not have what positions of the old one name."""
        fresh = secrets.token_hex(8)
        try:
            made = await self._database.run(
                lambda connection: renew_epoch(connection, news, held, fresh)
            )
        except ProblemError as problem:
            raise CannotRenewEpoch(problem.detail) from problem
        if made:
            why = "is on another cluster or timeline"
            if news.lost:
                why = f"no longer has revision {held.revision} as it was passed on"
            logger.warning("the database %s: it gets a new epoch", why)

    def _note_failure(self, error: Exception) -> None:
        self._failed_looks += 1
        self._moved.fire()
        if isinstance(error, ProblemError):
            trouble = f"the database cannot be read: {error.detail}"
        elif isinstance(error, FeedTrouble):
            trouble = str(error)
        else:
            # The class alone: a driver's text may hold what was read.
            trouble = f"the feed failed: {type(error).__name__}"
        if trouble != self._trouble:
            self._trouble = trouble
            expected = isinstance(error, ProblemError)
            logger.log(logging.WARNING if expected else logging.ERROR, "%s", trouble)

    def _tell_behind(self) -> None:
        behind = not self.current
        if behind != self._told_behind:
            self._told_behind = behind
            self._hub.beat_now()
