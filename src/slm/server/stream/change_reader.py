"""What the feed reads: the state row, and the committed changes after a revision.

Each function runs inside one transaction, so the state row and the changes are consistent. Writes
nothing except the epoch, and decides only whether changes can continue from a position: that the
position exists and no revision is missing after it (docs/protocol.md section 2).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from pydantic import ValidationError
from sqlalchemy import Connection, bindparam, literal_column, null, select

from slm.errors import DatabaseUnavailable
from slm.schemas import Agent
from slm.server.agents.changes import CommittedChange, Position
from slm.server.agents.mapping import agent_of
from slm.server.db import state
from slm.server.db.column_types import require_state
from slm.server.db.state import TIMELINE
from slm.server.db.tables import AGENTS, CHANGES, SELECT_AGENTS, STATE
from slm.server.security.token_table import TokenTable, read_tokens

logger = logging.getLogger(__name__)

MAX_CATCH_UP: Final = 50_000
"""Above this many changes, everything is reloaded instead of read one by one."""

# Built once: building a statement costs more than running it.
_HORIZON: Final = (
    STATE.c.revision,
    STATE.c.floor,
    STATE.c.epoch,
    STATE.c.tokens_version,
    STATE.c.head_id,
    STATE.c.floor_id,
    STATE.c.timeline,
)
_SELECT_HORIZON: Final = select(*_HORIZON)
_CHANGE: Final = (
    CHANGES.c.revision,
    CHANGES.c.type,
    CHANGES.c.agent,
    CHANGES.c.was_default,
    CHANGES.c.created_at,
    CHANGES.c.change_id,
)
_SELECT_CHANGES: Final = (
    select(*_CHANGE)
    .where(CHANGES.c.revision > bindparam("since"), CHANGES.c.revision <= bindparam("upto"))
    .order_by(CHANGES.c.revision)
    .limit(bindparam("at_most"))
)
_HERE: Final = CHANGES.alias("here")
_ID_HERE: Final = (
    select(_HERE.c.change_id).where(_HERE.c.revision == bindparam("position")).scalar_subquery()
)
_SELECT_WHERE: Final = select(*_HORIZON, _ID_HERE.label("id_here"))


def _select_news(timeline: Any) -> Any:
    """Return the usual poll as one statement: the state row joined with each new change."""
    return (
        select(
            *_HORIZON,
            _ID_HERE.label("id_here"),
            timeline.label("timeline_now"),
            *(column.label(f"change_{column.name}") for column in _CHANGE),
        )
        .select_from(STATE.outerjoin(CHANGES, CHANGES.c.revision > bindparam("position")))
        .order_by(CHANGES.c.revision)
        .limit(bindparam("at_most"))
    )


_SELECT_NEWS: Final = _select_news(null())
_SELECT_NEWS_AND_TIMELINE: Final = _select_news(literal_column(TIMELINE))


@dataclass(frozen=True)
class Horizon:
    """The state row, as one transaction saw it.

    Attributes:
        revision: the revision of the last committed change.
        floor: changes after this revision can be read.
        epoch: the database's epoch.
        tokens_version: increases with each change to the tokens.
        head_id: the change id of `revision`.
        floor_id: the change id of `floor`.
        timeline: the cluster and timeline the epoch was created on; None if not recorded.
    """

    revision: int
    floor: int
    epoch: str
    tokens_version: int
    head_id: str = ""
    floor_id: str = ""
    timeline: str | None = None

    def __post_init__(self) -> None:
        """Reject invalid values from another program; SQLite stores any value in any column.

        Raises:
            DatabaseUnavailable: a number or the epoch is invalid.
        """
        require_state(self.revision, self.floor, self.tokens_version, epoch=self.epoch)

    def lost(self, held: Position, id_here: str | None) -> bool:
        """Return whether a held position is missing from this database, as after a failover.

        Args:
            held: the position.
            id_here: the change id of the row at that revision; None if there is no row.
        """
        if held.revision > self.revision:
            return True
        if id_here is None and held.revision == self.revision:
            id_here = self.head_id
        elif id_here is None and held.revision == self.floor:
            id_here = self.floor_id
        return None not in (id_here, held.change_id) and id_here != held.change_id


@dataclass(frozen=True)
class ChangePage:
    """Changes after a revision, with the state row from the same transaction.

    `id_here` is the change id of that revision itself, if its row exists.
    """

    horizon: Horizon
    changes: Sequence[CommittedChange]
    id_here: str | None = None

    def continues(self, since: int) -> bool:
        """Whether the changes follow `since` without a missing revision."""
        first = self.changes[0].revision if self.changes else since + 1
        return self.horizon.floor <= since and first == since + 1


@dataclass(frozen=True)
class News:
    """The result of one poll: new changes or a full reload, and the tokens if they changed.

    Attributes:
        horizon: the state row.
        changes: the changes after the position, complete and in order.
        agents: all agents, if changes alone cannot continue from the position.
        tokens: all tokens, if they have changed.
        lost: whether the position is missing from this database.
        timeline: where the database runs; None if it does not say.
    """

    horizon: Horizon
    changes: Sequence[CommittedChange] = ()
    agents: Sequence[Agent] | None = None
    tokens: TokenTable | None = None
    lost: bool = False
    timeline: str | None = None

    @property
    def moved(self) -> bool:
        """Whether the cluster or timeline differs from the epoch's, so changes may be lost."""
        return self.timeline is not None and self.timeline != self.horizon.timeline

    def resync_reason(self, held: Position) -> Literal["forked", "epoch", "compacted"]:
        """Return why changes alone cannot lead from the held position to what was read."""
        if self.lost and held.revision <= self.horizon.revision:
            return "forked"
        return "compacted" if self.horizon.epoch == held.epoch else "epoch"

    @property
    def head(self) -> Position:
        """The position after everything that was read."""
        return Position(self.horizon.revision, self.horizon.epoch, self.horizon.head_id)


