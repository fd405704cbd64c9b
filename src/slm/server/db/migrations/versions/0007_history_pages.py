"""Indexes for each filter of the history and the audit in their pages' order; the audit's cut."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_changes_agent_id_revision", "changes", ["agent_id", "revision"])
    op.create_index("ix_changes_actor_revision", "changes", ["actor", "revision"])
    op.drop_index("ix_changes_agent_id", "changes")
    op.create_index("ix_audit_agent_id_seq", "audit", ["agent_id", "seq"])
    op.create_index("ix_audit_actor_seq", "audit", ["actor", "seq"])
    op.create_index("ix_audit_action_seq", "audit", ["action", "seq"])
    op.drop_index("ix_audit_agent_id", "audit")
    for column in (
        sa.Column("cut_seq", sa.BigInteger, nullable=False, server_default=sa.text("0")),
        sa.Column("cut_hash", sa.String(64), nullable=False, server_default="0" * 64),
        sa.Column("cut_seal", sa.Text),
    ):
        op.add_column("audit_head", column)
