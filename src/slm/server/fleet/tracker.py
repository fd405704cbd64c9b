"""Fleet: every backend that listens, what it holds, and who took a change (docs/protocol.md 4).

Fed by what connections say (subscribe, ack, gone) and asked by the routes. Holds no key and sends
nothing. What other replicas know comes in through `merge`, by way of the database.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import logging
import math
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TypeVar

from slm.protocol import Ack, ClientInfo
from slm.schemas import Agent
from slm.server.fleet.backend import (
    RECEIPT_REVISIONS,
    Acked,
    AckLog,
    Backend,
    Subject,
    Told,
    identity,
    outcome_of,
)
from slm.server.fleet.names import BackendNames
from slm.server.security.agent_scope import View
from slm.server.stream.subscriber import Subscriber
from slm.server.tasks.slices import Steps, at_once, in_slices, sliced, sorted_in_steps

logger = logging.getLogger(__name__)

KEEP_GONE_SECONDS: Final = 3600.0
"""How long a backend that went away is still told of."""

MAX_ACK_BYTES_OF_ALL: Final = 256 * 1024 * 1024
"""How much memory the acks of all backends may take; beyond it the largest logs are cut down."""

MAX_TOLD: Final = 50_000
"""How many backends of another replica are kept."""

FORGET_EVERY_SECONDS: Final = 10.0

_MAX_GONE: Final = 10_000
_T = TypeVar("_T")


class Lapse(NamedTuple):
    """A replica's lease that has run out.

    Attributes:
        head: how far its stream had come.
        at: when the lease ran out, seconds since 1970.
    """

    head: int
    at: float


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

    async def look(self, expected: Iterable[Backend]) -> None:
        """Look at everyone who is expected, one by one; who answers meanwhile is struck off."""
        async for backend in in_slices(expected):
            if backend.acks and not self._answered(backend):
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


class Fleet:
    """All backends that this server knows of.

    Args:
        replica: this server's own lease among the replicas.
        server: its name, for people.
        token_name: what a token is called, by its id.
        stale_after_seconds: how long a backend may lag before it counts as stale.
        clock: seconds since 1970.
        agent: returns the agent of an agent_id; nothing is kept about unknown agents.
        max_ack_bytes: how much memory what all backends said may take.

    Attributes:
        head: the revision that the stream has reached here.
        started_at_revision: of the changes up to here nobody's acks were heard by this server.
        dirty: ids of this server's backends that changed since others were told of them.
        waiters: who waits for a receipt here.
        news: set when there is something to tell other replicas.
        asked: set when somebody began to wait.
        unreadable: how often a backend could not be described, and was left out.
        ack_bytes: about how much memory what all backends said takes.
    """

    def __init__(
        self,
        replica: str,
        server: str,
        token_name: Callable[[int | None], str],
        stale_after_seconds: float = 5.0,
        clock: Callable[[], float] = time.time,
        *,
        agent: Callable[[str], Agent | None] | None = None,
        max_ack_bytes: int = MAX_ACK_BYTES_OF_ALL,
    ) -> None:
        self.replica = replica
        self.server = server
        self.head = 0
        self.started_at_revision = 0
        self.dirty: set[str] = set()
        self.waiters: set[Waiter] = set()
        self.news = asyncio.Event()
        self.asked = asyncio.Event()
        self.unreadable = 0
        self.ack_bytes = 0
        self._token_name = token_name
        self._stale_after_seconds = stale_after_seconds
        self._clock = clock
        self._agent = agent
        self._max_ack_bytes = max_ack_bytes
        self._own: dict[str, Backend] = {}
        self._others: dict[str, dict[str, Backend]] = {}
        self._told_of: dict[str, int] = {}
        self._lapsed: dict[str, Lapse] = {}
        self._by_subscriber: dict[Subscriber, Backend] = {}
        self._current: dict[str, Subscriber] = {}
        self._names = BackendNames(self._wholes)
        self._heads: list[int] = []
        self._head_times: list[float] = []
        self._numbers = itertools.count(1)
        self._forgot_at = 0.0
        self._is_anew = False
        self._closed = False

    # --- what connections say ---

    def moved(self, head: int, *, restarted: bool = False) -> None:
        """Note that the stream has reached `head`; `restarted`: positions began anew there."""
        if restarted or not self._heads:
            self._is_anew = bool(self._heads)
            del self._heads[:], self._head_times[:]
            self.started_at_revision = head
            for backend in self._own.values():
                self.ack_bytes -= backend.acks.bytes
                backend.acks.clear()
                if backend.connected:
                    backend.stretches[-1].first = head
        self.head = head
        self._heads.append(head)
        self._head_times.append(self._clock())
        if len(self._heads) >= 2 * RECEIPT_REVISIONS:
            del self._heads[:RECEIPT_REVISIONS], self._head_times[:RECEIPT_REVISIONS]
        self.news.set()

    def joined(self, subscriber: Subscriber) -> None:
        """Take in a connection that has subscribed; it may be a backend that was here before."""
        client = subscriber.client or ClientInfo()
        token = self._token_name(subscriber.token_id)
        number = "" if client.instance else f"{self.replica}#{next(self._numbers)}"
        key = identity(token, client, number)
        backend = self._own.get(key)
        if backend is None:
            backend = self._own[key] = Backend(key, client, token, self.replica, self.server)
            self._names.anew()
        backend.client, backend.token, backend.view = client, token, subscriber.view
        # What ends TLS before the server may hide it from us: the backend knows, too.
        backend.plain_http = subscriber.plain_http or client.plain_http is True
        backend.begin(self.head, self._clock())
        self._by_subscriber[subscriber] = backend
        self._current[key] = subscriber
        self._names.changed(backend)
        self._changed(backend)

    def acked(
        self, subscriber: Subscriber, ack: Ack, at: float | None = None, *, missed: int = 0
    ) -> None:
        """Take in what a backend says it received, and what of it is not in force.

        Args:
            subscriber: its connection.
            ack: what it says.
            at: when that came, where it was not just now.
            missed: how many acks right before it were thrown away.
        """
        backend = self._by_subscriber.get(subscriber)
        # A connection that was found dead too late has nothing to say any more.
        if backend is None or self._current.get(backend.id) is not subscriber:
            return
        before = backend.bytes
        refused = self._known_agents(ack.not_in_force, backend.view)
        when = self._clock() if at is None else at
        backend.acks.missed += missed
        backend.acks.add(Acked(ack.ack, when, refused, after_gap=missed > 0))
        backend.hold(self._known_agents(ack.keys, backend.view))
        self._grown(backend.bytes - before)
        self._changed(backend)

    def left(self, subscriber: Subscriber) -> None:
        """Note that a connection is gone."""
        backend = self._by_subscriber.pop(subscriber, None)
        if backend is None or self._current.get(backend.id) is not subscriber:
            return
        del self._current[backend.id]
        backend.end(self.head, self._clock())
        self._names.changed(backend)
        self._changed(backend)

    def close(self) -> None:
        """Let everyone go who waits: the server stops."""
        self._closed = True
        for waiter in self.waiters:
            waiter.done.set()

    def _known_agents(self, said: Mapping[str, _T], view: View) -> Mapping[str, _T]:
        """Leave out the agents that there are not, and those that the backend's token cannot see.

        Whoever names them says nothing that anybody asks for, and could name any number.
        """
        if not said or self._agent is None:
            return said
        known: dict[str, _T] = {}
        for agent_id, value in said.items():
            agent = self._agent(agent_id)
            if agent is not None and view.sees(agent_id, agent.is_default):
                # The agent's own text: one for all backends.
                known[agent.agent_id] = value
        return known

    def _grown(self, size: int) -> None:
        """Keep to the bound of all; who said most is cut down first, history before the state."""
        self.ack_bytes += size
        if self.ack_bytes <= self._max_ack_bytes:
            return
        told = [backend for each in self._others.values() for backend in each.values()]
        largest = sorted([*self._own.values(), *told], key=lambda b: b.bytes, reverse=True)
        self.ack_bytes = sum(each.bytes for each in largest)
        for forget in (AckLog.forget_older, AckLog.forget_refusals):
            for backend in largest:
                if self.ack_bytes <= self._max_ack_bytes * 3 // 4:
                    return
                before = backend.bytes
                forget(backend.acks)
                self.ack_bytes += backend.bytes - before
        for backend in largest:
            if self.ack_bytes <= self._max_ack_bytes * 3 // 4:
                return
            self.ack_bytes -= backend.bytes
            backend.keys, backend.keys_partial = {}, True
            self.ack_bytes += backend.bytes

    def _changed(self, backend: Backend) -> None:
        self.dirty.add(backend.id)
        self.news.set()
        self._tell(backend.id)

    def _tell(self, key: str) -> None:
        backend = self._whole(key) if self.waiters else None
        if backend is not None:
            for waiter in tuple(self.waiters):
                waiter.heard(backend)

    # --- what other replicas know ---

    def take_dirty(self) -> list[Backend]:
        """Return this server's backends that changed since the last call."""
        keys, self.dirty = self.dirty, set()
        return [self._own[key] for key in keys if key in self._own]

    def own(self) -> list[Backend]:
        """Return all of this server's backends."""
        return list(self._own.values())

    def merge(
        self, replica: str, key: str, data: Mapping[str, Any] | Told, offset_seconds: float
    ) -> None:
        """Take in what another replica tells of a backend.

        Raises:
            ValidationError: it is not of the shape that replicas tell.
        """
        told = data if isinstance(data, Told) else Told.of(data)
        at_replicas = self._others.get(key, {})
        backend = at_replicas.get(replica)
        if backend is None:
            if self._told_of.get(replica, 0) >= MAX_TOLD:
                return
            self._told_of[replica] = self._told_of.get(replica, 0) + 1
            backend = Backend(key, told.client, told.token, replica, told.server)
            self._others.setdefault(key, {})[replica] = backend
            self._names.anew()
        before, known_since = backend.bytes, backend.known_since
        backend.take_over(told, offset_seconds)
        if backend.known_since != known_since:
            self._names.anew()
        else:
            self._names.changed(backend)
        self._grown(backend.bytes - before)
        self._tell(key)

    def keep_replicas(self, live: Iterable[str], lapsed: Mapping[str, Lapse] | None = None) -> None:
        """Note which replicas live; what the others said stays, and counts again if they return.

        Args:
            live: their leases.
            lapsed: what is known of those that do not live; else they lapsed when first missed.
        """
        alive, said = set(live), lapsed or {}
        now = Lapse(self.head, self._clock())
        before = self._lapsed.keys()
        self._lapsed = {
            replica: said.get(replica) or self._lapsed.get(replica) or now
            for replica in self._told_of
            if replica not in alive
        }
        if before != self._lapsed.keys():
            self._names.anew()

    def forget_replica(self, replica: str) -> None:
        """Forget what a replica told that has been away for too long."""
        for key, at_replicas in list(self._others.items()):
            backend = at_replicas.pop(replica, None)
            if backend is not None:
                self.ack_bytes -= backend.bytes
                if not at_replicas:
                    del self._others[key]
                self._names.anew()
        self._told_of.pop(replica, None)

    async def look(self, waiter: Waiter) -> None:
        """Have someone who waits look at all who are expected, once everyone is known."""
        if not waiter.has_looked:
            await waiter.look(self._expected(waiter.subject))

    # --- who asks ---

    def backends(self) -> list[Backend]:
        """Return every backend that is known, by name, in one turn of the loop: `shown` has many.

        Backends that went away are known for an hour.
        """
        self._forget_long_gone()
        return sorted(self._wholes(), key=self.name_of)

    async def shown(self) -> AsyncIterator[tuple[str, Backend]]:
        """Yield every backend that is known with what it is shown as, by name.

        However many there are, the loop has its turns in between.
        """
        await self.forget_long_gone()
        async for key, name in in_slices((await self._names.all()).items()):
            backend = self._whole(key)
            if backend is not None:
                yield name, backend

    def name_of(self, backend: Backend) -> str:
        """Return what a backend is shown as: its own name, unless another token had it first."""
        return self._names.of(backend)

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

    def _expected(self, subject: Subject) -> Iterator[Backend]:
        return (backend for backend in self._wholes() if _is_expected(backend, subject))

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
            self.asked.set()
            if not self._closed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        if alone:
                            await self.look(waiter)
                        await waiter.done.wait()

    async def receipt(self, subject: Subject, named: str | None = None) -> dict[str, Any]:
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
        async for name, backend in self.shown():
            if not _is_expected(backend, subject):
                continue
            outcome = outcome_of(backend, subject)
            entry: Any = name
            if outcome.reason is not None:
                kind, entry = "refused", {"backend": name, "reason": outcome.reason}
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

    def describe(self, backend: Backend, name: str | None = None) -> dict[str, Any]:
        """Return what `GET /api/fleet` tells of a backend.

        Args:
            backend: the backend.
            name: what it is shown as, where that is known.
        """
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
            "backend": self.name_of(backend) if name is None else name,
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

    async def described(self) -> bytes:
        """Return the list of `GET /api/fleet` as JSON; who cannot be described is left out."""
        texts: list[bytes] = []
        async for name, backend in self.shown():
            try:
                texts.append(json.dumps(self.describe(backend, name), allow_nan=False).encode())
            except Exception as error:
                # One must not keep all others from being seen. The class alone: the text may hold
                # what was said.
                if not self.unreadable:
                    logger.error("a backend cannot be described: %s", type(error).__name__)
                self.unreadable += 1
        return b"[" + b",".join(texts) + b"]"

    def _lag_seconds(self, revision: int) -> float:
        """Return since when there is something newer than `revision`."""
        place = bisect_right(self._heads, revision)
        if place == len(self._heads):
            return 0.0
        return max(0.0, self._clock() - self._head_times[place])

    def _wholes(self) -> Iterator[Backend]:
        """Yield each backend as all replicas together know it; they may come and go meanwhile."""
        for key in [*self._own, *(key for key in self._others if key not in self._own)]:
            backend = self._whole(key)
            if backend is not None:
                yield backend

    def _whole(self, key: str) -> Backend | None:
        own = self._own.get(key)
        at_replicas = self._others.get(key)
        if own is not None and not at_replicas:
            return own
        known = [self._as_it_is(each) for each in (at_replicas or {}).values()]
        if own is not None:
            known.append(own)
        return functools.reduce(Backend.together_with, known) if known else None

    def _as_it_is(self, backend: Backend) -> Backend:
        lapse = self._lapsed.get(backend.replica)
        return backend if lapse is None else backend.gone_with(*lapse)

    async def forget_long_gone(self) -> None:
        """Forget who went away more than an hour ago, and the first of too many that went."""
        await sliced(self._forgetting())

    def _forget_long_gone(self) -> None:
        at_once(self._forgetting())

    def _forgetting(self) -> Steps[None]:
        now = self._clock()
        if now - self._forgot_at < FORGET_EVERY_SECONDS:
            return
        self._forgot_at = now
        gone: list[tuple[float, str]] = []
        for backend in self._wholes():
            if not backend.connected and not self._may_return(backend):
                if backend.since < now - KEEP_GONE_SECONDS:
                    self._forget(backend.id)
                else:
                    gone.append((backend.since, backend.id))
            yield
        if len(gone) <= _MAX_GONE:
            return
        first = yield from sorted_in_steps(gone, lambda each: each)
        for since, key in first[: len(gone) - _MAX_GONE]:
            left = self._whole(key)
            # It may have come back in between.
            if left is not None and not left.connected and left.since == since:
                self._forget(key)
            yield

    def _may_return(self, backend: Backend) -> bool:
        """Whether it is gone only as long as its server's lease is."""
        at_replicas = self._others.get(backend.id, {})
        return any(r in self._lapsed and each.connected for r, each in at_replicas.items())

    def _forget(self, key: str) -> None:
        own = self._own.pop(key, None)
        at_replicas = self._others.pop(key, {})
        for replica in at_replicas:
            self._told_of[replica] -= 1
            if not self._told_of[replica]:
                del self._told_of[replica]
        for backend in (*at_replicas.values(), *([own] if own is not None else [])):
            self.ack_bytes -= backend.bytes
        self.dirty.discard(key)
        self._names.anew()


def _is_expected(backend: Backend, subject: Subject) -> bool:
    """Whether it listened when the change was committed and was entitled to see it."""
    there = (
        backend.was_there(subject.revision, subject.committed_at)
        if subject.changed
        else backend.connected
    )
    return there and backend.view.sees(subject.agent_id, subject.is_default)


def _milliseconds(at: float, subject: Subject) -> float:
    return round(max(0.0, at - subject.committed_at) * 1000, 3)


def _percentile(times: list[float], share: float) -> float | None:
    """Return the nearest-rank percentile of sorted times."""
    return times[math.ceil(share * len(times)) - 1] if times else None


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
