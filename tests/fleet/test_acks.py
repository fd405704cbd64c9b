"""What the SDK says of itself: what it received, what is not in force, which keys it holds."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from typing import Any

import pytest

from slm import LLMInterface, ResolvedConfig, Timings
from slm.client.cache.cache import AgentConfigCache
from slm.client.cache.keys_in_use import KeysInUse
from slm.client.sync.acks import KEY_DID_NOT_COME, Acks
from slm.endpoints import EndpointPolicy
from slm.llm.transport import TransportSettings
from slm.schemas import Snapshot
from tests.support.gateway import gateway
from tests.support.raw import Api
from tests.support.sdk import FAST, applied, fleet_of, sdk
from tests.support.servers import InLoopServer, eventually

KEYED: dict[str, Any] = {
    "llm_provider": "openai",
    "llm_endpoint": "https://one.example.com/v1",
    "llm_api_key": "sk-canary-acks-1",
}


def name_of(fleet_entry: dict[str, Any]) -> str:
    """Return what receipts call it."""
    return str(fleet_entry["backend"])


async def test_a_backend_says_at_once_what_it_has(server: InLoopServer, admin: Api) -> None:
    """Right after it connected the fleet knows it, and after a change that it took it."""
    async with sdk(server.url, server.backend_token, "one") as client:
        await eventually(lambda: applied(admin, client.revision, "one"))
        answer = await admin.call("PUT", "/api/agents/default?wait=30s", json={"llm_model": "n"})
        one = (await fleet_of(admin))["one"]
        assert answer.json["receipt"]["applied"] == [name_of(one)]
        assert one["applied"] == answer.json["revision"]
        assert one["not_in_force"] == {}
        assert one["keys"] == {}
        assert one["pid"] > 0


async def test_acks_follow_the_swap(server: InLoopServer, admin: Api) -> None:
    """Whoever waited for the receipt finds every backend on the new config."""
    async with sdk(server.url, server.backend_token, "one") as client:
        await eventually(lambda: applied(admin, client.revision, "one"))
        for model in ("a", "b", "c"):
            await admin.call("PUT", "/api/agents/default?wait=30s", json={"llm_model": model})
            assert (await client.resolve("default")).llm_model == model


async def test_a_key_that_does_not_come_is_told(server: InLoopServer, admin: Api) -> None:
    """The ack waits for a changed key as long as resolve does; then it says that it did not come.

    Once the key is here after all, the change is applied.
    """
    await admin.create("a", **KEYED)
    async with gateway(server.url) as gate:
        client = sdk(gate.url, server.backend_token, "one", key_wait=0.3)
        async with client:
            await eventually(lambda: applied(admin, client.revision, "one"))
            old = await client.resolve("a")
            gate.refuse = lambda path: 503 if path.endswith("/llm") else None
            answer = await admin.call(
                "PUT", "/api/agents/a?wait=30s", json={"llm_api_key": "sk-canary-acks-2"}
            )
            receipt = answer.json["receipt"]
            assert receipt["applied"] == []
            assert [each["reason"] for each in receipt["refused"]] == [KEY_DID_NOT_COME]
            one = (await fleet_of(admin))["one"]
            revision = answer.json["revision"]
            assert one["applied"] == revision
            assert one["not_in_force"]["a"]["revision"] == revision
            assert one["keys"] == {"a": old.api_key_revision}
            gate.refuse = lambda _path: None
            await eventually(lambda: _in_force(admin, "one"))
            receipt = (await admin.get(f"/api/changes/{revision}/receipt")).json
            assert receipt["applied"] == [name_of(one)]
            assert (await client.resolve("a")).api_key_revision == revision


async def _in_force(admin: Api, name: str) -> bool:
    told = (await fleet_of(admin))[name]
    return not told["not_in_force"] and not told["keys"]


async def test_a_refused_config_leaves_the_last_good_one(server: InLoopServer, admin: Api) -> None:
    """A validator's reason is in the receipt; calls go on with the config that was good."""
    await admin.create("a", llm_model="good")

    def only_good(config: ResolvedConfig) -> str | None:
        return None if config.llm_model != "bad" else "this model is not allowed here"

    async with sdk(server.url, server.backend_token, "one") as client:
        client.register_validator(only_good)
        told: list[str] = []
        client.on_change(lambda _, config: told.append(config.llm_model if config else "none"))
        await eventually(lambda: applied(admin, client.revision, "one"))
        answer = await admin.call("PUT", "/api/agents/a?wait=30s", json={"llm_model": "bad"})
        (refusal,) = answer.json["receipt"]["refused"]
        assert refusal["reason"] == "this model is not allowed here"
        config = await client.resolve("a")
        assert (config.llm_model, config.stale) == ("good", True)
        assert told == []
        answer = await admin.call("PUT", "/api/agents/a?wait=30s", json={"llm_model": "better"})
        assert answer.json["receipt"]["refused"] == []
        config = await client.resolve("a")
        assert (config.llm_model, config.stale) == ("better", False)
        await eventually(lambda: told == ["better"])


