"""SLMClient against a real server: the chain, keys, callbacks, files and secrets."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from slm import AgentKeyUnavailable, ClientStatus, SLMClient, Step, Timings
from slm.client.config import ResolvedConfig
from slm.client.runtime.background import following
from tests.support.faults.backends import TENTH
from tests.support.faults.scripted import Peer, changed, config, scripted_slm
from tests.support.gateway import Gateway
from tests.support.raw import Api
from tests.support.sdk import client_of
from tests.support.servers import InLoopServer, eventually

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there
KEYED: dict[str, Any] = {"llm_provider": "openai", "llm_model": "gpt-6.1-sol"}


async def without_stream(gate: Gateway, client: SLMClient) -> None:
    """End the stream, and let no new one through; HTTP goes on."""
    gate.refuse = lambda path: 503 if path in ("/ws", "/api/changes") else None
    await gate.cut()
    await eventually(lambda: client.status is ClientStatus.DISCONNECTED)


def key_of(config: ResolvedConfig) -> str | None:
    return config.llm_api_key.get_secret_value() if config.llm_api_key is not None else None


# --- the chain ---


async def test_a_change_is_the_next_answer(client: SLMClient, admin: Api) -> None:
    """What an operator changes is what the next question is answered, with its revision."""
    await admin.create("billing", llm_model="old")
    answer = await admin.put("billing", llm_model="new", llm_options={"seed": 1})
    await eventually(lambda: client.revision >= answer.revision)
    config = await client.resolve("billing")
    assert (config.step, config.revision, config.llm_model) == (
        Step.AGENT,
        answer.revision,
        "new",
    )
    assert (config.age, config.stale, config.source_agent_id) == (0, False, "billing")
    assert (await client.get_agent_config("billing")) == {
        "llm_provider": "ollama",
        "llm_endpoint": None,
        "llm_model": "new",
        "llm_api_key": None,
        "llm_timeout": 30,
        "llm_temperature": None,
        "llm_max_tokens": None,
        "llm_options": {"seed": 1},
    }


async def test_while_live_an_answer_is_one_lookup(client: SLMClient, server: InLoopServer) -> None:
    """No lock and no waiting: the frozen value itself, and a copy of a ready dict."""
    first = await client.resolve("default")
    with pytest.raises(StopIteration) as answer:
        client.resolve("default").send(None)
    assert answer.value.value is first
    with pytest.raises(StopIteration) as answer:
        client.get_agent_config("default").send(None)
    assert answer.value.value == first.as_dict()
    assert client.resolve_now("default") is first


async def test_the_default_answers_for_the_unknown_and_the_inactive(
    client: SLMClient, admin: Api
) -> None:
    """Step 2 is whichever agent is the default now, told with the name of its row."""
    await admin.create("off", llm_model="never", is_active=False)
    await admin.create("house", llm_model="house-model")
    answer = await admin.put("house", is_default=True)
    await eventually(lambda: client.revision >= answer.revision)
    for agent_id in ("off", "unknown", "", "..", "a/b"):
        config = await client.resolve(agent_id)
        assert (config.step, config.llm_model, config.agent_id, config.source_agent_id) == (
            Step.DEFAULT,
            "house-model",
            agent_id,
            "house",
        )
    assert (await client.get_default_agent_config())["llm_model"] == "house-model"
    answer = await admin.put("off", is_active=True)
    await eventually(lambda: client.revision >= answer.revision)
    assert (await client.resolve("off")).llm_model == "never"


async def test_while_live_memory_is_the_truth(
    gate: Gateway, server: InLoopServer, admin: Api
) -> None:
    """An unknown agent costs no request; start-up costs one snapshot."""
    async with client_of(gate.url, server) as client:
        for _ in range(20):
            assert (await client.resolve("unknown")).step is Step.DEFAULT
    assert gate.passed == ["/api/snapshot"]


async def test_without_a_stream_a_miss_is_one_request_for_all(
    gate: Gateway, server: InLoopServer, admin: Api
) -> None:
    """HTTP alone: one fetch shared by all who wait, and the unknown remembered for a while."""
    await admin.create("billing", llm_model="m", llm_api_key="sk-1", llm_provider="openai")
    gate.refuse = lambda path: 503 if path in ("/ws", "/api/changes") else None
    timings = Timings(**(TENTH | {"unknown_seconds": 60.0}))
    async with client_of(gate.url, server, start_timeout=0.1, timings=timings) as client:
        found = await asyncio.gather(*(client.resolve("billing") for _ in range(50)))
        assert {(c.step, key_of(c), c.stale) for c in found} == {(Step.AGENT, "sk-1", False)}
        missed = await asyncio.gather(*(client.resolve("unknown") for _ in range(50)))
        missed += [await client.resolve("unknown") for _ in range(5)]
        assert {(c.step, c.source_agent_id) for c in missed} == {(Step.DEFAULT, "default")}
    assert sorted(path for path in gate.passed if path != "/api/changes") == [
        "/api/agents/billing/llm",
        "/api/agents/default",
        "/api/agents/unknown/llm",
    ]


async def test_without_a_stream_old_values_are_refreshed_behind_the_answer(
    gate: Gateway, server: InLoopServer, admin: Api
) -> None:
    """Past the TTL an answer is the last known value, stale, and asks for the new one meanwhile."""
    created = await admin.create("billing", llm_model="old")
    async with client_of(gate.url, server, ttl_seconds=0.2) as client:
        await eventually(lambda: client.revision >= created.revision)
        await without_stream(gate, client)
        changed = await admin.put("billing", llm_model="new")
        seen = []

        async def refreshed() -> bool:
            config = await client.resolve("billing")
            seen.append((config.llm_model, config.stale))
            return config.revision == changed.revision

        await eventually(refreshed)
        assert ("old", True) in seen
        assert seen[-1] == ("new", False)

        await admin.delete("billing")

        async def gone() -> bool:
            return (await client.resolve("billing")).step is Step.DEFAULT

        await eventually(gone)


async def test_an_answer_of_another_epoch_brings_the_whole_of_it(tmp_path: Path) -> None:
    """Without a stream too, a restored database is noticed and taken over as a whole."""
    agents = {"default": (9, config("d", is_default=True)), "gone": (8, config("g"))}
    async with scripted_slm(revision=9, agents=agents, scripts=[once_live(9)]) as slm:
        timings = Timings(
            **(TENTH | {"backoff_initial_seconds": 60.0, "backoff_max_seconds": 60.0})
        )
        async with SLMClient(slm.url, token="t", ttl_seconds=0.1, timings=timings) as client:
            await eventually(lambda: client.status is ClientStatus.DISCONNECTED)
            assert (await client.resolve("gone")).llm_model == "g"
            slm.epoch, slm.revision = "restored", 3
            slm.agents = {"default": (2, config("older", is_default=True))}

            async def taken_over() -> bool:
                return (await client.resolve("gone")).llm_model == "older"

            await eventually(taken_over)
            assert client.revision == 3


def once_live(revision: int) -> Any:
    async def script(peer: Peer) -> None:
        await peer.subscribed(revision)
        await peer.say({"type": "heartbeat", "revision": revision, "behind": False})

    return script


# --- keys ---


async def test_a_key_that_cannot_be_decrypted_raises(
    gate: Gateway, server: InLoopServer, admin: Api
) -> None:
    """On 409 neither the older key nor the default agent takes over; a new key mends it."""
    created = await admin.create("billing", **KEYED, llm_api_key="sk-1")
    async with client_of(gate.url, server, key_wait=0.1) as client:
        await eventually(lambda: client.revision >= created.revision)
        told: list[ResolvedConfig | None] = []
        client.on_change(lambda _, config: told.append(config))
        gate.refuse = lambda path: 409 if path.endswith("/llm") else None
        await admin.put("billing", llm_api_key="sk-2")
        await eventually(lambda: told == [None])
        # What the SLM said of it, and not merely that it is late.
        with pytest.raises(AgentKeyUnavailable, match="'billing' cannot be had: HTTP 409"):
            await client.resolve("billing")
        with pytest.raises(AgentKeyUnavailable):
            await client.get_agent_config("billing")
        gate.refuse = lambda _: None
        await admin.put("billing", llm_api_key="sk-3")
        await eventually(lambda: len(told) == 2)
        assert key_of(await client.resolve("billing")) == "sk-3"


async def test_a_key_that_never_came_raises_rather_than_going_on(
    gate: Gateway, server: InLoopServer, admin: Api
) -> None:
    """A new agent whose key cannot be fetched is not served by the default agent's provider."""
    async with client_of(gate.url, server, key_wait=0.1) as client:
        gate.refuse = lambda path: 503 if path.endswith("/llm") else None
        created = await admin.create("billing", **KEYED, llm_api_key="sk-1")
        await eventually(lambda: client.revision >= created.revision)
        with pytest.raises(AgentKeyUnavailable) as caught:
            await client.resolve("billing")
        assert caught.value.agent_id == "billing"
        gate.refuse = lambda _: None

        async def here() -> bool:
            try:
                return key_of(await client.resolve("billing")) == "sk-1"
            except AgentKeyUnavailable:
                return False

        await eventually(here)
        assert client.last_error is None


