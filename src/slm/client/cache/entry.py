"""What the cache knows about one agent: the config in use, what it waits for, and the result.

Knows no other agent and makes no calls; the cache decides what is newer.
"""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from typing import Final

from pydantic import SecretStr

from slm.client.cache.freshness import Freshness
from slm.client.cache.snapshot import ReceivedAgent
from slm.client.config import Options, ResolvedConfig, Step
from slm.schemas import AgentConfig

_NO_OPTIONS: Final = Options()


@dataclass(slots=True, eq=False)
class KnownAgent:
    """What is known about one agent.

    Attributes:
        revision: the newest known revision, with or without its key.
        generation: the cache's generation at that time; revisions and keys of others are
            meaningless.
        is_default: whether it is flagged as the default agent.
        is_active: whether it may be served.
        config: the last complete value, config and key together; None if there is none.
        freshness: the freshness of `config`.
        pending: the newest config while its key is missing (and None in it), or while it is
            `unjudged`.
        pending_since: since when the key or the verdict has been awaited.
        unjudged: whether a user's validator has not returned a verdict on `pending` yet.
        pending_freshness: the freshness of `pending` while it is unjudged.
        key_error: why the SLM cannot provide the key; None if it can.
        refused: why the newest config must not be used; None if it may.
        refused_config: the refused newest config, if `config` is the last good one instead.
        key_from: where the key came from: `snapshot`, `fetch` or `file`.
    """

    revision: int
    generation: int
    is_default: bool
    is_active: bool
    config: ResolvedConfig | None
    freshness: Freshness
    pending: ResolvedConfig | None = None
    pending_since: float = 0.0
    unjudged: bool = False
    pending_freshness: Freshness | None = None
    key_error: str | None = None
    refused: str | None = None
    refused_config: ResolvedConfig | None = None
    key_from: str = ""

    def holds(self, revision: int, generation: int, key: SecretStr | None) -> bool:
        """Whether exactly this is in use: same revision and generation, with this key."""
        return (
            self.config is not None
            and (self.revision, self.generation) == (revision, generation)
            and self.pending is None
            and self.key_error is None
            and self.refused is None
            and self.refused_config is None
            and self.config.revision == revision
            and self.config.llm_api_key == key
        )

    @property
    def newest(self) -> ResolvedConfig | None:
        """The newest known config, in use or not."""
        return self.pending or self.refused_config or self.config

    @property
    def not_in_force(self) -> str | None:
        """Why the newest config is not in use; None if it is, or if only its key is missing."""
        if self.key_error is not None:
            return f"its key cannot be had: {self.key_error}"
        return self.refused

    @property
    def in_force(self) -> ResolvedConfig | None:
        """The agent's own config as it is served now, stale or not; None if it has none."""
        return self.config if self.is_active and self.key_error is None else None

    @property
    def awaits_key(self) -> bool:
        """Whether a key must still be fetched to bring this agent up to date."""
        missing = self.pending is not None and not self.unjudged
        return self.is_active and (missing or self.key_error is not None)

    def key_of(self, api_key_revision: int) -> SecretStr | None:
        """Return the key with this revision, if it is here."""
        for held in (self.config, self.refused_config, self.pending):
            same_key = held is not None and held.api_key_revision == api_key_revision
            if held is not None and same_key and held.llm_api_key is not None:
                return held.llm_api_key
        return None

    # --- transitions ---

    def take(
        self, value: ResolvedConfig, old: KnownAgent | None, key_from: str, now: float
    ) -> ResolvedConfig:
        """Put a value in use and return it; if it equals the previous one, keep that object.

        Args:
            value: config and key.
            old: what was known before.
            key_from: where the key came from; empty for unchanged.
            now: the cache's time.
        """
        before = old.in_force if old is not None else None
        if old is not None and before is not None and same(before, value):
            value, self.freshness = before, old.freshness
            self.freshness.confirm(now)
        self.config = value
        self.key_from = key_from or (old.key_from if old is not None else "")
        return value

    def await_verdict(self, old: KnownAgent | None, now: float) -> None:
        """Keep serving the previous value, as stale, until a validator has judged the new one."""
        self.pending, self.unjudged, self.pending_since = self.config, True, now
        self.pending_freshness = self.freshness
        self.config = old.in_force if old is not None else None
        if old is not None and self.config is not None:
            self.freshness = old.freshness

    def await_key(
        self, value: ResolvedConfig, key_error: str | None, old: KnownAgent | None, now: float
    ) -> None:
        """Serve the previous value, as stale, until the key arrives; nothing after an error."""
        self.pending, self.key_error = value, key_error
        waiting = old.pending if old is not None else None
        same_key = waiting is not None and waiting.api_key_revision == value.api_key_revision
        self.pending_since = old.pending_since if old is not None and same_key else now
        if old is not None and key_error is None:
            # The previous complete value: better than nothing, and never mixed with the new one.
            self.config, self.freshness = old.in_force, old.freshness

    def refuse(self, reason: str, old: KnownAgent | None) -> None:
        """Keep the last good config in use: the new one must not be used."""
        self.refused = reason
        before = old.in_force if old is not None else None
        # Without a good config to keep, a call itself reports best what is wrong.
        if old is not None and before is not None and before is not self.config:
            if old.refused is not None and old.refused_config is None:
                return  # not good either
            self.refused_config = self.config
            self.config, self.freshness = before, old.freshness

    def take_verdict(self, value: ResolvedConfig, reason: str | None, now: float) -> ResolvedConfig:
        """Apply the awaited verdict on `value`; return what is served from now on."""
        before = self.in_force
        self.pending, self.unjudged, self.refused = None, False, reason
        if reason is not None and before is not None:
            self.refused_config = value
            return before
        if before is not None:
            self.freshness.supersede(now)
        self.config, self.freshness = value, self.pending_freshness or self.freshness
        return value

    def take_later_verdict(self, reason: str | None, freshness: Freshness) -> bool:
        """Apply a later verdict on the newest config; return whether it is served from now on."""
        self.refused = reason
        if reason is not None or self.refused_config is None:
            return False
        self.config, self.refused_config, self.freshness = self.refused_config, None, freshness
        return True


def value_of(
    agent_id: str,
    revision: int,
    config: AgentConfig | ReceivedAgent,
    key: SecretStr | None,
    freshness: Freshness,
) -> ResolvedConfig:
    """Return the frozen value of an agent's own config, with its key."""
    return ResolvedConfig(
        agent_id=agent_id,
        step=Step.AGENT,
        # A thousand agents share a few names, so keep one copy of each.
        llm_provider=sys.intern(config.llm_provider),
        llm_model=sys.intern(config.llm_model),
        llm_endpoint=config.llm_endpoint and sys.intern(config.llm_endpoint),
        llm_api_key=key,
        llm_timeout=config.llm_timeout,
        llm_temperature=config.llm_temperature,
        llm_max_tokens=config.llm_max_tokens,
        llm_options=Options(config.llm_options) if config.llm_options else _NO_OPTIONS,
        revision=revision,
        api_key_revision=config.api_key_revision,
        source_agent_id=agent_id,
        _freshness=freshness,
    )


_COMPARED: Final = operator.attrgetter(
    "llm_provider",
    "llm_endpoint",
    "llm_model",
    "llm_api_key",
    "llm_timeout",
    "llm_temperature",
    "llm_max_tokens",
    "llm_options",
    "api_key_revision",
)


def same(one: ResolvedConfig, other: ResolvedConfig) -> bool:
    """Return whether two configs are equal, ignoring freshness."""
    return one.revision == other.revision and bool(_COMPARED(one) == _COMPARED(other))
