"""Outbox: committed changes that are not yet written to the streams, each encoded once.

The feed fills it and the hub's broadcast empties it, so a slow broadcast never delays the feed.
Knows no connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from slm.server.agents.changes import CommittedChange
from slm.server.stream.encoding import MAX_WRITE_BYTES, Frames, encode_change

ResyncReason = Literal["compacted", "epoch", "ahead", "forked", "far-behind"]


@dataclass(frozen=True)
class Restart:
    """From here on there is a new epoch, or changes are missing: everyone fetches a snapshot."""

    epoch: str
    revision: int
    reason: ResyncReason
    change_id: str


class Write(NamedTuple):
    """Changes that are sent together, with their frames."""

    frames: Frames
    changes: list[CommittedChange]


class Outbox:
    """One queue for all streams.

    Attributes:
        filled: set when something was queued.
        committed_at: the commit times of queued changes that this server committed.
        changes: how many changes were queued in total.
    """

    def __init__(self) -> None:
        self.filled = asyncio.Event()
        self.committed_at: dict[int, float] = {}
        self.changes = 0
        self._items: deque[tuple[CommittedChange, str] | Restart] = deque()
        # The last queued revision, and the ids of the most recent changes.
        self._head = 0
        self._epoch = ""
        self._ids: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._items)

    def start(self, revision: int, epoch: str) -> None:
        """Start after a revision."""
        self._head, self._epoch = revision, epoch

    def publish(self, changes: Iterable[CommittedChange]) -> None:
        """Queue committed changes, in order, all or none.

        Skips changes that are already queued, because a feed that failed afterwards sends them
        again. If those revisions now have different changes, as after a failover, everyone fetches
        a snapshot.
        """
        changes = list(changes)
        if not changes:
            return
        # A feed starts where everything before has been passed on.
        known = {r: i for r, i in self._ids.items() if r >= changes[0].revision}
        self._ids = known | {change.revision: change.change_id for change in changes}
        if any(self._ids[revision] != known[revision] for revision in known):
            head = changes[-1]
            self.restart(self._epoch, head.revision, "forked", head.change_id)
            return
        encoded = [
            (change, encode_change(change)) for change in changes if change.revision > self._head
        ]
        if not encoded:
            return
        self._items.extend(encoded)
        self._head = encoded[-1][0].revision
        self.changes += len(encoded)
        self.filled.set()

    def restart(self, epoch: str, revision: int, reason: ResyncReason, change_id: str = "") -> None:
        """Send everyone to a snapshot, because of a new epoch or missing changes."""
        self.committed_at.clear()
        self._items.append(Restart(epoch, revision, reason, change_id))
        self._head, self._epoch = revision, epoch
        self._ids.clear()
        self.filled.set()

    def take(self) -> Restart | Write:
        """Return what to write next: a restart, or as many changes as fit into one write."""
        texts: list[str] = []
        changes: list[CommittedChange] = []
        size = 0
        while self._items:
            item = self._items[0]
            if isinstance(item, Restart):
                if not texts:
                    self._items.popleft()
                    return item
                break
            if texts and size + len(item[1]) > MAX_WRITE_BYTES:
                break
            self._items.popleft()
            changes.append(item[0])
            texts.append(item[1])
            size += len(item[1])
        return Write(Frames(tuple(texts), changes[-1].revision, changes[-1].change_id), changes)

    def seconds_since_commit(self, changes: Iterable[CommittedChange], now: float) -> list[float]:
        """Return the age in seconds of those changes that this server committed."""
        times = (self.committed_at.pop(change.revision, None) for change in changes)
        return [now - at for at in times if at is not None]
