"""A change: its position in the order of all changes, and the result of a write.

Values only; knows no database.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

from slm.schemas import Agent

CREATED: Final = "agent_created"
CHANGED: Final = "agent_config_changed"
DELETED: Final = "agent_deleted"


class Position(NamedTuple):
    """A position in a database; the change id tells apart two positions with the same number.

    Attributes:
        revision: the revision of the last known change.
        epoch: its epoch; empty if nothing is known yet.
        change_id: the id of that change; None if only a number was given.
    """

    revision: int
    epoch: str
    change_id: str | None


@dataclass(frozen=True)
class CommittedChange:
    """One row of `changes`.

    Attributes:
        revision: its place in the order of all changes.
        type: `agent_config_changed`, `agent_created` or `agent_deleted`.
        agent: the agent after the change; for a delete, as it was before.
        was_default: whether it was the default before the change.
        created_at: when it was made, by the clock of the server that made it; None: not read.
        traceparent: the trace that it was made in, if it was made on this server and is traced.
        change_id: tells it from any other change with this revision.
    """

    revision: int
    type: str
    agent: Agent
    was_default: bool = False
    created_at: datetime | None = None
    traceparent: str | None = None
    change_id: str = ""

    @property
    def deletes(self) -> bool:
        """Whether this change deleted the agent."""
        return self.type == DELETED


@dataclass(frozen=True)
class Written:
    """What a write did.

    Attributes:
        agent: the agent after the write; None after a delete.
        revision: of the last change that this write made, or the current one if it made none.
        epoch: the epoch of that revision.
        changed: False if nothing was altered, so that there is no revision and no change.
        api_key_cleared: the stored key was removed, because it was bound to another place.
        changes: the changes it recorded in the history, in order.
        follows: the change id of the revision before the first of them.
    """

    agent: Agent | None
    revision: int
    epoch: str
    changed: bool = True
    api_key_cleared: bool = False
    changes: tuple[CommittedChange, ...] = ()
    follows: str = ""

    @property
    def change_id(self) -> str | None:
        """The id of the last change that this write made; None if it made none."""
        return self.changes[-1].change_id if self.changes else None
