"""The rows through which replicas report their backends: written as a whole, read one by one.

A row is a batch of one replica's backends. All of a replica's rows, in the order of `seq`, are its
report; a full report replaces the rows before it. A row that cannot be read, by an older server or
by any, is skipped and does not block the others. Knows SQL, and no event loop.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import TypeAdapter
from sqlalchemy import Connection, and_, case, delete, false, func, insert, or_, select

from slm.protocol import Revision
from slm.server.db.leases import database_time
from slm.server.db.tables import BACKENDS, REPLICAS
from slm.server.fleet.backend import Told, identity

logger = logging.getLogger(__name__)

BATCH: Final = "batch/"
"""The prefix of our rows' ids."""

MAX_ROW_BYTES: Final = 8 * 1024 * 1024
PAGE_ROWS: Final = 200
MAX_PAGE_BYTES: Final = 2 * 1024 * 1024
"""A page ends early if its rows hold more than this.

Otherwise reading it could exceed the transaction's time limit, and nothing would be read. A page
always has at least one row.
"""

_FETCHED_AT_ONCE: Final = 10
MAX_REPLICAS: Final = 1000
CLEAN_ROWS: Final = 10_000
"""How many rows are deleted at once."""

_HEAD_NUMBER: Final = TypeAdapter(Revision)
_HEAD: Final = ""
"""The id of the row in which an older version reports how far its stream has come."""


@dataclass(frozen=True)
class Batch:
    """The content of one row.

    Attributes:
        replica: the replica that wrote it.
        seq: the number of that replica's transaction.
        head: how far its stream had come; None if the row does not say.
        last: whether this is the replica's final report, written at an orderly stop.
        written_at: seconds since 1970 by the database's clock.
        backends: by id.
    """

    replica: str
    seq: int
    head: int | None
    last: bool
    written_at: float
    backends: dict[str, Told]


@dataclass
class ReportPage:
    """The result of one read: the replicas, and the next of their rows.

    Attributes:
        now: the database's time.
        leases: when each replica was last seen, without this one.
        batches: the rows that could be read.
        after: where the next page begins; None if this was the last.
    """

    now: float
    leases: dict[str, float] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)
    after: tuple[str, int, str] | None = None


def page_text(head: int, backends: Iterable[str]) -> str:
    """Return the JSON of a row: how far the stream has come, and its backends."""
    return f'{{"head":{head},"backends":{{{",".join(backends)}}}}}'


class TellTale:
    """Writes and reads the rows of `backends`.

    Attributes:
        unreadable: how many rows, or backends in rows, could not be read, by error class.
    """

    def __init__(self, replica: str) -> None:
        self.unreadable: Counter[str] = Counter()
        self._replica = replica

    def write(
        self, connection: Connection, seq: int, pages: Iterable[str], *, full: bool, last: bool
    ) -> None:
        """Write a report; `full`: replace everything reported before."""
        now = database_time(connection)
        if full:
            connection.execute(delete(BACKENDS).where(BACKENDS.c.replica == self._replica))
        rows = [
            {
                "id": f"{BATCH}{seq}/{number}",
                "replica": self._replica,
                "seq": seq,
                "data": page,
                "connected": not last,
                "written_at": now,
            }
            for number, page in enumerate(pages)
        ]
        connection.execute(insert(BACKENDS), rows)

    def own(self, connection: Connection) -> tuple[int, int]:
        """Return the last `seq` of this replica's rows, and the number of rows."""
        mine = select(func.coalesce(func.max(BACKENDS.c.seq), 0), func.count()).where(
            BACKENDS.c.replica == self._replica
        )
        last, count = connection.execute(mine).one()
        return last, count

    def read(
        self,
        connection: Connection,
        seen: Mapping[str, int],
        recent_seconds: float,
        after: tuple[str, int, str] | None = None,
    ) -> ReportPage:
        """Return the replicas and a page of the new rows.

        For a replica without a lease, only recent rows are returned.

        Args:
            connection: to the database.
            seen: by replica, the `seq` up to which its rows are known.
            recent_seconds: rows written within this time are recent.
            after: where the page begins.
        """
        page = ReportPage(database_time(connection))
        leases = (
            select(REPLICAS.c.id, REPLICAS.c.seen_at)
            .where(REPLICAS.c.id != self._replica)
            .order_by(REPLICAS.c.seen_at.desc())
            .limit(MAX_REPLICAS)
        )
        page.leases = {row.id: row.seen_at for row in connection.execute(leases)}
        b = BACKENDS.c
        known = {*page.leases, *seen}
        new = [and_(b.replica == r, b.seq > seen.get(r, -1)) for r in known]
        new.append(
            and_(
                b.replica.not_in([self._replica, *known]),
                b.written_at >= page.now - recent_seconds,
            )
        )
        rows = (
            select(
                b.replica,
                b.seq,
                b.id,
                b.connected,
                b.written_at,
                case((func.octet_length(b.data) <= MAX_ROW_BYTES, b.data)).label("data"),
            )
            .where(or_(*new))
            .order_by(b.replica, b.seq, b.id)
            .limit(PAGE_ROWS)
        )
        if after is not None:
            replica, seq, key = after
            same = and_(b.replica == replica, or_(b.seq > seq, and_(b.seq == seq, b.id > key)))
            rows = rows.where(or_(b.replica > replica, same))
        size = 0
        with connection.execute(rows, execution_options={"yield_per": _FETCHED_AT_ONCE}) as found:
            for row in found:
                page.batches.append(self._batch(row))
                size += len(row.data or "")
                if len(page.batches) == PAGE_ROWS or size > MAX_PAGE_BYTES:
                    page.after = (row.replica, row.seq, row.id)
                    break
        return page

    def clean(self, connection: Connection, before: float) -> None:
        """Delete rows written before a time by replicas that no longer exist."""
        b = BACKENDS.c
        old = (
            select(b.id, b.replica)
            .where(
                b.written_at < before,
                b.replica != self._replica,
                # A crashed server's rows stay as long as its lease is visible: its last report may
                # be older than its end.
                or_(b.connected == false(), b.replica.not_in(select(REPLICAS.c.id))),
            )
            .limit(CLEAN_ROWS)
            .subquery()
        )
        these = and_(b.id == old.c.id, b.replica == old.c.replica)
        connection.execute(delete(BACKENDS).where(these))

    def _batch(self, row: Any) -> Batch:
        head: int | None = None
        backends: dict[str, Told] = {}
        try:
            if row.data is None:
                raise OverflowError
            data = json.loads(row.data)
            told = {row.id: data}
            if row.id == _HEAD or row.id.startswith(BATCH):
                head, told = _HEAD_NUMBER.validate_python(data["head"]), data.get("backends", {})
            for key, said in told.items():
                backend = self._told(said)
                if backend is not None:
                    if not row.id.startswith(BATCH):
                        # An older version uses the token's number instead.
                        key = identity(backend.token, backend.client, key)
                    backends[key] = backend
        except Exception as error:
            self._note(error)
        last = row.connected is False and row.id.startswith(BATCH)
        return Batch(row.replica, row.seq, head, last, row.written_at, backends)

    def _told(self, data: Any) -> Told | None:
        try:
            return Told.of(data)
        except Exception as error:
            self._note(error)
            return None

    def _note(self, error: Exception) -> None:
        # Only the class name, and only once: the text may contain the row's data.
        name = type(error).__name__
        if name not in self.unreadable:
            logger.warning("what a replica tells of a backend cannot be read: %s", name)
        self.unreadable[name] += 1