async def test_a_cleared_key_is_dropped_without_a_request(
    gate: Gateway, server: InLoopServer, admin: Api
) -> None:
    """Null in a frame drops the key; another model with the same key fetches nothing either."""
    created = await admin.create("billing", **KEYED, llm_api_key="sk-1")
    async with client_of(gate.url, server) as client:
        await eventually(lambda: client.revision >= created.revision)
        answer = await admin.put("billing", llm_model="gpt-6.1-terra")
        await eventually(lambda: client.revision >= answer.revision)
        config = await client.resolve("billing")
        assert (config.llm_model, key_of(config)) == ("gpt-6.1-terra", "sk-1")
        answer = await admin.put("billing", llm_api_key=None)
        await eventually(lambda: client.revision >= answer.revision)
        assert key_of(await client.resolve("billing")) is None
    assert gate.passed == ["/api/snapshot"]


async def test_a_keyed_read_asks_for_nothing_older_than_is_known() -> None:
    """Snapshot, changed key and an unknown agent: each says how new its answer must be."""
    agents = {"default": (1, config("d", is_default=True)), "a": (4, config("m"))}

    async def script(peer: Peer) -> None:
        await peer.subscribed(5)
        await eventually(lambda: client.status is ClientStatus.LIVE)
        keyed = config("m", has_api_key=True, api_key_revision=6)
        slm.agents["a"] = (6, keyed | {"llm_api_key": "k"})
        await peer.say(
            changed("a", 6, "m", has_api_key=True, api_key_revision=6), changed("b", 7, "m")
        )
        await eventually(lambda: len(slm.asked) >= 2)

    async with scripted_slm(revision=5, agents=agents, scripts=[script]) as slm:
        timings = Timings(
            **(TENTH | {"backoff_initial_seconds": 3600, "backoff_max_seconds": 3600})
        )
        client = SLMClient(slm.url, token="t", timings=timings)
        async with client:
            await eventually(lambda: client.status is ClientStatus.DISCONNECTED)
            await client.resolve("unknown")
    assert slm.asked == [
        "/api/snapshot?min_revision=5",
        "/api/agents/a/llm?min_revision=6",
        # It was not in the snapshot of 5, and has not been heard of since.
        "/api/agents/unknown/llm?min_revision=5",
    ]


