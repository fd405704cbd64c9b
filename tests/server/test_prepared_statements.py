"""Prepared: a statement compiled once does what Core's own execute does."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import Connection, bindparam, insert, select, update

from slm.server.db.database import Database
from slm.server.db.statements import Prepared
from slm.server.db.tables import CHANGES, Base


async def test_it_stores_what_core_stores(database_url: str) -> None:
    """Times, flags and nulls are stored by a prepared statement as SQLAlchemy stores them."""
    values = {
        "type": "agent_created",
        "agent_id": "alpha",
        "agent": "{}",
        "was_default": True,
        "actor": "me",
        "comment": None,
        "created_at": datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
    }
    record = Prepared(insert(CHANGES))
    rename = Prepared(
        update(CHANGES)
        .where(CHANGES.c.revision == bindparam("which"), CHANGES.c.was_default.is_(True))
        .values(actor=bindparam("new_actor"), type="fixed")
        .returning(CHANGES.c.revision, CHANGES.c.actor)
    )

    def work(connection: Connection) -> None:
        Base.metadata.create_all(connection)
        connection.execute(insert(CHANGES), values | {"revision": 1})
        for revision in (2, 3):
            assert not record.run(connection, values | {"revision": revision})
        rows = connection.exec_driver_sql("SELECT * FROM changes ORDER BY revision").all()
        assert rows[0][1:] == rows[1][1:] == rows[2][1:]
        found = [rename.run(connection, {"which": n, "new_actor": f"n{n}"}) for n in (2, 3, 4)]
        assert [[tuple(row) for row in rows] for rows in found] == [[(2, "n2")], [(3, "n3")], []]
        kinds = connection.execute(select(CHANGES.c.type).order_by(CHANGES.c.revision)).scalars()
        assert list(kinds) == ["agent_created", "fixed", "fixed"]

    database = Database(database_url)
    await database.open()
    try:
        await database.run(work)
    finally:
        await database.close()
