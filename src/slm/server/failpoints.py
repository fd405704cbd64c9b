"""Places where a test can make the server fail on purpose; outside a test each costs one `if`.

Knows only names and actions. `SLM_FAILPOINT=after_commit:kill` arms one (several: separated by
commas). It is refused without SLM_TESTING=1, so that no environment can arm one by accident.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from slm.errors import ConfigurationError, DatabaseUnavailable

NAMES: Final = ("database", "before_commit", "after_commit", "before_push", "in_compaction")
"""database: any transaction is about to begin;
before_commit: a write has run its statements; after_commit: the write is durable and nobody knows
yet; before_push: the feed has a change, read or received from its own server, and has pushed
nothing of it; in_compaction: changes were deleted and the transaction is open."""

Kind = Literal["kill", "hold", "raise"]


@dataclass
class _Armed:
    """What happens at one place: `kind`, for how long, and after how many passes."""

    kind: Kind
    seconds: float = 0.0
    skip: int = 0


_armed: dict[str, _Armed] = {}
_lock = threading.Lock()


def arm(text: str | None, *, testing: bool) -> None:
    """Arm what `text` says, and disarm everything else.

    Args:
        text: `NAME:ACTION`, several separated by commas. ACTION is `kill` (SIGKILL to this
            process), `hold:SECONDS` or `raise` (as if the database were unreachable); `@N` after
            it lets the first N passes through. None or empty: disarm.
        testing: whether the server runs in a test.

    Raises:
        ConfigurationError: `testing` is false, or the text names no failpoint or action.
    """
    wanted = {}
    for part in (text or "").split(","):
        if part.strip():
            name, armed = _parse(part.strip())
            wanted[name] = armed
    if wanted and not testing:
        raise ConfigurationError("failpoint is for tests alone and needs SLM_TESTING=1")
    with _lock:
        _armed.clear()
        _armed.update(wanted)


def reach(name: str) -> None:
    """Run what is armed at this place; for code in a thread."""
    if _armed and (armed := _due(name)) is not None:
        _act(armed)
        time.sleep(armed.seconds)


async def reach_async(name: str) -> None:
    """Run what is armed at this place; for code in the event loop, which a hold does not block."""
    if _armed and (armed := _due(name)) is not None:
        _act(armed)
        await asyncio.sleep(armed.seconds)


def reach_then(
    name: str, loop: asyncio.AbstractEventLoop, call: Callable[..., object], *arguments: object
) -> None:
    """Run what is armed at this place, then schedule `call` in the loop; for code in a thread.

    A hold delays the call, but blocks neither the thread nor the loop.
    """
    if _armed and (armed := _due(name)) is not None:
        _act(armed)
        loop.call_soon_threadsafe(lambda: loop.call_later(armed.seconds, call, *arguments))
    else:
        loop.call_soon_threadsafe(call, *arguments)


def _due(name: str) -> _Armed | None:
    with _lock:
        armed = _armed.get(name)
        if armed is not None and armed.skip > 0:
            armed.skip -= 1
            return None
        return armed


def _act(armed: _Armed) -> None:
    if armed.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if armed.kind == "raise":
        raise DatabaseUnavailable("A failpoint stands in for a database that is away.")


def _parse(part: str) -> tuple[str, _Armed]:
    spec, _, skip = part.partition("@")
    name, _, action = spec.partition(":")
    kind, _, seconds = action.partition(":")
    try:
        if name in NAMES:
            if kind == "hold":
                return name, _Armed("hold", float(seconds), int(skip or 0))
            if kind in ("kill", "raise") and not seconds:
                return name, _Armed("kill" if kind == "kill" else "raise", 0.0, int(skip or 0))
    except ValueError:
        pass
    raise ConfigurationError(
        f"failpoint: NAME:ACTION is wanted, with a NAME of {', '.join(NAMES)} and an ACTION of"
        " kill, hold:SECONDS, raise, and @N after it to let the first N through"
    )