async def test_an_agent_that_goes_while_its_key_is_fetched_is_gone(
    gate: Gateway, server: InLoopServer, admin: Api
) -> None:
    """A 404 in answer to a key fetch: the chain goes on to the default, and nothing is tried on."""
    async with client_of(gate.url, server, key_wait=0.1) as client:
        gate.refuse = lambda path: 404 if path.endswith("/llm") else None
        created = await admin.create("billing", **KEYED, llm_api_key="sk-1")
        await eventually(lambda: client.revision >= created.revision)

        async def goes_on() -> bool:
            try:
                return (await client.resolve("billing")).step is Step.DEFAULT
            except AgentKeyUnavailable:
                return False

        await eventually(goes_on)
        assert gate.passed.count("/api/agents/billing/llm") == 1


# --- on_change ---


async def test_on_change_follows_the_swap(client: SLMClient, admin: Api) -> None:
    """A callback is told what is in force; one that raises harms neither others nor the stream."""
    told: list[tuple[str, str | None]] = []
    later: list[str] = []

    def broken(agent_id: str, config: ResolvedConfig | None) -> None:
        raise RuntimeError("a user's mistake")

    def cancelled(agent_id: str, config: ResolvedConfig | None) -> None:
        raise asyncio.CancelledError  # such as the result of a cancelled future

    async def coroutine(agent_id: str, config: ResolvedConfig | None) -> None:
        later.append(agent_id)
        raise RuntimeError("another one")

    def plain(agent_id: str, config: ResolvedConfig | None) -> None:
        # It is called in a thread of its own, so a newer one may be in force already.
        heard = (config.revision if config is not None else None) or 0
        assert client.peek(agent_id) is config or client.revision > heard
        told.append((agent_id, config.llm_model if config is not None else None))

    client.on_change(broken)
    client.on_change(cancelled)
    client.on_change(coroutine)
    unsubscribe = client.on_change(plain)
    await admin.create("a", llm_model="one")
    await admin.put("a", llm_model="two")
    await admin.put("a", is_active=False)
    await admin.delete("a")
    await eventually(lambda: len(told) == 3)
    assert told == [("a", "one"), ("a", "two"), ("a", None)]
    await eventually(lambda: len(later) == 3)
    unsubscribe()
    unsubscribe()
    answer = await admin.create("b")
    await eventually(lambda: client.revision >= answer.revision)
    assert len(told) == 3
    assert client.status is ClientStatus.LIVE


