"""Fleet: every backend that listens, what it holds, and who applied a change (docs/protocol.md 4).

Updated by connections (subscribe, ack, close) and queried by the routes. Holds no key and sends
nothing. What other replicas know arrives through `merge`, by way of the database. Does not know the
contents of a receipt or of the fleet view.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any, Final, TypeVar

from slm.protocol import Ack, ClientInfo
from slm.schemas import Agent
from slm.server.fleet.ack_log import Acked
from slm.server.fleet.backend import Backend, Told, cut_down, identity
from slm.server.fleet.elsewhere import Elsewhere, Lapse
from slm.server.fleet.names import BackendNames
from slm.server.fleet.outcome import Subject, Waiter
from slm.server.fleet.view import Heads, description
from slm.server.security.agent_scope import View
from slm.server.stream.subscriber import Subscriber
from slm.server.tasks.slices import Steps, at_once, in_slices, sliced, sorted_in_steps

logger = logging.getLogger(__name__)

KEEP_GONE_SECONDS: Final = 3600.0
"""How long a disconnected backend is still listed."""

MAX_ACK_BYTES_OF_ALL: Final = 256 * 1024 * 1024
"""The memory limit for all backends' acks; above it the largest logs are cut down."""

FORGET_EVERY_SECONDS: Final = 10.0

_MAX_GONE: Final = 10_000
_T = TypeVar("_T")


