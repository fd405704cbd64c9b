"""Receipts: waits until every backend has answered for one change, and says how each took it.

Knows what a change is from the history and who took it from the fleet; on PostgreSQL the other
replicas are asked first (docs/protocol.md section 3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from slm.errors import DatabaseUnavailable, RevisionNotFound
from slm.server.agents.history import History
from slm.server.agents.service import Written
from slm.server.db.database import Database
from slm.server.fleet.backend import RECEIPT_REVISIONS, Subject
from slm.server.fleet.replication import FleetSync
from slm.server.fleet.tracker import Fleet


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
        subject = Subject(
            agent_id=change.agent_id,
            is_default=change.was_default or change.agent.is_default,
            revision=revision,
            committed_at=change.created_at.timestamp(),
        )
        told = fleet.remembers(subject, alone=self._alone)
        if told and revision <= fleet.started_at_revision:
            told = await self._sync.covers(subject)
        if not told:
            raise RevisionNotFound(
                f"This server started after revision {revision} and does not know who took it;"
                " who runs what now is in the fleet view."
            )
        return subject

    async def subject_of(self, written: Written) -> Subject | None:
        """Return what the receipt of a write is about; the write stands, whatever fails here."""
        agent = written.agent
        with contextlib.suppress(DatabaseUnavailable, RevisionNotFound):
            if written.changed:
                return await self.subject(written.revision if agent is None else agent.revision)
        if agent is None:
            return None
        return Subject(
            agent_id=agent.agent_id,
            is_default=agent.is_default,
            revision=agent.revision,
            committed_at=(agent.updated_at if written.changed else datetime.now(UTC)).timestamp(),
            changed=written.changed,
        )

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
        return await self._fleet.receipt(subject, named)

    async def refresh(self) -> None:
        """Take in what other replicas have told of their backends, where there are any."""
        if not self._alone:
            await self._sync.refresh()
