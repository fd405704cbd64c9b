"""Outcome: how backends handled a change, who is still expected to answer, and the receipt.

Rules only; knows no database, no connection and no clock (docs/protocol.md section 3).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterable, Iterable
from typing import Any, NamedTuple

from slm.server.fleet.ack_log import Outcome
from slm.server.fleet.backend import Backend
from slm.server.tasks.slices import in_slices


class Subject(NamedTuple):
    """What a receipt is about.

    Attributes:
        agent_id: the agent that was changed.
        is_default: whether it is, or was, the default, which everyone may see.
        revision: the revision of the change.
        committed_at: seconds since 1970.
        changed: False if the write altered nothing; then every connected backend is expected.
    """

    agent_id: str
    is_default: bool
    revision: int
    committed_at: float
    changed: bool = True


def outcome_of(backend: Backend, subject: Subject) -> Outcome:
    """Return how `backend` handled the change, from the first ack that applied it, or the last."""
    return backend.acks.outcome(subject.agent_id, subject.revision)


def is_expected(backend: Backend, subject: Subject) -> bool:
    """Whether it was connected when the change was committed and may see it."""
    there = (
        backend.was_there(subject.revision, subject.committed_at)
        if subject.changed
        else backend.connected
    )
    return there and backend.view.sees(subject.agent_id, subject.is_default)


class Waiter:
    """Waits until every expected backend has answered for one change.

    Attributes:
        subject: the change.
        done: set once no more answers are expected.
        has_looked: whether the expected backends are known.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.done = asyncio.Event()
        self.has_looked = False
        self._left: set[str] = set()

    async def look(self, backends: Iterable[Backend]) -> None:
        """Find the expected backends one by one; those that answer meanwhile are removed."""
        async for backend in in_slices(backends):
            if is_expected(backend, self.subject) and backend.acks and not self._answered(backend):
                self._left.add(backend.id)
        self.has_looked = True
        self._check()

    def heard(self, backend: Backend) -> None:
        """Remove the backend if it has answered."""
        if backend.id in self._left and self._answered(backend):
            self._left.discard(backend.id)
            self._check()

    def _answered(self, backend: Backend) -> bool:
        return outcome_of(backend, self.subject).answered

    def _check(self) -> None:
        if self.has_looked and not self._left:
            self.done.set()


async def receipt_of(
    subject: Subject, backends: AsyncIterable[tuple[str, Backend]], named: str | None = None
) -> dict[str, Any]:
    """Return who applied the change, who refused it and why, and who has not answered.

    Backends that never ack are `unknown`. Times are in milliseconds since the commit.

    Args:
        subject: the change.
        backends: all known backends, each with the name it is shown under.
        named: only backends of this token are named, the others are counted in `others`. None names
            all.
    """
    told: dict[str, list[Any]] = {"applied": [], "refused": [], "pending": [], "unknown": []}
    others = dict.fromkeys(told, 0)
    applied = 0
    times: list[float] = []
    async for name, backend in backends:
        if not is_expected(backend, subject):
            continue
        outcome = outcome_of(backend, subject)
        entry: Any = name
        if outcome.reason is not None:
            kind, entry = "refused", {"backend": name, "reason": outcome.reason}
        elif outcome.answered:
            kind = "applied"
            applied += 1
            if outcome.at is not None:
                times.append(round(max(0.0, outcome.at - subject.committed_at) * 1000, 3))
        else:
            kind = "pending" if backend.acks else "unknown"
        if named is None or backend.token == named:
            told[kind].append(entry)
        else:
            others[kind] += 1
    if len(times) < applied:
        # If any time is unknown, it may be the slowest.
        times = []
    times.sort()
    return {
        "revision": subject.revision,
        **told,
        **({} if named is None else {"others": others}),
        "elapsed_ms": _percentile(times, 1.0),
        "p50_ms": _percentile(times, 0.50),
        "p99_ms": _percentile(times, 0.99),
    }


def _percentile(times: list[float], share: float) -> float | None:
    """Return the nearest-rank percentile of sorted times."""
    return times[math.ceil(share * len(times)) - 1] if times else None
