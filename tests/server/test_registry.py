"""The registry: every rule of a write, on both engines."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import SecretStr

from slm.errors import (
    AgentExists,
    AgentInactive,
    AgentIsDefault,
    AgentNotFound,
    InvalidRequest,
    KeyUndecryptable,
    PreconditionFailed,
    ProblemError,
)
from slm.schemas import Agent
from slm.server.agents.changes import Written
from slm.server.agents.schemas import AgentUpdate
from slm.server.db.tables import utc_now
from slm.server.security.audit import Who
from tests.support.store import Store, new_agent

CANARY = "sk-canary-7"


async def change(store: Store, agent_id: str = "billing", **fields: Any) -> Written:
    return await store.registry.update(
        agent_id, AgentUpdate.model_validate(fields), who=Who("tester"), comment="why"
    )


async def key_of(store: Store, agent_id: str = "billing") -> str | None:
    config, _, _ = await store.reads.llm(agent_id)
    return None if config.llm_api_key is None else config.llm_api_key.get_secret_value()


# --- create ---


async def test_a_created_agent_is_one_row_and_one_change(store: Store) -> None:
    """A create answers the agent, its revision and the epoch, and the change holds the same."""
    before = utc_now()
    written = await store.registry.create(
        new_agent(
            description="Ünïcode",
            llm_options={"stop": ["\n"], "top_p": 1.0, "b": 1, "a": 2},
            llm_api_key=CANARY,
        ),
        who=Who("tester"),
        comment="first",
    )
    agent = written.agent
    assert agent is not None
    assert (written.revision, written.changed, written.api_key_cleared) == (2, True, False)
    assert (agent.revision, agent.api_key_revision, agent.has_api_key) == (2, 2, True)
    assert (agent.llm_timeout, agent.llm_temperature, agent.is_active) == (30, None, True)
    assert list(agent.llm_options.items()) == [
        ("stop", ["\n"]),
        ("top_p", 1.0),
        ("b", 1),
        ("a", 2),
    ]
    assert before <= agent.created_at == agent.updated_at <= utc_now()
    assert await store.agent("billing") == agent
    row = (await store.changes())[-1]
    assert (row.revision, row.type, row.agent_id) == (2, "agent_created", "billing")
    assert (row.was_default, row.actor, row.comment) == (False, "tester", "first")
    assert Agent.model_validate_json(row.agent) == agent
    assert written.epoch == (await store.sql("SELECT epoch FROM state"))[0][0]


async def test_no_key_is_in_any_table(store: Store) -> None:
    """The key is in its own ciphertext and nowhere else in the database."""
    await store.registry.create(new_agent(llm_api_key=CANARY), who=Who("tester"))
    for table in ("agents", "changes", "state", "tokens", "encryption_keys"):
        assert CANARY not in repr(await store.sql(f"SELECT * FROM {table}"))
    token = (await store.sql("SELECT llm_api_key_encrypted FROM agents WHERE id = 2"))[0][0]
    assert token not in repr(await store.changes())


async def test_an_agent_id_is_taken_once(store: Store) -> None:
    """The second create of an agent_id is refused, and leaves no gap in the revisions."""
    await store.registry.create(new_agent(), who=Who("tester"))
    with pytest.raises(AgentExists):
        await store.registry.create(new_agent(), who=Who("tester"))
    assert await store.head() == 2
    await store.check_laws()


async def test_an_agent_can_be_created_as_the_default(store: Store) -> None:
    """The new default comes first, the old one's demotion second."""
    written = await store.registry.create(new_agent(is_default=True), who=Who("tester"))
    assert written.agent is not None
    assert (written.agent.revision, written.revision) == (2, 3)
    created, demoted = (await store.changes())[-2:]
    assert (created.type, created.agent_id, created.was_default) == (
        "agent_created",
        "billing",
        False,
    )
    assert (demoted.type, demoted.agent_id, demoted.was_default) == (
        "agent_config_changed",
        "default",
        True,
    )
    await store.check_laws()


async def test_the_default_cannot_be_created_inactive(store: Store) -> None:
    """An inactive agent answers nobody, so it cannot be what everybody falls back to."""
    with pytest.raises(AgentIsDefault):
        await store.registry.create(new_agent(is_default=True, is_active=False), who=Who("tester"))
    await store.check_laws()
    assert await store.head() == 1


