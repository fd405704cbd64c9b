"""What the cache knows of one agent: which config serves, what it waits for, and what came of that.

Knows no other agent and asks nobody; what is newer than what is known is for the cache to say.
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
    """What is known of one agent.

    Attributes:
        revision: of the newest that is known, with or without its key.
        generation: the cache's at that time; revisions and keys of another mean nothing.
        is_default: whether it is flagged as the default agent.
        is_active: whether it may be served.
        config: the last whole value, config and key together; None when there is none.
        freshness: that of `config`.
        pending: the newest config while its key is not here yet, and None in it; or while it is
            `unjudged`.
        pending_since: since when that key is missing, or that judgement is awaited.
        unjudged: whether a validator of the user's has not said yet what it thinks of `pending`.
        pending_freshness: that of `pending`, while it is unjudged.
        key_error: why the SLM cannot give the key; None when it can.
        refused: why the newest config is not to be used; None when it may.
        refused_config: that newest config, where `config` is the last good one instead.
        key_from: how the key came: `snapshot`, `fetch` or `file`.
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
        """Whether exactly this is in force: the same revision of the same life, with this key."""
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
        """The newest config that is known, in force or not."""
        return self.pending or self.refused_config or self.config

    @property
    def not_in_force(self) -> str | None:
        """Why the newest config is not in force; None where it is, or only its key is awaited."""
        if self.key_error is not None:
            return f"its key cannot be had: {self.key_error}"
        return self.refused

    @property
    def in_force(self) -> ResolvedConfig | None:
        """The agent's own config as it is served now, stale or not; None where it has none."""
        return self.config if self.is_active and self.key_error is None else None

    @property
    def awaits_key(self) -> bool:
        """Whether a key must still be fetched for this agent to be up to date."""
        missing = self.pending is not None and not self.unjudged
        return self.is_active and (missing or self.key_error is not None)

    def key_of(self, api_key_revision: int) -> SecretStr | None:
        """Return the key of this revision, if it is here."""
        for held in (self.config, self.refused_config, self.pending):
            same_key = held is not None and held.api_key_revision == api_key_revision
            if held is not None and same_key and held.llm_api_key is not None:
                return held.llm_api_key
        return None

    # --- what becomes of it ---

    def take(
        self, value: ResolvedConfig, old: KnownAgent | None, key_from: str, now: float
    ) -> ResolvedConfig:
        """Serve a value, and return it; what equals the one served before stays that one.

        Args:
            value: config and key.
            old: what was known before.
            key_from: how the key came; empty: as before.
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
        """Serve what was served before, as stale, until a validator has judged what was taken."""
        self.pending, self.unjudged, self.pending_since = self.config, True, now
        self.pending_freshness = self.freshness
        self.config = old.in_force if old is not None else None
        if old is not None and self.config is not None:
            self.freshness = old.freshness

    def await_key(
        self, value: ResolvedConfig, key_error: str | None, old: KnownAgent | None, now: float
    ) -> None:
        """Serve what was served before, as stale, until the key is here; nothing after an error."""
        self.pending, self.key_error = value, key_error
        waiting = old.pending if old is not None else None
        same_key = waiting is not None and waiting.api_key_revision == value.api_key_revision
        self.pending_since = old.pending_since if old is not None and same_key else now
        if old is not None and key_error is None:
            # The previous whole value: better than nothing, and never mixed with the new one.
            self.config, self.freshness = old.in_force, old.freshness

    def refuse(self, reason: str, old: KnownAgent | None) -> None:
        """Keep the last good config in force: what was taken must not be used."""
        self.refused = reason
        before = old.in_force if old is not None else None
        # With nothing good to keep, a call says best itself what is wrong.
        if old is not None and before is not None and before is not self.config:
            if old.refused is not None and old.refused_config is None:
                return  # not good either
            self.refused_config = self.config
            self.config, self.freshness = before, old.freshness

    def take_verdict(self, value: ResolvedConfig, reason: str | None, now: float) -> ResolvedConfig:
        """Take what was said of `value`, which was awaited; return what serves then."""
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
        """Take what is said now of the newest config; return whether it serves from now on."""
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
        # A thousand agents share a few names; one copy of each is enough.
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
    """Say whether two configs are the same value, their freshness apart."""
    return one.revision == other.revision and bool(_COMPARED(one) == _COMPARED(other))
