"""What `GET /api/fleet` shows about one backend, and how far it lags.

Pure; knows no connection and no other backend (docs/protocol.md section 3).
"""

from __future__ import annotations

from bisect import bisect_right
from datetime import UTC, datetime
from typing import Any

from slm.server.fleet.ack_log import RECEIPT_REVISIONS
from slm.server.fleet.backend import Backend


class Heads:
    """The times at which the stream reached each of its last revisions."""

    def __init__(self) -> None:
        self._heads: list[int] = []
        self._times: list[float] = []

    def __bool__(self) -> bool:
        return bool(self._heads)

    def add(self, head: int, at: float) -> None:
        """Note that the stream reached a revision at this time, in seconds since 1970."""
        self._heads.append(head)
        self._times.append(at)
        if len(self._heads) >= 2 * RECEIPT_REVISIONS:
            del self._heads[:RECEIPT_REVISIONS], self._times[:RECEIPT_REVISIONS]

    def clear(self) -> None:
        """Forget them, because positions start over."""
        del self._heads[:], self._times[:]

    def lag(self, revision: int) -> int:
        """Return how many revisions came after this one."""
        return max(0, self._heads[-1] - revision) if self._heads else 0

    def lag_seconds(self, revision: int, now: float) -> float:
        """Return for how many seconds there has been something newer than `revision`."""
        place = bisect_right(self._heads, revision)
        return 0.0 if place == len(self._heads) else max(0.0, now - self._times[place])


def description(
    backend: Backend, name: str, heads: Heads, now: float, stale_after_seconds: float
) -> dict[str, Any]:
    """Return what is shown about a backend.

    Args:
        backend: the backend.
        name: the name it is shown under.
        heads: the stream's progress.
        now: seconds since 1970.
        stale_after_seconds: a backend that lags for longer is stale.
    """
    last = backend.acks.last
    lag = None if last is None else heads.lag(last.revision)
    lag_seconds = heads.lag_seconds(last.revision, now) if last is not None and lag else 0.0
    if not backend.connected:
        state = "gone"
    elif last is None:
        state = "unknown"
    else:
        state = "stale" if lag_seconds > stale_after_seconds else "live"
    return {
        "backend": name,
        **backend.client.model_dump(),
        "token": backend.token,
        "agents": backend.view.patterns,
        "server": backend.server,
        "plain_http": backend.plain_http,
        "state": state,
        "since": _time(backend.since),
        "applied": backend.applied,
        "applied_at": None if last is None else _time(last.at),
        "lag": lag,
        "lag_ms": None if last is None else round(lag_seconds * 1000, 3),
        "not_in_force": {
            agent_id: held_up.model_dump() for agent_id, held_up in backend.not_in_force.items()
        },
        "keys": dict(backend.keys),
        "truncated": backend.acks.partial or backend.keys_partial,
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