# --- update ---


async def test_fields_not_sent_stay(store: Store) -> None:
    """A change touches what was sent, and the revision and time of the row."""
    created = (await store.registry.create(new_agent(description="d"), who=Who("t"))).agent
    assert created is not None
    written = await change(store, llm_model="gpt-6.1-terra", llm_max_tokens=7)
    assert written.agent is not None
    assert written.agent == created.model_copy(
        update={
            "llm_model": "gpt-6.1-terra",
            "llm_max_tokens": 7,
            "revision": 3,
            "updated_at": written.agent.updated_at,
        }
    )
    assert written.agent.updated_at > created.updated_at
    assert await store.agent("billing") == written.agent
    await store.check_laws()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "Another"),
        ("description", "Another"),
        ("llm_provider", "anthropic"),
        ("llm_endpoint", "https://llm.example.com/v1"),
        ("llm_model", "another"),
        ("llm_timeout", 3600),
        ("llm_temperature", 0.0),
        ("llm_max_tokens", 2**31 - 1),
        ("llm_options", {"seed": 2**60, "nested": {"": [None, True, 1.5, "é"]}}),
        ("is_active", False),
    ],
)
async def test_every_field_can_be_changed(store: Store, field: str, value: Any) -> None:
    """Each field is stored as it was sent, and sending it again alters nothing."""
    await store.registry.create(new_agent(), who=Who("tester"))
    written = await change(store, **{field: value})
    assert written.changed
    assert getattr(written.agent, field) == value
    assert getattr(await store.agent("billing"), field) == value
    assert not (await change(store, **{field: value})).changed
    await store.check_laws()


async def test_null_clears_what_can_be_empty(store: Store) -> None:
    """A null in a nullable field clears it."""
    await store.registry.create(
        new_agent(
            description="d", llm_endpoint="https://h/v1", llm_max_tokens=5, llm_api_key=CANARY
        ),
        who=Who("tester"),
    )
    cleared = (
        await change(
            store, description=None, llm_endpoint=None, llm_max_tokens=None, llm_api_key=None
        )
    ).agent
    assert cleared is not None
    assert (cleared.description, cleared.llm_endpoint, cleared.llm_max_tokens) == (None, None, None)
    assert (cleared.has_api_key, cleared.api_key_revision) == (False, None)


async def test_a_write_that_alters_nothing_leaves_no_trace(store: Store) -> None:
    """Nothing sent, or only what is there already: no revision, no change, the same time."""
    await store.registry.create(new_agent(llm_api_key=CANARY, llm_options={"a": 1}), who=Who("t"))
    before = await store.agent("billing")
    for fields in (
        {},
        {"llm_model": "gpt-6.1-sol", "is_default": False},
        {"llm_options": {"a": 1}},
        {"llm_api_key": CANARY},
        {"description": None},
    ):
        written = await change(store, **fields)
        assert (written.changed, written.revision) == (False, 2)
        assert written.agent == before
    assert await store.head() == 2
    await store.check_laws()


async def test_options_that_only_look_equal_are_a_change(store: Store) -> None:
    """1, 1.0 and true are three values, and the order of options is passed on as it is."""
    await store.registry.create(new_agent(llm_options={"a": 1, "b": 2}), who=Who("tester"))
    variants: list[dict[str, Any]] = [{"a": 1.0, "b": 2}, {"a": True, "b": 2}, {"b": 2, "a": True}]
    for options in variants:
        written = await change(store, llm_options=options)
        assert written.changed
        assert repr((await store.agent("billing")).llm_options) == repr(options)


async def test_if_match_names_the_revision_that_must_still_be(store: Store) -> None:
    """A stale If-Match is refused, the right one is not."""
    await store.registry.create(new_agent(), who=Who("tester"))
    for stale in (1, 3):
        with pytest.raises(PreconditionFailed, match="revision 2"):
            await store.registry.update(
                "billing", AgentUpdate(llm_timeout=5), who=Who("tester"), if_match=stale
            )
        with pytest.raises(PreconditionFailed):
            await store.registry.delete("billing", who=Who("tester"), if_match=stale)
    written = await store.registry.update(
        "billing", AgentUpdate(llm_timeout=5), who=Who("tester"), if_match=2
    )
    assert written.revision == 3
    assert (await store.registry.delete("billing", who=Who("tester"), if_match=3)).revision == 4
    await store.check_laws()


