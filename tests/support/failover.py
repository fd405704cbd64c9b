"""What a database looks like after an asynchronous standby took over, made on one database.

A standby is its primary as it was some commits ago, whole. So that is what is put back: every row
of the agents, of their changes, of the tokens and of the state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from slm.server.db.database import Database
from slm.server.db.tables import AGENTS, CHANGES, STATE, TOKENS

_TABLES = (AGENTS, CHANGES, STATE, TOKENS)


@dataclass
class Standby:
    """The database as it was when this was made.

    Attributes:
        database: the one that is put back.
    """

    database: Database
    _rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    async def of(cls, database: Database) -> Standby:
        """Return what a standby holds that has everything up to now."""
        return cls(database, await database.read(_all_rows))

    async def promote(self, and_then: Callable[[Connection], None] | None = None) -> None:
        """Take the database's place; what was committed since is lost.

        Args:
            and_then: what else is done before anybody can look.
        """

        def work(connection: Connection) -> None:
            for table in _TABLES:
                connection.execute(delete(table))
                if self._rows[table.name]:
                    connection.execute(insert(table), self._rows[table.name])
            if and_then is not None:
                and_then(connection)

        await self.database.run(work)


def _all_rows(connection: Connection) -> dict[str, list[dict[str, Any]]]:
    return {
        table.name: [dict(row._mapping) for row in connection.execute(select(table))]
        for table in _TABLES
    }


async def ids_of(database: Database) -> dict[int, str]:
    """Return which change each revision is, as the database holds it."""
    rows = await database.read(
        lambda connection: connection.execute(select(CHANGES.c.revision, CHANGES.c.change_id)).all()
    )
    return {row.revision: row.change_id for row in rows}
