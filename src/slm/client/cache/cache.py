"""AgentConfigCache: what the SLM said about each agent, and for how long it may be believed.

Passive: each source has its own verb (`apply_snapshot`, `apply_change`, …), and it fetches nothing.
Knows no socket, no file and no clock but the monotonic one that it is given.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from pydantic import SecretStr

from slm.client.cache.entry import Freshness, KnownAgent, same, value_of
from slm.client.cache.snapshot import ReceivedAgent, ReceivedSnapshot
from slm.client.config import ResolvedConfig
from slm.client.runtime import clock
from slm.client.timings import check_seconds
from slm.protocol import AgentChanged, AgentDeleted
from slm.schemas import AgentConfig, LLMConfig, LLMConfigWithKey, Snapshot

NEVER: Final = -math.inf
"""Until when a cache is live that is not."""

MAX_DELETES: Final = 10_000
"""So many deleted agents are remembered one by one; agents that live for a minute add up."""


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
        epoch: the life of the database that the revisions belong to.
        epoch_since: when that was first heard of, by `clock`.
        revision: everything up to it is in here; 0 before the first snapshot.
        synced: whether everything up to `revision` is in here, keys apart.
        live_until: until when every change since then counts as heard of, by `clock`; each message
            from the SLM moves it on. A read while it is in the past is not live, whatever became of
            the stream.
        default_id: the agent_id of the default agent.
        refused: asked for each config before it comes into force; why it must not, or None.
        ask_first: asked for each config before it comes into force, and returns whether somebody
            else is to judge it, who takes a while: `judged` says what came of it.
        generation: goes up whenever the revisions known so far lose their meaning.
    """

    def __init__(
        self,
        ttl_seconds: float = 300,
        *,
        max_stale_seconds: float | None = None,
        clock: Callable[[], float] = clock.now,
    ) -> None:
        self.ttl_seconds = check_seconds("ttl_seconds", ttl_seconds)
        if max_stale_seconds is not None:
            check_seconds("max_stale_seconds", max_stale_seconds)
        self.max_stale_seconds = max_stale_seconds
        self.clock = clock
        self.ready: dict[str, ResolvedConfig] = {}
        self.epoch: str | None = None
        self.epoch_since = NEVER
        self.revision = 0
        self.synced = False
        self.live_until = NEVER
        self.default_id: str | None = None
        self.generation = 0
        self.refused: Callable[[ResolvedConfig], str | None] = lambda config: None
        self.ask_first: Callable[[str, KnownAgent], bool] = lambda agent_id, known: False
        self._agents: dict[str, KnownAgent] = {}
        # Kept beside: an ack asks for them after each change, and there may be 100,000 agents.
        self._unsettled: dict[str, KnownAgent] = {}
        self._tombstones: dict[str, int] = {}
        self._streamed = 0
        self._heard: tuple[int, str | None] = (0, None)
        self._base = 0
        self._all_confirmed_at: float | None = None
        self._by_hand: dict[str, tuple[dict[str, Any], float]] = {}

    # --- a plain cache, used alone ---

    def get(self, agent_id: str) -> dict[str, Any] | None:
        """Return the agent's config as a fresh dict, or None where there is none or it expired."""
        known = self._agents.get(agent_id)
        if known is not None:
            config = known.in_force
            fresh = config is not None and config.age <= self.ttl_seconds
            return config.as_dict() if config is not None and fresh else None
        held = self._by_hand.get(agent_id)
        if held is None or self.clock() - held[1] > self.ttl_seconds:
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

    @property
    def live(self) -> bool:
        """Whether every change up to now would have been heard of."""
        return self.clock() < self.live_until

    def find(self, agent_id: str) -> KnownAgent | None:
        """Return what is known of the agent, whatever its state."""
        return self._agents.get(agent_id)

    @property
    def position(self) -> int:
        """The revision that the SLM's answers may not be older than."""
        return self._streamed

    @property
    def heard(self) -> tuple[int, str | None]:
        """Where the stream stands, and which change it heard there: what can be resumed.

        A snapshot may be newer. It is not resumed from, since nothing says that it is of the same
        line of changes as what was heard: after a failover a database may have another.
        """
        return self._heard

    def known_revision(self, agent_id: str) -> int:
        """Return up to which revision this agent is known, its absence too; -1 for not at all."""
        known = self._agents.get(agent_id)
        if known is not None and known.generation == self.generation:
            return known.revision
        # Whoever is not here at a snapshot's revision was gone by then.
        gone = self._base if self.synced else -1
        return max(self._tombstones.get(agent_id, -1), gone)

    @property
    def names(self) -> Iterable[str]:
        """The agents that are known."""
        return self._agents.keys()

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

    def expired(self, config: ResolvedConfig) -> bool:
        """Say whether even as stale the value may no longer be served (`max_stale_seconds`)."""
        limit = self.max_stale_seconds
        return limit is not None and config.age > self.ttl_seconds + limit

    def freshness(self, confirmed_at: float, *, from_file: bool) -> tuple[float, bool]:
        """Return age and staleness of a value that nothing has superseded."""
        if self.live:
            return 0.0, False
        never = self._all_confirmed_at is None and self.live_until == NEVER
        # It was confirmed for as long as it was live, whether or not that was noticed to end.
        age = self.clock() - max(
            confirmed_at, self._all_confirmed_at or confirmed_at, self.live_until
        )
        return age, age > self.ttl_seconds or (from_file and never)

    def everything(self) -> list[tuple[ResolvedConfig, bool, bool]]:
        """Return each whole config with its is_default and is_active, for the snapshot file."""
        return [
            (newest, known.is_default, known.is_active)
            for known in self._agents.values()
            # What is refused too: whoever resumes from there is not told of it again.
            if (newest := known.newest) is not None
            and (known.pending is None or known.unjudged)
            and known.key_error is None
        ]

    # --- what the SLM says ---

    def set_live(self, live: bool, until: float = math.inf) -> None:
        """Note that every change is heard of, which counts `until` then, or no longer is."""
        if live:
            self.live_until = until
        elif self.live_until != NEVER:
            self._all_confirmed_at = min(self.clock(), self.live_until)
            self.live_until = NEVER

    def confirm(self) -> None:
        """Note that everything known is the newest at this moment."""
        self._all_confirmed_at = self.clock()

    def begin(self, epoch: str, revision: int, change_id: str | None = None) -> None:
        """Start over at `revision` of `epoch`: what is held goes on being served until replaced.

        After a plain subscription, a `resync` or word of another epoch. A snapshot must follow;
        until then the changes after `revision` apply to what is held.
        """
        self.set_live(False)
        self.generation += 1
        if epoch != self.epoch:
            self.epoch_since = self.clock()
        self.epoch = epoch
        self.synced = False
        self._tombstones.clear()
        self._streamed = self._base = revision
        self._heard = revision, change_id

    def advance(self, revision: int, change_id: str | None = None) -> None:
        """Note that the stream has passed everything up to `revision`, which is that change."""
        if revision > self._heard[0] or (revision == self._heard[0] and change_id is not None):
            self._heard = revision, change_id
        self._streamed = max(self._streamed, revision)
        if self.synced:
            self.revision = self._streamed

    def contradicts(self, snapshot: Snapshot | ReceivedSnapshot) -> bool:
        """Say whether a snapshot is of another line of changes than what the stream told."""
        revision, change_id = self._heard
        another = None not in (change_id, snapshot.change_id) and change_id != snapshot.change_id
        return snapshot.epoch != self.epoch or (snapshot.revision == revision and another)

    def apply_snapshot(self, snapshot: Snapshot | ReceivedSnapshot) -> list[str]:
        """Take over a snapshot, where it is newer; return the agents whose config was swapped.

        Its list of agents is empty afterwards: each row makes room for what is kept of it, so that
        the heap does not have to hold all of both.
        """
        if self.contradicts(snapshot):
            self.begin(snapshot.epoch, snapshot.revision, snapshot.change_id)
        if snapshot.revision < self._base:
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
        self._tombstones = {i: r for i, r in self._tombstones.items() if r > snapshot.revision}
        self._base = snapshot.revision
        self._all_confirmed_at = self.clock()
        self._find_default()
        self.synced = True
        self._streamed = self.revision = max(self._streamed, snapshot.revision)
        return swapped

    def apply_change(self, message: AgentChanged | AgentDeleted) -> bool:
        """Apply a change if it is newer than what is known; return whether a config was swapped."""
        agent_id, revision = message.agent_id, message.revision
        if revision <= self.known_revision(agent_id):
            return False
        if isinstance(message, AgentChanged):
            return self._put(agent_id, revision, message.config)
        self._tombstones[agent_id] = revision
        self._forget_deletes()
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
        known = self.known_revision(agent.agent_id)
        deleted = agent.agent_id not in self._agents and agent.revision == known
        if agent.revision < known or deleted:
            return False
        error = agent.key_error
        if agent.llm_api_key is None and agent.api_key_revision is not None and error is None:
            error = "the SLM did not send it"
        key = agent.llm_api_key
        old = self._agents.get(agent.agent_id)
        if old is not None and old.holds(agent.revision, self.generation, key) and error is None:
            # Nothing new, as for most agents of a snapshot that was fetched for a few keys.
            old.freshness.confirmed_at, old.freshness.superseded_at = self.clock(), None
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
        if self.live and agent_id == self.default_id:
            return False  # the stream is about to say who the default is now, and then this
        self._tombstones[agent_id] = self.known_revision(agent_id)
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
        self._supersede(known)
        known.config = None
        self.ready.pop(agent_id, None)
        return served

    def load(
        self,
        agents: Iterable[LLMConfigWithKey | ReceivedAgent],
        *,
        epoch: str,
        revision: int,
        complete: bool,
        age_seconds: float,
        epoch_age_seconds: float = 0.0,
        change_id: str | None = None,
    ) -> None:
        """Start from a snapshot file: all of it stale; entries that lack their key are left out.

        Args:
            agents: the file's entries.
            epoch: which the file's revisions belong to.
            revision: up to which the file was complete.
            complete: whether a client may resume from there without a snapshot.
            age_seconds: how long ago the file was written.
            epoch_age_seconds: how long ago the epoch was first heard of.
            change_id: which change `revision` was.
        """
        self.begin(epoch, revision, change_id)
        self.epoch_since = self.clock() - epoch_age_seconds
        confirmed_at = self.clock() - age_seconds
        for agent in agents:
            if agent.llm_api_key is None and agent.api_key_revision is not None:
                complete = False
                continue
            self.apply_fetched(agent, "file")
            freshness = self._agents[agent.agent_id].freshness
            freshness.confirmed_at, freshness.from_file = confirmed_at, True
        self._find_default()
        self.synced = complete
        self.revision = revision if complete else 0

    def distrust(self) -> None:
        """Serve what is held as stale until a snapshot: a fork may have cut a change in half."""
        self.synced = False
        self.set_live(False)

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
        now = self.clock()
        old = self._agents.get(agent_id)
        before = old.in_force if old is not None else None
        if not whole:
            key, whole = self._held_key(old, config)
        freshness = Freshness(self, now, from_file=False)
        new = KnownAgent(
            revision, self.generation, config.is_default, config.is_active, None, freshness
        )
        value = value_of(agent_id, revision, config, key, freshness)
        if whole and key_error is None:
            if before is not None and same(before, value):
                value, new.freshness = before, old.freshness if old is not None else freshness
                new.freshness.confirmed_at = now
                new.freshness.superseded_at = None
            new.config = value
            new.key_from = key_from or (old.key_from if old is not None else "")
            if config.is_active and value is not before and self.ask_first(agent_id, new):
                # As with a key that is not here yet: the last one serves meanwhile, as stale.
                new.pending, new.unjudged, new.pending_since = value, True, now
                new.config, new.pending_freshness = before, freshness
                if before is not None and old is not None:
                    new.freshness = old.freshness
            elif config.is_active:
                self._judge(new, old, before)
        else:
            new.pending, new.key_error = value, key_error
            waiting = old.pending if old is not None else None
            same_key = waiting is not None and waiting.api_key_revision == value.api_key_revision
            new.pending_since = old.pending_since if old is not None and same_key else now
            if old is not None and key_error is None:
                # The previous whole value: better than nothing, and never mixed with the new one.
                new.config, new.freshness = before, old.freshness
        kept = new.pending is not None or new.refused_config is not None
        if old is not None and (new.config is not old.config or kept):
            self._supersede(old)
        self._agents[agent_id] = new
        self._note_unsettled(agent_id, new)
        self._tombstones.pop(agent_id, None)
        if new.is_active and new.config is not None and new.pending is None:
            self.ready[agent_id] = new.config
        else:
            self.ready.pop(agent_id, None)
        self._note_default(agent_id, new)
        return new.in_force is not before

    def _judge(
        self, new: KnownAgent, old: KnownAgent | None, before: ResolvedConfig | None
    ) -> None:
        """Keep the last good config in force where the new one must not be used."""
        value = new.config
        if value is None or (reason := self.refused(value)) is None:
            return
        new.refused = reason
        # With nothing good to keep, a call says best itself what is wrong.
        if old is not None and before is not None and before is not value:
            if old.refused is not None and old.refused_config is None:
                return  # not good either
            new.refused_config = value
            new.config, new.freshness = before, old.freshness

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
        known.pending, known.unjudged = None, False
        reason = self.refused(value) or reason
        if reason is None or before is None:
            known.refused = reason
            if before is not None:
                self._supersede(known)
            known.config, known.freshness = value, known.pending_freshness or known.freshness
            self.ready[agent_id] = value
        else:
            known.refused, known.refused_config = reason, value
            self.ready[agent_id] = before
        self._note_unsettled(agent_id, known)
        return known.in_force is not before

    def to_judge_anew(self, *, all_of_them: bool) -> list[tuple[str, ResolvedConfig]]:
        """Return the configs to ask of again: all, or those that are refused."""
        return [
            (agent_id, newest)
            for agent_id, known in self._agents.items()
            if (newest := known.newest) is not None
            and known.is_active
            and known.pending is None
            and known.key_error is None
            and (all_of_them or known.refused is not None)
        ]

    def judged_anew(self, agent_id: str, config: ResolvedConfig, reason: str | None) -> bool:
        """Take what is said of a config now; return whether it was swapped in.

        One that is in force stays so: it is not worse than it was, and the SLM is told.
        """
        known = self._agents.get(agent_id)
        if known is None or known.newest is not config or known.pending is not None:
            return False
        known.refused = reason
        swapped = reason is None and known.refused_config is not None
        if swapped:
            known.config, known.refused_config = known.refused_config, None
            known.freshness = Freshness(self, self.clock(), from_file=False)
            self.ready[agent_id] = config
        self._note_unsettled(agent_id, known)
        return swapped

    def _held_key(
        self, old: KnownAgent | None, config: AgentConfig | ReceivedAgent
    ) -> tuple[SecretStr | None, bool]:
        """Return the key for a config that came without it, and whether it is the right one."""
        if config.api_key_revision is None:
            return None, True
        if old is not None and old.generation == self.generation:
            for held in (old.config, old.refused_config, old.pending):
                same_key = held is not None and held.api_key_revision == config.api_key_revision
                if held is not None and same_key and held.llm_api_key is not None:
                    return held.llm_api_key, True
        return None, False

    def _forget_deletes(self) -> None:
        """Keep no more deletes than `MAX_DELETES`: whoever is not here was gone by `revision`."""
        if len(self._tombstones) > MAX_DELETES and self.synced:
            self._base = max(self._base, self.revision)
            self._tombstones = {i: r for i, r in self._tombstones.items() if r > self._base}

    def _note_unsettled(self, agent_id: str, known: KnownAgent) -> None:
        if known.is_active and (known.awaits_key or known.unjudged or known.refused is not None):
            self._unsettled[agent_id] = known
        else:
            self._unsettled.pop(agent_id, None)

    def _supersede(self, known: KnownAgent) -> None:
        if known.freshness.superseded_at is None:
            known.freshness.superseded_at = self.clock()

    def _drop(self, agent_id: str) -> bool:
        known = self._agents.pop(agent_id, None)
        self._unsettled.pop(agent_id, None)
        self.ready.pop(agent_id, None)
        if known is None:
            return False
        self._supersede(known)
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