async def test_the_body_may_name_only_the_agent_of_the_path(store: Store) -> None:
    """An agent has one name for its whole life."""
    await store.registry.create(new_agent(), who=Who("tester"))
    with pytest.raises(InvalidRequest) as caught:
        await store.registry.update(
            "billing", AgentUpdate(agent_id="canary", llm_timeout=5), who=Who("tester")
        )
    assert caught.value.errors == [
        {"loc": ["body", "agent_id"], "msg": "is not the path's", "type": "mismatch"}
    ]
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    "agent_id",
    ["nobody", "", "Billing", "a' OR '1'='1", "\x00", "billing\x00", "\ud800", "é" * 500],
)
async def test_what_is_not_there_is_not_found(store: Store, agent_id: str) -> None:
    """An unknown agent_id, of whatever form, is 404 for every verb and costs no revision."""
    await store.registry.create(new_agent(), who=Who("tester"))
    with pytest.raises(AgentNotFound):
        await store.registry.update(agent_id, AgentUpdate(llm_timeout=5), who=Who("tester"))
    with pytest.raises(AgentNotFound):
        await store.registry.delete(agent_id, who=Who("tester"))
    with pytest.raises(AgentNotFound):
        await store.reads.llm(agent_id)
    assert await store.head() == 2


# --- the default ---


async def test_a_promotion_is_two_changes_promotion_first(store: Store) -> None:
    """Whoever reads the changes in order is never without a default."""
    await store.registry.create(new_agent(), who=Who("tester"))
    written = await change(store, is_default=True, llm_timeout=5)
    assert written.agent is not None
    assert (written.agent.revision, written.agent.is_default, written.revision) == (3, True, 4)
    promoted, demoted = (await store.changes())[-2:]
    assert (promoted.agent_id, promoted.was_default) == ("billing", False)
    assert (demoted.agent_id, demoted.was_default) == ("default", True)
    assert (demoted.actor, demoted.comment) == ("tester", "why")
    assert (await store.agent("default")).revision == 4
    await store.check_laws()
    back = await change(store, "default", is_default=True)
    assert back.revision == 6
    await store.check_laws()


@pytest.mark.parametrize("fields", [{"is_default": False}, {"is_active": False}])
async def test_the_default_stays_the_default_and_active(
    store: Store, fields: dict[str, Any]
) -> None:
    """The default is neither deactivated nor simply un-defaulted, nor deleted."""
    with pytest.raises(AgentIsDefault):
        await change(store, "default", **fields)
    with pytest.raises(AgentIsDefault):
        await store.registry.delete("default", who=Who("tester"))
    assert await store.head() == 1


async def test_an_inactive_agent_becomes_the_default_only_when_activated(store: Store) -> None:
    """Activating and promoting can be one request; promoting alone is refused."""
    await store.registry.create(new_agent(is_active=False), who=Who("tester"))
    with pytest.raises(AgentIsDefault):
        await change(store, is_default=True)
    await store.registry.create(new_agent("other"), who=Who("tester"))
    with pytest.raises(AgentIsDefault):
        await change(store, "other", is_default=True, is_active=False)
    await store.check_laws()
    written = await change(store, is_default=True, is_active=True)
    assert written.agent is not None
    assert written.agent.is_default
    await store.check_laws()


# --- delete ---


async def test_a_delete_is_a_change_with_the_agent_as_it_was(store: Store) -> None:
    """History still knows what was deleted."""
    created = await store.registry.create(new_agent(llm_api_key=CANARY), who=Who("tester"))
    written = await store.registry.delete("billing", who=Who("tester"), comment="gone")
    assert (written.agent, written.revision, written.changed) == (None, 3, True)
    row = (await store.changes())[-1]
    assert (row.type, row.comment) == ("agent_deleted", "gone")
    assert Agent.model_validate_json(row.agent) == created.agent
    assert "billing" not in await store.agents()
    await store.check_laws()


async def test_an_id_is_never_used_again(store: Store) -> None:
    """A deleted agent's number goes to nobody, and its name to a new agent."""
    first = (await store.registry.create(new_agent(), who=Who("tester"))).agent
    await store.registry.delete("billing", who=Who("tester"))
    second = (await store.registry.create(new_agent(), who=Who("tester"))).agent
    assert first is not None
    assert second is not None
    assert second.id > first.id
    await store.check_laws()


