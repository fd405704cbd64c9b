"""Iterates over many items while letting the rest of the event loop run in between."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from typing import Any, Final, TypeVar

_T = TypeVar("_T")

SLICE_SECONDS: Final = 0.005
"""How long one turn of the event loop may take during such an iteration."""

_SORTED_AT_ONCE: Final = 1000

Steps = Generator[None, None, _T]
"""Work in small steps, each ended by a bare `yield`; returns the result."""


async def in_slices(items: Iterable[_T], seconds: float = SLICE_SECONDS) -> AsyncIterator[_T]:
    """Yield each item; after every `seconds` of work, let the event loop run."""
    until = time.monotonic() + seconds
    for item in items:
        yield item
        if time.monotonic() >= until:
            await asyncio.sleep(0)
            until = time.monotonic() + seconds


async def sliced(steps: Steps[_T]) -> _T:
    """Do stepwise work, letting the event loop run in between as `in_slices` does."""
    results: list[_T] = []
    async for _ in in_slices(_collecting(steps, results)):
        pass
    return results[0]


def at_once(steps: Steps[_T]) -> _T:
    """Do stepwise work in one turn of the event loop."""
    results: list[_T] = []
    for _ in _collecting(steps, results):
        pass
    return results[0]


def _collecting(steps: Steps[_T], results: list[_T]) -> Generator[None, None, None]:
    results.append((yield from steps))


def sorted_in_steps(items: Iterable[_T], key: Callable[[_T], Any]) -> Steps[list[_T]]:
    """Sort as `sorted` does, in small steps."""
    found = []
    for item in items:
        found.append(item)
        yield
    parts = []
    for start in range(0, len(found), _SORTED_AT_ONCE):
        parts.append(sorted(found[start : start + _SORTED_AT_ONCE], key=key))
        yield
    result = []
    for item in heapq.merge(*parts, key=key):
        result.append(item)
        yield
    return result