async def test_a_validator_that_goes_lets_the_config_in(server: InLoopServer, admin: Api) -> None:
    """Configs are judged anew when a validator comes or goes."""
    await admin.create("a", llm_model="good")
    async with sdk(server.url, server.backend_token, "one") as client:
        remove = client.register_validator(lambda c: "no" if c.llm_model == "bad" else None)
        await admin.call("PUT", "/api/agents/a?wait=30s", json={"llm_model": "bad"})
        assert (await client.resolve("a")).llm_model == "good"
        remove()

        async def let_in() -> bool:
            return (await client.resolve("a")).llm_model == "bad"

        await eventually(let_in)
        await eventually(lambda: _in_force(admin, "one"))


async def test_no_providers_sdk_is_needed(
    server: InLoopServer, admin: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend takes a provider whose SDK is not there: none is used."""
    await admin.create("a", llm_model="local")
    # What Python itself does for a package that is not installed.
    for name in ("anthropic", "openai", "ollama", "httpx", "httpx2"):
        monkeypatch.setitem(sys.modules, name, None)
    async with sdk(server.url, server.backend_token, "one") as client, LLMInterface(client):
        await eventually(lambda: applied(admin, client.revision, "one"))
        answer = await admin.call(
            "PUT",
            "/api/agents/a?wait=30s",
            json={"llm_provider": "anthropic", "llm_model": "claude", "llm_api_key": "sk-c"},
        )
        assert answer.json["receipt"]["refused"] == []
        assert (await client.resolve("a")).llm_provider == "anthropic"


async def test_an_endpoint_that_is_refused_here_is_told_before_any_call(
    server: InLoopServer, admin: Api
) -> None:
    """A backend that may call public addresses alone says so of an endpoint that the SLM took."""
    await admin.create("a", llm_endpoint="https://one.example.com")
    strict = TransportSettings(endpoints=EndpointPolicy(strict=True))
    async with (
        sdk(server.url, server.backend_token, "one") as client,
        LLMInterface(client, transport=strict),
    ):
        await eventually(lambda: applied(admin, client.revision, "one"))
        change = {"llm_endpoint": "http://10.0.0.1:11434"}
        answer = await admin.call("PUT", "/api/agents/a?wait=30s", json=change)
        (refusal,) = answer.json["receipt"]["refused"]
        assert refusal["reason"] == (
            "the endpoint is not a public address, which SLM_ENDPOINTS=strict refuses"
        )
        assert (await client.resolve("a")).llm_endpoint == "https://one.example.com"


async def test_a_call_in_flight_holds_its_key(server: InLoopServer, admin: Api) -> None:
    """While a call runs on the old key the fleet names it; when it ends nobody holds it."""
    await admin.create("a", **KEYED)
    async with sdk(server.url, server.backend_token, "one") as client:
        await eventually(lambda: applied(admin, client.revision, "one"))
        old = await client.resolve("a")
        with client.in_use(old):
            answer = await admin.call(
                "PUT", "/api/agents/a?wait=30s", json={"llm_api_key": "sk-canary-acks-2"}
            )
            assert len(answer.json["receipt"]["applied"]) == 1
            assert (await fleet_of(admin))["one"]["keys"] == {"a": old.api_key_revision}
        await eventually(lambda: _in_force(admin, "one"))


async def test_many_changes_are_few_acks(server: InLoopServer, admin: Api) -> None:
    """Under load acks are taken together, and the last one is of the last change."""
    timings = type(FAST)(ack_interval_seconds=0.5)
    async with gateway(server.url) as gate:
        client = sdk(gate.url, server.backend_token, "one", timings=timings)
        async with client:
            await eventually(lambda: applied(admin, client.revision, "one"))
            (backend,) = server.running.services.fleet.backends()
            loop, last, before = asyncio.get_running_loop(), 0, backend.acks.count
            began = loop.time()
            for number in range(50):
                last = (await admin.put("default", llm_model=f"m{number}")).revision
            await eventually(lambda: applied(admin, last, "one"))
            assert backend.acks.count - before <= (loop.time() - began) / 0.5 + 2
    assert Timings().ack_interval_seconds == 0.1


@pytest.mark.parametrize(("busy_seconds", "acks_meanwhile"), [(0.2, 0), (0.8, 1)])
async def test_a_busy_process_acks_after_its_callbacks(
    busy_seconds: float, acks_meanwhile: int
) -> None:
    """A loop that is behind puts its acks off until it is not, but for no longer than the delay."""
    sent: list[str] = []

    async def send(text: str) -> bool:
        sent.append(text)
        return True

    cache = AgentConfigCache()
    timings = Timings(ack_delay_seconds=0.5, ack_interval_seconds=0.01)
    acks = Acks(cache, KeysInUse(), timings, 1.0, send)
    telling = asyncio.create_task(acks.run())
    loop = asyncio.get_running_loop()
    acks.subscribed()
    await eventually(lambda: len(sent) == 1)
    cache.begin("e", 1)
    cache.apply_snapshot(Snapshot(revision=1, epoch="e", agents=[]))
    acks.changed()
    until = loop.time() + busy_seconds
    while loop.time() < until:
        # Work in pieces of ten milliseconds, as callbacks of hundreds of clients are.
        piece = loop.time() + 0.01
        while loop.time() < piece:
            pass
        await asyncio.sleep(0)
    assert len(sent) == 1 + acks_meanwhile
    await eventually(lambda: len(sent) == 2)
    telling.cancel()
    assert Timings().ack_delay_seconds == 0.04


async def test_an_ack_after_a_reconnect_begins_the_interval_anew() -> None:
    """What waited for its time on the stream before it does not come early on the next one."""
    interval = 0.3
    sent: list[float] = []
    loop = asyncio.get_running_loop()

    async def send(text: str) -> bool:
        sent.append(loop.time())
        return True

    cache = AgentConfigCache()
    timings = Timings(ack_interval_seconds=interval)
    acks = Acks(cache, KeysInUse(), timings, 1.0, send)
    telling = asyncio.create_task(acks.run())
    acks.subscribed()
    await eventually(lambda: len(sent) == 1)
    cache.begin("e", 1)
    cache.apply_snapshot(Snapshot(revision=1, epoch="e", agents=[]))
    acks.changed()
    half = sent[0] + interval / 2
    await eventually(lambda: loop.time() > half)
    acks.subscribed()
    await eventually(lambda: len(sent) == 2)
    cache.position.advance(2)
    acks.changed()
    await eventually(lambda: len(sent) == 3)
    assert sent[2] - sent[1] >= interval * 0.95
    telling.cancel()


async def test_an_idle_client_acks_at_once(server: InLoopServer, admin: Api) -> None:
    """The interval lies between two acks: who has been quiet for as long waits for nothing."""
    interval = 3.0
    timings = replace(FAST, ack_interval_seconds=interval)
    async with sdk(server.url, server.backend_token, "one", timings=timings) as client:
        await eventually(lambda: applied(admin, client.revision, "one"))
        loop = asyncio.get_running_loop()
        idle_at = loop.time() + interval
        await eventually(lambda: loop.time() > idle_at)
        answer = await admin.call("PUT", "/api/agents/default?wait=30s", json={"name": "x"})
        assert answer.json["receipt"]["elapsed_ms"] < interval * 1000


async def test_two_backends_of_one_name_are_told_apart(server: InLoopServer, admin: Api) -> None:
    """Two clients of one name are two backends, by their instances."""
    async with (
        sdk(server.url, server.backend_token, "twin"),
        sdk(server.url, server.backend_token, "twin"),
    ):
        await eventually(lambda: _count(admin, 2))


async def _count(admin: Api, count: int) -> bool:
    fleet = (await admin.get("/api/fleet")).json["backends"]
    return len({each["backend"] for each in fleet if each["state"] == "live"}) == count
