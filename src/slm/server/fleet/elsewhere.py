"""Elsewhere: what other replicas have told of their backends, and which of those replicas live.

Values and rules; knows no database and no clock. What one told stays while its lease has lapsed,
and counts again if it returns (docs/protocol.md section 4).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from slm.server.fleet.backend import Backend, Told

MAX_TOLD: Final = 50_000
"""How many backends of another replica are kept."""


@dataclass
class Account:
    """What another replica has told in all.

    Attributes:
        head: how far its stream had come when it last told; -1: it has not told.
        last: whether that was its last word.
        written_at: when, by our clock.
        ends_at: when its lease runs out, or ran out, by our clock.
        live: whether it has not.
    """

    head: int = -1
    last: bool = False
    written_at: float = 0.0
    ends_at: float = 0.0
    live: bool = False


class Lapse(NamedTuple):
    """A replica's lease that has run out.

    Attributes:
        head: how far its stream had come.
        at: when the lease ran out, seconds since 1970.
    """

    head: int
    at: float


class Merged(NamedTuple):
    """What came of taking in what a replica told.

    Attributes:
        backend: what that replica knows of it now.
        grown_bytes: how much more memory it takes.
        renamed: whether it, or another, may be shown under another name now.
    """

    backend: Backend
    grown_bytes: int
    renamed: bool


class Elsewhere:
    """The backends of other replicas, each as that replica knows it."""

    def __init__(self) -> None:
        self._backends: dict[str, dict[str, Backend]] = {}
        self._count: dict[str, int] = {}
        self._lapsed: dict[str, Lapse] = {}

    def ids(self) -> Iterable[str]:
        """Return the ids of the backends."""
        return self._backends

    def all(self) -> Iterator[Backend]:
        """Yield each backend once for each replica that knows it."""
        return (each for known in self._backends.values() for each in known.values())

    def at(self, key: str) -> list[Backend]:
        """Return one backend as each replica knows it: gone, where that one's lease has lapsed."""
        if key not in self._backends:
            return []
        return [self._as_it_is(each) for each in self._backends[key].values()]

    def _as_it_is(self, backend: Backend) -> Backend:
        lapse = self._lapsed.get(backend.replica)
        return backend if lapse is None else backend.gone_with(*lapse)

    def may_return(self, key: str) -> bool:
        """Whether a backend is gone only as long as its server's lease is."""
        known = self._backends.get(key, {})
        return any(r in self._lapsed and each.connected for r, each in known.items())

    def merge(self, replica: str, key: str, told: Told, offset_seconds: float) -> Merged | None:
        """Take in what a replica tells of a backend; None where it has told of too many."""
        backend = self._backends.get(key, {}).get(replica)
        is_new = backend is None
        if backend is None:
            count = self._count.get(replica, 0)
            if count >= MAX_TOLD:
                return None
            self._count[replica] = count + 1
            backend = Backend(key, told.client, told.token, replica, told.server)
            self._backends.setdefault(key, {})[replica] = backend
        before, known_since = backend.bytes, backend.known_since
        backend.take_over(told, offset_seconds)
        renamed = is_new or backend.known_since != known_since
        return Merged(backend, backend.bytes - before, renamed)

    def keep(self, live: Iterable[str], lapsed: Mapping[str, Lapse], now: Lapse) -> bool:
        """Note which replicas live; return whether those that do not are others than before.

        Args:
            live: their leases.
            lapsed: what is known of those that do not live.
            now: counts for those of which nothing is known, from when they are first missed.
        """
        alive, before = set(live), self._lapsed.keys()
        self._lapsed = {
            replica: lapsed.get(replica) or self._lapsed.get(replica) or now
            for replica in self._count
            if replica not in alive
        }
        return before != self._lapsed.keys()

    def forget_replica(self, replica: str) -> list[Backend]:
        """Forget all that a replica told; return what that was."""
        forgotten = []
        for key in [key for key, known in self._backends.items() if replica in known]:
            forgotten.append(self._backends[key].pop(replica))
            if not self._backends[key]:
                del self._backends[key]
        self._count.pop(replica, None)
        return forgotten

    def forget(self, key: str) -> list[Backend]:
        """Forget what was told of a backend; return what that was."""
        known = self._backends.pop(key, {})
        for replica in known:
            self._count[replica] -= 1
            if not self._count[replica]:
                del self._count[replica]
        return list(known.values())