# --- keys ---


async def test_a_new_key_is_a_change_with_its_own_revision(store: Store) -> None:
    """api_key_revision tells a client that holds the old key to fetch the new one."""
    await store.registry.create(new_agent(llm_api_key=CANARY), who=Who("tester"))
    await change(store, llm_timeout=5)
    assert (await store.agent("billing")).api_key_revision == 2
    written = await change(store, llm_api_key="sk-second")
    assert written.agent is not None
    assert (written.agent.api_key_revision, written.agent.revision) == (4, 4)
    assert await key_of(store) == "sk-second"


@pytest.mark.parametrize(
    "fields",
    [
        {"llm_provider": "anthropic"},
        {"llm_endpoint": "https://evil.example.com/v1"},
        {"llm_endpoint": "http://api.openai.com/v1"},
        {"llm_endpoint": "https://api.openai.com:8443/v1"},
        {"llm_provider": "anthropic", "llm_endpoint": "https://api.openai.com/v1"},
    ],
)
async def test_a_key_does_not_move_to_another_place(store: Store, fields: dict[str, Any]) -> None:
    """Changing provider or origin without sending the key again drops it, and says so."""
    await store.registry.create(new_agent(llm_api_key=CANARY), who=Who("tester"))
    written = await change(store, **fields)
    assert written.agent is not None
    assert written.api_key_cleared
    assert (written.agent.has_api_key, written.agent.api_key_revision) == (False, None)
    assert await key_of(store) is None
    assert (await store.sql("SELECT llm_api_key_encrypted FROM agents WHERE id = 2"))[0][0] is None
    # Back at the old place the key is not back: it is gone.
    await change(store, llm_provider="openai", llm_endpoint=None)
    assert await key_of(store) is None


@pytest.mark.parametrize("endpoint", ["https://api.openai.com/v2", "https://API.openai.com:443/v1"])
async def test_a_key_stays_where_the_origin_does(store: Store, endpoint: str) -> None:
    """Another path, or another spelling of the same origin, keeps the key."""
    await store.registry.create(new_agent(llm_api_key=CANARY), who=Who("tester"))
    written = await change(store, llm_endpoint=endpoint)
    assert written.agent is not None
    assert not written.api_key_cleared
    assert written.agent.api_key_revision == 2
    assert await key_of(store) == CANARY


async def test_a_key_sent_with_its_new_place_is_kept(store: Store) -> None:
    """Key and endpoint sent together are stored together, even the same key."""
    await store.registry.create(new_agent(llm_api_key=CANARY), who=Who("tester"))
    written = await change(store, llm_endpoint="https://llm.example.com/v1", llm_api_key=CANARY)
    assert written.agent is not None
    assert not written.api_key_cleared
    assert written.agent.api_key_revision == 3
    assert await key_of(store) == CANARY


async def test_a_ciphertext_moved_to_another_row_gives_no_key(store: Store) -> None:
    """Whoever can write to the database cannot have a key sent elsewhere."""
    await store.registry.create(new_agent("a", llm_api_key="sk-of-a"), who=Who("tester"))
    await store.registry.create(
        new_agent("b", llm_endpoint="https://evil.example.com", llm_api_key="sk-of-b"),
        who=Who("tester"),
    )
    await store.sql(
        "UPDATE agents SET llm_api_key_encrypted ="
        " (SELECT llm_api_key_encrypted FROM agents WHERE agent_id = 'a') WHERE agent_id = 'b'"
    )
    await store.sql("UPDATE agents SET llm_endpoint = 'https://evil.example.com' WHERE id = 2")
    for agent_id in ("a", "b"):
        with pytest.raises(KeyUndecryptable):
            await store.reads.llm(agent_id)
    snapshot = {config.agent_id: config for config in (await store.reads.snapshot()).agents}
    for agent_id in ("a", "b"):
        assert snapshot[agent_id].llm_api_key is None
        assert snapshot[agent_id].key_error == "undecryptable"
        assert snapshot[agent_id].has_api_key
    assert snapshot["default"].key_error is None
    # Setting the key again mends it.
    await change(store, "b", llm_api_key="sk-new")
    assert await key_of(store, "b") == "sk-new"


# --- keyed reads ---


