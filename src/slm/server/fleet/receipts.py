"""Receipts: waits until every backend has answered for one change, and says how each took it.

Knows what a change is from the history and who took it from the fleet; on PostgreSQL the other
replicas are asked first (docs/protocol.md section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from slm.errors import RevisionNotFound
from slm.schemas import Agent
from slm.server.agents.changes import Written
from slm.server.agents.history import History
from slm.server.db.database import Database
from slm.server.fleet.ack_log import RECEIPT_REVISIONS
from slm.server.fleet.outcome import Subject, receipt_of
from slm.server.fleet.replication import FleetSync
from slm.server.fleet.tracker import Fleet


def subject_of(written: Written) -> Subject | None:
    """Return what the receipt of a write is about; None where it is about no agent."""
    if written.changes:
        # The write's own change; one that follows takes the flag from the former default.
        change = written.changes[0]
        return _subject(change.agent, change.was_default, change.revision, change.created_at)
    agent = written.agent
    if agent is None:
        return None
    return _subject(agent, False, agent.revision, None)._replace(changed=False)


def _subject(agent: Agent, was_default: bool, revision: int, made: datetime | None) -> Subject:
    return Subject(
        agent_id=agent.agent_id,
        is_default=was_default or agent.is_default,
        revision=revision,
        committed_at=(made or datetime.now(UTC)).timestamp(),
    )


class Receipts:
    """Answers `?wait=` and `GET /api/changes/{revision}/receipt`."""

    def __init__(self, database: Database, fleet: Fleet, sync: FleetSync) -> None:
        self._history = History(database)
        self._fleet = fleet
        self._sync = sync
        self._alone = database.dialect == "sqlite"

    async def subject(
        self, revision: int, sees: Callable[[str], bool] = lambda _agent_id: True
    ) -> Subject:
        """Return what a receipt of this revision is about.

        Args:
            revision: of the change.
            sees: whether the caller may see the agent of this agent_id.

        Raises:
            RevisionNotFound: there is no such change, the caller may not see it, or nobody
                remembers who took it.
            DatabaseUnavailable: the database does not answer.
        """
        fleet = self._fleet
        if revision <= fleet.head - RECEIPT_REVISIONS:
            raise RevisionNotFound(f"Receipts are kept of the last {RECEIPT_REVISIONS} revisions.")
        change = await self._history.change(revision)
        if not sees(change.agent_id):
            # First of all, so that it cannot be told from one that does not exist.
            raise RevisionNotFound
        subject = _subject(change.agent, change.was_default, revision, change.created_at)
        told = fleet.remembers(subject, alone=self._alone)
        if told and revision <= fleet.started_at_revision:
            told = await self._sync.covers(subject)
        if not told:
            raise RevisionNotFound(
                f"This server started after revision {revision} and does not know who took it;"
                " who runs what now is in the fleet view."
            )
        return subject

    async def receipt(
        self, subject: Subject, seconds: float = 0.0, *, named: str | None = None
    ) -> dict[str, Any]:
        """Return how everyone took a change, once all have answered or after `seconds`.

        Args:
            subject: the change.
            seconds: how long to wait.
            named: the token whose backends are named, the others being counted; None: all are.
        """
        if seconds > 0:
            await self._fleet.wait(subject, seconds, alone=self._alone)
        else:
            await self.refresh()
        return await receipt_of(subject, self._fleet.shown(), named)

    async def refresh(self) -> None:
        """Take in what other replicas have told of their backends, where there are any."""
        if not self._alone:
            await self._sync.refresh()
