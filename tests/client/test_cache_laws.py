"""The law: whatever the stream does, in the end the cache is equal to the database.

A model database of our own makes creates, updates, key changes, deletes and default changes, is
restored from backups and compacted; the stream is cut, delayed and doubled, snapshots and key
answers come late. Pure: no socket, the cache alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pydantic import SecretStr

from slm.client.cache.cache import AgentConfigCache
from slm.protocol import AgentChanged, AgentDeleted
from slm.schemas import AgentConfig, LLMConfigWithKey, Snapshot

AGENTS = ["a", "b"]  # few, so that things meet
Change = AgentChanged | AgentDeleted


@dataclass(frozen=True)
class Row:
    """One agent in the model database."""

    revision: int
    endpoint: str
    key: str | None = None
    key_revision: int | None = None
    is_default: bool = False
    is_active: bool = True

    def config(self) -> dict[str, Any]:
        return {
            "llm_provider": "openai",
            "llm_model": "m",
            "llm_endpoint": self.endpoint,
            "is_default": self.is_default,
            "is_active": self.is_active,
            "has_api_key": self.key is not None,
            "api_key_revision": self.key_revision,
        }

    def keyed(self, agent_id: str) -> LLMConfigWithKey:
        key = None if self.key is None else SecretStr(self.key)
        return LLMConfigWithKey(
            agent_id=agent_id, revision=self.revision, llm_api_key=key, **self.config()
        )


class Database:
    """The model: its rows, its changes, and every state that it ever was in."""

    def __init__(self) -> None:
        self.epoch = "e0"
        self.rows: dict[str, Row] = {"default": Row(1, "https://0.example", is_default=True)}
        self.changes: dict[int, Change] = {}
        self.states: dict[int, dict[str, Row]] = {1: dict(self.rows)}
        self.head = 1
        self.floor = 1
        self.pairs: set[tuple[str, str | None]] = {("https://0.example", None)}

    def write(self, agent_id: str, row: Row | None) -> None:
        self.head += 1
        if row is None:
            del self.rows[agent_id]
            self.changes[self.head] = AgentDeleted(agent_id=agent_id, revision=self.head)
        else:
            row = replace(row, revision=self.head)
            self.rows[agent_id] = row
            self.pairs.add((row.endpoint, row.key))
            self.changes[self.head] = AgentChanged(
                type="agent_config_changed",
                agent_id=agent_id,
                revision=self.head,
                config=AgentConfig(**row.config()),
            )
        self.states[self.head] = dict(self.rows)

    def snapshot(self) -> Snapshot:
        agents = [row.keyed(agent_id) for agent_id, row in self.rows.items()]
        return Snapshot(revision=self.head, epoch=self.epoch, agents=agents)

    def restore(self, revision: int) -> None:
        self.epoch = f"e{int(self.epoch[1:]) + 1}"
        self.head = revision
        self.rows = dict(self.states[revision])
        self.changes = {r: c for r, c in self.changes.items() if r <= revision}
        self.states = {r: s for r, s in self.states.items() if r <= revision}
        self.floor = min(self.floor, revision)


class AnyStream(RuleBasedStateMachine):
    """One cache behind one stream of one database, each step whatever Hypothesis thinks of."""

    def __init__(self) -> None:
        super().__init__()
        self.database = Database()
        self.cache = AgentConfigCache()
        self.connected = False
        self.sent_up_to = 0
        self.in_flight: list[Change] = []
        self.delivered: list[Change] = []
        self.snapshots: list[Snapshot] = []
        self.answers: list[tuple[int, str, int, LLMConfigWithKey | None]] = []

    # --- the operator ---

    @rule(agent_id=st.sampled_from(AGENTS), place=st.integers(0, 1), keyed=st.booleans())
    def write(self, agent_id: str, place: int, keyed: bool) -> None:
        """Create, or change endpoint and key together."""
        row = self.database.rows.get(agent_id, Row(0, ""))
        next_revision = self.database.head + 1
        self.database.write(
            agent_id,
            replace(
                row,
                endpoint=f"https://{place}.example",
                key=f"sk-{self.database.epoch}-{next_revision}-for-{place}" if keyed else None,
                key_revision=next_revision if keyed else None,
            ),
        )

    @rule(agent_id=st.sampled_from(AGENTS))
    def touch(self, agent_id: str) -> None:
        """Change something else: the key stays."""
        if agent_id in self.database.rows:
            self.database.write(agent_id, self.database.rows[agent_id])

    @rule(agent_id=st.sampled_from(AGENTS))
    def switch(self, agent_id: str) -> None:
        """Deactivate or activate."""
        row = self.database.rows.get(agent_id)
        if row is not None and not row.is_default:
            self.database.write(agent_id, replace(row, is_active=not row.is_active))

    @rule(agent_id=st.sampled_from(AGENTS))
    def delete(self, agent_id: str) -> None:
        row = self.database.rows.get(agent_id)
        if row is not None and not row.is_default:
            self.database.write(agent_id, None)

    @rule(agent_id=st.sampled_from([*AGENTS, "default"]))
    def make_default(self, agent_id: str) -> None:
        """Two changes: the promotion, then the demotion."""
        rows = self.database.rows
        if agent_id not in rows or rows[agent_id].is_default:
            return
        old = next(name for name, row in rows.items() if row.is_default)
        self.database.write(agent_id, replace(rows[agent_id], is_default=True, is_active=True))
        self.database.write(old, replace(rows[old], is_default=False))

    @rule(back=st.integers(-20, 6))
    def restore(self, back: int) -> None:
        """Now and then restore a backup: the server is stopped for it, so the stream is cut."""
        if back >= 0:
            self.cut()
            self.database.restore(max(1, self.database.head - back))

    @rule(now=st.integers(0, 4))
    def compact(self, now: int) -> None:
        if now == 0:
            self.database.floor = self.database.head

    # --- the network ---

    @rule()
    def cut(self) -> None:
        """The connection ends, and what was under way with it."""
        self.connected = False
        self.in_flight.clear()
        self.cache.liveness.set(False)

    @precondition(lambda self: not self.connected)
    @rule()
    def subscribe(self) -> None:
        """Resume where the cache is, or begin with a snapshot, as the contract has it."""
        database, cache = self.database, self.cache
        self.connected = True
        self.delivered.clear()
        if (
            cache.position.synced
            and cache.position.epoch == database.epoch
            and (database.floor <= cache.position.revision <= database.head)
        ):
            self.sent_up_to = cache.position.revision
            cache.liveness.set(True)
        else:
            cache.begin(database.epoch, database.head)
            self.sent_up_to = database.head

    @precondition(lambda self: self.connected)
    @rule()
    def send(self) -> None:
        """The server pushes everything up to its head."""
        for revision in range(self.sent_up_to + 1, self.database.head + 1):
            self.in_flight.append(self.database.changes[revision])
        self.sent_up_to = self.database.head

    @precondition(lambda self: self.connected and self.in_flight)
    @rule(doubled=st.booleans())
    def deliver(self, doubled: bool) -> None:
        message = self.in_flight.pop(0)
        for _ in range(2 if doubled else 1):
            self.cache.position.advance(message.revision)
            self.cache.apply_change(message)
        self.delivered.append(message)

    @precondition(lambda self: self.connected and self.delivered)
    @rule(number=st.integers(0, 99))
    def deliver_an_old_one_again(self, number: int) -> None:
        self.cache.apply_change(self.delivered[number % len(self.delivered)])

    @rule()
    def ask_for_a_snapshot(self) -> None:
        self.snapshots.append(self.database.snapshot())

    @precondition(lambda self: self.snapshots)
    @rule()
    def a_snapshot_arrives(self) -> None:
        """A late one too; but one that was asked for before a resync is given up with it."""
        snapshot = self.snapshots.pop(0)
        wanted = self.connected and snapshot.epoch == self.cache.position.epoch
        if wanted and (
            self.cache.position.synced or snapshot.revision >= self.cache.position.at_least
        ):
            self.cache.apply_snapshot(snapshot)
            self.cache.liveness.set(True)

    @rule(agent_id=st.sampled_from(AGENTS))
    def ask_for_a_key(self, agent_id: str) -> None:
        """The database answers now; the answer arrives when it likes."""
        cache, database = self.cache, self.database
        known = cache.known_revision(agent_id)
        if cache.position.epoch != database.epoch or database.head < known:
            return
        row = database.rows.get(agent_id)
        answer = row.keyed(agent_id) if row is not None and row.is_active else None
        self.answers.append((cache.position.generation, agent_id, known, answer))

    @precondition(lambda self: self.answers)
    @rule(number=st.integers(0, 99))
    def a_key_arrives(self, number: int) -> None:
        generation, agent_id, known, answer = self.answers.pop(number % len(self.answers))
        if generation != self.cache.position.generation:
            return
        if answer is None:
            self.cache.apply_absent(agent_id, known)
        else:
            self.cache.apply_fetched(answer)

    # --- what must hold ---

    @invariant()
    def no_config_has_the_key_of_another(self) -> None:
        """What is served, stale or not, was in the database just so: endpoint and key together."""
        for agent_id in [*AGENTS, "default"]:
            known = self.cache.find(agent_id)
            config = known.in_force if known is not None else None
            if config is not None:
                key = config.llm_api_key
                pair = (config.llm_endpoint or "", key.get_secret_value() if key else None)
                assert pair in self.database.pairs

    @invariant()
    def there_is_a_default_while_live(self) -> None:
        if self.cache.liveness.live:
            assert self.cache.default_id is not None

    @invariant()
    def who_is_unsettled_is_known_without_a_search(self) -> None:
        """An ack names just those active agents whose newest config is not in force, or not yet."""
        known = {agent_id: self.cache.find(agent_id) for agent_id in [*AGENTS, "default"]}
        assert dict(self.cache.unsettled()) == {
            agent_id: each
            for agent_id, each in known.items()
            if each and each.is_active and (each.awaits_key or each.refused is not None)
        }

    @rule()
    def heal(self) -> None:
        """Let everything arrive: the cache is equal to the database, to the last field."""
        if not self.connected:
            self.subscribe()
        self.send()
        while self.in_flight:
            self.deliver(doubled=False)
        if not self.cache.position.synced:
            self.cache.apply_snapshot(self.database.snapshot())
        self.cache.liveness.set(True)
        for agent_id in self.cache.keys_awaited():
            self.cache.apply_fetched(self.database.rows[agent_id].keyed(agent_id))
        self.check_equality()

    def teardown(self) -> None:
        self.heal()

    def check_equality(self) -> None:
        rows = self.database.rows
        assert self.cache.position.revision == self.database.head
        assert self.cache.keys_awaited() == []
        for agent_id in [*AGENTS, "default"]:
            row, known = rows.get(agent_id), self.cache.find(agent_id)
            if row is None or not row.is_active:
                assert agent_id not in self.cache.ready
                # An inactive agent may have been told as absent; it is served by neither.
                assert known is None or (row is not None and not known.is_active)
                continue
            config = self.cache.ready[agent_id]
            assert known is not None
            assert config.revision == row.revision
            assert config.llm_endpoint == row.endpoint
            assert config.api_key_revision == row.key_revision
            key = config.llm_api_key
            assert (key.get_secret_value() if key else None) == row.key
            assert known.is_default == row.is_default
        assert rows[self.cache.default_id or ""].is_default


AnyStream.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    # Without the explaining phase, whose tracing makes it five times slower on Python 3.11.
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
)
TestAnyStreamLeavesTheCacheEqualToTheDatabase = AnyStream.TestCase


def test_a_thousand_long_walks_end_equal_to_the_database() -> None:
    """The same law on long random walks, which reach what shrinkable ones rarely do."""
    for seed in range(1000):
        random = Random(seed)
        walk = AnyStream()
        for _ in range(80):
            step = random.choices(list(STEPS), list(STEPS.values()))[0]
            agent_id, number, coin = random.choice(AGENTS), random.randrange(5), random.random()
            if step == "write":
                walk.write(agent_id, number % 2, coin < 0.5)
            elif step in ("touch", "switch", "delete", "ask_for_a_key"):
                getattr(walk, step)(agent_id)
            elif step == "make_default":
                walk.make_default("default" if coin < 0.3 else agent_id)
            elif step in ("cut", "heal", "ask_for_a_snapshot"):
                getattr(walk, step)()
            elif step in ("restore", "compact"):
                getattr(walk, step)(number)
            elif step == "a_snapshot_arrives" and walk.snapshots:
                walk.a_snapshot_arrives()
            elif step == "a_key_arrives" and walk.answers:
                walk.a_key_arrives(number)
            elif step == "subscribe" and not walk.connected:
                walk.subscribe()
            elif step == "send" and walk.connected:
                walk.send()
            elif step == "deliver" and walk.connected and walk.in_flight:
                walk.deliver(coin < 0.2)
            elif step == "deliver_an_old_one_again" and walk.connected and walk.delivered:
                walk.deliver_an_old_one_again(number)
            walk.no_config_has_the_key_of_another()
            walk.there_is_a_default_while_live()
        walk.heal()


STEPS = {
    "write": 8,
    "touch": 4,
    "switch": 3,
    "delete": 6,
    "make_default": 3,
    "restore": 1,
    "compact": 1,
    "cut": 1,
    "heal": 2,
    "subscribe": 9,
    "send": 9,
    "deliver": 30,
    "deliver_an_old_one_again": 9,
    "ask_for_a_snapshot": 5,
    "a_snapshot_arrives": 5,
    "ask_for_a_key": 9,
    "a_key_arrives": 9,
}
"""How often each step of a walk is taken."""
