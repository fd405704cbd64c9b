"""Each change gets a random id, so that a position names a commit and not only a number.

A standby that was promoted without the last commits numbers its own alike (docs/protocol.md 2).
"""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

IDS = ("head_id", "before_id", "floor_id")


def upgrade() -> None:
    connection = op.get_bind()
    if connection.dialect.name == "sqlite":
        # SQLite adds no column with a default that differs by row; one server writes the file.
        column = sa.Column("change_id", sa.String(16), nullable=False, server_default="")
        op.add_column("changes", column)
        connection.execute(
            sa.text("UPDATE changes SET change_id = lower(hex(randomblob(8))) WHERE change_id = ''")
        )
    else:
        # One pass over the table. The default stays: during a rolling upgrade a server of the
        # version before this one still writes changes, and those need an id too.
        random_id = sa.text("right(replace(gen_random_uuid()::text, '-', ''), 16)")
        column = sa.Column("change_id", sa.String(16), nullable=False, server_default=random_id)
        op.add_column("changes", column)
    for name in IDS:
        op.add_column("state", sa.Column(name, sa.String(16), nullable=False, server_default=""))
    op.add_column("state", sa.Column("timeline", sa.String(64)))
    state = sa.table("state", *map(sa.column, ("revision", "floor", *IDS)))
    changes = sa.table("changes", sa.column("revision"), sa.column("change_id"))
    # What was compacted away has no row to take an id from.
    connection.execute(sa.text("UPDATE state SET floor_id = :id"), {"id": secrets.token_hex(8)})
    for name, at in (
        ("floor_id", state.c.floor),
        ("before_id", state.c.revision - 1),
        ("head_id", state.c.revision),
    ):
        there = sa.select(changes.c.change_id).where(changes.c.revision == at).scalar_subquery()
        found = sa.func.coalesce(there, state.c.floor_id)
        connection.execute(sa.update(state).values({name: found}))
