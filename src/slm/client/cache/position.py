"""Where in which line of changes a cache stands, and which agents are known to be gone there.

Numbers only: knows no configuration, and nothing of how they came.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from slm.client.cache.freshness import NEVER
from slm.client.cache.snapshot import ReceivedSnapshot
from slm.schemas import Snapshot

MAX_DELETES: Final = 10_000
"""So many deleted agents are remembered one by one; agents that live for a minute add up."""


class Position:
    """Goes on with each change, and back only with `begin`.

    Args:
        clock: monotonic seconds.

    Attributes:
        epoch: the life of the database that the revisions belong to.
        epoch_since: when that was first heard of, by `clock`.
        generation: goes up whenever the revisions known so far lose their meaning.
        revision: everything up to it is in the cache; 0 before the first snapshot.
        synced: whether everything up to `revision` is in the cache, keys apart.
        at_least: the revision that the SLM's answers may not be older than.
        heard: where the stream stands, and which change it heard there: what can be resumed. A
            snapshot may be newer. It is not resumed from, since nothing says that it is of the same
            line of changes as what was heard: after a failover a database may have another.
        base: with `synced`, every agent that is not in the cache was gone by this revision.
        gone: the agents that are known to be gone later than that, with the revision.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.epoch: str | None = None
        self.epoch_since = NEVER
        self.generation = 0
        self.revision = 0
        self.synced = False
        self.at_least = 0
        self.heard: tuple[int, str | None] = (0, None)
        self.base = 0
        self.gone: dict[str, int] = {}

    def begin(self, epoch: str, revision: int, change_id: str | None) -> None:
        """Start over at `revision` of `epoch`."""
        self.generation += 1
        if epoch != self.epoch:
            self.epoch_since = self._clock()
        self.epoch = epoch
        self.synced = False
        self.gone.clear()
        self.at_least = self.base = revision
        self.heard = revision, change_id

    def advance(self, revision: int, change_id: str | None = None) -> None:
        """Note that the stream has passed everything up to `revision`, which is that change."""
        if revision > self.heard[0] or (revision == self.heard[0] and change_id is not None):
            self.heard = revision, change_id
        self.at_least = max(self.at_least, revision)
        if self.synced:
            self.revision = self.at_least

    def complete(self, revision: int) -> None:
        """Note that a snapshot of this revision was taken over."""
        self.gone = {i: r for i, r in self.gone.items() if r > revision}
        self.base = revision
        self.synced = True
        self.at_least = self.revision = max(self.at_least, revision)

    def contradicts(self, snapshot: Snapshot | ReceivedSnapshot) -> bool:
        """Say whether a snapshot is of another line of changes than what the stream told."""
        revision, change_id = self.heard
        another = None not in (change_id, snapshot.change_id) and change_id != snapshot.change_id
        return snapshot.epoch != self.epoch or (snapshot.revision == revision and another)

    def gone_by(self, agent_id: str) -> int:
        """Return up to which revision an agent is known not to be there; -1 for not at all."""
        # Whoever is not here at a snapshot's revision was gone by then.
        return max(self.gone.get(agent_id, -1), self.base if self.synced else -1)

    def note_gone(self, agent_id: str, revision: int) -> None:
        """Note that an agent is gone; no more than `MAX_DELETES` are kept one by one."""
        self.gone[agent_id] = revision
        if len(self.gone) > MAX_DELETES and self.synced:
            self.base = max(self.base, self.revision)
            self.gone = {i: r for i, r in self.gone.items() if r > self.base}
