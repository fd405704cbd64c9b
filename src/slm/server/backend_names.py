"""The names under which backends are shown: each one's own, and never another's.

Pure. A backend says itself how it is called, so the name belongs to the token that was first to use
it; any other is shown with its token (docs/protocol.md section 3, Fleet).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from slm.server.backends import Backend


def names_of(backends: Iterable[Backend]) -> dict[str, str]:
    """Return what each backend is shown as, by its id; no two are shown alike."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for backend in sorted(backends, key=lambda each: (each.known_since, each.id)):
        name = next(each for each in _candidates(backend) if each not in taken)
        taken.add(name)
        names[backend.id] = name
    return names


def _candidates(backend: Backend) -> Iterator[str]:
    yield backend.name
    with_token = f"{backend.name} (token {backend.token})"
    yield with_token
    for number in itertools.count(2):
        yield f"{with_token} #{number}"
