"""Key reads by a crowd share a commit and a snapshot, and each of them is audited."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag

from slm.errors import AgentNotFound, ProblemError
from slm.server.agents.credentials import KeyedReads
from slm.server.agents.read_batches import MAX_AT_ONCE
from slm.server.agents.schemas import AgentUpdate
from slm.server.agents.snapshots import MAX_NAMED, SnapshotHead, SnapshotStore
from slm.server.encryption.sealed import SealedTexts, Sealer
from slm.server.security.agent_scope import EVERYTHING, View
from slm.server.security.audit import AuditLog, Who
from tests.support.store import Store, new_agent

ADA = Who("ada", "127.0.0.1")
CANARY = "sk-canary-of-the-crowd"
_NOWHERE = SnapshotHead(0, "", 0, None)


class Counted:
    """How many transactions a database ran."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = self.reads = 0
        database = store.database
        run, read = database.run, database.read

        async def counted_run(fn: Any, **more: Any) -> Any:
            self.runs += 1
            return await run(fn, **more)

        async def counted_read(fn: Any) -> Any:
            self.reads += 1
            return await read(fn)

        monkeypatch.setattr(database, "run", counted_run)
        monkeypatch.setattr(database, "read", counted_read)


@pytest.fixture
async def reads(store: Store) -> KeyedReads:
    """A store with two agents that have a key, and what reads them."""
    for agent_id in ("a", "b"):
        await store.registry.create(
            new_agent(agent_id, llm_api_key=f"{CANARY}-{agent_id}"), who=Who("tester")
        )
    return store.reads


async def _audit(store: Store, action: str) -> list[dict[str, Any]]:
    entries = await AuditLog(store.database).entries(action=action, limit=1000)
    return [json.loads(each.detail) | {"agent_id": each.agent_id} for each in entries]


