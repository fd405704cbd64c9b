"""The state row: the database's current revision, epoch and versions.

Every write locks this row before any other, so that writes take turns across any number of
replicas, and what a write reads here stays true until it commits. Only this module changes the row
(tests/server/test_state.py). Knows no agent, token or key.
"""

from __future__ import annotations

import secrets
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Text, bindparam, cast, func, literal_column, select, update

from slm.server.db.column_types import require_state, text_of, the_row
from slm.server.db.engines.listener import CHANNEL
from slm.server.db.statements import Prepared
from slm.server.db.tables import STATE

# What an unprivileged role may ask PostgreSQL: which cluster this is, and how often one of its
# standbys was promoted. A standby can report neither this nor an LSN of its own.
TIMELINE: Final = (
    "(SELECT CASE WHEN pg_is_in_recovery() THEN NULL ELSE"
    " (SELECT system_identifier FROM pg_control_system())::text || '/'"
    " || left(pg_walfile_name(pg_current_wal_lsn()), 8) END)"
)


class Head(NamedTuple):
    """The state row after a write took its revision.

    Attributes:
        revision: the revision taken.
        epoch: the epoch it belongs to.
        keyring_version: the version of the encryption keys.
        tokens_version: the version of the tokens.
        before_id: the change id of the previous revision.
        change_id: the id of the change made at this revision.
    """

    revision: int
    epoch: str
    keyring_version: int
    tokens_version: int
    before_id: str
    change_id: str


class Locked(NamedTuple):
    """The state row, which nobody else changes until the transaction ends.

    Attributes:
        revision: the revision of the last change.
        floor: the revision of the last change that was removed.
        keyring_version: the version of the encryption keys.
        tokens_version: the version of the tokens.
        head_id: the change id of `revision`.
    """

    revision: int
    floor: int
    keyring_version: int
    tokens_version: int
    head_id: str


# Built once: building a statement costs more than running it.
_NEXT: Final = (
    update(STATE)
    .where(STATE.c.id == 1)
    .values(
        revision=STATE.c.revision + 1,
        # An assignment reads the old value.
        before_id=STATE.c.head_id,
        head_id=bindparam("change_id"),
    )
)
_HEAD: Final = (
    STATE.c.revision,
    STATE.c.epoch,
    STATE.c.keyring_version,
    STATE.c.tokens_version,
    STATE.c.before_id,
)
_NEXT_REVISION: Final = {
    "sqlite": Prepared(_NEXT.returning(*_HEAD)),
    # The wake-up for every replica: part of the transaction, so that it is sent only on commit,
    # and part of the statement, so that it costs no round trip.
    "postgresql": Prepared(
        _NEXT.returning(*_HEAD, func.pg_notify(CHANNEL, cast(STATE.c.revision, Text)))
    ),
}
# On SQLite, BEGIN IMMEDIATE has taken the lock.
_LOCK: Final = (
    select(
        STATE.c.revision,
        STATE.c.floor,
        STATE.c.keyring_version,
        STATE.c.tokens_version,
        STATE.c.head_id,
    )
    .where(STATE.c.id == 1)
    .with_for_update()
)


def lock(connection: Connection) -> Locked:
    """Lock the state row: always the first statement of a write that takes no revision."""
    locked = Locked(*connection.execute(_LOCK).one())
    require_state(locked.keyring_version, locked.tokens_version)
    return locked


def next_revision(connection: Connection) -> Head:
    """Lock the state row and take the next revision: always the first statement of a write."""
    change_id = new_change_id()
    rows = _NEXT_REVISION[connection.dialect.name].run(connection, {"change_id": change_id})
    revision, epoch, keyring, tokens, before_id, *_ = the_row(rows)
    require_state(revision, tokens, epoch=text_of(epoch))
    return Head(revision, epoch, keyring, tokens, before_id, change_id)


def take_revisions(connection: Connection, revision: int, *, head_id: str, before_id: str) -> None:
    """Move to a revision several further on, in a row that is already locked."""
    _set(connection, revision=revision, head_id=head_id, before_id=before_id)


def new_change_id() -> str:
    """Return a random id for a change that is about to be made."""
    return secrets.token_hex(8)


def bump_tokens(connection: Connection) -> tuple[int, int]:
    """Lock the state row and let every replica see that the tokens changed.

    Returns:
        The new tokens_version, and the previous one.
    """
    step = _step()
    raised = (
        update(STATE).where(STATE.c.id == 1).values(tokens_version=STATE.c.tokens_version + step)
    )
    statement: Any = raised.returning(STATE.c.tokens_version)
    if connection.dialect.name == "postgresql":
        # Without a revision: there is none, and a replica that has every revision must look too.
        statement = raised.returning(STATE.c.tokens_version, func.pg_notify(CHANNEL, ""))
    version: int = connection.execute(statement).one()[0]
    return version, version - step


def bump_keyring(connection: Connection) -> None:
    """Let every replica see that the encryption keys changed."""
    _set(connection, keyring_version=STATE.c.keyring_version + _step())


def move_floor(connection: Connection, floor: int, floor_id: str) -> None:
    """Record that the changes up to `floor`, which has this id, are removed."""
    _set(connection, floor=floor, floor_id=floor_id)


def begin_epoch(connection: Connection) -> None:
    """Start a new epoch: what clients hold of the old one is no longer valid."""
    _set(connection, epoch=new_epoch())


def renew(connection: Connection, before: str, *, epoch: str | None, timeline: str | None) -> None:
    """Set the epoch, the timeline or both, if the epoch is still `before`."""
    given = {"epoch": epoch, "timeline": timeline}
    values = {name: value for name, value in given.items() if value is not None}
    if values:
        connection.execute(update(STATE).where(STATE.c.epoch == before).values(values))


def new_epoch() -> str:
    """Return a random name for a new epoch."""
    return secrets.token_hex(8)


def write_nothing(connection: Connection) -> None:
    """Write the row unchanged: this shows whether the database accepts writes."""
    _set(connection, floor=STATE.c.floor)


def has_moved(connection: Connection) -> bool:
    """Return whether the database runs elsewhere than its epoch was made: that epoch is over.

    Only PostgreSQL shows this, and only if it was asked before.
    """
    if connection.execute(select(STATE.c.timeline)).scalar_one() is None:
        return False
    moved = STATE.c.timeline != literal_column(TIMELINE)
    return bool(connection.execute(select(moved)).scalar_one())


def _set(connection: Connection, **values: Any) -> None:
    connection.execute(update(STATE).where(STATE.c.id == 1).values(values))


def _step() -> int:
    """Return by how much a change raises a version.

    Random: after a failover that lost the last changes, later ones must not reach the same number,
    which a server would take for the version it already has.
    """
    return 1 + secrets.randbelow(1 << 20)