async def test_nothing_is_heard_after_close() -> None:
    """What lay in the socket when `close` was called changes nothing, and nobody is told of it."""
    go, said, over = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.subscribed(1)
        await go.wait()
        await peer.say(
            changed("a", 2, "late"),
            {"type": "heartbeat", "revision": 2, "behind": False},
            {"type": "resync", "revision": 3, "epoch": slm.epoch, "reason": "x"},
        )
        said.set()
        async for _ in peer.ws:
            pass
        over.set()

    told: list[str] = []
    async with scripted_slm(scripts=[script]) as slm:
        client = SLMClient(slm.url, token="t", timings=Timings(**TENTH))
        await client.connect()
        client.on_change(lambda agent_id, config: told.append(agent_id))
        held, release = threading.Event(), threading.Event()
        assert following.loop is not None
        following.loop.call_soon_threadsafe(held.set)
        following.loop.call_soon_threadsafe(release.wait, 10)
        await asyncio.to_thread(held.wait, 10)
        go.set()
        await asyncio.wait_for(said.wait(), 10)
        closing = asyncio.create_task(client.close())
        await asyncio.sleep(0)  # it was called, and the client has read nothing yet
        release.set()
        await closing
        await asyncio.wait_for(over.wait(), 10)
        assert (told, client.revision, client.peek("a")) == ([], 1, None)
        assert client.status is ClientStatus.CLOSED
        assert slm.snapshots == 1


# --- the snapshot file ---


