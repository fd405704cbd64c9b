"""The statements that write agents and their changes, each run inside the caller's transaction.

Knows tables and columns. The registry has the rules: what may be written, and when.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, bindparam, delete, insert, update
from sqlalchemy.types import UserDefinedType

from slm.schemas import Agent
from slm.server.agents.changes import CommittedChange
from slm.server.db.state import Head
from slm.server.db.statements import Prepared
from slm.server.db.tables import AGENTS, CHANGES, SELECT_AGENTS, utc_now
from slm.server.security.audit import Who


class Author(NamedTuple):
    """Who writes, and why."""

    who: Who
    comment: str | None


class _AsItIs(UserDefinedType[Any]):
    """A value that goes to the driver untouched, whatever the column's type."""

    cache_ok = True


# Built once: building a statement costs more than running it.
_AGENT: Final = Prepared(SELECT_AGENTS.where(AGENTS.c.agent_id == bindparam("agent_id")))
_COLUMNS: Final = tuple(SELECT_AGENTS.selected_columns.keys())
_DEFAULT: Final = SELECT_AGENTS.where(AGENTS.c.is_default.is_(True))
_WRITTEN: Final = tuple(c.name for c in AGENTS.c if c.name not in ("id", "agent_id", "created_at"))
# All values except the time go as they are: a field that was not sent is written back unchanged,
# whatever it contains.
_UPDATE: Final = Prepared(
    update(AGENTS)
    .where(AGENTS.c.id == bindparam("row_id"))
    .values(
        {
            name: bindparam(name, type_=None if name == "updated_at" else _AsItIs())
            for name in _WRITTEN
        }
    )
)
_INSERT: Final = insert(AGENTS).returning(AGENTS.c.id)
_DELETE: Final = delete(AGENTS).where(AGENTS.c.id == bindparam("row_id"))
_RECORD: Final = Prepared(insert(CHANGES))


def agent_row(connection: Connection, agent_id: str) -> dict[str, Any] | None:
    """Return the columns of an agent, or None; accepts any text."""
    if "\x00" in agent_id or any("\ud800" <= c <= "\udfff" for c in agent_id):
        return None  # no database accepts it in a query
    rows = _AGENT.run(connection, {"agent_id": agent_id})
    return dict(zip(_COLUMNS, rows[0], strict=True)) if rows else None


def default_row(connection: Connection) -> Any:
    """Return the row of the default agent, or None."""
    return connection.execute(_DEFAULT).one_or_none()


def insert_agent(connection: Connection, values: Mapping[str, Any]) -> int:
    """Add a row and return its id."""
    return int(connection.execute(_INSERT, dict(values)).scalar_one())


def update_agent(connection: Connection, values: Mapping[str, Any]) -> None:
    """Write every column of the row with this `id`, except those that never change."""
    _UPDATE.run(connection, {name: values[name] for name in _WRITTEN} | {"row_id": values["id"]})


def delete_agent(connection: Connection, row_id: int) -> None:
    """Delete one row."""
    connection.execute(_DELETE, {"row_id": row_id})


def record_change(
    connection: Connection,
    kind: str,
    agent: Agent,
    head: Head,
    was_default: bool,
    author: Author,
) -> CommittedChange:
    """Write the change that the feeds read, in the same transaction as what it describes."""
    now = utc_now()
    _RECORD.run(
        connection,
        {
            "revision": head.revision,
            "change_id": head.change_id,
            "type": kind,
            "agent_id": agent.agent_id,
            "agent": agent.model_dump_json(),
            "was_default": was_default,
            "actor": author.who.actor,
            "comment": author.comment,
            "created_at": now,
        },
    )
    return CommittedChange(head.revision, kind, agent, was_default, now, change_id=head.change_id)
