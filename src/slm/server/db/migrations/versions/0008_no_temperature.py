"""A temperature of NULL comes to mean that none is sent.

Until now such a row was served with 0.7. It keeps that: an upgrade changes no agent. What was not
served yet, a table that is being adopted, keeps its NULL.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.get_bind().execute(
        sa.text(
            "UPDATE agents SET llm_temperature = 0.7 WHERE llm_temperature IS NULL AND revision > 0"
        )
    )
