"""Which tokens each replica has in force, so that a revocation knows who has not confirmed it."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "replicas",
        sa.Column("tokens_version", sa.BigInteger, nullable=False, server_default=sa.text("-1")),
    )
