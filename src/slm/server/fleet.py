"""Fleet: every backend that listens, what it holds, and who took a change (docs/protocol.md 4).

Fed by what connections say (subscribe, ack, gone) and asked by the routes. Holds no key and sends
nothing. What other replicas know comes in through `merge`, by way of the database.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from slm.protocol import Ack, ClientInfo
from slm.server.backends import RECEIPT_REVISIONS, Acked, Backend, Subject, outcome_of
from slm.server.hub import Subscriber

KEEP_GONE_SECONDS: Final = 3600.0
"""How long a backend that went away is still told of."""

_MAX_GONE: Final = 10_000
_FORGET_EVERY_SECONDS: Final = 10.0


class Waiter:
    """Someone who waits until every expected backend has answered for one change."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.done = asyncio.Event()
        self._left: set[str] | None = None

    @property
    def has_looked(self) -> bool:
        """Whether it knows whom it waits for."""
        return self._left is not None

    def look(self, expected: Iterable[Backend]) -> None:
        """Look at everyone who is expected."""
        self._left = {b.id for b in expected if b.acks and not self._answered(b)}
        self._check()

    def heard(self, backend: Backend) -> None:
        """Strike the backend off once it has answered."""
        if self._left and backend.id in self._left and self._answered(backend):
            self._left.discard(backend.id)
            self._check()

    def _answered(self, backend: Backend) -> bool:
        return outcome_of(backend, self.subject).answered

    def _check(self) -> None:
        if not self._left:
            self.done.set()


