"""What the feed reads: the state row, and the committed changes after a revision.

Each function runs inside one transaction, so the state row and the changes are of one moment. Moves
nothing, and decides only whether the changes lead on without a hole (docs/protocol.md section 2).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from pydantic import ValidationError
from sqlalchemy import Connection, bindparam, select

from slm.schemas import Agent
from slm.server.auth import TokenTable, read_tokens
from slm.server.catalog import CommittedChange
from slm.server.models import AGENTS, CHANGES, SELECT_AGENTS, STATE, agent_of

logger = logging.getLogger(__name__)

MAX_CATCH_UP: Final = 50_000
"""More changes than this are not read one by one: everything is loaded anew instead."""

# Built once: building a statement costs more than running it.
_HORIZON: Final = select(STATE.c.revision, STATE.c.floor, STATE.c.epoch, STATE.c.tokens_version)
_CHANGE: Final = (
    CHANGES.c.revision,
    CHANGES.c.type,
    CHANGES.c.agent,
    CHANGES.c.was_default,
    CHANGES.c.created_at,
)
_SELECT_CHANGES: Final = (
    select(*_CHANGE)
    .where(CHANGES.c.revision > bindparam("since"), CHANGES.c.revision <= bindparam("upto"))
    .order_by(CHANGES.c.revision)
    .limit(bindparam("at_most"))
)
# The usual look in one statement: the state row, and beside it each change that is new.
_SELECT_NEWS: Final = (
    select(
        *_HORIZON.selected_columns, *(column.label(f"change_{column.name}") for column in _CHANGE)
    )
    .select_from(STATE.outerjoin(CHANGES, CHANGES.c.revision > bindparam("position")))
    .order_by(CHANGES.c.revision)
    .limit(MAX_CATCH_UP + 1)
)


@dataclass(frozen=True)
class Horizon:
    """The state row, as one transaction saw it.

    Attributes:
        revision: that of the last committed change.
        floor: changes after this one can be read.
        epoch: the database's life.
        tokens_version: counts changes of the tokens.
    """

    revision: int
    floor: int
    epoch: str
    tokens_version: int


@dataclass(frozen=True)
class Page:
    """Some changes after a revision, and the state row of the same transaction."""

    horizon: Horizon
    changes: Sequence[CommittedChange]

    def continues(self, since: int) -> bool:
        """Whether the changes follow `since` with no hole between."""
        first = self.changes[0].revision if self.changes else since + 1
        return self.horizon.floor <= since and first == since + 1


@dataclass(frozen=True)
class News:
    """What one look found: changes, or everything anew; the tokens where they have changed."""

    horizon: Horizon
    changes: Sequence[CommittedChange] = ()
    agents: Sequence[Agent] | None = None
    tokens: TokenTable | None = None


def read_horizon(connection: Connection) -> Horizon:
    """Return the state row."""
    return Horizon(*connection.execute(_HORIZON).one())


def read_page(connection: Connection, since: int, limit: int, upto: int) -> Page:
    """Return at most `limit` changes after `since`, none after `upto`."""
    horizon = read_horizon(connection)
    bounds = {"since": since, "upto": upto, "at_most": limit}
    rows = connection.execute(_SELECT_CHANGES, bounds).all()
    return Page(horizon, _without_hole(rows, since))


def read_news(connection: Connection, position: int, epoch: str, tokens_version: int) -> News:
    """Return what is new after `position` of `epoch`: changes one by one, or everything anew.

    Args:
        connection: inside a transaction.
        position: the revision up to which all is known.
        epoch: its epoch; empty before the first look, so that everything is read.
        tokens_version: of the tokens that are known.
    """
    new: list[Sequence[Any]] = []
    if epoch:
        rows = connection.execute(_SELECT_NEWS, {"position": position}).all()
        horizon = Horizon(*rows[0][:4])
        # Without a change the state row stands alone.
        new = [row[4:] for row in rows if row[4] is not None]
    else:
        horizon = read_horizon(connection)
    tokens = None
    if (horizon.epoch, horizon.tokens_version) != (epoch, tokens_version):
        # In another life of the database the same version may stand for other tokens.
        tokens = read_tokens(connection, horizon.tokens_version)
    behind = horizon.revision - position
    if horizon.epoch == epoch and behind < 0:
        return News(horizon, tokens=tokens)
    if horizon.epoch == epoch and position >= horizon.floor and behind <= MAX_CATCH_UP:
        changes = _without_hole(new, position)
        if len(changes) == behind:
            return News(horizon, changes, tokens=tokens)
    agents = [agent_of(row) for row in connection.execute(SELECT_AGENTS.order_by(AGENTS.c.id))]
    return News(horizon, agents=agents, tokens=tokens)


def _without_hole(rows: Iterable[Sequence[Any]], since: int) -> list[CommittedChange]:
    """Return the changes that follow `since` one by one; the first hole ends them.

    Args:
        rows: each a revision, type, agent, was_default and when it was made.
        since: the revision before the first.
    """
    changes = []
    for expected, (revision, kind, text, was_default, at) in enumerate(rows, since + 1):
        if revision != expected:
            break
        try:
            agent = Agent.model_validate_json(text)
        except ValidationError:
            logger.error("change %d cannot be read", revision)
            break
        changes.append(CommittedChange(revision, kind, agent, was_default, _as_utc(at)))
    return changes


def _as_utc(time: datetime) -> datetime:
    # SQLite keeps no zone; what we write is UTC.
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)