class Fleet:
    """All backends that this server knows of.

    Args:
        replica: this server's own lease among the replicas.
        server: its name, for people.
        token_name: returns the name of a token by its id.
        stale_after_seconds: a backend that lags for longer is stale.
        clock: seconds since 1970.
        agent: returns the agent with an agent_id; nothing is kept about unknown agents.
        max_ack_bytes: the memory limit for what all backends report.

    Attributes:
        head: the revision that the stream has reached here.
        started_at_revision: this server has heard no acks for changes up to here.
        dirty: ids of this server's backends that changed since the last report to other replicas.
        waiters: the receipts that are waiting here.
        news: set when there is something to report to other replicas.
        asked: set when a receipt starts to wait.
        unreadable: how often a backend was left out because it could not be described.
        ack_bytes: approximate memory use of what all backends reported.
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
        self._elsewhere = Elsewhere()
        self._by_subscriber: dict[Subscriber, Backend] = {}
        self._current: dict[str, Subscriber] = {}
        self._names = BackendNames(self._wholes)
        self._heads = Heads()
        self._numbers = itertools.count(1)
        self._forgot_at = 0.0
        self._is_anew = False
        self._closed = False

    # --- events of connections ---

    def moved(self, head: int, *, restarted: bool = False) -> None:
        """Note that the stream has reached `head`; `restarted`: revisions restarted there."""
        if restarted or not self._heads:
            self._is_anew = bool(self._heads)
            self._heads.clear()
            self.started_at_revision = head
            for backend in self._own.values():
                self.ack_bytes -= backend.acks.bytes
                backend.acks.clear()
                if backend.connected:
                    backend.stretches[-1].first = head
        self.head = head
        self._heads.add(head, self._clock())
        self.news.set()

    def joined(self, subscriber: Subscriber) -> None:
        """Add a connection that has subscribed; the backend may be known already."""
        client = subscriber.client or ClientInfo()
        token = self._token_name(subscriber.token_id)
        number = "" if client.instance else f"{self.replica}#{next(self._numbers)}"
        key = identity(token, client, number)
        backend = self._own.get(key)
        if backend is None:
            backend = self._own[key] = Backend(key, client, token, self.replica, self.server)
            self._names.anew()
        backend.client, backend.token, backend.view = client, token, subscriber.view
        # If TLS ends at a proxy, the server cannot see it, but the backend knows.
        backend.plain_http = subscriber.plain_http or client.plain_http is True
        backend.begin(self.head, self._clock())
        self._by_subscriber[subscriber] = backend
        self._current[key] = subscriber
        self._names.changed(backend)
        self._changed(backend)

    def acked(
        self, subscriber: Subscriber, ack: Ack, at: float | None = None, *, missed: int = 0
    ) -> None:
        """Record what a backend reports as received, and which of it is not applied.

        Args:
            subscriber: its connection.
            ack: the ack.
            at: when it arrived, if not just now.
            missed: how many acks right before it were discarded.
        """
        backend = self._by_subscriber.get(subscriber)
        # Ignore a connection that has already been replaced.
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
        """Note that a connection has ended."""
        backend = self._by_subscriber.pop(subscriber, None)
        if backend is None or self._current.get(backend.id) is not subscriber:
            return
        del self._current[backend.id]
        backend.end(self.head, self._clock())
        self._names.changed(backend)
        self._changed(backend)

    def close(self) -> None:
        """Release everyone who waits, because the server is stopping."""
        self._closed = True
        for waiter in self.waiters:
            waiter.done.set()

    def _known_agents(self, said: Mapping[str, _T], view: View) -> Mapping[str, _T]:
        """Leave out agents that do not exist or that the backend's token cannot see.

        Nobody asks for these, and a backend could name any number of them.
        """
        if not said or self._agent is None:
            return said
        known: dict[str, _T] = {}
        for agent_id, value in said.items():
            agent = self._agent(agent_id)
            if agent is not None and view.sees(agent_id, agent.is_default):
                # Use the agent's own string, shared by all backends.
                known[agent.agent_id] = value
        return known

    def _grown(self, size: int) -> None:
        """Enforce the memory limit for all backends."""
        self.ack_bytes += size
        if self.ack_bytes <= self._max_ack_bytes:
            return
        backends = [*self._own.values(), *self._elsewhere.all()]
        self.ack_bytes = cut_down(backends, self._max_ack_bytes * 3 // 4)

    def _changed(self, backend: Backend) -> None:
        self.dirty.add(backend.id)
        self.news.set()
        self._tell(backend.id)

    def _tell(self, key: str) -> None:
        backend = self._whole(key) if self.waiters else None
        if backend is not None:
            for waiter in tuple(self.waiters):
                waiter.heard(backend)

    # --- reports of other replicas ---

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
        """Apply another replica's report about a backend.

        Raises:
            ValidationError: it does not have the shape of a report.
        """
        told = data if isinstance(data, Told) else Told.of(data)
        merged = self._elsewhere.merge(replica, key, told, offset_seconds)
        if merged is None:
            return
        if merged.renamed:
            self._names.anew()
        else:
            self._names.changed(merged.backend)
        self._grown(merged.grown_bytes)
        self._tell(key)

    def keep_replicas(self, live: Iterable[str], lapsed: Mapping[str, Lapse] | None = None) -> None:
        """Note which replicas are alive. The others' reports are kept in case they return.

        Args:
            live: the leases that are alive.
            lapsed: what is known about the others; a replica not listed lapsed when first missed.
        """
        if self._elsewhere.keep(live, lapsed or {}, Lapse(self.head, self._clock())):
            self._names.anew()

    def forget_replica(self, replica: str) -> None:
        """Forget the reports of a replica that has been gone for too long."""
        self._forgot(self._elsewhere.forget_replica(replica))

    async def look(self, waiter: Waiter) -> None:
        """Let a waiter find all expected backends, once every replica has reported."""
        if not waiter.has_looked:
            await waiter.look(self._wholes())

    # --- queries ---

    def backends(self) -> list[Backend]:
        """Return every known backend, by name, in one turn of the loop; see also `shown`.

        Backends that disconnected are known for an hour.
        """
        at_once(self._forgetting())
        return sorted(self._wholes(), key=self.name_of)

    async def shown(self) -> AsyncIterator[tuple[str, Backend]]:
        """Yield every known backend with the name it is shown under, by name.

        Gives the event loop turns in between, however many there are.
        """
        await self.forget_long_gone()
        async for key, name in in_slices((await self._names.all()).items()):
            backend = self._whole(key)
            if backend is not None:
                yield name, backend

    def name_of(self, backend: Backend) -> str:
        """Return the name a backend is shown under: its own, unless another token used it first."""
        return self._names.of(backend)

    def subscriber(self, key: str) -> Subscriber | None:
        """Return the connection of a backend that is connected here."""
        return self._current.get(key)

    def remembers(self, subject: Subject, *, alone: bool) -> bool:
        """Whether this server can know who applied a change.

        Other servers report for an hour what was acked to them or to this server before a restart;
        with `alone` there are none. Nobody reports acks of another epoch.
        """
        if subject.revision > self.started_at_revision:
            return True
        told_until = subject.committed_at + KEEP_GONE_SECONDS
        return not alone and not self._is_anew and self._clock() < told_until

    async def wait(self, subject: Subject, seconds: float, *, alone: bool = True) -> None:
        """Wait until every expected backend that acks at all has answered, at most `seconds`.

        Args:
            subject: the change.
            seconds: the limit.
            alone: whether there is no other replica; otherwise `look` is called once they have
                reported.
        """
        if self._closed:
            return
        waiter = Waiter(subject)
        self.waiters.add(waiter)
        self.asked.set()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    if alone:
                        await self.look(waiter)
                    await waiter.done.wait()
        finally:
            self.waiters.discard(waiter)

    def describe(self, backend: Backend, name: str | None = None) -> dict[str, Any]:
        """Return a backend's entry in `GET /api/fleet`.

        Args:
            backend: the backend.
            name: the name it is shown under, if known.
        """
        shown_as = self.name_of(backend) if name is None else name
        return description(backend, shown_as, self._heads, self._clock(), self._stale_after_seconds)

    async def described(self) -> bytes:
        """Return the JSON list of `GET /api/fleet`, without backends that cannot be described."""
        texts: list[bytes] = []
        async for name, backend in self.shown():
            try:
                texts.append(json.dumps(self.describe(backend, name), allow_nan=False).encode())
            except Exception as error:
                # One bad entry must not hide the others. Only the class name is logged: the text
                # may contain what the backend reported.
                if not self.unreadable:
                    logger.error("a backend cannot be described: %s", type(error).__name__)
                self.unreadable += 1
        return b"[" + b",".join(texts) + b"]"

    def _wholes(self) -> Iterator[Backend]:
        """Yield each backend merged from all replicas; backends may come and go meanwhile."""
        for key in [*self._own, *(key for key in self._elsewhere.ids() if key not in self._own)]:
            backend = self._whole(key)
            if backend is not None:
                yield backend

    def _whole(self, key: str) -> Backend | None:
        own, known = self._own.get(key), self._elsewhere.at(key)
        if own is not None:
            known.append(own)
        return functools.reduce(Backend.together_with, known) if known else None

    async def forget_long_gone(self) -> None:
        """Forget backends that left over an hour ago, and the earliest if too many have left."""
        await sliced(self._forgetting())

    def _forgetting(self) -> Steps[None]:
        now = self._clock()
        if now - self._forgot_at < FORGET_EVERY_SECONDS:
            return
        self._forgot_at = now
        gone: list[tuple[float, str]] = []
        for backend in self._wholes():
            if not backend.connected and not self._elsewhere.may_return(backend.id):
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
            # It may have reconnected in between.
            if left is not None and not left.connected and left.since == since:
                self._forget(key)
            yield

    def _forget(self, key: str) -> None:
        own = self._own.pop(key, None)
        self.dirty.discard(key)
        self._forgot([*self._elsewhere.forget(key), *([own] if own is not None else [])])

    def _forgot(self, backends: Iterable[Backend]) -> None:
        for backend in backends:
            self.ack_bytes -= backend.bytes
        self._names.anew()
