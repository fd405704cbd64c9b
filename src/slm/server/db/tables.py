"""The tables.

Only declares them; opens no connection. Tables and columns: docs/protocol.md sections 1 and 2.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final, TypeVar

from sqlalchemy import (
    BigInteger,
    Boolean,
    Float,
    Index,
    Integer,
    Table,
    false,
    func,
    select,
    text,
    true,
    type_coerce,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import NullType

from slm.server.db.column_types import (
    StoredDouble,
    StoredString,
    StoredText,
    StoredTime,
)

T = TypeVar("T")


class Base(DeclarativeBase):
    """All tables of the server."""


class AgentRow(Base):
    """One agent; the columns up to `updated_at` are those of an adopted table.

    `llm_options` is text and not JSON: PostgreSQL would accept less than a SQLite file can hold,
    and JSONB would reorder what is passed on unchanged.
    """

    __tablename__ = "agents"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    agent_id: Mapped[str] = mapped_column(StoredString(64), unique=True)
    name: Mapped[str] = mapped_column(StoredString(128))
    description: Mapped[str | None] = mapped_column(StoredText)
    llm_provider: Mapped[str] = mapped_column(StoredString(32))
    llm_endpoint: Mapped[str | None] = mapped_column(StoredString(256))
    llm_model: Mapped[str] = mapped_column(StoredString(256))
    llm_api_key_encrypted: Mapped[str | None] = mapped_column(StoredText)
    llm_timeout: Mapped[int | None] = mapped_column(Integer, server_default=text("30"))
    llm_temperature: Mapped[float | None] = mapped_column(Float, server_default=text("0.7"))
    llm_max_tokens: Mapped[int | None] = mapped_column(Integer)
    is_default: Mapped[bool | None] = mapped_column(Boolean, server_default=false())
    is_active: Mapped[bool | None] = mapped_column(Boolean, server_default=true())
    created_at: Mapped[datetime | None] = mapped_column(
        StoredTime(), server_default=func.current_timestamp()
    )
    updated_at: Mapped[datetime | None] = mapped_column(
        StoredTime(), server_default=func.current_timestamp()
    )

    llm_options: Mapped[str] = mapped_column(StoredText, server_default="{}")
    revision: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    api_key_revision: Mapped[int | None] = mapped_column(BigInteger)
    # For an adopted token that no key decrypted yet: proof that it may be bound (adoption.py).
    key_state: Mapped[str | None] = mapped_column(StoredText)

    __table_args__ = (
        Index("idx_agents_agent_id", "agent_id"),
        Index("idx_agents_is_default", "is_default"),
        Index(
            "uq_agents_one_default",
            "is_default",
            unique=True,
            sqlite_where=text("is_default = 1"),
            postgresql_where=text("is_default"),
        ),
        {"sqlite_autoincrement": True},
    )


class ChangeRow(Base):
    """One committed change: the feed and the history (docs/protocol.md section 2).

    `agent` is the JSON of `schemas.Agent`, without the key; for a delete, the agent before it.
    `change_id` is random: another commit with the same revision, such as one made after a failover
    that lost this one, has another id.
    """

    __tablename__ = "changes"

    revision: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    type: Mapped[str] = mapped_column(StoredString(32))
    agent_id: Mapped[str] = mapped_column(StoredString(64))
    agent: Mapped[str] = mapped_column(StoredText)
    was_default: Mapped[bool] = mapped_column(Boolean)
    actor: Mapped[str] = mapped_column(StoredString(128))
    comment: Mapped[str | None] = mapped_column(StoredText)
    created_at: Mapped[datetime] = mapped_column(StoredTime())
    change_id: Mapped[str] = mapped_column(StoredString(16), server_default="")

    # One index for each filter of the history, in the order of its pages (db/pages.py).
    __table_args__ = (
        Index("ix_changes_agent_id_revision", "agent_id", "revision"),
        Index("ix_changes_actor_revision", "actor", "revision"),
    )


class StateRow(Base):
    """The one row that every writer locks first, so that revision order is commit order.

    Attributes:
        revision: the revision of the last committed change.
        floor: changes up to here may be gone; a `since` below it cannot be resumed.
        epoch: the random id of the current epoch.
        tokens_version: rises with each change of `tokens`, so that every replica notices one.
        keyring_version: the same for `encryption_keys`.
        head_id: the change id of `revision`.
        before_id: the change id of the previous revision.
        floor_id: the change id of `floor`, which no longer has a row.
        timeline: the PostgreSQL cluster and timeline that this epoch was made on.
    """

    __tablename__ = "state"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    revision: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    floor: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    epoch: Mapped[str] = mapped_column(StoredString(64))
    tokens_version: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    keyring_version: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    head_id: Mapped[str] = mapped_column(StoredString(16), server_default="")
    before_id: Mapped[str] = mapped_column(StoredString(16), server_default="")
    floor_id: Mapped[str] = mapped_column(StoredString(16), server_default="")
    timeline: Mapped[str | None] = mapped_column(StoredString(64))


class TokenRow(Base):
    """One bearer token; only the token's digest is stored.

    `agents` is null, or the JSON list of patterns that limits what the token can see.
    """

    __tablename__ = "tokens"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    name: Mapped[str] = mapped_column(StoredString(128))
    digest: Mapped[str] = mapped_column(StoredString(64), unique=True)
    scopes: Mapped[str] = mapped_column(StoredText)
    agents: Mapped[str | None] = mapped_column(StoredText)
    created_at: Mapped[datetime] = mapped_column(StoredTime())
    expires_at: Mapped[datetime | None] = mapped_column(StoredTime())
    revoked_at: Mapped[datetime | None] = mapped_column(StoredTime())
    last_used_at: Mapped[datetime | None] = mapped_column(StoredTime())

    __table_args__ = ({"sqlite_autoincrement": True},)


class EncryptionKeyRow(Base):
    """What the database stores of an encryption key: its name, and a token that only it decrypts.

    `retired_at`: when it was pruned; its name stays, so that a server still configured with the key
    does not take it for a new one.
    """

    __tablename__ = "encryption_keys"

    fingerprint: Mapped[str] = mapped_column(StoredString(16), primary_key=True)
    check_token: Mapped[str] = mapped_column(StoredText)
    is_active: Mapped[bool] = mapped_column(Boolean)
    created_at: Mapped[datetime] = mapped_column(StoredTime())
    retired_at: Mapped[datetime | None] = mapped_column(StoredTime())


class AuditRow(Base):
    """Who did what, to which agent, when and from where; each row's hash covers the one before.

    `at` is text, since the hash covers what is stored, and the two engines store times differently.
    """

    __tablename__ = "audit"

    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    at: Mapped[str] = mapped_column(StoredString(32))
    actor: Mapped[str] = mapped_column(StoredString(128))
    action: Mapped[str] = mapped_column(StoredString(32))
    agent_id: Mapped[str | None] = mapped_column(StoredText)
    address: Mapped[str | None] = mapped_column(StoredString(64))
    detail: Mapped[str] = mapped_column(StoredText)
    hash: Mapped[str] = mapped_column(StoredString(64))

    __table_args__ = (
        Index("ix_audit_agent_id_seq", "agent_id", "seq"),
        Index("ix_audit_actor_seq", "actor", "seq"),
        Index("ix_audit_action_seq", "action", "seq"),
    )


class AuditHeadRow(Base):
    """The one row that says where the audit's chain ends; locked to append to the audit.

    Not in `state`: a key read would then wait for every write, and delay it.

    Attributes:
        cut_seq, cut_hash: the last row that was removed after its export; the chain starts there.
        cut_seal: both, sealed by the active encryption key, which is not in the database.
    """

    __tablename__ = "audit_head"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    seq: Mapped[int] = mapped_column(BigInteger)
    hash: Mapped[str] = mapped_column(StoredString(64))
    cut_seq: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    cut_hash: Mapped[str] = mapped_column(StoredString(64), server_default="0" * 64)
    cut_seal: Mapped[str | None] = mapped_column(StoredText)


class ReplicaRow(Base):
    """One server process that serves this database: a lease, and the encryption keys it has.

    `seen_at` is seconds since 1970 by the database's clock, the only one that replicas share;
    `tokens_version` is the version of the tokens that it applies.
    """

    __tablename__ = "replicas"

    id: Mapped[str] = mapped_column(StoredString(32), primary_key=True)
    name: Mapped[str] = mapped_column(StoredString(255))
    fingerprints: Mapped[str] = mapped_column(StoredText)
    seen_at: Mapped[float] = mapped_column(StoredDouble)
    tokens_version: Mapped[int] = mapped_column(BigInteger, server_default=text("-1"))


class BackendRow(Base):
    """What a replica reports to the others about some backends (`fleet/replication_rows.py`).

    Attributes:
        id: the batch; in rows of an older version a backend, or empty if the row says how far the
            replica's stream has come.
        seq: counts the replica's transactions, so that others read only what is new.
        data: JSON.
        connected: false in a replica's last report.
        written_at: seconds since 1970 by the database's clock.
    """

    __tablename__ = "backends"

    id: Mapped[str] = mapped_column(StoredText, primary_key=True)
    replica: Mapped[str] = mapped_column(StoredString(32), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger)
    data: Mapped[str] = mapped_column(StoredText)
    connected: Mapped[bool] = mapped_column(Boolean)
    written_at: Mapped[float] = mapped_column(StoredDouble)

    __table_args__ = (
        Index("ix_backends_replica_seq", "replica", "seq"),
        Index("ix_backends_written_at", "written_at"),
    )


def _table(model: type[Base]) -> Table:
    table = model.__table__
    assert isinstance(table, Table)  # noqa: S101 - for the type checker
    return table


AGENTS: Final = _table(AgentRow)
CHANGES: Final = _table(ChangeRow)
STATE: Final = _table(StateRow)
TOKENS: Final = _table(TokenRow)
ENCRYPTION_KEYS: Final = _table(EncryptionKeyRow)
AUDIT: Final = _table(AuditRow)
AUDIT_HEAD: Final = _table(AuditHeadRow)
REPLICAS: Final = _table(ReplicaRow)
BACKENDS: Final = _table(BackendRow)

# Without SQLAlchemy's types: they raise on what another program may have stored in a SQLite column
# (a text date, 'true'), and one such row must not break the whole list.
SELECT_AGENTS: Final = select(*(type_coerce(c, NullType()).label(c.name) for c in AGENTS.c))
"""Every agent, as `agent_of` takes it; add a `where` or `order_by`."""


def utc_now() -> datetime:
    """Return the time as it is written into every row."""
    return datetime.now(UTC)