async def test_llm_answers_key_revision_and_epoch(store: Store) -> None:
    """The keyed read of one agent is of one transaction and says which."""
    written = await store.registry.create(new_agent(llm_api_key=CANARY), who=Who("tester"))
    await store.registry.create(new_agent("other"), who=Who("tester"))
    config, revision, epoch = await store.reads.llm("billing")
    assert config.llm_api_key == SecretStr(CANARY)
    assert (config.revision, config.api_key_revision) == (2, 2)
    assert (revision, epoch) == (3, written.epoch)
    assert CANARY not in repr(config)


async def test_an_inactive_agent_gives_no_key(store: Store) -> None:
    """An inactive agent is 404 on /llm, under a code of its own."""
    await store.registry.create(new_agent(is_active=False, llm_api_key=CANARY), who=Who("tester"))
    with pytest.raises(AgentInactive):
        await store.reads.llm("billing")


async def test_default_is_no_alias_for_a_key(store: Store) -> None:
    """`default` is the agent of that name, also when another agent is the default."""
    await store.registry.create(new_agent(is_default=True, llm_api_key=CANARY), who=Who("tester"))
    config, _, _ = await store.reads.llm("default")
    assert config.agent_id == "default"
    assert config.llm_api_key is None


async def test_the_snapshot_is_everything_at_one_revision(store: Store) -> None:
    """All agents with their keys, inactive ones too, at the head."""
    await store.registry.create(new_agent("a", llm_api_key="sk-a"), who=Who("tester"))
    await store.registry.create(
        new_agent("b", is_active=False, llm_api_key="sk-b"), who=Who("tester")
    )
    snapshot = await store.reads.snapshot()
    assert snapshot.revision == 3
    assert {
        config.agent_id: config.llm_api_key and config.llm_api_key.get_secret_value()
        for config in snapshot.agents
    } == {"default": None, "a": "sk-a", "b": "sk-b"}
    assert "sk-" not in repr(snapshot)


# --- many at once ---


async def test_writers_at_once_take_turns(store: Store) -> None:
    """Twenty writers at once: each gets a revision of its own, and none is lost."""
    await store.registry.create(new_agent(), who=Who("tester"))
    writes = await asyncio.gather(*(change(store, llm_timeout=100 + n) for n in range(20)))
    assert sorted(written.revision for written in writes) == list(range(3, 23))
    await store.check_laws()


async def test_of_two_writers_with_one_if_match_one_wins(store: Store) -> None:
    """Compare-and-set: exactly one of the two is refused."""
    await store.registry.create(new_agent(), who=Who("tester"))
    results = await asyncio.gather(
        *(
            store.registry.update(
                "billing", AgentUpdate(llm_timeout=n), who=Who("tester"), if_match=2
            )
            for n in (5, 6)
        ),
        return_exceptions=True,
    )
    assert sorted(type(result).__name__ for result in results) == ["PreconditionFailed", "Written"]
    assert await store.head() == 3


async def test_promotions_at_once_leave_one_default(store: Store) -> None:
    """Ten agents made the default at once: one is in the end, and no two ever were."""
    for n in range(10):
        await store.registry.create(new_agent(f"a{n}"), who=Who("tester"))
    results = await asyncio.gather(
        *(change(store, f"a{n}", is_default=True) for n in range(10)), return_exceptions=True
    )
    assert not [result for result in results if not isinstance(result, Written | ProblemError)]
    await store.check_laws()


async def test_a_snapshot_under_writes_is_never_torn(store: Store) -> None:
    """Two agents changed in turn never differ by more than the one write under way."""
    await store.registry.create(new_agent("a", llm_timeout=100), who=Who("tester"))
    await store.registry.create(new_agent("b", llm_timeout=100), who=Who("tester"))
    start = await store.head()

    async def write() -> None:
        for n in range(1, 41):
            await change(store, "ab"[n % 2], llm_timeout=100 + n)

    writing = asyncio.create_task(write())
    while not writing.done():
        snapshot = await store.reads.snapshot()
        by_id = {config.agent_id: config for config in snapshot.agents}
        newest = max(by_id["a"].llm_timeout, by_id["b"].llm_timeout) - 100
        assert snapshot.revision == start + newest
        assert all(config.revision <= snapshot.revision for config in snapshot.agents)
    await writing
