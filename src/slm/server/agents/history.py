"""History: every agent's state at any time, read from the table `changes`.

Reads only; a rollback is a write like any other and goes through the registry. Knows no HTTP
(docs/protocol.md section 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from pydantic import ValidationError
from sqlalchemy import BigInteger, ColumnElement, Connection, Row, case, literal, select

from slm.errors import InvalidRequest, RevisionNotFound
from slm.schemas import Agent, Change, ChangeList
from slm.server.agents.schemas import RESTORED_FIELDS, AgentCreate, AgentUpdate
from slm.server.db.column_types import require_state
from slm.server.db.database import Database
from slm.server.db.pages import Window, opaque, read_page
from slm.server.db.tables import AGENTS, CHANGES, STATE
from slm.server.security import agent_scope_sql as view_sql
from slm.server.security.agent_scope import EVERYTHING, View
from slm.server.strict_json import MAX_INTEGER

MAX_PAGE: Final = 1000
"""The largest number of changes in one response."""

_SELECT_STATE: Final = select(
    STATE.c.floor,
    STATE.c.revision,
    STATE.c.epoch,
    select(AGENTS.c.agent_id).where(AGENTS.c.is_default).scalar_subquery().label("default_id"),
)


@dataclass(frozen=True)
class ChangeFilter:
    """Which changes to return.

    Attributes:
        agent_id: only changes of this agent.
        actor: only changes made by this token.
        since: only changes after this revision.
        upto: no changes after this revision.
        at: no changes after this time.
        newest_first: the order, and the end from which `limit` applies.
        view: what the caller may see; whoever may see an agent today may see its past.
    """

    agent_id: str | None = None
    actor: str | None = None
    since: int = 0
    upto: int | None = None
    at: datetime | None = None
    newest_first: bool = False
    view: View = EVERYTHING


class History:
    """Past changes, by revision and by time."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def changes(self, wanted: ChangeFilter, limit: int) -> ChangeList:
        """Return at most `limit` changes, in order, and where the next page starts.

        A page may be short, even empty, and still have a `next`: each page examines a bounded
        number of rows, whatever the filter.

        It runs beside the writers, and is interrupted at the database's time-out.

        Raises:
            DatabaseUnavailable: the database does not answer, or not in time.
            Overloaded: too many such reads are running.
        """
        return await self._database.read_long(lambda connection: _page(connection, wanted, limit))

    async def _few(self, wanted: ChangeFilter, limit: int) -> ChangeList:
        """Return one or two changes, for a write or a receipt, without waiting for long reads."""
        return await self._database.read(
            lambda connection: _page(connection, wanted, limit, strict=True)
        )

    async def change(self, revision: int) -> Change:
        """Return one change.

        Raises:
            RevisionNotFound: there is no change with this revision, or it has been removed.
        """
        found = await self._few(ChangeFilter(since=revision - 1, upto=revision), 1)
        if not found.changes:
            raise RevisionNotFound
        return found.changes[0]

    async def agent_before(self, agent_id: str, to: int | None) -> Change:
        """Return the change with the agent's state that a rollback should restore.

        Args:
            agent_id: taken literally.
            to: a revision of the database; None means the one before the agent's last change.

        Raises:
            RevisionNotFound: the history has nothing about the agent at that revision.
            InvalidRequest: the agent was deleted at that revision.
        """
        last_two = await self._few(
            ChangeFilter(agent_id=agent_id, upto=to, newest_first=True), 2 if to is None else 1
        )
        found = last_two.changes
        if to is not None and to > last_two.revision:
            raise RevisionNotFound(
                f"There is no revision {to} yet; the last is {last_two.revision}."
            )
        if to is None and found and found[0].type != "agent_deleted":
            # The delete itself records what the agent was.
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
    """Return the write that restores an agent, except for its key.

    Not validated again: what was once stored may be stored again, even if rules have changed.
    """
    fields = {name: getattr(old, name) for name in RESTORED_FIELDS}
    return AgentUpdate.model_construct(_fields_set=set(fields), comment=comment, **fields)


