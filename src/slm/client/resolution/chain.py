"""The chain: agent, default, environment, hardcoded; first value wins (docs/protocol.md 5).

Reads the cache and requests what is missing there; knows no connection, no file and no thread.
"""

from __future__ import annotations

from typing import Protocol

from slm.client.cache.cache import AgentConfigCache
from slm.client.cache.entry import KnownAgent
from slm.client.config import ResolvedConfig
from slm.client.resolution.environment import from_environment, hardcoded
from slm.client.resolution.unknown import UnknownAgents
from slm.client.runtime.log import quiet_logger
from slm.client.status import ClientStatus
from slm.errors import AgentKeyUnavailable, AgentUnknown, SLMUnavailable

_log = quiet_logger("slm.client")


class Fetcher(Protocol):
    """Fetches what the cache lacks; raises nothing."""

    async def ask(self, agent_id: str) -> None:
        """Fetch one agent."""

    async def ask_default(self) -> None:
        """Fetch which agent is the default."""

    def refresh(self, agent_id: str) -> None:
        """Fetch an agent in the background."""

    def lacks(self, agent_id: str) -> bool:
        """Return whether the SLM said within the last seconds that this agent does not exist."""


class Source(Protocol):
    """What keeps the cache up to date, as seen by the chain."""

    @property
    def fetcher(self) -> Fetcher:
        """The fetcher for what is missing."""

    @property
    def closed(self) -> bool:
        """Whether it was closed, so that waiting is pointless."""

    @property
    def status(self) -> ClientStatus:
        """The state of the connection to the SLM."""

    @property
    def last_error(self) -> str | None:
        """What failed last; None if nothing is wrong."""

    def hurry_key(self, agent_id: str) -> None:
        """Request an agent's missing key at once, because a call is waiting for it."""

    async def wait_for_change(self, timeout: float) -> None:
        """Return when anything in the cache changed, or after the timeout."""


