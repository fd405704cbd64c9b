"""The cache's position in the sequence of changes, and which agents are known to be deleted.

Numbers only: knows no configuration and not how the numbers arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from slm.client.cache.freshness import NEVER
from slm.client.cache.snapshot import ReceivedSnapshot
from slm.schemas import Snapshot

MAX_DELETES: Final = 10_000
"""How many deleted agents are remembered individually; short-lived agents add up."""


class Position:
    """Moves forward with each change, and back only with `begin`.

    Args:
        clock: monotonic seconds.

    Attributes:
        epoch: the epoch of the revisions.
        epoch_since: when that epoch was first seen, by `clock`.
        generation: increases whenever the known revisions become meaningless.
        revision: everything up to it is in the cache; 0 before the first snapshot.
        synced: whether everything up to `revision` is in the cache, except keys.
        at_least: the SLM's answers must not be older than this revision.
        heard: the stream's position and its change, from which it can resume. A snapshot may be
            newer, but is not resumed from: nothing guarantees that it belongs to the same history
            as the stream, because after a failover a database may have another.
        base: if `synced`, every agent that is not in the cache was gone by this revision.
        gone: the agents known to be gone after that, with the revision.
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
        """Note that the stream has delivered everything up to `revision`, which is that change."""
        if revision > self.heard[0] or (revision == self.heard[0] and change_id is not None):
            self.heard = revision, change_id
        self.at_least = max(self.at_least, revision)
        if self.synced:
            self.revision = self.at_least

    def complete(self, revision: int) -> None:
        """Note that a snapshot of this revision was applied."""
        self.gone = {i: r for i, r in self.gone.items() if r > revision}
        self.base = revision
        self.synced = True
        self.at_least = self.revision = max(self.at_least, revision)

    def contradicts(self, snapshot: Snapshot | ReceivedSnapshot) -> bool:
        """Return whether a snapshot belongs to a different history than the stream."""
        revision, change_id = self.heard
        another = None not in (change_id, snapshot.change_id) and change_id != snapshot.change_id
        return snapshot.epoch != self.epoch or (snapshot.revision == revision and another)

    def gone_by(self, agent_id: str) -> int:
        """Return the revision by which an agent is known to be gone; -1 if unknown."""
        # Any agent missing from a snapshot was gone by its revision.
        return max(self.gone.get(agent_id, -1), self.base if self.synced else -1)

    def note_gone(self, agent_id: str, revision: int) -> None:
        """Note that an agent is gone; at most `MAX_DELETES` are kept individually."""
        self.gone[agent_id] = revision
        if len(self.gone) > MAX_DELETES and self.synced:
            self.base = max(self.base, self.revision)
            self.gone = {i: r for i, r in self.gone.items() if r > self.base}
