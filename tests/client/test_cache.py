"""AgentConfigCache: the mission's four methods, and the rules of order, keys and staleness."""

from __future__ import annotations

import time
from typing import Any

import pytest
from pydantic import SecretStr

from slm.client.cache.cache import AgentConfigCache
from slm.client.cache.position import MAX_DELETES
from slm.client.cache.restoring import restore
from slm.client.cache.snapshot import ReceivedAgent
from slm.client.cache.snapshot_file import Loaded
from slm.errors import ConfigurationError
from slm.protocol import AgentChanged, AgentDeleted
from slm.schemas import AgentConfig, LLMConfigWithKey, Snapshot


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def row(agent_id: str, revision: int, **fields: Any) -> LLMConfigWithKey:
    values = {"llm_provider": "openai", "llm_model": "m"} | fields
    key = values.pop("key", None)
    if key is not None:
        values |= {"llm_api_key": SecretStr(key), "has_api_key": True}
        values.setdefault("api_key_revision", revision)
    return LLMConfigWithKey(agent_id=agent_id, revision=revision, **values)


def changed(agent_id: str, revision: int, **fields: Any) -> AgentChanged:
    values = {"llm_provider": "openai", "llm_model": "m"} | fields
    return AgentChanged(
        type="agent_config_changed",
        agent_id=agent_id,
        revision=revision,
        config=AgentConfig(**values),
    )


def deleted(agent_id: str, revision: int) -> AgentDeleted:
    return AgentDeleted(agent_id=agent_id, revision=revision)


def synced(*rows: LLMConfigWithKey, revision: int = 10, **options: Any) -> AgentConfigCache:
    cache = AgentConfigCache(**options)
    cache.apply_snapshot(Snapshot(revision=revision, epoch="e1", agents=list(rows)))
    cache.liveness.set(True)
    return cache


def key_of(cache: AgentConfigCache, agent_id: str) -> str | None:
    key = cache.ready[agent_id].llm_api_key
    return key.get_secret_value() if key is not None else None


# --- the mission's four methods ---


def test_a_value_expires_after_the_ttl() -> None:
    """Used alone, an entry older than its TTL is None."""
    clock = Clock()
    cache = AgentConfigCache(ttl_seconds=300, clock=clock)
    config = {"llm_provider": "ollama", "llm_model": "m"}
    cache.set("a", config)
    clock.now += 300
    assert cache.get("a") == config
    clock.now += 0.1
    assert cache.get("a") is None
    assert cache.get("never") is None


def test_update_resets_the_ttl() -> None:
    """A pushed value counts from its own time, and replaces the old one as a whole."""
    clock = Clock()
    cache = AgentConfigCache(clock=clock)
    cache.set("a", {"llm_model": "old", "llm_api_key": "k"})
    clock.now += 299
    cache.update("a", {"llm_model": "new"})
    clock.now += 299
    assert cache.get("a") == {"llm_model": "new"}


def test_remove_forgets() -> None:
    """A removed agent is None, and removing it again is no error."""
    cache = AgentConfigCache()
    cache.set("a", {"llm_model": "m"})
    cache.remove("a")
    cache.remove("a")
    assert cache.get("a") is None


def test_what_the_caller_does_with_a_dict_stays_there() -> None:
    """Neither the dict that was given nor the one that was got is the cache's own."""
    cache = synced(row("slm", 1, llm_options={"seed": 1}))
    given = {"llm_model": "m"}
    cache.set("a", given)
    given["llm_model"] = "other"
    cache.get("a")["llm_model"] = "third"  # type: ignore[index]
    got = cache.get("slm")
    assert got is not None
    got["llm_options"]["seed"] = 2
    assert cache.get("a") == {"llm_model": "m"}
    assert cache.get("slm")["llm_options"] == {"seed": 1}  # type: ignore[index]


def test_a_senseless_ttl_is_refused() -> None:
    """A negative or infinite duration is named, rather than behaving oddly later."""
    with pytest.raises(ConfigurationError, match="ttl_seconds"):
        AgentConfigCache(ttl_seconds=-1)


# --- order ---


