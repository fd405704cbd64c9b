"""What the cache knows of one agent: its whole value, what it waits for, and how fresh it is.

Values only; the rules about them are the cache's.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from pydantic import SecretStr

from slm.client.cache.snapshot import ReceivedAgent
from slm.client.config import Options, ResolvedConfig, Step
from slm.schemas import AgentConfig

_NO_OPTIONS: Final = Options()


class Clockwork(Protocol):
    """What a value asks for its age: the cache."""

    clock: Callable[[], float]

    def freshness(self, confirmed_at: float, *, from_file: bool) -> tuple[float, bool]:
        """Return age and staleness of a value that nothing has superseded."""


class Freshness:
    """Since when one value was known to be the current one; a `ResolvedConfig` asks it."""

    __slots__ = ("_cache", "confirmed_at", "from_file", "superseded_at")

    def __init__(self, cache: Clockwork, confirmed_at: float, *, from_file: bool) -> None:
        self._cache = cache
        self.confirmed_at = confirmed_at
        self.from_file = from_file
        self.superseded_at: float | None = None

    def __deepcopy__(self, memo: object) -> Freshness:
        return self  # of its client: copying it would copy every agent

    def __call__(self) -> tuple[float, bool]:
        """Return the age in seconds, and whether the value is stale."""
        if self.superseded_at is not None:
            return self._cache.clock() - self.superseded_at, True
        return self._cache.freshness(self.confirmed_at, from_file=self.from_file)


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
