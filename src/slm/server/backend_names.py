"""The names under which backends are shown, each of them only once.

A backend says itself how it is called, so a name belongs to the token that was first to use it, for
as long as its backend is known. Any other is shown with its token (docs/protocol.md section 3).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from slm.server.backends import Backend


def names_of(backends: Iterable[Backend]) -> dict[str, str]:
    """Return what each backend is shown as, by its id; no two are shown alike."""
    by_name: dict[str, list[Backend]] = {}
    for backend in sorted(backends, key=lambda each: (each.known_since, each.id)):
        by_name.setdefault(backend.name, []).append(backend)
    names: dict[str, str] = {}
    taken: set[str] = set()
    for name, several in by_name.items():
        owner = several[0].token
        if len(several) > 1:
            # Of one token's the one that is here now, not those that it was before.
            several.sort(key=lambda each: (each.token != owner, not each.connected, -each.since))
        for backend in several:
            prefix = name if backend.token == owner else f"{name} (token {backend.token})"
            shown = next(each for each in _candidates(prefix) if each not in taken)
            taken.add(shown)
            names[backend.id] = shown
    return names


class BackendNames:
    """`names_of` all backends, kept current as they come and go.

    Args:
        everyone: all backends that are known.
    """

    def __init__(self, everyone: Callable[[], Iterable[Backend]]) -> None:
        self._everyone = everyone
        self._names: dict[str, str] | None = None
        self._shared: set[str] = set()

    def of(self, backend: Backend) -> str:
        """Return what this one is shown as."""
        if self._names is None or backend.id not in self._names:
            everyone = list(self._everyone())
            counts = Counter(each.name for each in everyone)
            self._shared = {name for name, count in counts.items() if count > 1}
            self._names = names_of(everyone)
        return self._names.get(backend.id, backend.name)

    def anew(self) -> None:
        """Note that a backend was added or removed."""
        self._names = None

    def changed(self, backend: Backend) -> None:
        """Note that a backend came or went."""
        if backend.name in self._shared:
            self._names = None


def _candidates(prefix: str) -> Iterator[str]:
    yield prefix
    for number in itertools.count(2):
        yield f"{prefix} #{number}"
