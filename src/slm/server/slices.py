"""in_slices: walks over many things and lets the rest of the event loop run in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import Final, TypeVar

_T = TypeVar("_T")

SLICE_SECONDS: Final = 0.005
"""How long one turn of the loop may take of such a walk."""


async def in_slices(items: Iterable[_T], seconds: float = SLICE_SECONDS) -> AsyncIterator[_T]:
    """Yield each item; after every `seconds` of work the loop has a turn."""
    until = time.monotonic() + seconds
    for item in items:
        yield item
        if time.monotonic() >= until:
            await asyncio.sleep(0)
            until = time.monotonic() + seconds
