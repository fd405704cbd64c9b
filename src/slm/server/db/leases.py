"""The leases of a database's server processes: which are live, and which keys each one has.

On SQLite there is one process, which holds the file, so its row needs no renewal. Knows no agent.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Double, delete, func, insert, select, text, update

from slm.errors import ProblemError
from slm.server.db.column_types import UNREADABLE
from slm.server.db.database import Database
from slm.server.db.tables import REPLICAS

KEEP_LAPSED_SECONDS: Final = 3600.0
"""How long the expired lease of a server is kept."""

_ASK_AGAIN_SECONDS: Final = 0.05

_NOW: Final[dict[str, Any]] = {
    # The database's clock, which all replicas share.
    "sqlite": text("SELECT (julianday('now') - 2440587.5) * 86400.0"),
    "postgresql": select(func.extract("epoch", func.clock_timestamp()).cast(Double)),
}


@dataclass(frozen=True)
class ReplicaInfo:
    """One server process, as it last reported.

    Attributes:
        id: random, new at each start.
        name: host and process id.
        fingerprints: the encryption keys that it has.
        seconds_since_seen: how long ago it reported.
        live: whether its lease is still valid.
    """

    id: str
    name: str
    fingerprints: tuple[str, ...]
    seconds_since_seen: float
    live: bool


class Lease:
    """This process's row in `replicas`.

    Args:
        database: the database of all the replicas.
        lease_seconds: after how long without a report this process is considered gone.
        fingerprints: returns the fingerprints of this process's encryption keys.
        tokens_version: returns the tokens_version applied here; by default -1, for none.
    """

    def __init__(
        self,
        database: Database,
        lease_seconds: float,
        fingerprints: Callable[[], tuple[str, ...]],
        tokens_version: Callable[[], int] = lambda: -1,
    ) -> None:
        self.id = secrets.token_hex(16)
        self.name = f"{socket.gethostname()}:{os.getpid()}"[:255]
        self._database = database
        self._lease_seconds = lease_seconds
        self._fingerprints = fingerprints
        self._tokens_version = tokens_version
        self._reported: tuple[str, ...] | None = None

    async def renew(self) -> None:
        """Report that this process is live, its keys, and which version of the tokens it applies.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        fingerprints = self._fingerprints()
        if self._database.dialect == "sqlite" and self._reported == fingerprints:
            return

        def work(connection: Connection) -> None:
            now = database_time(connection)
            values: dict[str, Any] = {
                "name": self.name,
                "fingerprints": json.dumps(fingerprints),
                "seen_at": now,
                "tokens_version": self._tokens_version(),
            }
            if connection.dialect.name == "sqlite":
                # The previous holder of the file is gone.
                connection.execute(delete(REPLICAS).where(REPLICAS.c.id != self.id))
            mine = update(REPLICAS).where(REPLICAS.c.id == self.id).values(values)
            if not connection.execute(mine).rowcount:
                connection.execute(insert(REPLICAS).values(id=self.id, **values))
            # Gone for good: a server never returns under the same id. Until then the row shows
            # when a server that died was there, for receipts.
            old = now - max(100 * self._lease_seconds, KEEP_LAPSED_SECONDS)
            connection.execute(delete(REPLICAS).where(REPLICAS.c.seen_at < old))

        await self._database.run(work)
        self._reported = fingerprints

    async def give_up(self) -> None:
        """Remove the row, at a clean stop."""
        mine = delete(REPLICAS).where(REPLICAS.c.id == self.id)
        await self._database.run(lambda connection: connection.execute(mine) and None)

    async def unconfirmed(
        self, version: int, *, wait_seconds: float, heard_within_seconds: float
    ) -> list[str] | None:
        """Return the other processes that do not apply the tokens of `version` yet.

        Args:
            version: a tokens_version.
            wait_seconds: how long the live ones have to confirm it.
            heard_within_seconds: a process silent for longer than this no longer serves anyone.

        Returns:
            Their names; None if the database could not answer.
        """
        if self._database.dialect == "sqlite":
            return []
        behind = select(REPLICAS.c.name, REPLICAS.c.seen_at).where(
            REPLICAS.c.id != self.id, REPLICAS.c.tokens_version < version
        )

        def read(connection: Connection) -> tuple[list[str], bool]:
            now = database_time(connection)
            rows = connection.execute(behind.order_by(REPLICAS.c.name)).all()
            names = [row.name for row in rows if now - row.seen_at <= heard_within_seconds]
            return names, any(now - row.seen_at <= self._lease_seconds for row in rows)

        until = time.monotonic() + wait_seconds
        try:
            names, some_live = await self._database.read(read)
            while some_live and time.monotonic() < until:
                await asyncio.sleep(_ASK_AGAIN_SECONDS)
                names, some_live = await self._database.read(read)
        except ProblemError:
            return None
        return names


def replicas(connection: Connection, lease_seconds: float) -> list[ReplicaInfo]:
    """Return the processes that reported, both live ones and those with an expired lease."""
    now = database_time(connection)
    alone = connection.dialect.name == "sqlite"
    return [
        ReplicaInfo(
            id=row.id,
            name=row.name,
            fingerprints=_fingerprints(row.fingerprints),
            seconds_since_seen=max(0.0, now - row.seen_at),
            live=alone or is_live(row.seen_at, now, lease_seconds),
        )
        for row in connection.execute(select(REPLICAS).order_by(REPLICAS.c.name))
    ]


def is_live(seen_at: float, now: float, lease_seconds: float) -> bool:
    """Return whether a lease is still valid.

    One too far in the future is not: the database's clock was set back, and any live process has
    reported since.
    """
    return abs(now - seen_at) <= lease_seconds


def _fingerprints(text: str) -> tuple[str, ...]:
    """Return the stored list; if it was altered, it names no key that anyone has."""
    try:
        names = json.loads(text)
    except UNREADABLE:
        names = None
    return tuple(map(str, names)) if isinstance(names, list) else ()


def database_time(connection: Connection) -> float:
    """Return the seconds since 1970 by the database's clock."""
    now: float = connection.execute(_NOW[connection.dialect.name]).scalar_one()
    return now
