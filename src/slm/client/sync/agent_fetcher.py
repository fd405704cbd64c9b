"""Fetches what the cache lacks: one agent, the default agent, or all keys.

Concurrent requests for one agent share one HTTP request, and an SLM that could not be reached is
left alone for a few seconds. Knows no stream; the recipient handles the results.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol

from slm.client.cache.cache import AgentConfigCache
from slm.client.timings import Timings
from slm.client.transport.http import Connection, EpochChanged
from slm.errors import AgentInactive, AgentNotFound, KeyUndecryptable, SLMError

_REMEMBERED: Final = 10_000
_DEFAULT: Final = "/default"  # the alias; can't be an agent_id, which is used literally


class Recipient(Protocol):
    """Receives the results of requests."""

    def fetched(self, agent_id: str, swapped: bool, *, for_key: bool = False) -> None:
        """Called when a request for an agent ended, with whether its config was swapped."""

    def snapshot_applied(self, swapped: list[str]) -> None:
        """Called with the agents whose config a snapshot swapped."""

    def answered(self) -> None:
        """Called when the SLM answered."""

    def not_answered(self, error: SLMError) -> None:
        """Called with the reason when it did not."""

    def other_epoch(self) -> None:
        """Called when the answer belongs to another epoch than the cache."""


class AgentFetcher:
    """Sends requests to one SLM for one cache; belongs to one event loop.

    Args:
        connection: sends the requests.
        cache: stores the results.
        timings: how long a failed request is not repeated.
        spawn: runs a request in a task.
        recipient: receives the results.
    """

    def __init__(
        self,
        connection: Connection,
        cache: AgentConfigCache,
        timings: Timings,
        spawn: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]],
        recipient: Recipient,
    ) -> None:
        self._connection = connection
        self._cache = cache
        self._unknown_seconds = timings.unknown_seconds
        self._spawn = spawn
        self._recipient = recipient
        self._loop = asyncio.get_running_loop()
        self._asked: dict[str, asyncio.Task[Any]] = {}
        self._not_before: dict[str, float] = {}
        self._away_until = 0.0

    async def ask(self, agent_id: str) -> None:
        """Fetch one agent; raises nothing: the result is in the cache, or there is none.

        After a failed request, or for an unknown agent, waits a few seconds before asking again.
        """
        generation = self._cache.position.generation
        await asyncio.wait({self._asking(agent_id)})
        if generation != self._cache.position.generation and not self._cache.position.synced:
            # The stream restarted meanwhile, which made the answer useless.
            await asyncio.wait({self._asking(agent_id)})

    async def ask_default(self) -> None:
        """Fetch which agent is the default; its key, if it has one, follows on its own."""
        await asyncio.wait({self._asking(None)})

    def refresh(self, agent_id: str) -> None:
        """Fetch an agent in the background."""
        if self._may_ask(agent_id):
            self._asking(agent_id)

    def lacks(self, agent_id: str) -> bool:
        """Return whether the SLM said within the last seconds that this agent does not exist."""
        return agent_id in self._not_before

    def ask_again(self) -> None:
        """Forget all pauses between requests: the SLM is reachable."""
        self._away_until = 0.0
        self._not_before.clear()

    async def fetch_key(self, agent_id: str) -> SLMError | None:
        """Fetch one agent for its key, now; return the error if nothing came."""
        return await self._fetch(agent_id, for_key=True)

    async def fetch_all_keys(self) -> SLMError | None:
        """Fetch a snapshot for its keys while the stream runs; return the error if none came."""
        cache = self._cache
        generation = cache.position.generation
        try:
            snapshot = await self._connection.get_snapshot(min_revision=cache.position.at_least)
        except SLMError as error:
            self._could_not_ask(error)
            return error
        if generation != cache.position.generation:
            return None  # a snapshot after the restart is in progress
        if cache.position.contradicts(snapshot):
            self._recipient.other_epoch()
            return None
        self._recipient.snapshot_applied(cache.apply_snapshot(snapshot))
        return None

    def _asking(self, agent_id: str | None) -> asyncio.Task[Any]:
        """Return this agent's request in progress, starting one if needed; None is the default."""
        name = agent_id if agent_id is not None else _DEFAULT
        task = self._asked.get(name)
        if task is None:
            task = self._asked[name] = self._spawn(
                self._fetch(agent_id) if agent_id is not None else self._fetch_default()
            )
            task.add_done_callback(lambda _: self._asked.pop(name, None))
        return task

    async def _fetch(self, agent_id: str, *, for_key: bool = False) -> SLMError | None:
        """Fetch one agent and apply the result; return the error if nothing came."""
        if agent_id in ("", ".", "..") or not (for_key or self._may_ask(agent_id)):
            return None
        cache, position = self._cache, self._cache.position
        generation, known = position.generation, cache.known_revision(agent_id)
        failure: SLMError | None = None
        swapped = False
        try:
            agent = await self._connection.get_llm(
                agent_id,
                min_revision=known if known >= 0 else position.at_least,
                epoch=position.epoch,
            )
            if generation == position.generation:
                swapped = cache.apply_fetched(agent)
        except (AgentNotFound, AgentInactive):
            self._do_not_ask_for_a_while(agent_id)
            if generation == position.generation:
                swapped = cache.apply_absent(agent_id, known)
        except KeyUndecryptable as error:
            self._do_not_ask_for_a_while(agent_id)
            if generation == position.generation:
                swapped = cache.apply_key_error(agent_id, known, error.detail)
        except EpochChanged as error:
            failure = error
            self._recipient.other_epoch()
        except SLMError as error:
            failure = error
            self._could_not_ask(error)
        if failure is None:
            self._recipient.answered()
        self._recipient.fetched(agent_id, swapped, for_key=for_key)
        return failure

    async def _fetch_default(self) -> None:
        if not self._may_ask(_DEFAULT):
            return
        generation = self._cache.position.generation
        try:
            agent = await self._connection.get_default(epoch=self._cache.position.epoch)
        except EpochChanged:
            self._recipient.other_epoch()
        except SLMError as error:
            self._could_not_ask(error)
        else:
            if generation == self._cache.position.generation:
                self._recipient.fetched(agent.agent_id, self._cache.apply_config(agent))

    def _may_ask(self, name: str) -> bool:
        now = self._loop.time()
        return now >= self._away_until and now >= self._not_before.get(name, 0.0)

    def _do_not_ask_for_a_while(self, name: str) -> None:
        if len(self._not_before) >= _REMEMBERED:
            self._not_before.clear()
        self._not_before[name] = self._loop.time() + self._unknown_seconds

    def _could_not_ask(self, error: SLMError) -> None:
        self._away_until = self._loop.time() + self._unknown_seconds
        self._recipient.not_answered(error)
