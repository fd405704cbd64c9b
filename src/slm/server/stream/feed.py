"""ChangeFeed: follows the database and has the relay pass on committed changes in order.

The only reader of `changes` for the live stream. Commits of this server are handed to it directly
and passed on if they are the next change; it reads everything else. Knows no request and no
connection (docs/protocol.md sections 2 and 4).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from dataclasses import replace
from typing import Final

from slm.errors import ProblemError
from slm.server import failpoints
from slm.server.agents.catalog import Catalog
from slm.server.agents.changes import Position, Written
from slm.server.db.database import Database
from slm.server.db.state import new_epoch
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
"""How long a write's response waits for the feed; with many concurrent writers the feed queues."""


class CannotRenewEpoch(FeedTrouble):
    """The database lost changes and cannot be written to."""

    def __init__(self, detail: str) -> None:
        super().__init__(
            "the database lost changes or is on another timeline, and its new epoch cannot be"
            f" written: {detail}"
        )


class OnStandby(FeedTrouble):
    """Everything read was passed on, but it may be old: another server takes the writes."""

    def __init__(self) -> None:
        super().__init__("the database is a standby: it takes no writes and may be behind")


class ChangeFeed:
    """Follows the database: wakes up for each write, and polls once per poll interval.

    Args:
        database: only read, except to set a new epoch when changes were lost.
        catalog: updated only by this feed's relay.
        hub: started at the catalog's revision; its outbox receives every change.
        tokens: replaced when the database's tokens have changed.
        settings: uses poll_interval_seconds and behind_after_seconds.
        metrics: records how old each change was.
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
        # Polls are numbered as they start; `_good_look` is the last one that succeeded.
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
        """Whether a view cannot see this agent now, neither by its patterns nor as the default."""
        return not view.sees(agent_id, agent_id == self._catalog.default_id)

    @property
    def held(self) -> Position:
        """The position up to which everything was passed on, with the id of its change."""
        return self._relay.held

    @property
    def replay_limit(self) -> int:
        """Above this many changes a client gets a snapshot instead, because it is smaller."""
        return far_behind(len(self._catalog))

    @property
    def trouble(self) -> str | None:
        """Why the last poll failed, in one sentence; None if it succeeded."""
        return self._trouble

    @property
    def database_answers(self) -> bool:
        """Whether the database was read recently, even if the result could not be used."""
        now = asyncio.get_running_loop().time()
        return now - self._last_answer <= self._behind_after_seconds

    @property
    def seconds_since_look(self) -> float:
        """How many seconds ago everything in the database had been passed on."""
        return asyncio.get_running_loop().time() - self._last_good_look

    @property
    def current(self) -> bool:
        """Whether everything found by a recent poll was passed on (protocol section 4).

        False for a database that has become read-only, such as a standby: it may lag behind
        another.
        """
        recent = self.seconds_since_look <= self._behind_after_seconds
        return recent and not self._database.read_only

    @property
    def running(self) -> bool:
        """Whether the feed is running."""
        return self._following.running

    @property
    def _tokens_version(self) -> int:
        return self._tokens.version

    async def start(self) -> None:
        """Load everything, start the hub at that revision, and start following the database.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        self._loop = asyncio.get_running_loop()
        self._with_timeline = await self._tells_timeline()
        while not self.epoch:  # a poll that finds the database has moved sets a new epoch first
            await self._poll()
        self._hub.start(self.position, self.epoch, self._catalog.change_id)
        self.follow()

    def follow(self) -> None:
        """Follow the database from the catalog's position; called by `start`, or after `stop`."""
        self._following.start()

    async def stop(self) -> None:
        """Stop following the database."""
        await self._following.stop()

    def wake(self) -> None:
        """Poll the database now instead of at the next interval."""
        self._wake.set()

    def hear(self, revision: int | None) -> None:
        """Handle a database notification. Ignores revisions that are already applied."""
        if revision is None or revision > self.position:
            self.wake()

    async def passed(self, revision: int, timeout: float) -> bool:
        """Wait up to `timeout` seconds for `revision`; return whether the catalog has it."""
        if self.position >= revision:
            return True
        self.wake()
        return await self._moved.until(lambda: self.position >= revision, timeout)

    async def settled(self, revision: int, change_id: str | None = None) -> bool:
        """Wait for a committed revision to be passed on; return whether the catalog has it.

        Gives up when the database cannot be read, or does not answer for `SETTLE_SECONDS`.

        Args:
            revision: the revision.
            change_id: the change's id. If a different change was passed on under that revision,
                such as one lost in a failover, waits for a poll of the database to settle it.
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
        """Wait at most `timeout` seconds for a successful poll that starts after this call."""
        self.wake()
        looks = self._polls
        await self._moved.until(lambda: self._good_look > looks, timeout)

    async def horizon(self) -> Horizon:
        """Return the current state row.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        return await self._database.read(read_horizon)

    async def read(self, since: int, limit: int, upto: int) -> ChangePage:
        """Return up to `limit` changes after `since` and not after `upto`, for a replay.

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
        """Read what is new in one transaction and pass it on; succeeds only as a whole."""
        # Taken before the read, so what is read is at least as new as this.
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
        # Tokens first, so that they are current even if the rest fails.
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
            # A local commit overtook this poll. If that was all the news, the poll is done:
            # otherwise, under steady writes, each poll would request another.
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
        """Take a commit of this server; called in the thread that committed."""
        loop = self._loop
        failpoints.reach("after_commit")
        if loop is not None:
            failpoints.reach_then("before_push", loop, self._take, written, loop.time())

    def _take(self, written: Written, committed_at: float) -> None:
        """Pass on a local commit if it is the next change; otherwise leave it to the next poll."""
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
        """Set a new epoch: the database may lack what positions of the old epoch refer to."""
        fresh = new_epoch()
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
            # Only the class name: a driver's error text may contain data it read.
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