@pytest.mark.parametrize(("revision", "applies"), [(4, False), (5, False), (6, True)])
def test_only_what_is_newer_applies(revision: int, applies: bool) -> None:
    """A lower or equal revision changes nothing, a higher one does."""
    cache = synced(row("a", 5), revision=5)
    assert cache.apply_change(changed("a", revision, llm_model="new")) is applies
    assert cache.ready["a"].llm_model == ("new" if applies else "m")


def test_a_delete_is_remembered() -> None:
    """An update that is older than a delete does not bring the agent back; a newer one does."""
    cache = synced(row("a", 5), row("b", 6, is_default=True))
    assert cache.apply_change(deleted("a", 12))
    assert not cache.apply_change(changed("a", 11))
    assert not cache.apply_change(deleted("a", 12))
    assert "a" not in cache.ready
    assert cache.apply_change(changed("a", 13))
    assert "a" in cache.ready


def test_a_snapshot_does_not_undo_what_is_newer() -> None:
    """Changes that overtook a snapshot stay: updates, creations and deletes."""
    cache = synced(row("a", 1), row("b", 2), row("c", 3))
    cache.apply_change(changed("a", 21, llm_model="new"))
    cache.apply_change(deleted("b", 22))
    cache.apply_change(changed("d", 23))
    cache.apply_snapshot(
        Snapshot(revision=20, epoch="e1", agents=[row("a", 1), row("b", 2), row("e", 15)])
    )
    assert sorted(cache.ready) == ["a", "d", "e"]
    assert cache.ready["a"].llm_model == "new"
    assert not cache.apply_change(deleted("b", 22))
    cache.position.advance(23)
    assert cache.position.revision == 23


def test_a_snapshot_says_what_it_swapped() -> None:
    """Only agents whose config is another one now are told about."""
    cache = synced(row("a", 1), row("b", 2), row("c", 3, key="k"))
    before = cache.ready["a"]
    swapped = cache.apply_snapshot(
        Snapshot(revision=20, epoch="e1", agents=[row("a", 1), row("b", 12), row("c", 3, key="k")])
    )
    assert swapped == ["b"]
    assert cache.ready["a"] is before


def test_another_epoch_moves_back() -> None:
    """A database restored from a backup is believed, though its revisions are lower."""
    cache = synced(row("a", 9), row("gone", 8), revision=10)
    cache.apply_change(deleted("back", 10))
    cache.apply_snapshot(
        Snapshot(revision=4, epoch="e2", agents=[row("a", 3, llm_model="old"), row("back", 2)])
    )
    assert sorted(cache.ready) == ["a", "back"]
    assert cache.ready["a"].llm_model == "old"
    assert (cache.position.revision, cache.position.epoch) == (4, "e2")


def test_after_begin_what_is_held_goes_on_being_served() -> None:
    """A resync takes nothing away until its snapshot is here, but is not live either."""
    cache = synced(row("a", 9), row("gone", 8))
    cache.begin("e2", 4)
    assert cache.apply_change(changed("a", 5, llm_model="new"))
    assert not cache.liveness.live
    assert not cache.position.synced
    assert cache.ready["a"].llm_model == "new"
    assert "gone" in cache.ready
    cache.apply_snapshot(Snapshot(revision=4, epoch="e2", agents=[row("a", 3)]))
    assert cache.ready["a"].llm_model == "new"
    assert "gone" not in cache.ready
    assert cache.position.synced
    assert cache.position.revision == 4


def test_an_absence_that_is_older_than_a_change_is_not_applied() -> None:
    """The answer "no such agent" is of the moment of the question, not of what came since."""
    cache = synced(row("a", 5))
    asked_at = cache.known_revision("a")
    cache.apply_change(changed("a", 11))
    assert not cache.apply_absent("a", asked_at)
    assert cache.apply_absent("a", 11)
    assert not cache.apply_change(changed("a", 11)), "the same change again brings nothing back"


# --- keys ---


def test_a_change_without_a_new_key_keeps_the_key() -> None:
    """The same api_key_revision means the key that is held."""
    cache = synced(row("a", 5, key="sk-1"))
    assert cache.apply_change(changed("a", 11, llm_model="new", api_key_revision=5))
    assert key_of(cache, "a") == "sk-1"
    assert cache.ready["a"].llm_model == "new"