class Fleet:
    """All backends that this server knows of.

    Args:
        replica: this server's own lease among the replicas.
        server: its name, for people.
        token_name: what a token is called, by its id.
        stale_after_seconds: how long a backend may lag before it counts as stale.
        clock: seconds since 1970.

    Attributes:
        head: the revision that the stream has reached here.
        started_at_revision: of the changes up to here nobody's acks were heard by this server.
        dirty: ids of this server's backends that changed since others were told of them.
        waiters: who waits for a receipt here.
        news: set when there is something to tell other replicas.
        asked: set when somebody began to wait.
    """

    def __init__(
        self,
        replica: str,
        server: str,
        token_name: Callable[[int | None], str],
        stale_after_seconds: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.replica = replica
        self.server = server
        self.head = 0
        self.started_at_revision = 0
        self.dirty: set[str] = set()
        self.waiters: set[Waiter] = set()
        self.news = asyncio.Event()
        self.asked = asyncio.Event()
        self._token_name = token_name
        self._stale_after_seconds = stale_after_seconds
        self._clock = clock
        self._own: dict[str, Backend] = {}
        self._others: dict[str, dict[str, Backend]] = {}
        self._by_subscriber: dict[Subscriber, Backend] = {}
        self._current: dict[str, Subscriber] = {}
        self._heads: deque[tuple[int, float]] = deque(maxlen=RECEIPT_REVISIONS)
        self._numbers = itertools.count(1)
        self._forgot_at = 0.0
        self._is_anew = False
        self._closed = False

    # --- what connections say ---

    def moved(self, head: int, *, restarted: bool = False) -> None:
        """Note that the stream has reached `head`; `restarted`: positions began anew there."""
        if restarted or not self._heads:
            self._is_anew = bool(self._heads)
            self._heads.clear()
            self.started_at_revision = head
            for backend in self._own.values():
                backend.acks.clear()
                if backend.connected:
                    backend.stretches[-1].first = head
        self.head = head
        self._heads.append((head, self._clock()))
        self.news.set()

    def joined(self, subscriber: Subscriber) -> None:
        """Take in a connection that has subscribed; it may be a backend that was here before."""
        client = subscriber.client or ClientInfo()
        if client.instance:
            key = f"{subscriber.token_id}:{client.name or ''}/{client.instance}"
        else:
            key = f"{subscriber.token_id}:{self.replica}#{next(self._numbers)}"
        token = self._token_name(subscriber.token_id)
        backend = self._own.get(key)
        if backend is None:
            backend = self._own[key] = Backend(key, client, token, self.replica, self.server)
        backend.client, backend.token, backend.view = client, token, subscriber.view
        backend.begin(self.head, self._clock())
        self._by_subscriber[subscriber] = backend
        self._current[key] = subscriber
        self._changed(backend)
        self._forget_long_gone()

    def acked(self, subscriber: Subscriber, ack: Ack) -> None:
        """Take in what a backend says it received, and what of it is not in force."""
        backend = self._by_subscriber.get(subscriber)
        # A connection that was found dead too late has nothing to say any more.
        if backend is None or self._current.get(backend.id) is not subscriber:
            return
        backend.acks.add(Acked(ack.ack, self._clock(), ack.not_in_force))
        backend.keys = ack.keys
        self._changed(backend)

    def left(self, subscriber: Subscriber) -> None:
        """Note that a connection is gone."""
        backend = self._by_subscriber.pop(subscriber, None)
        if backend is None or self._current.get(backend.id) is not subscriber:
            return
        del self._current[backend.id]
        backend.end(self.head, self._clock())
        self._changed(backend)

    def close(self) -> None:
        """Let everyone go who waits: the server stops."""
        self._closed = True
        for waiter in self.waiters:
            waiter.done.set()

    def _changed(self, backend: Backend) -> None:
        self.dirty.add(backend.id)
        self.news.set()
        self._tell(backend.id)

    def _tell(self, key: str) -> None:
        if not self.waiters:
            return
        backend = self._whole(key)
        for waiter in tuple(self.waiters):
            waiter.heard(backend)

    # --- what other replicas know ---

    def take_dirty(self) -> list[Backend]:
        """Return copies of this server's backends that changed since the last call."""
        keys, self.dirty = self.dirty, set()
        return [self._own[key].told() for key in keys if key in self._own]

    def merge(self, replica: str, key: str, data: Mapping[str, Any], offset_seconds: float) -> None:
        """Take in what another replica tells of a backend."""
        at_replicas = self._others.setdefault(key, {})
        backend = at_replicas.get(replica)
        if backend is None:
            backend = at_replicas[replica] = Backend(key, ClientInfo(), "", replica, "")
        backend.take_over(data, offset_seconds)
        self._tell(key)

    def keep_replicas(self, live: Iterable[str]) -> None:
        """Note which replicas live: the backends of one whose lease ran out are gone."""
        alive = set(live)
        for at_replicas in self._others.values():
            for replica, backend in at_replicas.items():
                if replica not in alive:
                    backend.end(self.head, self._clock())

    def look(self, waiter: Waiter) -> None:
        """Have someone who waits look at all who are expected, once everyone is known."""
        if not waiter.has_looked:
            waiter.look(self.expected(waiter.subject))

    # --- who asks ---

    def backends(self) -> list[Backend]:
        """Return every backend that is here or went away within the last hour, by name."""
        self._forget_long_gone()
        return sorted(
            map(self._whole, self._known()), key=lambda backend: (backend.name, backend.id)
        )

    def subscriber(self, key: str) -> Subscriber | None:
        """Return the connection of a backend that listens here."""
        return self._current.get(key)

    def remembers(self, subject: Subject, *, alone: bool) -> bool:
        """Whether it can be known here who took a change.

        What was said to another server, or to the one before this, other servers tell for an hour;
        `alone` there is none. Of another epoch nobody tells.
        """
        if subject.revision > self.started_at_revision:
            return True
        told_until = subject.committed_at + KEEP_GONE_SECONDS
        return not alone and not self._is_anew and self._clock() < told_until

    def expected(self, subject: Subject) -> list[Backend]:
        """Return who listened when the change was committed and was entitled to see it."""
        return [
            backend
            for backend in self.backends()
            if backend.view.sees(subject.agent_id, subject.is_default)
            and (
                backend.was_there(subject.revision, subject.committed_at)
                if subject.changed
                else backend.connected
            )
        ]

    @contextlib.contextmanager
    def _waiting(self, subject: Subject) -> Any:
        waiter = Waiter(subject)
        self.waiters.add(waiter)
        try:
            yield waiter
        finally:
            self.waiters.discard(waiter)

    async def wait(self, subject: Subject, seconds: float, *, alone: bool = True) -> None:
        """Wait until every expected backend that acks at all has answered, `seconds` at most.

        Args:
            subject: the change.
            seconds: the limit.
            alone: there is no other replica; else `look` is called once they have told.
        """
        with self._waiting(subject) as waiter:
            if alone:
                waiter.look(self.expected(subject))
            self.asked.set()
            if not self._closed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await waiter.done.wait()

    def receipt(self, subject: Subject, named: str | None = None) -> dict[str, Any]:
        """Return who applied the change, who refused it and why, and who has not answered.

        Backends that never ack are `unknown` and are not waited for. Times are counted from the
        commit, in milliseconds.

        Args:
            subject: the change.
            named: the token whose backends are named; those of other tokens are counted in
                `others`. None: all are named.
        """
        told: dict[str, list[Any]] = {"applied": [], "refused": [], "pending": [], "unknown": []}
        others = dict.fromkeys(told, 0)
        applied = 0
        times: list[float] = []
        for backend in self.expected(subject):
            outcome = outcome_of(backend, subject)
            entry: Any = backend.name
            if outcome.reason is not None:
                kind, entry = "refused", {"backend": backend.name, "reason": outcome.reason}
            elif outcome.answered:
                kind = "applied"
                applied += 1
                if outcome.at is not None:
                    times.append(_milliseconds(outcome.at, subject))
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

    def describe(self, backend: Backend) -> dict[str, Any]:
        """Return what `GET /api/fleet` tells of a backend."""
        last = backend.acks.last
        lag = None if last is None else max(0, self.head - last.revision)
        lag_seconds = self._lag_seconds(last.revision) if last is not None and lag else 0.0
        if not backend.connected:
            state = "gone"
        elif last is None:
            state = "unknown"
        else:
            state = "stale" if lag_seconds > self._stale_after_seconds else "live"
        return {
            "backend": backend.name,
            **backend.client.model_dump(),
            "token": backend.token,
            "agents": backend.view.patterns,
            "server": backend.server,
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
        }

    def _lag_seconds(self, revision: int) -> float:
        """Return since when there is something newer than `revision`."""
        for head, at in self._heads:
            if head > revision:
                return max(0.0, self._clock() - at)
        return 0.0

    def _whole(self, key: str) -> Backend:
        """Return a backend as all replicas together know it."""
        own = self._own.get(key)
        at_replicas = self._others.get(key)
        if own is not None and not at_replicas:
            return own
        known = [*(at_replicas or {}).values(), *([own] if own is not None else [])]
        return functools.reduce(Backend.together_with, known)

    def _forget_long_gone(self) -> None:
        now = self._clock()
        if now - self._forgot_at < _FORGET_EVERY_SECONDS:
            return
        self._forgot_at = now
        gone = [each for each in map(self._whole, self._known()) if not each.connected]
        gone.sort(key=lambda backend: backend.since, reverse=True)
        for number, backend in enumerate(gone):
            if backend.since < now - KEEP_GONE_SECONDS or number >= _MAX_GONE:
                self._own.pop(backend.id, None)
                self._others.pop(backend.id, None)
                self.dirty.discard(backend.id)

    def _known(self) -> list[str]:
        return [*self._own, *(self._others.keys() - self._own.keys())]


def _milliseconds(at: float, subject: Subject) -> float:
    return round(max(0.0, at - subject.committed_at) * 1000, 3)


def _percentile(times: list[float], share: float) -> float | None:
    """Return the nearest-rank percentile of sorted times."""
    return times[math.ceil(share * len(times)) - 1] if times else None


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
