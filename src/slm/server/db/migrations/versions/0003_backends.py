"""What each replica tells the others of its backends; PostgreSQL alone uses it."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "backends",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("replica", sa.String(32), primary_key=True),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
        sa.Column("connected", sa.Boolean, nullable=False),
        sa.Column("written_at", sa.Double, nullable=False),
    )
    op.create_index("ix_backends_replica_seq", "backends", ["replica", "seq"])
