"""Callbacks and validators: where they run, what they may do, and that they harm nobody."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from slm import BlockingSLMClient, ClientStatus, LLMInterface, SLMClient, Timings
from slm.client.config import ResolvedConfig
from slm.client.runtime import callbacks as hooks
from slm.client.runtime.dispatch import callbacks
from tests.support.faults.backends import TENTH
from tests.support.faults.scripted import changed, config, scripted_slm
from tests.support.processes import create, process, until, write
from tests.support.raw import Api
from tests.support.sdk import applied, sdk
from tests.support.servers import InLoopServer, ServerProcess, eventually

__all__ = ["process"]


@pytest.fixture
async def client(server: InLoopServer, admin: Api) -> AsyncIterator[SLMClient]:
    """A client that is live, and an agent."""
    await admin.create("a", llm_model="m0")
    async with sdk(server.url, server.backend_token, "one") as opened:
        yield opened


# --- callbacks ---


def test_a_plain_callback_may_ask_the_client_anything(process: ServerProcess) -> None:
    """Blocking questions, explaining and closing, from the callback itself: nothing hangs."""
    create(process, "a", llm_model="m0")
    client = BlockingSLMClient(process.url, token=process.backend_token, timings=Timings(**TENTH))
    told: list[Any] = []

    def callback(agent_id: str, config: ResolvedConfig | None) -> None:
        told.append(client.get_agent_config(agent_id)["llm_model"])
        told.append(client.resolve("nobody").step.value)
        told.append(client.get_default_agent_config()["llm_provider"])
        told.append(client.explain(agent_id).answered_by)
        if config is None:
            client.close()
            told.append(client.status)

    client.on_change(callback)
    client.connect()
    until(lambda: len(told) >= 8)  # the snapshot's agents, a and the default
    told.clear()
    write(process, "PUT", "/a", {"is_active": False})
    until(lambda: ClientStatus.CLOSED in told)
    assert told[1:4] == ["default", "ollama", "default"]
    assert client.resolve("a").llm_model


async def test_coroutines_run_in_the_loop_that_registered_them(
    client: SLMClient, admin: Api
) -> None:
    """Each in its own loop, whichever thread that is; plain ones in the dispatcher's thread."""
    threads: dict[str, set[str]] = {"here": set(), "there": set(), "plain": set(), "nowhere": set()}

    def noting(name: str) -> Any:
        async def callback(agent_id: str, _: ResolvedConfig | None) -> None:
            assert (await client.resolve(agent_id)).llm_model != "m0"
            threads[name].add(threading.current_thread().name)

        return callback

    client.on_change(noting("here"))
    client.on_change(lambda *_: threads["plain"].add(threading.current_thread().name))
    stop = asyncio.Event()

    async def elsewhere() -> None:
        client.on_change(noting("there"))
        registered.set()
        await stop.wait()

    registered = threading.Event()
    other = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: other.run_until_complete(elsewhere()), name="other")
    thread.start()
    await asyncio.to_thread(registered.wait, 10)
    await asyncio.to_thread(client.on_change, noting("nowhere"))
    await admin.put("a", llm_model="m1")
    await eventually(lambda: all(threads.values()))
    other.call_soon_threadsafe(stop.set)
    await asyncio.to_thread(thread.join)
    other.close()
    assert threads == {
        "here": {threading.current_thread().name},
        "there": {"other"},
        "plain": {"slm-callbacks"},
        "nowhere": {"slm-callbacks"},
    }


async def test_one_whose_loop_has_ended_is_dropped_with_one_line(
    client: SLMClient, admin: Api, caplog: pytest.LogCaptureFixture
) -> None:
    """A coroutine callback of a loop that is closed hears nothing more; the log says so once."""
    told: list[str] = []

    async def callback(agent_id: str, _: ResolvedConfig | None) -> None:
        raise AssertionError("its loop has ended")

    async def register() -> None:
        client.on_change(callback)

    await asyncio.to_thread(lambda: asyncio.run(register()))
    client.on_change(lambda _, config: told.append(config.llm_model if config else ""))
    for number in (1, 2, 3):
        await admin.put("a", llm_model=f"m{number}")
    await eventually(lambda: told == ["m1", "m2", "m3"])
    lines = [r for r in caplog.records if "hears no more changes" in r.message]
    assert len(lines) == 1


