"""Rows of the fleet are found by their age: what is old is neither read nor kept."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_backends_written_at", "backends", ["written_at"])
