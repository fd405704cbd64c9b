"""Relay: passes on committed changes: updates the catalog and queues frames for the streams.

Runs only in the event loop, one step per call. Knows no database and no connection; the feed
decides what is passed on (docs/protocol.md sections 2 and 4).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from slm.common import tracing
from slm.server.agents.catalog import Catalog
from slm.server.agents.changes import CommittedChange, Position, Written
from slm.server.db.tables import utc_now
from slm.server.metrics import Metrics
from slm.server.stream.change_reader import News
from slm.server.stream.outbox import Outbox, ResyncReason
from slm.server.tasks.condition import Pulse

logger = logging.getLogger(__name__)

REMEMBERED: Final = 1000
"""For how many revisions the relay remembers which change it passed on."""


class FeedTrouble(Exception):
    """Why the feed cannot continue; the text is for the log and /readyz."""


class CannotPassOn(FeedTrouble):
    """A change was read but cannot be passed on, so later changes cannot be either."""

    def __init__(self, revision: int, error: Exception) -> None:
        # Only the class name: the text may contain parts of the change.
        super().__init__(f"change {revision} cannot be passed on: {type(error).__name__}")


class Relay:
    """The only component that updates the catalog.

    Args:
        catalog: updated after the frames are in the outbox.
        outbox: receives every change.
        traces: the trace of each write by this server, by revision; removed once passed on.
        metrics: records how old each change was.

    Attributes:
        moved: fired whenever changes were passed on.
    """

    def __init__(
        self, catalog: Catalog, outbox: Outbox, traces: dict[int, str], metrics: Metrics
    ) -> None:
        self.moved = Pulse()
        self._catalog = catalog
        self._outbox = outbox
        self._traces = traces
        self._metrics = metrics
        # The change ids of the most recent revisions.
        self._ids: dict[int, str] = {}
        # Set while the catalog has been reloaded but the streams have not been notified yet.
        self._resync_due: ResyncReason | None = None

    @property
    def held(self) -> Position:
        """The position up to which everything was passed on, with the id of its change."""
        return Position(self._catalog.revision, self._catalog.epoch, self._catalog.change_id)

    def has_passed(self, revision: int, change_id: str) -> bool:
        """Whether this exact change was passed on recently."""
        return self._ids.get(revision) == change_id

    def comes_next(self, written: Written) -> bool:
        """Whether a write's changes come next, directly after the held position.

        They don't if the database lost that position or has a different change there.
        """
        held = self.held
        return (
            written.changes[0].revision == held.revision + 1
            and written.epoch == held.epoch
            and written.follows == held.change_id
            and self._resync_due is None
        )

    def note_commit(self, written: Written, committed_at: float) -> None:
        """Note when a change that is not yet passed on was committed here."""
        held = self.held
        if written.epoch == held.epoch and written.revision > held.revision:
            self._outbox.committed_at[written.revision] = committed_at

    def differs(self, news: News) -> bool:
        """Whether an agent differs from what was passed on without a later change to explain it.

        This detects a loss even if the row of the held position was compacted away.
        """
        held = self.held
        return news.horizon.epoch == held.epoch and any(
            agent.revision <= held.revision and agent != self._catalog.agent(agent.agent_id)
            for agent in news.agents or ()
        )

    def rest(self, news: News) -> Sequence[CommittedChange] | None:
        """Return what an overtaken poll still has to pass on, or None if it is useless."""
        held = self.held
        if news.agents is not None or news.horizon.epoch != held.epoch:
            return None
        rest: Sequence[CommittedChange] = ()
        for number, change in enumerate(news.changes, 1):
            if self._ids.get(change.revision, change.change_id) != change.change_id:
                return None
            if change.revision == held.revision:
                rest = news.changes[number:]
        return rest

    def pass_on(self, news: News) -> None:
        """Update the catalog, then queue the frames, in one step of the event loop."""
        if news.agents is not None:
            if self._catalog.epoch:
                self._resync_due = news.resync_reason(self.held)
                logger.warning("everything was loaded again, at revision %d", news.head.revision)
            head = news.head
            self._catalog.load(news.agents, head.revision, head.epoch, head.change_id or "")
            self._ids = {head.revision: head.change_id or ""}
        held = self.held
        if self._resync_due is not None:
            self._outbox.restart(
                held.epoch, held.revision, self._resync_due, self._catalog.change_id
            )
            self._resync_due = None
        if news.agents is None and news.changes:
            self.advance(news.changes)

    def advance(self, changes: Sequence[CommittedChange]) -> None:
        """Apply the changes that come next, as far as they can be passed on.

        Raises:
            CannotPassOn: a change cannot be passed on; those before it were.
        """
        try:
            self._step(changes)
        except Exception as error:
            if len(changes) == 1:
                raise CannotPassOn(changes[0].revision, error) from error
            for change in changes:
                self.advance((change,))

    def _step(self, changes: Sequence[CommittedChange]) -> None:
        changes = self._with_traces(changes)
        # Queue first: if encoding fails, neither has moved and the next poll tries again.
        # Nothing is sent before this step of the event loop ends.
        with tracing.joined("slm.feed", changes[-1].traceparent):
            self._outbox.publish(changes)
        self._catalog.apply(changes, changes[-1].revision)
        self._remember(changes)
        self._tell_ages(changes)
        self.moved.fire()

    def _remember(self, changes: Sequence[CommittedChange]) -> None:
        for change in changes:
            self._ids[change.revision] = change.change_id
        while len(self._ids) > REMEMBERED:
            del self._ids[next(iter(self._ids))]

    def _with_traces(self, changes: Sequence[CommittedChange]) -> Sequence[CommittedChange]:
        """Return the changes, each with the trace of its write if this server made it."""
        traces = self._traces
        if not traces:
            return changes
        traced = [replace(change, traceparent=traces.get(change.revision)) for change in changes]
        # Older entries were passed on already, or were never committed.
        head = changes[-1].revision
        for revision in [each for each in list(traces) if each <= head]:
            traces.pop(revision, None)
        return traced

    def _tell_ages(self, changes: Sequence[CommittedChange]) -> None:
        now = utc_now()
        for change in changes:
            if change.created_at is not None:
                self._metrics.passed_on((now - change.created_at).total_seconds())