@pytest.mark.parametrize("key_revision", [4, 11])
def test_config_and_key_are_swapped_together(key_revision: int) -> None:
    """Another api_key_revision, lower or higher, keeps the previous whole value until the key."""
    cache = synced(row("a", 5, key="sk-1", llm_endpoint="https://old.example"))
    change = changed("a", 11, llm_endpoint="https://new.example", api_key_revision=key_revision)
    assert not cache.apply_change(change)
    known = cache.find("a")
    assert known is not None
    assert known.awaits_key
    assert known.in_force is not None
    assert known.in_force.llm_endpoint == "https://old.example"
    assert known.in_force.stale
    assert "a" not in cache.ready
    assert cache.keys_awaited() == ["a"]
    assert not cache.apply_fetched(row("a", 5, key="sk-1")), "an older answer is refused"
    fetched = row(
        "a", 11, key="sk-2", llm_endpoint="https://new.example", api_key_revision=key_revision
    )
    assert cache.apply_fetched(fetched)
    assert (key_of(cache, "a"), cache.ready["a"].llm_endpoint) == ("sk-2", "https://new.example")
    assert not cache.ready["a"].stale
    assert cache.keys_awaited() == []


def test_null_drops_the_key() -> None:
    """A change that clears the key is whole without any fetch."""
    cache = synced(row("a", 5, key="sk-1"))
    assert cache.apply_change(changed("a", 11, api_key_revision=None))
    assert key_of(cache, "a") is None


def test_a_key_that_cannot_be_used_is_not_the_same_as_none() -> None:
    """An undecryptable key takes the agent out of service, and a new key brings it back."""
    bad = row("a", 5, api_key_revision=5, has_api_key=True, key_error="undecryptable")
    cache = synced(bad)
    known = cache.find("a")
    assert known is not None
    assert known.in_force is None
    assert known.key_error == "undecryptable"
    assert not cache.apply_change(changed("a", 12, api_key_revision=12))
    assert cache.apply_fetched(row("a", 12, key="sk-2"))
    assert key_of(cache, "a") == "sk-2"


def test_a_key_error_ends_an_older_key_too() -> None:
    """When the new key cannot be decrypted, going on with the old one would look like success."""
    cache = synced(row("a", 5, key="sk-1"))
    cache.apply_change(changed("a", 12, api_key_revision=12))
    assert cache.apply_key_error("a", 12, "undecryptable")
    known = cache.find("a")
    assert known is not None
    assert known.in_force is None
    assert known.awaits_key


def test_an_inactive_agent_needs_no_key_and_serves_nothing() -> None:
    """Switched off, an agent is not ready; on again with the same key, it needs no fetch."""
    cache = synced(row("a", 5, key="sk-1"))
    assert cache.apply_change(changed("a", 11, is_active=False, api_key_revision=5))
    assert "a" not in cache.ready
    assert cache.keys_awaited() == []
    assert cache.apply_change(changed("a", 12, api_key_revision=5))
    assert key_of(cache, "a") == "sk-1"


def test_what_was_switched_off_is_not_served_again_while_its_new_key_is_missing() -> None:
    """The previous whole value is that of a served agent, never one that an operator ended."""
    cache = synced(row("a", 5, key="sk-1"))
    cache.apply_change(changed("a", 11, is_active=False, api_key_revision=5))
    cache.apply_change(changed("a", 12, api_key_revision=12))
    known = cache.find("a")
    assert known is not None
    assert known.awaits_key
    assert known.in_force is None


def test_keys_of_another_life_do_not_fit() -> None:
    """After a restore the same api_key_revision may be another key: it is fetched."""
    cache = synced(row("a", 5, key="sk-old"))
    cache.begin("e2", 5)
    cache.apply_change(changed("a", 6, api_key_revision=5))
    assert cache.keys_awaited() == ["a"]


# --- the default agent ---


def test_the_default_follows_the_flag() -> None:
    """Promotion comes first, demotion second; the newest flag counts in between."""
    cache = synced(row("a", 1, is_default=True), row("b", 2))
    assert cache.default_id == "a"
    cache.apply_change(changed("b", 11, is_default=True))
    assert cache.default_id == "b"
    cache.apply_change(changed("a", 12, is_default=False))
    assert cache.default_id == "b"


