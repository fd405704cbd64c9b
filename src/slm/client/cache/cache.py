"""AgentConfigCache: what the SLM said about each agent, and for how long it may be believed.

Passive: each source has its own verb (`apply_snapshot`, `apply_change`, …), and it fetches nothing.
Knows no socket, no file and no clock but the monotonic one that it is given.
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
    """Configurations by agent_id, each known for `ttl_seconds` after it was last confirmed.

    Used alone it is a plain cache: `set` and `update` put a value in, `get` answers it until it
    expires. `SLMClient` drives it with what the SLM says, by the rules of docs/protocol.md
    section 5: per agent_id only what is newer than the last known revision applies, deletes
    included, and only `begin` (a resync, another epoch) moves it back. One thread writes; a lookup
    in `ready` is safe from any.

    Args:
        ttl_seconds: how long a value counts as current without word from the SLM.
        max_stale_seconds: how long past that it may still be served as stale; None: for ever.
        clock: monotonic seconds.

    Attributes:
        ready: the configs that need no second look: whole, active and the newest known.
        position: up to which revision everything is in here, of which epoch.
        liveness: whether it is live, and how old what it holds is.
        agents: what is known of each agent, whatever its state; not to be changed.
        default_id: the agent_id of the default agent.
        refused: asked for each config before it comes into force; why it must not, or None.
        ask_first: asked for each config before it comes into force, and returns whether somebody
            else is to judge it, who takes a while: `judged` says what came of it.
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
        # Kept beside: an ack asks for them after each change, and there may be 100,000 agents.
        self._unsettled: dict[str, KnownAgent] = {}
        self._by_hand: dict[str, tuple[dict[str, Any], float]] = {}

    # --- a plain cache, used alone ---

    def get(self, agent_id: str) -> dict[str, Any] | None:
        """Return the agent's config as a fresh dict, or None where there is none or it expired."""
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
        """Hold a config for `ttl_seconds` from now."""
        self._by_hand[agent_id] = (copy.deepcopy(dict(config)), self.clock())

    def update(self, agent_id: str, config: Mapping[str, Any]) -> None:
        """Replace a config as a whole; its TTL starts anew."""
        self.set(agent_id, config)

    def remove(self, agent_id: str) -> None:
        """Forget the agent; one that is not there is no error."""
        self._by_hand.pop(agent_id, None)
        self._drop(agent_id)

    # --- reading what the SLM said ---

    def find(self, agent_id: str) -> KnownAgent | None:
        """Return what is known of the agent, whatever its state."""
        return self._agents.get(agent_id)

    def known_revision(self, agent_id: str) -> int:
        """Return up to which revision this agent is known, its absence too; -1 for not at all."""
        known = self._agents.get(agent_id)
        if known is not None and known.generation == self.position.generation:
            return known.revision
        return self.position.gone_by(agent_id)

    @property
    def size(self) -> int:
        """How many agents are known."""
        return len(self._agents)

    def keys_awaited(self) -> list[str]:
        """Return the agents whose newest config lacks its key."""
        return [agent_id for agent_id, known in self._unsettled.items() if known.awaits_key]

    def unsettled(self) -> Iterator[tuple[str, KnownAgent]]:
        """Yield the active agents whose newest config is not in force, or not yet."""
        yield from self._unsettled.items()

    def key_revision(self, agent_id: str) -> int | None:
        """Return the revision of the agent's present key; None with no key or no agent."""
        known = self._agents.get(agent_id)
        newest = known.newest if known is not None else None
        return newest.api_key_revision if newest is not None else None

    # --- what the SLM says ---

    def begin(self, epoch: str, revision: int, change_id: str | None = None) -> None:
        """Start over at `revision` of `epoch`: what is held goes on being served until replaced.

        After a plain subscription, a `resync` or word of another epoch. A snapshot must follow;
        until then the changes after `revision` apply to what is held.
        """
        self.liveness.set(False)
        self.position.begin(epoch, revision, change_id)

    def apply_snapshot(self, snapshot: Snapshot | ReceivedSnapshot) -> list[str]:
        """Take over a snapshot, where it is newer; return the agents whose config was swapped.

        Its list of agents is empty afterwards: each row makes room for what is kept of it, so that
        the heap does not have to hold all of both.
        """
        if self.position.contradicts(snapshot):
            self.begin(snapshot.epoch, snapshot.revision, snapshot.change_id)
        if snapshot.revision < self.position.base:
            return []  # deletes that it does not know of are no longer remembered here
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
        """Apply a config that came without its key over HTTP; return whether it was swapped in."""
        if agent.revision <= self.known_revision(agent.agent_id):
            return False
        return self._put(agent.agent_id, agent.revision, agent)

    def apply_fetched(
        self, agent: LLMConfigWithKey | ReceivedAgent, key_from: str = "fetch"
    ) -> bool:
        """Apply a config that came with its key, unless older; return whether it was swapped in."""
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
            # Nothing new, as for most agents of a snapshot that was fetched for a few keys.
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
        """Apply "no such agent, or inactive", asked when `asked_at` was the known revision."""
        if self.known_revision(agent_id) > asked_at or agent_id not in self._agents:
            return False
        if self.liveness.live and agent_id == self.default_id:
            return False  # the stream is about to say who the default is now, and then this
        self.position.note_gone(agent_id, self.known_revision(agent_id))
        return self._drop(agent_id)

    def apply_key_error(self, agent_id: str, asked_at: int, reason: str) -> bool:
        """Apply "there is a key, but it cannot be used"; return whether a config went out of force.

        Such an agent raises rather than being served: going on with an older key, or with the
        default agent's config, would look like success (docs/decisions, a missing key raises).
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
        """Serve what is held as stale until a snapshot: a fork may have cut a change in half."""
        self.position.synced = False
        self.liveness.set(False)

    # --- what validators say ---

    def judged(self, agent_id: str, known: KnownAgent, reason: str | None) -> bool:
        """Take what came of `ask_first`; return whether a config was swapped in.

        Args:
            agent_id: the agent.
            known: what `ask_first` was shown; where it is superseded, this says nothing.
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
        """Take what is said of a config now; return whether it was swapped in.

        One that is in force stays so: it is not worse than it was, and the SLM is told.
        """
        known = self._agents.get(agent_id)
        if known is None or known.newest is not config or known.pending is not None:
            return False
        swapped = known.take_later_verdict(reason, Freshness(self.liveness, self.clock()))
        if swapped:
            self.ready[agent_id] = config
        self._note_unsettled(agent_id, known)
        return swapped

    # --- inside ---

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
        """Return the key for a config that came without it, and whether it is the right one."""
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
        """Follow the flag; the promotion comes before the demotion, so the newest flag counts."""
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