async def test_a_crowd_shares_commits(
    store: Store, reads: KeyedReads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three hundred reads at once take a handful of transactions, and each has its row."""
    counted = Counted(store, monkeypatch)
    names = ["a", "b", "none"] * 100
    answers = await asyncio.gather(
        *(reads.llm(name, who=ADA, view=EVERYTHING) for name in names), return_exceptions=True
    )
    for name, answer in zip(names, answers, strict=True):
        if name == "none":
            assert isinstance(answer, AgentNotFound)
            continue
        assert isinstance(answer, tuple)
        config = answer[0]
        assert config.llm_api_key is not None
        assert config.llm_api_key.get_secret_value() == f"{CANARY}-{name}"
    assert counted.runs <= 2 + len(names) // MAX_AT_ONCE
    assert len(await _audit(store, "key.read")) == 200
    assert (await AuditLog(store.database).verify()).whole


async def test_with_no_audit_nobody_of_the_group_gets_a_key(
    store: Store, reads: KeyedReads
) -> None:
    """Where the row cannot be written every read of its transaction fails, and the next works."""
    await store.sql("ALTER TABLE audit RENAME TO elsewhere")
    asked = [reads.llm("a", who=ADA, view=EVERYTHING) for _ in range(20)]
    snapshots = [reads.sealed_snapshot(who=ADA, view=EVERYTHING) for _ in range(5)]
    answers = await asyncio.gather(*asked, *snapshots, return_exceptions=True)
    assert all(isinstance(answer, Exception) for answer in answers)
    assert CANARY not in str(answers)
    await store.sql("ALTER TABLE elsewhere RENAME TO audit")
    assert (await reads.llm("a", who=ADA, view=EVERYTHING))[0].llm_api_key is not None


async def test_one_snapshot_serves_all_who_ask_until_something_changes(
    store: Store, reads: KeyedReads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty at once are one look at the agents; each row of the audit names every agent read."""
    counted = Counted(store, monkeypatch)
    made = await asyncio.gather(
        *(reads.sealed_snapshot(who=ADA, view=EVERYTHING) for _ in range(50))
    )
    assert counted.reads == 1
    assert len({id(each) for each in made}) == 1
    rows = await _audit(store, "key.read_all")
    assert len(rows) == 50
    assert all(row["agents"] == ["a", "b"] and row["keys"] == 2 for row in rows)

    before = counted.reads
    await store.registry.update(
        "a", AgentUpdate.model_validate({"llm_api_key": f"{CANARY}-new"}), who=Who("tester")
    )
    snapshot = await reads.snapshot(who=ADA, view=EVERYTHING)
    keys = {a.agent_id: a.llm_api_key for a in snapshot.agents}
    assert keys["a"] is not None and keys["a"].get_secret_value() == f"{CANARY}-new"  # noqa: PT018
    limited = await reads.snapshot(who=ADA, view=View(("b",)))
    assert [a.agent_id for a in limited.agents if a.llm_api_key] == ["b"]
    assert counted.reads == before + 2
    assert (await _audit(store, "key.read_all"))[0]["agents"] == ["b"]


async def test_after_a_change_only_what_changed_is_opened_anew(
    store: Store, reads: KeyedReads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot after n changes opens n keys, however many agents there are.

    A row that was altered behind the server's back is a new one.
    """
    opened: list[str] = []
    with_key = reads._with_key

    def counted(agent: Any, row: Any) -> Any:
        opened.append(agent.agent_id)
        return with_key(agent, row)

    monkeypatch.setattr(reads, "_with_key", counted)

    async def keys() -> dict[str, str | None]:
        snapshot = await reads.snapshot(who=ADA, view=EVERYTHING)
        return {
            each.agent_id: each.llm_api_key.get_secret_value() if each.llm_api_key else None
            for each in snapshot.agents
        }

    async def change(**fields: Any) -> None:
        await store.registry.update("a", AgentUpdate.model_validate(fields), who=Who("tester"))

    first = await keys()
    assert set(opened) == set(first)
    for number in range(3):
        opened.clear()
        await change(llm_api_key=f"{CANARY}-{number}")
        assert await keys() == first | {"a": f"{CANARY}-{number}"}
        assert opened == ["a"]
    # A key that is bound to another place than the row names is not handed out of what is kept.
    await store.sql("UPDATE agents SET llm_endpoint = 'https://elsewhere.test' WHERE agent_id='b'")
    await change(llm_model="other")
    assert (await keys())["b"] is None
    assert "b" in reads.undecryptable
    # And it is tried again each time.
    opened.clear()
    await change(llm_model="another")
    await keys()
    assert sorted(opened) == ["a", "b"]
    # With other encryption keys nothing that is kept counts.
    store.vault.replace([store.vault.generate_key()])
    await change(llm_model="third")
    assert (await keys())["a"] is None


async def test_who_read_an_agents_key_is_found_in_snapshots_too(
    store: Store, reads: KeyedReads
) -> None:
    """The audit asked for one agent has the snapshots that held its key, and no others."""
    for agent_id in ("agents", "keys"):  # words of the row itself
        await store.registry.create(new_agent(agent_id), who=Who("tester"))
    await reads.llm("a", who=ADA, view=EVERYTHING)
    await reads.sealed_snapshot(who=ADA, view=EVERYTHING)
    await reads.sealed_snapshot(who=ADA, view=View(("b",)))
    log = AuditLog(store.database)

    async def actions(agent_id: str, **more: Any) -> list[str]:
        found = await log.entries(agent_id=agent_id, actor="ada", **more)
        return [each.action for each in found]

    assert await actions("a") == ["key.read_all", "key.read"]
    assert await actions("b") == ["key.read_all", "key.read_all"]
    assert await actions("a", action="key.") == ["key.read_all", "key.read"]
    assert await actions("a", action="key.read") == ["key.read"]
    assert await actions("b", limit=1) == ["key.read_all"]
    for agent_id in ("agents", "keys", "A", 'a", "b'):
        assert await actions(agent_id) == []


async def test_a_snapshot_of_a_thousand_agents_has_several_rows(store: Store) -> None:
    """A row of the audit names a few hundred agents, so a large snapshot has several."""
    count = MAX_NAMED + 1
    for number in range(count):
        await store.registry.create(
            new_agent(f"agent-{number:04}", llm_api_key="sk-x"), who=Who("tester")
        )
    await store.reads.sealed_snapshot(who=ADA, view=EVERYTHING)
    rows = await _audit(store, "key.read_all")
    assert [(len(row["agents"]), row["part"], row["parts"]) for row in rows] == [
        (1, 2, 2),
        (MAX_NAMED, 1, 2),
    ]


async def test_no_plain_key_lies_in_memory_between_two_answers(
    store: Store, reads: KeyedReads
) -> None:
    """What is kept of a snapshot and of opened keys is ciphertext."""
    canary = f"{CANARY}-a"
    sealed = await reads.sealed_snapshot(who=ADA, view=EVERYTHING)
    assert canary.encode() in b"".join(sealed.chunks())
    gc.collect()
    kept = [each for each in gc.get_objects() if isinstance(each, SealedTexts | SnapshotStore)]
    assert kept
    pending: list[Any] = [vars(each) for each in kept]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, tuple | list):
            pending += value
        elif hasattr(value, "_chunks"):
            pending += [vars(value)]
        assert canary not in str(value)


async def test_what_is_kept_is_bounded_in_bytes(store: Store, reads: KeyedReads) -> None:
    """Views beyond the bound push out the one used longest ago; opened keys start anew."""
    snapshots = SnapshotStore(reads._read_for_snapshot, kept_bytes=4000)
    for number in range(50):
        view = View((f"a*{number}", "a"))
        made = await snapshots.make(view, (await snapshots.make(view, _NOWHERE)).head)
        assert snapshots.bytes_held <= 4000 + made.held_bytes
    assert len(snapshots._kept) < 10

    texts = SealedTexts(max_bytes=10_000)
    for number in range(1000):
        texts.put(str(number).encode(), "sk-" + "x" * 50)
        assert texts.bytes_held <= 10_000
    assert texts.get(b"999") == "sk-" + "x" * 50
    texts.put(b"huge", "x" * 20_000)
    assert texts.get(b"huge") is None


def test_what_is_sealed_opens_under_its_own_name_alone() -> None:
    """An entry that was moved to another name, or altered, opens nothing."""
    sealer = Sealer()
    sealed = sealer.seal(b"sk-one", b"one")
    assert sealer.open(sealed, b"one") == b"sk-one"
    for other, name in ((sealed, b"two"), (sealed[:-1] + b"\x00", b"one")):
        with pytest.raises(InvalidTag):
            sealer.open(other, name)


async def test_after_a_rotation_a_pruned_key_opens_nothing_that_was_kept(store: Store) -> None:
    """The vault forgets what it opened when its keys change."""
    await store.registry.create(new_agent("a", llm_api_key=CANARY), who=Who("tester"))
    await store.reads.llm("a")
    store.vault.replace([store.vault.generate_key()])
    with pytest.raises(ProblemError):
        await store.reads.llm("a")