@pytest.mark.parametrize(
    "raised",
    [
        RuntimeError("x"),
        SystemExit(3),
        KeyboardInterrupt(),
        asyncio.CancelledError(),
        GeneratorExit(),
    ],
    ids=repr,
)
async def test_whatever_a_callback_raises_harms_nobody(
    client: SLMClient, admin: Api, raised: BaseException
) -> None:
    """Plain or coroutine: later changes still come, to it and to the others, and are acked."""
    told: list[str] = []
    seen: list[str] = []

    def plain(_: str, config: ResolvedConfig | None) -> None:
        seen.append("plain")
        raise raised

    async def coroutine(_: str, config: ResolvedConfig | None) -> None:
        seen.append("coroutine")
        if not isinstance(raised, GeneratorExit):
            raise raised

    client.on_change(plain)
    client.on_change(coroutine)
    client.on_change(lambda _, config: told.append(config.llm_model if config else ""))
    for number in (1, 2):
        answer = await admin.put("a", llm_model=f"m{number}")
    await eventually(lambda: told == ["m1", "m2"] and len(seen) == 4)
    await eventually(lambda: applied(admin, answer.revision, "one"))
    assert client.status is ClientStatus.LIVE


async def test_a_slow_callback_delays_no_answer_and_no_ack(
    client: SLMClient, server: InLoopServer, admin: Api
) -> None:
    """While one sleeps, the cache follows, this client's and another's changes are acked."""
    entered, go_on = threading.Event(), threading.Event()
    told: list[str] = []

    def slow(_: str, config: ResolvedConfig | None) -> None:
        entered.set()
        assert go_on.wait(20)
        told.append(config.llm_model if config else "")

    client.on_change(slow)
    async with sdk(server.url, server.backend_token, "two"):
        await admin.put("a", llm_model="m1")
        await asyncio.to_thread(entered.wait, 10)
        answer = await admin.put("a", llm_model="m2")
        await eventually(lambda: applied(admin, answer.revision, "one", "two"))
        assert (await client.resolve("a")).llm_model == "m2"
        assert told == []
        go_on.set()
        await eventually(lambda: told == ["m1", "m2"])


async def test_a_callback_far_behind_hears_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its bound of changes it hears each agent's newest, in order; memory stays bounded."""
    monkeypatch.setattr(hooks, "MAX_BEHIND", 10)
    registered = asyncio.Event()
    entered, go_on = threading.Event(), threading.Event()
    told: list[tuple[str, int | None]] = []

    def slow(agent_id: str, config: ResolvedConfig | None) -> None:
        entered.set()
        assert go_on.wait(20)
        told.append((agent_id, config.revision if config is not None else None))

    async def script(peer: Any) -> None:
        await peer.subscribed(1, heartbeat=3600)
        await registered.wait()
        for revision in range(2, 502):
            await peer.say(changed("ab"[revision % 2], revision, f"m{revision}"))
        async for _ in peer.ws:
            pass

    async with (
        scripted_slm(agents={"a": (1, config("m"))}, scripts=[script]) as slm,
        SLMClient(slm.url, token="t", timings=Timings(**TENTH)) as client,
    ):
        client.on_change(slow)
        registered.set()
        await eventually(lambda: client.revision == 501)
        (outlet,) = client._follower.hooks._outlets
        assert len(outlet._due) + len(outlet._newest) <= 12
        go_on.set()
        await eventually(lambda: {("a", 500), ("b", 501)} <= set(told))
        revisions = {name: [r for n, r in told if n == name] for name in "ab"}
        assert all(each == sorted(each, key=lambda r: r or 0) for each in revisions.values())
        assert len(told) <= 13
        await eventually(lambda: callbacks._jobs.empty())


async def test_nothing_is_told_after_close(client: SLMClient, admin: Api) -> None:
    """What a callback had not heard when the client was closed is not told any more."""
    entered, go_on = threading.Event(), threading.Event()
    told: list[str] = []

    def slow(_: str, config: ResolvedConfig | None) -> None:
        entered.set()
        assert go_on.wait(20)
        told.append(config.llm_model if config else "")

    client.on_change(slow)
    for number in (1, 2, 3):
        answer = await admin.put("a", llm_model=f"m{number}")
    await eventually(lambda: client.revision >= answer.revision)
    await asyncio.to_thread(entered.wait, 10)
    await client.close()
    go_on.set()
    await eventually(lambda: told == ["m1"])
    await eventually(lambda: not callbacks._running)
    assert told == ["m1"]


# --- validators ---


NO_REASONS: list[Any] = [False, None, "", 0, True, 5, object(), ["no"]]


@pytest.mark.parametrize("number", range(len(NO_REASONS)))
async def test_what_is_no_reason_refuses_nothing(
    client: SLMClient, admin: Api, number: int
) -> None:
    """Only text is a reason; with anything else the config is used, and acks go on."""
    client.register_validator(lambda _: NO_REASONS[number])
    for model in ("m1", "m2"):
        revision = (await admin.put("a", llm_model=model)).revision
        await acked(admin, revision)
        assert (await client.resolve("a")).llm_model == model


async def acked(admin: Api, revision: int) -> None:
    await eventually(lambda: applied(admin, revision, "one"))