def restoring_create(old: Agent, comment: str) -> AgentCreate:
    """Return the write that recreates a deleted agent, without its key."""
    fields = {name: getattr(old, name) for name in RESTORED_FIELDS}
    return AgentCreate.model_construct(
        agent_id=old.agent_id, llm_api_key=None, is_default=False, comment=comment, **fields
    )


def _page(
    connection: Connection, wanted: ChangeFilter, limit: int, *, strict: bool = False
) -> ChangeList:
    """Return a page; an unreadable change is left out, or raises if `strict`.

    Raises:
        RevisionNotFound: `strict` is set, and a change cannot be read.
    """
    state = connection.execute(_SELECT_STATE).one()
    require_state(state.floor, state.revision, epoch=state.epoch)
    default_id = state.default_id

    def visible(agent_id: str) -> bool:
        return wanted.view.sees(agent_id, agent_id == default_id)

    def answer(changes: list[Change], following: int | None = None) -> ChangeList:
        return ChangeList(
            changes=changes,
            floor=state.floor,
            revision=state.revision,
            epoch=state.epoch,
            next=following,
        )

    if wanted.agent_id is not None and not visible(wanted.agent_id):
        return answer([])
    window = _window(connection, wanted, state, default_id)
    page = read_page(connection, window, limit, _characters)
    # The SQL condition chose them; do not rely on it alone to keep hidden agents out.
    changes = []
    for row in page.rows:
        try:
            changes += [_change(row)] if visible(row.agent_id) else []
        except ValidationError:
            if strict:
                raise RevisionNotFound("That change was altered and cannot be read.") from None
    return answer(changes, page.following(window))


def _window(
    connection: Connection,
    wanted: ChangeFilter,
    state: Row[*tuple[Any, ...]],
    default_id: str | None,
) -> Window:
    columns = CHANGES.c
    filters: list[ColumnElement[bool]] = []
    equal = None
    if wanted.agent_id is not None:
        equal = (columns.agent_id, wanted.agent_id)
        if wanted.actor is not None:
            filters.append(opaque(columns.actor) == wanted.actor)
    else:
        if wanted.actor is not None:
            equal = (columns.actor, wanted.actor)
        seen = view_sql.sees(wanted.view, default_id, columns.agent_id, connection.dialect.name)
        if seen is not None:
            filters.append(seen)
    after = wanted.since if wanted.since > state.floor else 0
    upto = MAX_INTEGER if wanted.upto is None else wanted.upto
    if wanted.at is not None:
        last = min(upto, state.revision)
        upto = _revision_at(connection, wanted.at, max(after, state.floor), last)
        filters.append(columns.created_at <= wanted.at)
    return Window(
        CHANGES, columns.revision, after, upto, wanted.newest_first, equal, tuple(filters)
    )


def _revision_at(connection: Connection, at: datetime, after: int, upto: int) -> int:
    """Return the last revision made at or before a time.

    A binary search, since times rise with the revisions, apart from differences between servers'
    clocks: an index on the times would cost every write. One statement, not one for each step.
    """
    bounds = select(
        literal(after, BigInteger).label("low"), literal(upto, BigInteger).label("high")
    ).cte("bounds", recursive=True)
    low, high = bounds.c.low, bounds.c.high
    middle = (low + high + 1) // 2
    # The first at or after it: a history that someone edited may have gaps.
    first = (
        select(CHANGES.c.revision)
        .where(CHANGES.c.revision >= middle, CHANGES.c.revision <= high)
        .order_by(CHANGES.c.revision)
        .limit(1)
    )
    in_time = first.with_only_columns(CHANGES.c.created_at <= at).scalar_subquery()
    bounds = bounds.union_all(
        select(
            case((in_time, first.scalar_subquery()), else_=low),
            case((in_time, high), else_=middle - 1),
        ).where(low < high)
    )
    found: int = connection.execute(
        select(bounds.c.low).where(bounds.c.low >= bounds.c.high)
    ).scalar_one()
    return found


def _characters(row: Row[Any]) -> int:
    return len(row.agent) + len(row.comment or "")


def _change(row: Row[Any]) -> Change:
    return Change(
        revision=row.revision,
        type=row.type,
        agent_id=row.agent_id,
        agent=Agent.model_validate_json(row.agent),
        was_default=row.was_default,
        actor=row.actor,
        comment=row.comment,
        created_at=row.created_at,
    )
