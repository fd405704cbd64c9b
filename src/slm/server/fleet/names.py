"""The names under which backends are shown, all unique.

A backend chooses its own name, so a name belongs to the first token that used it, as long as its
backend is known. Any other backend is shown with its token (docs/protocol.md section 3).
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from operator import itemgetter
from typing import NamedTuple

from slm.server.fleet.backend import Backend
from slm.server.tasks.slices import Steps, at_once, sliced, sorted_in_steps


class Names(NamedTuple):
    """The name each backend is shown under.

    Attributes:
        shown: by backend id, ordered by name; all different.
        shared: the names that several backends use.
    """

    shown: Mapping[str, str]
    shared: Set[str]


def names_of(backends: Iterable[Backend]) -> Steps[Names]:
    """Return the name each backend is shown under, in small steps."""
    by_name: dict[str, list[Backend]] = {}
    first_known = yield from sorted_in_steps(backends, lambda each: (each.known_since, each.id))
    for backend in first_known:
        by_name.setdefault(backend.name, []).append(backend)
        yield
    names: dict[str, str] = {}
    taken: set[str] = set()
    shared: set[str] = set()
    for name, several in by_name.items():
        owner = several[0].token
        if len(several) > 1:
            shared.add(name)
            several = yield from sorted_in_steps(several, functools.partial(_rank, owner))
        free: dict[str, Iterator[str]] = {}
        for backend in several:
            prefix = name if backend.token == owner else f"{name} (token {backend.token})"
            numbered = free.setdefault(prefix, _numbered(prefix))
            shown = next(each for each in numbered if each not in taken)
            taken.add(shown)
            names[backend.id] = shown
            yield
    in_order = yield from sorted_in_steps(names.items(), itemgetter(1))
    return Names(dict(in_order), shared)


def _rank(owner: str, backend: Backend) -> tuple[bool, bool, float]:
    """Among one token's backends, a connected one comes before those that have left."""
    return (backend.token != owner, not backend.connected, -backend.since)


class BackendNames:
    """The result of `names_of` for all backends, kept current as they connect and disconnect.

    Args:
        everyone: all known backends.
    """

    def __init__(self, everyone: Callable[[], Iterable[Backend]]) -> None:
        self._everyone = everyone
        self._names: Names | None = None
        self._changes = 0
        self._naming = asyncio.Lock()

    def of(self, backend: Backend) -> str:
        """Return the name this backend is shown under."""
        if self._names is None:
            self._names = at_once(names_of(self._everyone()))
        return self._names.shown.get(backend.id, backend.name)

    async def all(self) -> Mapping[str, str]:
        """Return the name each backend is shown under, by id and ordered by name."""
        async with self._naming:
            names, changes = self._names, self._changes
            if names is None:
                names = await sliced(names_of(self._everyone()))
                if changes == self._changes:
                    self._names = names
        return names.shown

    def anew(self) -> None:
        """Note that a backend was added or removed."""
        self._names = None
        self._changes += 1

    def changed(self, backend: Backend) -> None:
        """Note that a backend connected or disconnected."""
        if self._names is None or backend.name in self._names.shared:
            self.anew()


def _numbered(prefix: str) -> Iterator[str]:
    yield prefix
    for number in itertools.count(2):
        yield f"{prefix} #{number}"