@pytest.mark.parametrize("raised", [ValueError("x"), SystemExit(1), KeyboardInterrupt()], ids=repr)
async def test_a_validator_that_raises_refuses_nothing(
    client: SLMClient, admin: Api, raised: BaseException
) -> None:
    """It is logged, and the config is used."""

    def validator(_: ResolvedConfig) -> str | None:
        raise raised

    client.register_validator(validator)
    answer = await admin.put("a", llm_model="m1")
    await eventually(lambda: applied(admin, answer.revision, "one"))
    assert (await client.resolve("a")).llm_model == "m1"


async def test_a_validator_may_ask_the_client_and_take_its_time(
    server: InLoopServer, admin: Api
) -> None:
    """Until it has answered, questions wait for it; what nobody must judge goes on and is acked."""
    await admin.create("a", llm_model="m0")
    client = sdk(server.url, server.backend_token, "one", key_wait=60)
    entered, go_on = threading.Event(), threading.Event()
    asked: list[Any] = []

    def validator(config: ResolvedConfig) -> str | None:
        if config.llm_model == "slow":
            entered.set()
            asked.append(client.resolve_now("nobody").step.value)
            asked.append(client.resolve_now("a").llm_model)
            asked.append(client.explain_now("a").answered_by)
            assert go_on.wait(20)
        return "not this one" if config.llm_model == "bad" else None

    client.register_validator(validator)
    async with client, sdk(server.url, server.backend_token, "two"):
        answer = await admin.put("a", llm_model="slow")
        await asyncio.to_thread(entered.wait, 10)
        assert client.peek("a") is None
        await eventually(lambda: applied(admin, answer.revision, "two"))
        asking = asyncio.create_task(client.resolve("a"))
        await eventually(lambda: len(asked) == 3)
        assert not asking.done()
        go_on.set()
        answered = await asking
        assert (answered.llm_model, answered.stale) == ("slow", False)
        assert asked == ["default", "m0", "agent"]
        await eventually(lambda: applied(admin, answer.revision, "one"))
        answer = await admin.call("PUT", "/api/agents/a?wait=30s", json={"llm_model": "bad"})
        (refusal,) = answer.json["receipt"]["refused"]
        assert refusal["reason"] == "not this one"
        answered = await client.resolve("a")
        assert (answered.llm_model, answered.stale) == ("slow", True)


async def test_a_validator_that_never_answers_keeps_the_last_good_one(
    server: InLoopServer, admin: Api
) -> None:
    """After `key_wait` the last good config is served, as stale, and the SLM is told why."""
    await admin.create("a", llm_model="good")
    go_on = threading.Event()
    async with sdk(server.url, server.backend_token, "one", key_wait=0.2) as client:

        def hangs(config: ResolvedConfig) -> str | None:
            return None if config.llm_model == "good" else str(go_on.wait(30))

        client.register_validator(hangs)
        await eventually(lambda: client.peek("a"))
        answer = await admin.call("PUT", "/api/agents/a?wait=30s", json={"llm_model": "new"})
        (refusal,) = answer.json["receipt"]["refused"]
        assert refusal["reason"] == "a validator has not answered"
        answered = await client.resolve("a")
        assert (answered.llm_model, answered.stale) == ("good", True)
        go_on.set()


async def test_a_snapshot_is_judged_before_it_is_used(server: InLoopServer, admin: Api) -> None:
    """A validator that is there from the start sees every agent; a new one's key is kept."""
    await admin.create("a", llm_provider="openai", llm_model="m", llm_api_key="sk-1")
    seen: list[str] = []
    client = sdk(server.url, server.backend_token, "one")

    def sees(config: ResolvedConfig) -> None:
        seen.append(config.agent_id)

    client.register_validator(sees)
    async with client:
        found = await client.resolve("a")
        assert found.llm_api_key is not None
        assert found.llm_api_key.get_secret_value() == "sk-1"
        assert set(seen) == {"a", "default"}
        answer = await admin.put("a", llm_model="m2")
        await eventually(lambda: client.revision >= answer.revision)
        found = await client.resolve("a")
        assert (found.llm_model, found.stale) == ("m2", False)
        assert found.llm_api_key is not None


async def test_interfaces_cost_and_leave_nothing(client: SLMClient) -> None:
    """Two thousand interfaces of one policy are one validator, and none once they are closed."""
    kept = client._follower.hooks
    opened = [LLMInterface(client) for _ in range(2000)]
    assert len(kept._validators) == 1
    for each in opened:
        await each.close()
    assert not kept._validators
    removes = [client.register_validator(never) for _ in range(3)]
    removes[0]()
    removes[0]()
    assert len(kept._validators) == 1
    for remove in removes:
        remove()
    assert not kept._validators


def never(_: ResolvedConfig) -> str | None:
    return None
