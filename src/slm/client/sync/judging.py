"""Has slow validators judge configs before they are used, many at once.

Decides what is judged and when; `Hooks` runs the validators, and the cache stores the verdicts.
Runs in the client's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from slm.client.cache.cache import AgentConfigCache
from slm.client.cache.entry import KnownAgent
from slm.client.config import ResolvedConfig
from slm.client.runtime.callbacks import Hooks


class Judging:
    """One client's verdicts.

    Args:
        cache: the configs to judge.
        hooks: the validators.
        judged: called with a function that applies the verdicts and returns the swapped agents.
    """

    def __init__(
        self,
        cache: AgentConfigCache,
        hooks: Hooks,
        judged: Callable[[Callable[[], list[str]]], None],
    ) -> None:
        self._cache = cache
        self._hooks = hooks
        self._judged = judged
        self._waiting: dict[str, KnownAgent] = {}
        self._anew = self._all = False
        cache.refused = hooks.refusal
        cache.ask_first = self._ask_first

    def forget(self) -> None:
        """Drop everything that was queued for judging."""
        self._waiting = {}
        self._anew = self._all = False

    def judge_later(self, agents: dict[str, KnownAgent]) -> None:
        """Judge these in the loop's next turn, with whatever else is queued until then."""
        if agents and not self._waiting:
            asyncio.get_running_loop().call_soon(self._ask_of_waiting)
        self._waiting |= agents

    def judge_anew(self, added: bool) -> None:
        """Judge all configs after a validator was added, or refused ones after one was removed."""
        if not self._anew:
            self._anew = True
            asyncio.get_running_loop().call_soon(self._ask_anew)
        self._all |= added

    def _ask_first(self, agent_id: str, known: KnownAgent) -> bool:
        if not self._hooks.has_slow_validators:
            return False
        self.judge_later({agent_id: known})
        return True

    def _ask_of_waiting(self) -> None:
        waiting, self._waiting = self._waiting, {}
        entries = [
            (agent_id, known, known.pending)
            for agent_id, known in waiting.items()
            if known.unjudged and known.pending is not None
        ]

        def take(reasons: list[str | None]) -> list[str]:
            return [
                agent_id
                for (agent_id, known, _), reason in zip(entries, reasons, strict=True)
                if self._cache.judged(agent_id, known, reason)
            ]

        self._ask([config for *_, config in entries], take)

    def _ask_anew(self) -> None:
        entries = [
            (agent_id, newest)
            for agent_id, known in self._cache.agents.items()
            if (newest := known.newest) is not None
            and known.is_active
            and known.pending is None
            and known.key_error is None
            and (self._all or known.refused is not None)
        ]
        self._anew = self._all = False

        def take(reasons: list[str | None]) -> list[str]:
            return [
                agent_id
                for (agent_id, config), reason in zip(entries, reasons, strict=True)
                if self._cache.judged_anew(agent_id, config, self._hooks.refusal(config) or reason)
            ]

        self._ask([config for _, config in entries], take)

    def _ask(
        self, configs: list[ResolvedConfig], take: Callable[[list[str | None]], list[str]]
    ) -> None:
        """Ask the validators, and continue in this loop with their verdicts."""
        loop = asyncio.get_running_loop()

        def tell(reasons: list[str | None]) -> None:
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                loop.call_soon_threadsafe(self._judged, lambda: take(reasons))

        if self._hooks.has_slow_validators:
            self._hooks.ask(configs, tell)
        else:
            self._judged(lambda: take([None] * len(configs)))
