"""Outcome: how backends took one change, who is waited for, and what its receipt says.

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
        is_default: whether it is, or was, the default: then everyone may see it.
        revision: that of the change.
        committed_at: seconds since 1970.
        changed: False where the write altered nothing: then whoever is connected now is expected.
    """

    agent_id: str
    is_default: bool
    revision: int
    committed_at: float
    changed: bool = True


def outcome_of(backend: Backend, subject: Subject) -> Outcome:
    """Return how `backend` took the change: the first ack that has it in force, else the last."""
    return backend.acks.outcome(subject.agent_id, subject.revision)


def is_expected(backend: Backend, subject: Subject) -> bool:
    """Whether it listened when the change was committed and was entitled to see it."""
    there = (
        backend.was_there(subject.revision, subject.committed_at)
        if subject.changed
        else backend.connected
    )
    return there and backend.view.sees(subject.agent_id, subject.is_default)


class Waiter:
    """Someone who waits until every expected backend has answered for one change.

    Attributes:
        subject: the change.
        done: set once nobody is waited for.
        has_looked: whether it knows whom it waits for.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.done = asyncio.Event()
        self.has_looked = False
        self._left: set[str] = set()

    async def look(self, backends: Iterable[Backend]) -> None:
        """Look for whom to wait, one by one; who answers meanwhile is struck off."""
        async for backend in in_slices(backends):
            if is_expected(backend, self.subject) and backend.acks and not self._answered(backend):
                self._left.add(backend.id)
        self.has_looked = True
        self._check()

    def heard(self, backend: Backend) -> None:
        """Strike the backend off once it has answered."""
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

    Backends that never ack are `unknown`. Times are counted from the commit, in milliseconds.

    Args:
        subject: the change.
        backends: those that there are, each with what it is shown as.
        named: the token whose backends are named; those of other tokens are counted in `others`.
            None: all are named.
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
        # One that is not known any more may be that of the slowest.
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
