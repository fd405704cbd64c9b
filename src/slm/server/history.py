"""History: what every agent was at any time, read from the table `changes`.

Reads only; a rollback is a write like any other and goes through the registry. Knows no HTTP
(docs/protocol.md section 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from pydantic import ValidationError
from sqlalchemy import Connection, Row, Select, select

from slm.errors import InternalError, InvalidRequest, RevisionNotFound
from slm.schemas import Agent, Change, ChangeList
from slm.server.bodies import AgentCreate, AgentUpdate
from slm.server.database import Database
from slm.server.models import CHANGES, STATE

MAX_PAGE: Final = 1000
"""So many changes in one answer at most."""

_RESTORED: Final = (
    "name",
    "description",
    "llm_provider",
    "llm_endpoint",
    "llm_model",
    "llm_timeout",
    "llm_temperature",
    "llm_max_tokens",
    "llm_options",
    "is_active",
)
"""What a rollback brings back. Not the key, which no history holds; and not is_default, which says
something of the fleet rather than of this agent."""


@dataclass(frozen=True)
class ChangeFilter:
    """Which changes are asked for.

    Attributes:
        agent_id: of this agent alone.
        actor: made by this token alone.
        since: after this revision.
        upto: not after this revision.
        at: not after this time.
        newest_first: the order, and which end `limit` counts from.
        sees: whether the caller may see the agent of this agent_id.
    """

    agent_id: str | None = None
    actor: str | None = None
    since: int = 0
    upto: int | None = None
    at: datetime | None = None
    newest_first: bool = False
    sees: Callable[[str], bool] = lambda _agent_id: True


class History:
    """What was, by revision and by time."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def changes(self, wanted: ChangeFilter, limit: int) -> ChangeList:
        """Return at most `limit` changes, in order.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """

        def read(connection: Connection) -> ChangeList:
            state = connection.execute(select(STATE.c.floor, STATE.c.revision, STATE.c.epoch)).one()
            found: list[Change] = []
            for row in connection.execute(_query(wanted)).yield_per(MAX_PAGE):
                change = _change(row)
                if wanted.sees(change.agent_id):
                    found.append(change)
                if len(found) == limit:
                    break
            return ChangeList(
                changes=found, floor=state.floor, revision=state.revision, epoch=state.epoch
            )

        return await self._database.read(read)

    async def change(self, revision: int) -> Change:
        """Return one change.

        Raises:
            RevisionNotFound: there is none of this revision, or none any more.
        """
        found = await self.changes(ChangeFilter(since=revision - 1, upto=revision), 1)
        if not found.changes:
            raise RevisionNotFound
        return found.changes[0]

    async def agent_before(self, agent_id: str, to: int | None) -> Change:
        """Return the change that made the agent what a rollback shall restore.

        Args:
            agent_id: taken literally.
            to: a revision of the database; None is the one before the agent's last change.

        Raises:
            RevisionNotFound: the history holds nothing of the agent at that revision.
            InvalidRequest: it was deleted at that revision.
        """
        last_two = await self.changes(
            ChangeFilter(agent_id=agent_id, upto=to, newest_first=True), 2 if to is None else 1
        )
        found = last_two.changes
        if to is not None and to > last_two.revision:
            raise RevisionNotFound(
                f"There is no revision {to} yet; the last is {last_two.revision}."
            )
        if to is None and found and found[0].type != "agent_deleted":
            # What a deleted agent was stands in the delete itself.
            found = found[1:]
        if not found:
            raise RevisionNotFound(
                "The history holds nothing of the agent there; it begins after revision"
                f" {last_two.floor}."
            )
        if to is not None and found[0].type == "agent_deleted":
            raise InvalidRequest(f"The agent was deleted at revision {found[0].revision}.")
        return found[0]


def restoring_update(old: Agent, comment: str) -> AgentUpdate:
    """Return the write that gives an agent back what it was, its key apart.

    Not validated anew: what was once stored may be stored again, even where rules have changed.
    """
    fields = {name: getattr(old, name) for name in _RESTORED}
    return AgentUpdate.model_construct(_fields_set=set(fields), comment=comment, **fields)


def restoring_create(old: Agent, comment: str) -> AgentCreate:
    """Return the write that makes a deleted agent again, without its key."""
    fields = {name: getattr(old, name) for name in _RESTORED}
    return AgentCreate.model_construct(
        agent_id=old.agent_id, llm_api_key=None, is_default=False, comment=comment, **fields
    )


def _query(wanted: ChangeFilter) -> Select[Any]:
    query = select(CHANGES).where(CHANGES.c.revision > wanted.since)
    if wanted.agent_id is not None:
        query = query.where(CHANGES.c.agent_id == wanted.agent_id)
    if wanted.actor is not None:
        query = query.where(CHANGES.c.actor == wanted.actor)
    if wanted.upto is not None:
        query = query.where(CHANGES.c.revision <= wanted.upto)
    if wanted.at is not None:
        query = query.where(CHANGES.c.created_at <= wanted.at)
    revision = CHANGES.c.revision
    return query.order_by(revision.desc() if wanted.newest_first else revision)


def _change(row: Row[Any]) -> Change:
    try:
        agent = Agent.model_validate_json(row.agent)
    except ValidationError:
        raise InternalError(f"Change {row.revision} of the history cannot be read.") from None
    created_at: datetime = row.created_at
    return Change(
        revision=row.revision,
        type=row.type,
        agent_id=row.agent_id,
        agent=agent,
        was_default=row.was_default,
        actor=row.actor,
        comment=row.comment,
        # SQLite keeps no zone; what is written is UTC.
        created_at=created_at if created_at.tzinfo else created_at.replace(tzinfo=UTC),
    )
