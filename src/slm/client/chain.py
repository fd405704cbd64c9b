"""The chain: agent, default, environment, hardcoded; the first that answers (docs/protocol.md 5).

Reads the cache, and asks for what is missing there; knows no connection, no file and no thread.
"""

from __future__ import annotations

import logging

from slm.client.cache import AgentConfigCache
from slm.client.config import ResolvedConfig
from slm.client.fallback import from_environment, hardcoded
from slm.client.known import KnownAgent
from slm.client.sync import Synchroniser
from slm.errors import AgentKeyUnavailable

_log = logging.getLogger("slm.client")


class Chain:
    """Answers for one cache.

    Args:
        cache: what is known.
        key_wait: how long an answer waits for a key that changed a moment ago, in seconds.
    """

    def __init__(self, cache: AgentConfigCache, key_wait: float) -> None:
        self._cache = cache
        self._key_wait = key_wait
        self._warned: set[str] = set()

    async def answer(
        self, agent_id: str | None, sync: Synchroniser | None, *, judged: bool = True
    ) -> ResolvedConfig:
        """Answer for an agent, or for the default agent when `agent_id` is None.

        Args:
            agent_id: the agent.
            sync: whom to ask for what is not known; None: nobody.
            judged: whether to wait for a validator that has not answered.

        Raises:
            AgentKeyUnavailable: the agent needs an API key that cannot be had now.
        """
        config = await self._own(agent_id, sync, judged) if agent_id is not None else None
        if config is None:
            config = await self._default(agent_id, sync, judged)
        return config or self._without_slm(agent_id or "default")

    async def _own(
        self, agent_id: str, sync: Synchroniser | None, judged: bool
    ) -> ResolvedConfig | None:
        """Step 1: the agent's own config, or None where it is unknown or inactive."""
        cache = self._cache
        if cache.find(agent_id) is None and not cache.live and sync is not None:
            await sync.ask(agent_id)
        return await self._whole(agent_id, sync, judged)

    async def _default(
        self, agent_id: str | None, sync: Synchroniser | None, judged: bool
    ) -> ResolvedConfig | None:
        """Step 2: the default agent's config."""
        cache = self._cache
        if cache.default_id is None and not cache.live and sync is not None:
            await sync.ask_default()
        default_id = cache.default_id
        if default_id is None or default_id == agent_id:
            return None
        config = await self._whole(default_id, sync, judged)
        return config and config.answering(agent_id if agent_id is not None else default_id)

    def _without_slm(self, agent_id: str) -> ResolvedConfig:
        """Steps 3 and 4: the environment, else the hardcoded values."""
        answer = from_environment(agent_id)
        for warning in answer.warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                _log.warning("%s", warning)
        return answer.config or hardcoded(agent_id)

    async def _whole(
        self, agent_id: str, sync: Synchroniser | None, judged: bool
    ) -> ResolvedConfig | None:
        """Return a known agent's whole value: the current one, or the last one as stale."""
        cache = self._cache
        known = await self._once_its_key_is_here(agent_id, sync, judged)
        if known is None:
            return None
        if not cache.live and sync is not None and known.freshness()[0] > cache.ttl_seconds:
            if known.config is not None and cache.expired(known.config):
                await sync.ask(agent_id)
            else:
                sync.refresh(agent_id)
            known = cache.find(agent_id)
        if known is None or not known.is_active:
            return None
        if known.key_error is not None:
            raise AgentKeyUnavailable(agent_id, known.key_error)
        config = known.config
        gone = config is not None and cache.expired(config)
        if known.unjudged and (config is None or gone):
            return known.pending  # as after a validator that failed: a call says what is wrong
        if known.pending is not None and (config is None or gone):
            raise AgentKeyUnavailable(agent_id, "it has not come from the SLM yet")
        return None if gone else config

    async def _once_its_key_is_here(
        self, agent_id: str, sync: Synchroniser | None, judged: bool
    ) -> KnownAgent | None:
        """Return what is known of the agent, after waiting up to `key_wait` for a changed key.

        A validator that has not said yet what it thinks of a change is waited for in the same way.
        The wait counts from the change as well as from the question: once the SLM has been slow
        with a key, later questions do not wait for it again.
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
