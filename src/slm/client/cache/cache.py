"""AgentConfigCache: what the SLM said about each agent, and how long that may be used.

Passive: each source has its own method (`apply_snapshot`, `apply_change`, …), and it fetches
nothing. Knows no socket, no file and no clock except the monotonic one it is given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from pydantic import SecretStr

from slm.client.cache.entry import KnownAgent, value_of
from slm.client.cache.freshness import Freshness, Liveness
from slm.client.cache.position import Position
from slm.client.cache.snapshot import ReceivedAgent, ReceivedSnapshot
from slm.client.config import ResolvedConfig
from slm.client.runtime import clock
from slm.protocol import AgentChanged, AgentDeleted
from slm.schemas import AgentConfig, LLMConfig, LLMConfigWithKey, Snapshot


class AgentConfigCache:
    """Configurations by agent_id, each current for `ttl_seconds` after it was last confirmed.

    On its own it is a plain cache: `set` and `update` store a value, and `get` returns it until it
    expires. `SLMClient` drives it with messages from the SLM, following docs/protocol.md section 5:
    per agent_id only what is newer than the last known revision is applied, deletes included, and
    only `begin` (a resync, another epoch) moves it back. Only one thread writes; reading `ready` is
    safe from any thread.

    Args:
        ttl_seconds: how long a value is current without contact with the SLM.
        max_stale_seconds: how long after that it may still be served as stale; None for no limit.
        clock: monotonic seconds.

    Attributes:
        ready: configs that need no further check: complete, active and the newest known.
        position: the revision and epoch up to which everything is in the cache.
        liveness: whether the cache is live, and the age of its values.
        agents: what is known about each agent, in any state; must not be modified.
        default_id: the agent_id of the default agent.
        refused: called before a config comes into use; returns why it must not, or None.
        ask_first: called before a config comes into use; returns whether a slower validator must
            judge it first, in which case `judged` receives the verdict.
    """

    def __init__(
        self,
        ttl_seconds: float = 300,
        *,
        max_stale_seconds: float | None = None,
        clock: Callable[[], float] = clock.now,
    ) -> None:
        self.position = Position(clock)
        self.liveness = Liveness(ttl_seconds, max_stale_seconds, clock)
        self.clock = clock
        self.ready: dict[str, ResolvedConfig] = {}
        self.default_id: str | None = None
        self.refused: Callable[[ResolvedConfig], str | None] = lambda config: None
        self.ask_first: Callable[[str, KnownAgent], bool] = lambda agent_id, known: False
        self._agents: dict[str, KnownAgent] = {}
        self.agents = MappingProxyType(self._agents)
        # Kept separately: each ack needs them after a change, and there may be 100,000 agents.
        self._unsettled: dict[str, KnownAgent] = {}
        self._by_hand: dict[str, tuple[dict[str, Any], float]] = {}

    # --- a plain cache, used on its own ---

    def get(self, agent_id: str) -> dict[str, Any] | None:
        """Return the agent's config as a new dict, or None if there is none or it has expired."""
        known = self._agents.get(agent_id)
        if known is not None:
            config = known.in_force
            fresh = config is not None and config.age <= self.liveness.ttl_seconds
            return config.as_dict() if config is not None and fresh else None
        held = self._by_hand.get(agent_id)
        if held is None or self.clock() - held[1] > self.liveness.ttl_seconds:
            return None
        return copy.deepcopy(held[0])

    def set(self, agent_id: str, config: Mapping[str, Any]) -> None:
        """Store a config for `ttl_seconds` from now."""
        self._by_hand[agent_id] = (copy.deepcopy(dict(config)), self.clock())

    def update(self, agent_id: str, config: Mapping[str, Any]) -> None:
        """Replace a whole config; its TTL starts again."""
        self.set(agent_id, config)

    def remove(self, agent_id: str) -> None:
        """Remove the agent; does nothing if it is not there."""
        self._by_hand.pop(agent_id, None)
        self._drop(agent_id)

    # --- reading ---

    def find(self, agent_id: str) -> KnownAgent | None:
        """Return what is known about the agent, in any state."""
        return self._agents.get(agent_id)

    def known_revision(self, agent_id: str) -> int:
        """Return the revision up to which this agent, or its absence, is known; -1 if unknown."""
        known = self._agents.get(agent_id)
        if known is not None and known.generation == self.position.generation:
            return known.revision
        return self.position.gone_by(agent_id)

    @property
    def size(self) -> int:
        """How many agents are known."""
        return len(self._agents)

    def keys_awaited(self) -> list[str]:
        """Return the agents that have a newest config whose key is missing."""
        return [agent_id for agent_id, known in self._unsettled.items() if known.awaits_key]

    def unsettled(self) -> Iterator[tuple[str, KnownAgent]]:
        """Yield the active agents for which the newest config is not in use, or not yet."""
        yield from self._unsettled.items()

    def key_revision(self, agent_id: str) -> int | None:
        """Return the revision of the agent's current key; None without a key or an agent."""
        known = self._agents.get(agent_id)
        newest = known.newest if known is not None else None
        return newest.api_key_revision if newest is not None else None

    # --- messages from the SLM ---

    def begin(self, epoch: str, revision: int, change_id: str | None = None) -> None:
        """Start over at `revision` of `epoch`; the cached values are served until replaced.

        Called after a plain subscription, a `resync` or a new epoch. A snapshot must follow; until
        then, changes after `revision` are applied to what is cached.
        """
        self.liveness.set(False)
        self.position.begin(epoch, revision, change_id)

    def apply_snapshot(self, snapshot: Snapshot | ReceivedSnapshot) -> list[str]:
        """Apply a snapshot where it is newer; return the agents with a swapped config.

        Empties the snapshot's list of agents: each row is freed as it is stored, so that the heap
        does not have to hold both in full.
        """
        if self.position.contradicts(snapshot):
            self.begin(snapshot.epoch, snapshot.revision, snapshot.change_id)
        if snapshot.revision < self.position.base:
            return []  # deletes it does not include are no longer remembered here
        swapped = []
        there = set()
        agents = snapshot.agents
        agents.reverse()
        while agents:
            agent = agents.pop()
            there.add(agent.agent_id)
            if self.apply_fetched(agent, "snapshot"):
                swapped.append(agent.agent_id)
        for agent_id in self._agents.keys() - there:
            if self.known_revision(agent_id) <= snapshot.revision and self._drop(agent_id):
                swapped.append(agent_id)
        self.position.complete(snapshot.revision)
        self.liveness.confirm()
        self._find_default()
        return swapped

    def apply_change(self, message: AgentChanged | AgentDeleted) -> bool:
        """Apply a change if it is newer than what is known; return whether a config was swapped."""
        agent_id, revision = message.agent_id, message.revision
        if revision <= self.known_revision(agent_id):
            return False
        if isinstance(message, AgentChanged):
            return self._put(agent_id, revision, message.config)
        self.position.note_gone(agent_id, revision)
        return self._drop(agent_id)

    def apply_config(self, agent: LLMConfig) -> bool:
        """Apply a config received over HTTP without its key; return whether it was swapped in."""
        if agent.revision <= self.known_revision(agent.agent_id):
            return False
        return self._put(agent.agent_id, agent.revision, agent)

    def apply_fetched(
        self, agent: LLMConfigWithKey | ReceivedAgent, key_from: str = "fetch"
    ) -> bool:
        """Apply a config received with its key, unless older; return whether it was swapped in."""
        known, generation = self.known_revision(agent.agent_id), self.position.generation
        deleted = agent.agent_id not in self._agents and agent.revision == known
        if agent.revision < known or deleted:
            return False
        error = agent.key_error
        if agent.llm_api_key is None and agent.api_key_revision is not None and error is None:
            error = "the SLM did not send it"
        key = agent.llm_api_key
        old = self._agents.get(agent.agent_id)
        if old is not None and old.holds(agent.revision, generation, key) and error is None:
            # Nothing new, as for most agents in a snapshot that was fetched for a few keys.
            old.freshness.confirm(self.clock())
            return False
        return self._put(
            agent.agent_id,
            agent.revision,
            agent,
            key=key,
            key_error=error,
            whole=True,
            key_from=key_from,
        )

    def apply_absent(self, agent_id: str, asked_at: int) -> bool:
        """Apply "no such agent, or inactive", requested when `asked_at` was the known revision."""
        if self.known_revision(agent_id) > asked_at or agent_id not in self._agents:
            return False
        if self.liveness.live and agent_id == self.default_id:
            return False  # the stream is about to announce the default agent, and then this
        self.position.note_gone(agent_id, self.known_revision(agent_id))
        return self._drop(agent_id)

    def apply_key_error(self, agent_id: str, asked_at: int, reason: str) -> bool:
        """Apply "the key exists but cannot be used"; return whether a config went out of use.

        Resolving such an agent raises an error: continuing with an older key, or with the default
        agent's config, would look like success (docs/decisions, a missing key raises).
        """
        known = self._agents.get(agent_id)
        if known is None or self.known_revision(agent_id) > asked_at:
            return False
        served = known.in_force is not None
        known.key_error, known.unjudged = reason, False
        self._note_unsettled(agent_id, known)
        known.freshness.supersede(self.clock())
        known.config = None
        self.ready.pop(agent_id, None)
        return served

    def distrust(self) -> None:
        """Serve the cache as stale until a snapshot: a fork may have interrupted a change."""
        self.position.synced = False
        self.liveness.set(False)

    # --- verdicts of validators ---

    def judged(self, agent_id: str, known: KnownAgent, reason: str | None) -> bool:
        """Apply the verdict requested by `ask_first`; return whether a config was swapped in.

        Args:
            agent_id: the agent.
            known: what `ask_first` was given; the verdict is ignored if this was superseded.
            reason: why it must not be used, or None.
        """
        value = known.pending
        if self._agents.get(agent_id) is not known or not known.unjudged or value is None:
            return False
        before = known.in_force
        self.ready[agent_id] = known.take_verdict(
            value, self.refused(value) or reason, self.clock()
        )
        self._note_unsettled(agent_id, known)
        return known.in_force is not before

    def judged_anew(self, agent_id: str, config: ResolvedConfig, reason: str | None) -> bool:
        """Apply a later verdict about a config; return whether it was swapped in.

        A config already in use stays in use: it is no worse than before, and the SLM is informed.
        """
        known = self._agents.get(agent_id)
        if known is None or known.newest is not config or known.pending is not None:
            return False
        swapped = known.take_later_verdict(reason, Freshness(self.liveness, self.clock()))
        if swapped:
            self.ready[agent_id] = config
        self._note_unsettled(agent_id, known)
        return swapped

    # --- internals ---

    def _put(
        self,
        agent_id: str,
        revision: int,
        config: AgentConfig | ReceivedAgent,
        *,
        key: SecretStr | None = None,
        key_error: str | None = None,
        whole: bool = False,
        key_from: str = "",
    ) -> bool:
        old = self._agents.get(agent_id)
        before = old.in_force if old is not None else None
        if not whole:
            key, whole = self._held_key(old, config)
        now = self.clock()
        freshness = Freshness(self.liveness, now)
        value = value_of(agent_id, revision, config, key, freshness)
        new = KnownAgent(
            revision, self.position.generation, config.is_default, config.is_active, None, freshness
        )
        if whole and key_error is None:
            served = new.take(value, old, key_from, now)
            if config.is_active and served is not before and self.ask_first(agent_id, new):
                new.await_verdict(old, now)
            elif config.is_active and (reason := self.refused(served)) is not None:
                new.refuse(reason, old)
        else:
            new.await_key(value, key_error, old, now)
        kept = new.pending is not None or new.refused_config is not None
        if old is not None and (new.config is not old.config or kept):
            old.freshness.supersede(now)
        self._agents[agent_id] = new
        self._note_unsettled(agent_id, new)
        self.position.gone.pop(agent_id, None)
        if new.is_active and new.config is not None and new.pending is None:
            self.ready[agent_id] = new.config
        else:
            self.ready.pop(agent_id, None)
        self._note_default(agent_id, new)
        return new.in_force is not before

    def _held_key(
        self, old: KnownAgent | None, config: AgentConfig | ReceivedAgent
    ) -> tuple[SecretStr | None, bool]:
        """Return the key for a config received without one, and whether it is the right key."""
        if config.api_key_revision is None:
            return None, True
        known = old is not None and old.generation == self.position.generation
        key = old.key_of(config.api_key_revision) if known and old is not None else None
        return key, key is not None

    def _note_unsettled(self, agent_id: str, known: KnownAgent) -> None:
        if known.is_active and (known.awaits_key or known.unjudged or known.refused is not None):
            self._unsettled[agent_id] = known
        else:
            self._unsettled.pop(agent_id, None)

    def _drop(self, agent_id: str) -> bool:
        known = self._agents.pop(agent_id, None)
        self._unsettled.pop(agent_id, None)
        self.ready.pop(agent_id, None)
        if known is None:
            return False
        known.freshness.supersede(self.clock())
        if agent_id == self.default_id:
            self._find_default()
        return known.in_force is not None

    def _note_default(self, agent_id: str, new: KnownAgent) -> None:
        """Track the default flag; a promotion precedes its demotion, so the newest flag wins."""
        if not new.is_default:
            return
        current = self._agents.get(self.default_id) if self.default_id is not None else None
        if (
            current is None
            or not current.is_default
            or (new.generation, new.revision) >= (current.generation, current.revision)
        ):
            self.default_id = agent_id

    def _find_default(self) -> None:
        flagged = [
            (known.generation, known.revision, agent_id)
            for agent_id, known in self._agents.items()
            if known.is_default
        ]
        if flagged:
            self.default_id = max(flagged)[2]
        elif self.default_id not in self._agents:
            self.default_id = None
