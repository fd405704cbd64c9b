"""Relay: passes committed changes on: moves the catalog and queues the frames for the streams.

In the loop alone, each time in one step. Knows no database and no connection; the feed decides what
is passed on (docs/protocol.md sections 2 and 4).
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
"""For how many revisions it is remembered which change was passed on."""


class FeedTrouble(Exception):
    """Why the feed does not go on; the text is for the log and for /readyz."""


class CannotPassOn(FeedTrouble):
    """A change was read but cannot be passed on, so nothing after it is either."""

    def __init__(self, revision: int, error: Exception) -> None:
        # The class alone: the text may hold what is in the change.
        super().__init__(f"change {revision} cannot be passed on: {type(error).__name__}")


class Relay:
    """The only one to move the catalog.

    Args:
        catalog: moved after the outbox has the frames.
        outbox: given every change.
        traces: by revision, the trace of a write of this server; emptied as they are passed on.
        metrics: told how old each change was.

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
        # Which change each of the last revisions was.
        self._ids: dict[int, str] = {}
        # Set while the catalog was loaded anew and the streams are not told yet.
        self._resync_due: ResyncReason | None = None

    @property
    def held(self) -> Position:
        """The position up to which everything was passed on, and which change is there."""
        return Position(self._catalog.revision, self._catalog.epoch, self._catalog.change_id)

    def has_passed(self, revision: int, change_id: str) -> bool:
        """Whether this very change was passed on, not long ago."""
        return self._ids.get(revision) == change_id

    def comes_next(self, written: Written) -> bool:
        """Whether a write's changes are what comes next, committed on top of what is held.

        A database that lost that, or that was given another, has another change there.
        """
        held = self.held
        return (
            written.changes[0].revision == held.revision + 1
            and written.epoch == held.epoch
            and written.follows == held.change_id
            and self._resync_due is None
        )

    def note_commit(self, written: Written, committed_at: float) -> None:
        """Note when a change that is still to be passed on was committed here."""
        held = self.held
        if written.epoch == held.epoch and written.revision > held.revision:
            self._outbox.committed_at[written.revision] = committed_at

    def differs(self, news: News) -> bool:
        """Whether an agent is another one than was passed on, though no later change made it.

        So a loss shows where the row of the position itself was compacted away.
        """
        held = self.held
        return news.horizon.epoch == held.epoch and any(
            agent.revision <= held.revision and agent != self._catalog.agent(agent.agent_id)
            for agent in news.agents or ()
        )

    def rest(self, news: News) -> Sequence[CommittedChange] | None:
        """Return what a look that was overtaken still has to pass on; None: it is of no use."""
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
        """Move the catalog at once, then queue the frames; one step of the loop."""
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
        """Move over the changes that come next, as far as they can be passed on.

        Raises:
            CannotPassOn: one of them cannot be; those before it are.
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
        # Queued first: should the encoding fail, neither has moved and the next look tries again.
        # Nothing is sent before this step of the loop is over.
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
        """Return the changes with the traces that they were made in, where this server did it."""
        traces = self._traces
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