async def test_an_encrypted_file_is_enough_to_go_on_and_to_resume(
    gate: Gateway, server: InLoopServer, admin: Api, tmp_path: Path
) -> None:
    """With a cache key, keys survive a restart without the SLM; then `since` and no full fetch."""
    path, cache_key = tmp_path / "last.json", Fernet.generate_key().decode()
    created = await admin.create("billing", **KEYED, llm_api_key="sk-canary")
    async with client_of(gate.url, server, cache_file=path, cache_key=cache_key) as client:
        await eventually(lambda: client.revision >= created.revision)
        assert key_of(await client.resolve("billing")) == "sk-canary"
    assert b"sk-canary" not in path.read_bytes()

    offline = SLMClient(NOBODY, token="t", cache_file=path, cache_key=cache_key, start_timeout=0.1)
    async with offline as client:
        config = await client.resolve("billing")
        assert (config.step, key_of(config), config.stale) == (Step.AGENT, "sk-canary", True)

    gate.passed.clear()
    answer = await admin.put("billing", llm_model="gpt-6.1-terra")
    async with client_of(gate.url, server, cache_file=path, cache_key=cache_key) as client:
        await eventually(lambda: client.revision >= answer.revision)
        config = await client.resolve("billing")
        assert (config.llm_model, key_of(config), config.stale) == (
            "gpt-6.1-terra",
            "sk-canary",
            False,
        )
    assert gate.passed == []


async def test_without_a_cache_key_an_agent_with_a_key_counts_as_not_there(
    gate: Gateway, server: InLoopServer, admin: Api, tmp_path: Path
) -> None:
    """With no SLM to ask, an error would help nobody: the default agent answers."""
    path = tmp_path / "last.json"
    created = await admin.create("billing", **KEYED, llm_api_key="sk-canary")
    async with client_of(gate.url, server, cache_file=path) as client:
        await eventually(lambda: client.revision >= created.revision)
        await client.resolve("billing")
    async with SLMClient(NOBODY, token="t", cache_file=path, start_timeout=0.1) as client:
        config = await client.resolve("billing")
        assert (config.step, config.source_agent_id, config.stale) == (
            Step.DEFAULT,
            "default",
            True,
        )
    gate.passed.clear()
    async with client_of(gate.url, server, cache_file=path) as client:
        assert key_of(await client.resolve("billing")) == "sk-canary"
    assert gate.passed == ["/api/snapshot"]


# --- secrets ---


async def test_no_secret_is_in_any_log_line(
    gate: Gateway,
    server: InLoopServer,
    admin: Api,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """Key and token through a whole life, failures included, with every logger at DEBUG."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "slm")
    asyncio.get_running_loop().set_debug(True)
    created = await admin.create("billing", **KEYED, llm_api_key="sk-canary")
    path = tmp_path / "file"
    async with client_of(gate.url, server, cache_file=path, key_wait=0.05) as client:
        await eventually(lambda: client.revision >= created.revision)
        client.on_change(lambda *_: 1 / 0)  # type: ignore[arg-type]
        gate.refuse = lambda path: 503 if path.endswith("/llm") else None
        answer = await admin.put("billing", llm_api_key="sk-canary-2")
        await eventually(lambda: client.revision >= answer.revision)
        await client.resolve("billing")
        gate.refuse = lambda path: 401 if path == "/ws" else None
        await gate.cut()
        await eventually(lambda: client.status is ClientStatus.UNAUTHORIZED)
        gate.refuse = lambda _: None
        await eventually(lambda: client.status is ClientStatus.LIVE)
        shown = repr(vars(client)) + str(client.last_error) + repr(client._cache._agents)
    asyncio.get_running_loop().set_debug(False)
    assert caplog.records
    for secret in ("sk-canary", server.backend_token):
        assert secret not in caplog.text
        assert secret not in shown
        assert secret not in path.read_text()
