"""Receipts: wait until every backend has answered for a change, and report how each handled it.

Takes the change from the history and the answers from the fleet; on PostgreSQL it asks the other
replicas first (docs/protocol.md section 3).
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
    """Return the subject of a write's receipt, or None if the write changed no agent."""
    if written.changes:
        # The write's own change; a second one only takes the flag from the former default.
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
        """Return the subject of the receipt for a revision.

        Args:
            revision: the revision of the change.
            sees: whether the caller may see the agent with this agent_id.

        Raises:
            RevisionNotFound: the change does not exist, the caller may not see it, or its acks are
                no longer remembered.
            DatabaseUnavailable: the database does not answer.
        """
        fleet = self._fleet
        if revision <= fleet.head - RECEIPT_REVISIONS:
            raise RevisionNotFound(f"Receipts are kept of the last {RECEIPT_REVISIONS} revisions.")
        change = await self._history.change(revision)
        if not sees(change.agent_id):
            # Check this first, so that a hidden change looks the same as one that does not exist.
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
        """Return how every backend handled a change, once all have answered or after `seconds`.

        Args:
            subject: the change.
            seconds: how long to wait.
            named: only backends of this token are named, the others are counted; None names all.
        """
        if seconds > 0:
            await self._fleet.wait(subject, seconds, alone=self._alone)
        else:
            await self.refresh()
        return await receipt_of(subject, self._fleet.shown(), named)

    async def refresh(self) -> None:
        """Read what other replicas report about their backends, if there are other replicas."""
        if not self._alone:
            await self._sync.refresh()