def test_a_demotion_that_overtakes_the_promotion_leaves_a_default() -> None:
    """A keyed answer may be newer than the stream; there is a default all the while."""
    cache = synced(row("a", 1, is_default=True), row("b", 2))
    cache.apply_fetched(row("a", 12, is_default=False))
    assert cache.default_id == "a"
    cache.apply_change(changed("b", 11, is_default=True))
    assert cache.default_id == "b"


# --- freshness ---


def test_while_live_nothing_ages() -> None:
    """However long ago a value came, while live it is the current one."""
    clock = Clock()
    cache = synced(row("a", 1), ttl_seconds=300, clock=clock)
    clock.now += 1_000_000
    assert (cache.ready["a"].age, cache.ready["a"].stale) == (0.0, False)
    assert cache.get("a") is not None


def test_the_ttl_counts_from_the_last_live_moment() -> None:
    """Stale begins a TTL after the stream was lost, not after the value came."""
    clock = Clock()
    cache = synced(row("a", 1), ttl_seconds=300, clock=clock)
    clock.now += 1000
    cache.liveness.set(False)
    config = cache.ready["a"]
    clock.now += 300
    assert (config.age, config.stale) == (300, False)
    clock.now += 1
    assert (config.age, config.stale) == (301, True)
    assert cache.get("a") is None, "get() is the mission's: expired is None"


def test_an_answer_over_http_counts_anew() -> None:
    """A refresh in the background resets the age of that agent alone."""
    clock = Clock()
    cache = synced(row("a", 1), row("b", 1), ttl_seconds=300, clock=clock)
    cache.liveness.set(False)
    clock.now += 400
    cache.apply_fetched(row("a", 1))
    assert not cache.ready["a"].stale
    assert cache.ready["b"].stale


def test_max_stale_ends_what_is_served() -> None:
    """None: for ever. 0: with the TTL. Else that much later."""
    clock = Clock()
    for limit, at_301, at_400 in ((None, False, False), (0, True, True), (50, False, True)):
        cache = synced(row("a", 1), ttl_seconds=300, max_stale_seconds=limit, clock=clock)
        cache.liveness.set(False)
        clock.now += 301
        assert cache.liveness.expired(cache.ready["a"].age) is at_301
        clock.now += 99
        assert cache.liveness.expired(cache.ready["a"].age) is at_400


def test_a_value_that_was_replaced_says_so() -> None:
    """Whoever still holds an old value can see that it is one."""
    cache = synced(row("a", 1))
    held = cache.ready["a"]
    cache.apply_change(changed("a", 11))
    assert held.stale
    assert not cache.ready["a"].stale


def test_from_the_file_everything_is_stale_and_keyless_entries_are_not_there() -> None:
    """An entry that needs a key that the file lacks counts as not there."""
    cache = AgentConfigCache()
    rows = [row("a", 1), row("b", 2, api_key_revision=2), row("c", 3, key="k", is_default=True)]
    agents = [ReceivedAgent(**dict(each)) for each in rows]
    saved_at = time.time() - 60
    restore(cache, Loaded(epoch="e1", revision=5, complete=True, saved_at=saved_at, agents=agents))
    assert sorted(cache.ready) == ["a", "c"]
    assert cache.ready["a"].stale
    assert cache.ready["a"].age >= 60
    assert cache.default_id == "c"
    assert not cache.position.synced, "with an entry missing there is nothing to resume from"


def test_a_config_never_shows_its_key() -> None:
    """Neither the frozen value nor the dict prints the key, and the dict's key is usable."""
    cache = synced(row("a", 1, key="sk-canary"))
    config = cache.ready["a"]
    assert "sk-canary" not in repr(config)
    assert "sk-canary" not in repr(config.as_dict())
    assert config.as_dict()["llm_api_key"] == "sk-canary"
    assert "sk-canary" not in repr(cache.find("a"))


def test_deletes_do_not_add_up() -> None:
    """Agents that live for a minute: what is kept of those that are gone is bounded."""
    cache = synced(revision=10)
    for revision in range(11, 11 + 2 * MAX_DELETES + 10):
        cache.position.advance(revision)
        cache.apply_change(deleted(f"a{revision}", revision))
    assert len(cache.position.gone) <= MAX_DELETES
    assert cache.known_revision("a11") >= 11
    assert not cache.apply_change(changed("a11", 11))
    assert cache.find("a11") is None
