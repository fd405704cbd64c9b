"""Fetches keys after their change: a few one by one, many with one snapshot.

Events carry no keys, so every backend requests them at the same moment. Requests are spread over a
short time, and each client has one in progress; a call that waits for its key is not delayed. While
keys keep changing, the slower the last request was, the more keys are fetched at once. Decides when
to fetch; `agent_fetcher` sends the requests (docs/decisions/0039-what-a-key-storm-costs.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from slm.client.cache.cache import AgentConfigCache
from slm.client.sync.backoff import Backoff
from slm.client.timings import Timings
from slm.errors import SLMError, SLMUnavailable

FEW: Final = 3
"""With more keys than this to fetch, one snapshot brings them all.

Separate requests would cost both sides more than a few dozen agents in one response.
"""

MAX_SINGLE: Final = 8
"""How many are fetched one by one at once if a snapshot would be wasteful."""

_SHARE: Final = 64
"""A snapshot with more than this many times the awaited agents would be wasteful."""

_PATIENCE: Final = 4
"""The client waits about this many times as long as the last response took.

A busy server therefore gets fewer requests. Once no more keys change, a quarter of that is enough,
because only the last keys are missing.
"""

_OVER_AFTER: Final = 3
"""After this many times the jitter without a change, no further change is expected."""


@dataclass(slots=True, eq=False)
class _Awaited:
    """One agent with a missing key.

    Attributes:
        backoff: for its further attempts.
        not_before: when it is requested next, by the loop's clock.
        again: whether it changed since the last request.
        hurried: whether a call is waiting for it.
        failed: whether an attempt brought nothing.
    """

    backoff: Backoff
    not_before: float
    again: bool = False
    hurried: bool = False
    failed: bool = False


class KeyFetcher:
    """Belongs to one event loop; `run` continues until it is cancelled.

    Args:
        cache: says which keys are missing.
        timings: all durations.
        fetch_one: fetches one agent into the cache; returns the error if nothing came.
        fetch_all: the same with a snapshot.
        spawn: runs a request that does not wait for its turn.
        uniform: returns a random number between two numbers.
    """

    def __init__(
        self,
        cache: AgentConfigCache,
        timings: Timings,
        fetch_one: Callable[[str], Awaitable[SLMError | None]],
        fetch_all: Callable[[], Awaitable[SLMError | None]],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._cache = cache
        self._timings = timings
        self._fetch_one = fetch_one
        self._fetch_all = fetch_all
        self._spawn = spawn
        self._uniform = uniform
        self._loop = asyncio.get_running_loop()
        self._awaited: dict[str, _Awaited] = {}
        self._asking: set[str] = set()
        # When the next request may start: while keys keep changing, and once they do not.
        self._free_at = self._free_when_over = 0.0
        self._wanted_at = float("-inf")
        # How long `run` waits; None for until a key is missing.
        self._until: float | None = None
        self._changed = asyncio.Event()

    def want(self, agent_id: str) -> None:
        """Note that this agent's key is missing, or missing again because it changed."""
        now = self._wanted_at = self._loop.time()
        awaited = self._awaited.get(agent_id)
        if awaited is None:
            awaited = self._awaited[agent_id] = _Awaited(Backoff(self._timings), float("inf"))
        else:
            awaited.again, awaited.failed = True, False
        if awaited.not_before > now:
            soon = now + self._uniform(0, self._timings.key_jitter_seconds)
            awaited.not_before = min(awaited.not_before, soon)
        until = self._until
        if until is None or (awaited.not_before < until and self._free() < until):
            self._changed.set()

    def hurry(self, agent_id: str) -> None:
        """Request this agent's key now, because a call is waiting for it."""
        awaited = self._awaited.get(agent_id)
        # A failed one is retried at its scheduled time.
        if awaited is None or awaited.failed:
            return
        awaited.hurried = True
        if agent_id not in self._asking:
            self._spawn(self._fetch([agent_id]))

    async def run(self) -> None:
        """Fetch what is due, until cancelled."""
        loop = self._loop
        while True:
            self._changed.clear()
            began = loop.time()
            if began >= self._free() and (due := self._due(began)):
                await self._fetch(due)
                self._pause(loop.time() - began)
                continue
            times = [a.not_before for i, a in self._awaited.items() if i not in self._asking]
            self._until = max(min(times), self._free()) if times else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._until):
                    await self._changed.wait()

    def _pause(self, took: float) -> None:
        """Leave the server alone for a while after a request that took this long."""
        now, longest = self._loop.time(), self._timings.key_pause_max_seconds
        took *= self._uniform(0.5, 1.5)
        self._free_at = now + min(took * _PATIENCE, longest)
        self._free_when_over = now + min(took, longest / _PATIENCE)

    def _free(self) -> float:
        """Return when the next request may start if nothing more changes."""
        over_at = self._wanted_at + _OVER_AFTER * self._timings.key_jitter_seconds
        return min(self._free_at, max(self._free_when_over, over_at))

    def _due(self, now: float) -> list[str]:
        for agent_id in list(self._awaited):
            if not self._is_awaited(agent_id):
                del self._awaited[agent_id]
        free = {i: each for i, each in self._awaited.items() if i not in self._asking}
        if all(each.not_before > now for each in free.values()):
            return []
        # Send all that wait only for their jitter with the first that is due, as one request.
        return [i for i, each in free.items() if each.not_before <= now or not each.failed]

    def _is_awaited(self, agent_id: str) -> bool:
        known = self._cache.find(agent_id)
        return known is not None and known.awaits_key

    async def _fetch(self, agent_ids: list[str]) -> None:
        """Request these, and schedule the next attempt for each that is still missing."""
        cache = self._cache
        many = len(agent_ids) > FEW and len(agent_ids) * _SHARE >= cache.size
        if not (many and cache.position.synced):
            # Before the first snapshot, the one in progress brings the others.
            agent_ids = agent_ids[:MAX_SINGLE]
        for agent_id in agent_ids:
            if (awaited := self._awaited.get(agent_id)) is not None:
                awaited.again = False
        self._asking.update(agent_ids)
        try:
            if many and cache.position.synced:
                failures = [await self._fetch_all()] * len(agent_ids)
            else:
                failures = list(await asyncio.gather(*map(self._fetch_one, agent_ids)))
        finally:
            self._asking.difference_update(agent_ids)
        for agent_id, failure in zip(agent_ids, failures, strict=True):
            self._plan(agent_id, failure)
        self._changed.set()

    def _plan(self, agent_id: str, failure: SLMError | None) -> None:
        awaited = self._awaited.get(agent_id)
        if awaited is None:
            return
        if not self._is_awaited(agent_id):
            del self._awaited[agent_id]
            return
        known = self._cache.find(agent_id)
        now = self._loop.time()
        awaited.failed = not awaited.again or failure is not None
        if not awaited.failed:
            awaited.not_before = now
            if awaited.hurried:
                self._spawn(self._fetch([agent_id]))
        elif known is not None and known.key_error is not None:
            # An operator's change arrives over the stream; this is for a repaired server.
            awaited.not_before = now + self._timings.refused_retry_seconds
        else:
            missing = failure or SLMUnavailable("the key did not come")
            awaited.not_before = now + awaited.backoff.delay_after(missing)