def far_behind(agents: int) -> int:
    """Return the number of changes above which reading everything is cheaper."""
    return max(1000, 4 * agents)


def read_horizon(connection: Connection) -> Horizon:
    """Return the state row."""
    return Horizon(*connection.execute(_SELECT_HORIZON).one())


def tells_timeline(connection: Connection) -> bool:
    """Return whether this PostgreSQL reports its timeline; some compatible databases cannot."""
    connection.execute(select(literal_column(TIMELINE))).one()
    return True


def read_page(connection: Connection, since: int, limit: int, upto: int) -> ChangePage:
    """Return up to `limit` changes after `since` and not after `upto`."""
    *horizon, id_here = connection.execute(_SELECT_WHERE, {"position": since}).one()
    bounds = {"since": since, "upto": upto, "at_most": limit}
    rows = connection.execute(_SELECT_CHANGES, bounds).all()
    return ChangePage(Horizon(*horizon), _without_hole(rows, since), id_here)


def read_news(
    connection: Connection,
    held: Position,
    tokens_version: int,
    *,
    at_most: int = MAX_CATCH_UP,
    with_timeline: bool = False,
) -> News:
    """Return what is new after a position: changes one by one, or everything.

    Args:
        connection: inside a transaction.
        held: the position up to which everything is known; it has no epoch before the first poll.
        tokens_version: the version of the known tokens.
        at_most: if more changes than this are new, everything is read instead.
        with_timeline: whether the database reports its timeline.
    """
    statement = _SELECT_NEWS_AND_TIMELINE if with_timeline else _SELECT_NEWS
    at_most = min(at_most, MAX_CATCH_UP)
    bounds = {"position": held.revision, "at_most": at_most + 1 if held.epoch else 1}
    rows = connection.execute(statement, bounds).all()
    width = len(_HORIZON)
    horizon = Horizon(*rows[0][:width])
    id_here, timeline = rows[0][width : width + 2]
    lost = bool(held.epoch) and horizon.lost(held, id_here)
    found = News(horizon, lost=lost, timeline=timeline)
    if (
        lost
        or found.moved
        or (horizon.epoch, horizon.tokens_version) != (held.epoch, tokens_version)
    ):
        # In another epoch the same version number may stand for different tokens.
        found = replace(found, tokens=read_tokens(connection, horizon.tokens_version))
    if found.moved or (lost and horizon.epoch == held.epoch):
        return found  # useless until there is a new epoch
    behind = horizon.revision - held.revision
    if horizon.epoch == held.epoch and held.revision >= horizon.floor and behind <= at_most:
        # If there are no changes, the state row comes alone.
        new = [row[width + 2 :] for row in rows if row[width + 2] is not None]
        changes = _without_hole(new, held.revision)
        if len(changes) == behind:
            return replace(found, changes=changes)
    agents = [agent_of(row) for row in connection.execute(SELECT_AGENTS.order_by(AGENTS.c.id))]
    if not agents:
        # A default always exists; no change would announce agents created after this poll.
        raise DatabaseUnavailable("The database has no agents, as in the middle of a restore.")
    *_, head_id = connection.execute(_SELECT_WHERE, {"position": horizon.revision}).one()
    # Use the row's own id if it exists, because the next poll compares with it.
    horizon = replace(horizon, head_id=head_id or horizon.head_id)
    return replace(found, horizon=horizon, agents=agents)


def renew_epoch(connection: Connection, news: News, held: Position, fresh: str) -> bool:
    """Set a new epoch if the database lost the held position or has moved; return whether it did.

    Takes the lock on the state row and checks that the epoch is still the one that was read: of
    several replicas that notice, exactly one sets the epoch, and all use it.

    Args:
        connection: inside a transaction that writes.
        news: what was read.
        held: the position to look for.
        fresh: the new epoch.
    """
    state.lock(connection)
    *row, id_here = connection.execute(_SELECT_WHERE, {"position": held.revision}).one()
    horizon = Horizon(*row)
    if horizon.epoch != news.horizon.epoch:
        return False
    lost = horizon.epoch == held.epoch and (news.lost or horizon.lost(held, id_here))
    timeline = news.timeline if news.moved and news.timeline != horizon.timeline else None
    over = lost or (timeline is not None and horizon.timeline is not None)
    state.renew(connection, horizon.epoch, epoch=fresh if over else None, timeline=timeline)
    return over


def _without_hole(rows: Iterable[Sequence[Any]], since: int) -> list[CommittedChange]:
    """Return the changes that follow `since` consecutively, up to the first missing revision.

    Args:
        rows: each a revision, type, agent, was_default, creation time and change id.
        since: the revision before the first.
    """
    changes = []
    for expected, (revision, kind, text, was_default, at, change_id) in enumerate(rows, since + 1):
        if revision != expected:
            break
        try:
            agent = Agent.model_validate_json(text)
        except ValidationError:
            logger.error("change %d cannot be read", revision)
            break
        changes.append(CommittedChange(revision, kind, agent, was_default, at, change_id=change_id))
    return changes
