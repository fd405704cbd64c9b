"""The tables of version 1, made new or around a table `agents` that is there already.

An existing `agents` gets columns, never a rebuilt table: batch_alter_table lost its UNIQUE and its
AUTOINCREMENT. What the new index and NOT NULL rules need of old rows is put right here; revisions,
changes and keys are the work of `lifecycle.adoption`, which runs in the same transaction.
"""

import secrets
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Each with its default: adding a NOT NULL column to rows needs one.
OURS = (
    ("llm_options", sa.Text(), False, "{}"),
    ("revision", sa.BigInteger(), False, sa.text("0")),
    ("api_key_revision", sa.BigInteger(), True, None),
    ("key_state", sa.Text(), True, None),
)


def upgrade() -> None:
    connection = op.get_bind()
    inspector = sa.inspect(connection)
    if inspector.has_table("agents"):
        _take_over(connection, inspector)
    else:
        _create_agents()
    _indices(connection)
    _create_others()
    connection.execute(
        sa.text("INSERT INTO state (id, epoch) VALUES (1, :epoch)"),
        {"epoch": secrets.token_hex(8)},
    )
    _exactly_one_default(connection)


def _ours() -> list[sa.Column[Any]]:
    return [
        sa.Column(name, kind, nullable=nullable, server_default=default)
        for name, kind, nullable, default in OURS
    ]


def _create_agents() -> None:
    op.create_table(
        "agents",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("agent_id", sa.String(64), nullable=False, unique=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("description", sa.Text),
        sa.Column("llm_provider", sa.String(32), nullable=False),
        sa.Column("llm_endpoint", sa.String(256)),
        sa.Column("llm_model", sa.String(256), nullable=False),
        sa.Column("llm_api_key_encrypted", sa.Text),
        sa.Column("llm_timeout", sa.Integer, server_default=sa.text("30")),
        sa.Column("llm_temperature", sa.Float, server_default=sa.text("0.7")),
        sa.Column("llm_max_tokens", sa.Integer),
        sa.Column("is_default", sa.Boolean, server_default=sa.false()),
        sa.Column("is_active", sa.Boolean, server_default=sa.true()),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.func.current_timestamp()
        ),
        sa.Column(
            "updated_at", sa.DateTime(timezone=True), server_default=sa.func.current_timestamp()
        ),
        *_ours(),
        sqlite_autoincrement=True,
    )


def _take_over(connection: sa.Connection, inspector: sa.Inspector) -> None:
    present = {column["name"] for column in inspector.get_columns("agents")}
    for column in _ours():
        if column.name not in present:
            op.add_column("agents", column)
    if connection.dialect.name == "postgresql":
        # SQLite checks no length.
        op.alter_column("agents", "llm_model", type_=sa.String(256))
    for statement in (
        "UPDATE agents SET llm_timeout = 30 WHERE llm_timeout IS NULL",
        "UPDATE agents SET is_active = TRUE WHERE is_active IS NULL",
        "UPDATE agents SET created_at = CURRENT_TIMESTAMP WHERE created_at IS NULL",
        "UPDATE agents SET updated_at = created_at WHERE updated_at IS NULL",
    ):
        connection.execute(sa.text(statement))
    if connection.dialect.name == "sqlite":
        # SQLite keeps a word in a BOOLEAN column as the word; the partial index needs 0 and 1.
        connection.execute(
            sa.text(
                "UPDATE agents SET is_default = coalesce(lower(trim(CAST(is_default AS TEXT)))"
                " IN ('1', '1.0', 'true', 't', 'yes', 'y', 'on'), 0)"
                " WHERE is_default IS NULL OR typeof(is_default) != 'integer'"
                " OR is_default NOT IN (0, 1)"
            )
        )
    else:
        connection.execute(sa.text("UPDATE agents SET is_default = false WHERE is_default IS NULL"))
    # Before the unique index: of several defaults the lowest id keeps the flag.
    connection.execute(
        sa.text(
            "UPDATE agents SET is_default = FALSE WHERE id >"
            " (SELECT min(id) FROM agents WHERE is_default = TRUE)"
        )
    )


def _indices(connection: sa.Connection) -> None:
    op.create_index("idx_agents_agent_id", "agents", ["agent_id"], if_not_exists=True)
    op.create_index("idx_agents_is_default", "agents", ["is_default"], if_not_exists=True)
    op.create_index(
        "uq_agents_one_default",
        "agents",
        ["is_default"],
        unique=True,
        sqlite_where=sa.text("is_default = 1"),
        postgresql_where=sa.text("is_default"),
    )


def _create_others() -> None:
    op.create_table(
        "changes",
        sa.Column("revision", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("agent_id", sa.String(64), nullable=False),
        sa.Column("agent", sa.Text, nullable=False),
        sa.Column("was_default", sa.Boolean, nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("comment", sa.Text),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("ix_changes_agent_id", "changes", ["agent_id"])
    op.create_table(
        "state",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("revision", sa.BigInteger, nullable=False, server_default=sa.text("0")),
        sa.Column("floor", sa.BigInteger, nullable=False, server_default=sa.text("0")),
        sa.Column("epoch", sa.String(64), nullable=False),
        sa.Column("tokens_version", sa.BigInteger, nullable=False, server_default=sa.text("0")),
        sa.Column("keyring_version", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("agents", sa.Text),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.Column("revoked_at", sa.DateTime(timezone=True)),
        sa.Column("last_used_at", sa.DateTime(timezone=True)),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "encryption_keys",
        sa.Column("fingerprint", sa.String(16), primary_key=True),
        sa.Column("check_token", sa.Text, nullable=False),
        sa.Column("is_active", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )


def _exactly_one_default(connection: sa.Connection) -> None:
    """Flag `default` where no row is the default, or seed it; the default is always active."""
    for statement in (
        "UPDATE agents SET is_default = TRUE WHERE agent_id = 'default'"
        " AND NOT EXISTS (SELECT 1 FROM agents WHERE is_default = TRUE)",
        "INSERT INTO agents (agent_id, name, llm_provider, llm_model, llm_temperature, is_default)"
        " SELECT 'default', 'Default Agent', 'ollama', 'mistral:7b-instruct', NULL, TRUE"
        " WHERE NOT EXISTS (SELECT 1 FROM agents WHERE is_default = TRUE)",
        "UPDATE agents SET is_active = TRUE WHERE is_default = TRUE",
    ):
        connection.execute(sa.text(statement))
