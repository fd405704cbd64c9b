"""Elsewhere: what other replicas have reported about their backends, and which are alive.

Values and rules; knows no database and no clock. A replica's report is kept while its lease has
lapsed, and is used again if the replica returns (docs/protocol.md section 4).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from slm.server.fleet.backend import Backend, Told

MAX_TOLD: Final = 50_000
"""How many backends are kept per other replica."""


@dataclass
class Account:
    """Everything another replica has reported.

    Attributes:
        head: how far its stream had come at its last report; -1 if it has not reported.
        last: whether that was its final report.
        written_at: when it was written, by our clock.
        ends_at: when its lease runs out, or ran out, by our clock.
        live: whether its lease is still valid.
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
    """The result of applying a replica's report.

    Attributes:
        backend: what that replica now knows about it.
        grown_bytes: how much more memory it takes.
        renamed: whether this or another backend may now be shown under a different name.
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
        """Return the backends' ids."""
        return self._backends

    def all(self) -> Iterator[Backend]:
        """Yield each backend once for each replica that knows it."""
        return (each for known in self._backends.values() for each in known.values())

    def at(self, key: str) -> list[Backend]:
        """Return a backend as each replica knows it: gone if that replica's lease has lapsed."""
        if key not in self._backends:
            return []
        return [self._as_it_is(each) for each in self._backends[key].values()]

    def _as_it_is(self, backend: Backend) -> Backend:
        lapse = self._lapsed.get(backend.replica)
        return backend if lapse is None else backend.gone_with(*lapse)

    def may_return(self, key: str) -> bool:
        """Whether a backend only appears disconnected because its server's lease has lapsed."""
        known = self._backends.get(key, {})
        return any(r in self._lapsed and each.connected for r, each in known.items())

    def merge(self, replica: str, key: str, told: Told, offset_seconds: float) -> Merged | None:
        """Apply a replica's report about a backend; returns None if it has reported too many."""
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
        """Note which replicas are alive; return whether the set of the others has changed.

        Args:
            live: the leases that are alive.
            lapsed: what is known about replicas that are not alive.
            now: used for replicas about which nothing is known, from when they are first missed.
        """
        alive, before = set(live), self._lapsed.keys()
        self._lapsed = {
            replica: lapsed.get(replica) or self._lapsed.get(replica) or now
            for replica in self._count
            if replica not in alive
        }
        return before != self._lapsed.keys()

    def forget_replica(self, replica: str) -> list[Backend]:
        """Forget everything a replica reported; return what was forgotten."""
        forgotten = []
        for key in [key for key, known in self._backends.items() if replica in known]:
            forgotten.append(self._backends[key].pop(replica))
            if not self._backends[key]:
                del self._backends[key]
        self._count.pop(replica, None)
        return forgotten

    def forget(self, key: str) -> list[Backend]:
        """Forget what was reported about a backend; return what was forgotten."""
        known = self._backends.pop(key, {})
        for replica in known:
            self._count[replica] -= 1
            if not self._count[replica]:
                del self._count[replica]
        return list(known.values())
