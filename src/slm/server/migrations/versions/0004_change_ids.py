"""Each change gets a random id, so that a position names a commit and not only a number.

A standby that was promoted without the last commits numbers its own alike (docs/protocol.md 2).
"""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0005"
branch_labels = None
depends_on = None


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
    for name in ("head_id", "before_id", "floor_id"):
        op.add_column("state", sa.Column(name, sa.String(16), nullable=False, server_default=""))
    op.add_column("state", sa.Column("timeline", sa.String(64)))
    # What was compacted away has no row to take an id from.
    connection.execute(sa.text("UPDATE state SET floor_id = :id"), {"id": secrets.token_hex(8)})
    for name, at in (("floor_id", "floor"), ("before_id", "revision - 1"), ("head_id", "revision")):
        connection.execute(
            sa.text(
                f"UPDATE state SET {name} = coalesce((SELECT change_id FROM changes"  # noqa: S608 # nosec B608
                f" WHERE changes.revision = state.{at}), floor_id)"
            )
        )