class Chain:
    """Resolves agents from one cache.

    Args:
        cache: what is known.
        key_wait: how long to wait for a key that has just changed, in seconds.
        strict: whether to raise an error instead of using another agent's config or built-in
            values.
    """

    def __init__(self, cache: AgentConfigCache, key_wait: float, *, strict: bool = False) -> None:
        self._cache = cache
        self._key_wait = key_wait
        self._strict = strict
        self._unknown = UnknownAgents()
        self._warned: set[str] = set()

    async def answer(
        self, agent_id: str | None, sync: Source | None, *, judged: bool = True
    ) -> ResolvedConfig:
        """Resolve an agent, or the default agent if `agent_id` is None.

        Args:
            agent_id: the agent.
            sync: fetches what is unknown; None for no fetching.
            judged: whether to wait for a validator that has not answered yet.

        Raises:
            AgentKeyUnavailable: the agent needs an API key that is unavailable now.
            AgentUnknown: the client is strict; the agent does not exist or is switched off.
            SLMUnavailable: the client is strict, and neither the SLM nor the environment has a
                value.
        """
        config = await self._own(agent_id, sync, judged) if agent_id is not None else None
        if config is not None:
            return config
        if agent_id is not None and self._is_missing(agent_id, sync):
            self._unknown.near(agent_id, self._cache.agents)
        if agent_id is None or not self._strict:
            config = await self._default(agent_id, sync, judged)
        elif self._cache.find(agent_id) is not None:
            raise AgentUnknown(agent_id, self._why_not(agent_id, sync))
        elif self._is_missing(agent_id, sync):
            near = self._unknown.near(agent_id, self._cache.agents)
            raise AgentUnknown(agent_id, self._why_not(agent_id, sync), near)
        return config or self._without_slm(agent_id or "default", self._why_not(agent_id, sync))

    def answer_in_place(self, agent_id: str | None) -> ResolvedConfig:
        """Resolve from what is known, without fetching.

        Raises:
            SLMError: as `answer` does.
        """
        answering = self.answer(agent_id, None)
        try:
            answering.send(None)
        except StopIteration as answer:
            config: ResolvedConfig = answer.value
            return config
        answering.close()
        raise AssertionError("an answer from what is known waits for nothing")

    def _is_missing(self, agent_id: str, sync: Source | None) -> bool:
        """Return whether the SLM is known not to have this agent."""
        cache = self._cache
        if cache.find(agent_id) is not None:
            return False
        return cache.position.synced or (sync is not None and sync.fetcher.lacks(agent_id))

    def _why_not(self, agent_id: str | None, sync: Source | None) -> str:
        """Return why the agent's own config was not used, in one sentence."""
        if agent_id is not None and self._cache.find(agent_id) is not None:
            return f"agent {agent_id!r} is switched off, or what is known of it is too old"
        if agent_id is not None and self._is_missing(agent_id, sync):
            return self._unknown.sentence(agent_id, self._cache.agents)
        if sync is None:
            return "this client is closed"
        said = sync.last_error or f"the SLM has not answered yet ({sync.status.value})"
        return said.rstrip(".")

    async def _own(self, agent_id: str, sync: Source | None, judged: bool) -> ResolvedConfig | None:
        """Step 1: the agent's own config, or None if it is unknown or inactive."""
        cache = self._cache
        if cache.find(agent_id) is None and not cache.liveness.live and sync is not None:
            await sync.fetcher.ask(agent_id)
        return await self._whole(agent_id, sync, judged)

    async def _default(
        self, agent_id: str | None, sync: Source | None, judged: bool
    ) -> ResolvedConfig | None:
        """Step 2: the default agent's config."""
        cache = self._cache
        if cache.default_id is None and not cache.liveness.live and sync is not None:
            await sync.fetcher.ask_default()
        default_id = cache.default_id
        if default_id is None or default_id == agent_id:
            return None
        config = await self._whole(default_id, sync, judged)
        if config is None or agent_id is None:
            return config and config.answering(default_id)
        return config.answering(
            agent_id, f"{self._why_not(agent_id, sync)}, so the default agent answers"
        )

    def _without_slm(self, agent_id: str, why: str) -> ResolvedConfig:
        """Steps 3 and 4: the environment, or else the hardcoded values."""
        answer = from_environment(agent_id, passed_over=f"{why}, so AUTOBOT_LLM_* answer")
        for warning in answer.warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                _log.warning("%s", warning)
        if answer.config is not None:
            return answer.config
        unset = "AUTOBOT_LLM_* cannot be used" if answer.warnings else "no AUTOBOT_LLM_* is set"
        if self._strict:
            raise SLMUnavailable(f"agent {agent_id!r} cannot be resolved: {why}; {unset}")
        return hardcoded(agent_id, f"{why}; {unset}, so the built-in values answer")

    async def _whole(
        self, agent_id: str, sync: Source | None, judged: bool
    ) -> ResolvedConfig | None:
        """Return a known agent's complete value: the current one, or the last one as stale."""
        cache = self._cache
        known = await self._once_its_key_is_here(agent_id, sync, judged)
        if known is None:
            return None
        if (
            not cache.liveness.live
            and sync is not None
            and known.freshness()[0] > cache.liveness.ttl_seconds
        ):
            if known.config is not None and cache.liveness.expired(known.config.age):
                await sync.fetcher.ask(agent_id)
            else:
                sync.fetcher.refresh(agent_id)
            known = cache.find(agent_id)
        if known is None or not known.is_active:
            return None
        if known.key_error is not None:
            raise AgentKeyUnavailable(agent_id, known.key_error)
        config = known.config
        gone = config is not None and cache.liveness.expired(config.age)
        if known.unjudged and (config is None or gone):
            return known.pending  # as after a failed validator: the call reports what is wrong
        if known.pending is not None and (config is None or gone):
            raise AgentKeyUnavailable(agent_id, "it has not come from the SLM yet")
        return None if gone else config

    async def _once_its_key_is_here(
        self, agent_id: str, sync: Source | None, judged: bool
    ) -> KnownAgent | None:
        """Return what is known about the agent, after waiting up to `key_wait` for a changed key.

        It waits in the same way for a validator that has not judged a change yet. The limit counts
        from the change as well as from the question: once the SLM has been slow to deliver a key,
        later questions do not wait for it again.
        """
        cache = self._cache
        asked_at = cache.clock()
        while (known := cache.find(agent_id)) is not None:
            if known.pending is None or known.key_error is not None or not known.is_active:
                break
            if known.unjudged and not judged:
                break
            left = min(asked_at, known.pending_since) + self._key_wait - cache.clock()
            if left <= 0 or sync is None or sync.closed:
                break
            if not known.unjudged:
                sync.hurry_key(agent_id)
            await sync.wait_for_change(left)
        return known
