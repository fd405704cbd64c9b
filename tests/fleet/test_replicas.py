"""One fleet over two replicas of a real PostgreSQL: receipts, and a replica that dies."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from typing import Any

import aiohttp
from sqlalchemy import func, select, update

from slm import ResolvedConfig
from slm.server.db.tables import BACKENDS
from slm.server.fleet.tracker import KEEP_GONE_SECONDS
from tests.support.raw import Api
from tests.support.sdk import applied, fleet_of, sdk
from tests.support.servers import InLoopServer, eventually

REASON = "anthropic is not approved here"
LIGHT = 294
SDKS = 6

Frame = dict[str, Any]
Reply = Callable[[aiohttp.ClientWebSocketResponse, Frame], Awaitable[None]]


async def ack(ws: aiohttp.ClientWebSocketResponse, frame: Frame) -> None:
    """Ack what came."""
    await ws.send_str(json.dumps({"ack": frame["revision"]}))


async def ack_late(ws: aiohttp.ClientWebSocketResponse, frame: Frame) -> None:
    """Ack what came, as the slowest of all."""
    await asyncio.sleep(0.7)
    await ack(ws, frame)


async def stall(_ws: aiohttp.ClientWebSocketResponse, _frame: Frame) -> None:
    """Say nothing."""


async def die(ws: aiohttp.ClientWebSocketResponse, _frame: Frame) -> None:
    """Be gone in the middle of it, as a killed process is: no close frame."""
    ws.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


async def light(
    session: aiohttp.ClientSession, url: str, token: str, name: str, reply: Reply
) -> None:
    """Be a backend without an SDK: ack the position, then treat each change as `reply` does."""
    headers = {"Authorization": f"Bearer {token}"}
    async with session.ws_connect(f"{url}/ws", headers=headers) as ws:
        who = {"name": name, "instance": "1"}
        await ws.send_str(json.dumps({"subscribe": "agent_config", "client": who}))
        async for message in ws:
            if message.type is not aiohttp.WSMsgType.TEXT:
                break
            frame = json.loads(message.data)
            if frame["type"] == "subscribed":
                await ack(ws, frame)
            elif frame["type"] != "heartbeat":
                await reply(ws, frame)


@contextlib.asynccontextmanager
async def running(tasks: list[asyncio.Task[None]]) -> AsyncIterator[None]:
    """Let them run for the block's length."""
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_three_of_300_are_named(replicas: list[InLoopServer], apis: list[Api]) -> None:
    """300 backends over two replicas: one refuses, one stalls, one is killed in mid-publish.

    The receipt names exactly those three, all others have applied, and the elapsed time is that of
    the slowest that did.
    """
    await apis[0].create("a")
    token = replicas[0].backend_token
    replies: dict[str, Reply] = {f"light-{n}": ack for n in range(LIGHT)}
    replies |= {"light-10": stall, "light-11": die, "light-12": ack_late}
    connector = aiohttp.TCPConnector(limit=0)
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        tasks = [
            asyncio.create_task(light(session, replicas[n % 2].url, token, name, reply))
            for n, (name, reply) in enumerate(replies.items())
        ]
        await stack.enter_async_context(running(tasks))
        clients = [
            await stack.enter_async_context(sdk(replicas[n % 2].url, token, f"sdk-{n}"))
            for n in range(SDKS)
        ]
        clients[1].register_validator(only_ollama)

        async def all_live() -> bool:
            states = [each["state"] for each in (await fleet_of(apis[0])).values()]
            return states.count("live") == LIGHT + SDKS

        await eventually(all_live, 60, every=0.2)
        change = {"llm_provider": "anthropic", "llm_model": "claude", "llm_api_key": "sk-x"}
        answer = await apis[0].call("PUT", "/api/agents/a?wait=2s", json=change)
        revision = answer.json["receipt"]["revision"]

        async def settled() -> Frame | None:
            path = f"/api/changes/{revision}/receipt?wait=1s"
            told: Frame = (await apis[1].get(path)).json
            return told if len(told["pending"]) == 2 else None

        receipt = await eventually(settled, 30)
        assert receipt is not None
        fleet = await fleet_of(apis[1])
        assert receipt["refused"] == [{"backend": fleet["sdk-1"]["backend"], "reason": REASON}]
        assert receipt["pending"] == ["light-10/1", "light-11/1"]
        assert receipt["unknown"] == []
        assert len(receipt["applied"]) == LIGHT + SDKS - 3
        assert fleet["light-11"]["state"] == "gone"
        committed = datetime.fromisoformat(answer.json["updated_at"])
        took = [
            (datetime.fromisoformat(each["applied_at"]) - committed).total_seconds() * 1000
            for each in fleet.values()
            if each["backend"] in receipt["applied"]
        ]
        assert abs(receipt["elapsed_ms"] - max(took)) < 100
        assert receipt["elapsed_ms"] >= 700
        assert receipt["p50_ms"] <= receipt["p99_ms"] <= receipt["elapsed_ms"]


def only_ollama(config: ResolvedConfig) -> str | None:
    """Refuse a provider, as a backend without its extra does."""
    return REASON if config.llm_provider == "anthropic" else None


async def test_the_replica_that_wrote_waits_for_the_other(
    replicas: list[InLoopServer], apis: list[Api]
) -> None:
    """A write at one replica is answered as soon as the other's backends have applied it."""
    async with (
        sdk(replicas[0].url, replicas[0].backend_token, "here") as here,
        sdk(replicas[1].url, replicas[0].backend_token, "there"),
    ):
        await eventually(lambda: applied(apis[0], here.revision, "here", "there"))
        for n in range(3):
            body = {"llm_model": f"m{n}"}
            answer = await apis[0].call("PUT", "/api/agents/default?wait=60s", json=body)
            names = [name.partition("/")[0] for name in answer.json["receipt"]["applied"]]
            assert names == ["here", "there"]
        servers = {each["server"] for each in (await fleet_of(apis[1])).values()}
        assert len(servers) == 1  # one machine, one process: two leases of one name
        later = await apis[1].get(f"/api/changes/{answer.json['revision']}/receipt")
        assert len(later.json["applied"]) == 2


async def test_a_backend_that_moves_is_one(replicas: list[InLoopServer], apis: list[Api]) -> None:
    """A backend whose replica stops goes on at the other one and is there once."""
    who = {"name": "mover", "instance": "1"}
    token = replicas[0].backend_token
    apis[1].token = apis[0].token
    async with Api(replicas[1], apis[1].session, token).stream(client=who) as stream:
        first = await stream.frame()
        await stream.send(ack=first["revision"])
        await eventually(lambda: applied(apis[0], first["revision"], "mover"))
    async with Api(replicas[0], apis[0].session, token).stream(client=who) as stream:
        first = await stream.frame()
        await stream.send(ack=first["revision"])

        async def live_once() -> bool:
            told = (await apis[1].get("/api/fleet")).json["backends"]
            return [each["state"] for each in told] == ["live"]

        await eventually(live_once)


async def test_a_lease_that_ran_out_takes_its_backends_along(
    replicas: list[InLoopServer], apis: list[Api]
) -> None:
    """Backends of a replica that died are gone once its lease is, whatever its last word was."""
    async with sdk(replicas[1].url, replicas[0].backend_token, "orphan") as client:
        await eventually(lambda: applied(apis[0], client.revision, "orphan"))
        # As a killed process leaves it: no more renewals, and no goodbye.
        caretaker = replicas[1].running.services.caretaker
        caretaker._task.cancel()

        async def gone() -> bool:
            return bool((await fleet_of(apis[0]))["orphan"]["state"] == "gone")

        # It had nothing new to tell for longer than that.
        services = replicas[0].running.services
        long_ago = update(BACKENDS).values(written_at=BACKENDS.c.written_at - 2 * KEEP_GONE_SECONDS)
        await services.database.run(lambda connection: connection.execute(long_ago) and None)
        await eventually(gone, 20, every=0.1)
        services.fleet_sync._cleaned_at = 0.0
        assert await gone()
        # Nor has a server that starts only now forgotten them.
        await replicas[0].stop()
        await replicas[0].start()
        await eventually(gone, 20, every=0.1)


async def test_a_time_that_is_not_known_is_not_made_up(
    replicas: list[InLoopServer], apis: list[Api]
) -> None:
    """A server that was told of the last of many acks alone says who applied, not how fast.

    The backend was at this server before, so that what it knows of it has a gap in the middle.
    """
    who, token = {"name": "mover", "instance": "1"}, replicas[0].backend_token
    await replicas[1].stop()
    await replicas[1].start(fleet_interval_seconds=3600)
    async with Api(replicas[0], apis[0].session, token).stream(client=who) as stream:
        first = await stream.frame()
        await stream.send(ack=first["revision"])
        await eventually(lambda: applied(apis[0], first["revision"], "mover"))
    revisions = []
    async with Api(replicas[1], apis[1].session, token).stream(client=who) as stream:
        first = await stream.frame()
        await stream.send(ack=first["revision"])
        await eventually(lambda: applied(apis[1], first["revision"], "mover"))
        for n in range(100):
            revisions.append((await apis[1].put("default", llm_model=f"m{n}")).revision)
            await stream.until(revisions[-1])
            await stream.send(ack=revisions[-1])
        await eventually(lambda: applied(apis[1], revisions[-1], "mover"))
        path = f"/api/changes/{revisions[1]}/receipt"
        exact = (await apis[1].get(path)).json
        assert exact["applied"] == ["mover/1"]
        await apis[0].get(f"/api/changes/{revisions[-1]}/receipt?wait=30s")
        told = (await apis[0].get(path)).json
        assert told["applied"] == ["mover/1"]
        assert (told["elapsed_ms"], told["p50_ms"], told["p99_ms"]) == (None, None, None)
        last = (await apis[0].get(f"/api/changes/{revisions[-1]}/receipt")).json
        assert last["elapsed_ms"] is not None
        assert exact["elapsed_ms"] < 10_000


async def test_a_word_that_comes_too_late_takes_nothing_back(
    replicas: list[InLoopServer], apis: list[Api]
) -> None:
    """What a server still hears over a connection that was given up for another is no news."""
    who, token = {"name": "mover", "instance": "1"}, replicas[0].backend_token
    async with contextlib.AsyncExitStack() as stack:
        there, here = (Api(r, apis[0].session, token) for r in replicas)
        former = await stack.enter_async_context(there.stream(client=who))
        before = (await former.frame())["revision"]
        await former.send(ack=before)
        present = await stack.enter_async_context(here.stream(client=who))
        await present.send(ack=(await present.frame())["revision"])
        revision = (await apis[1].put("default", llm_model="n")).revision
        await present.until(revision)
        await present.send(ack=revision)
        await eventually(lambda: applied(apis[1], revision, "mover"))
        await former.send(ack=before)
        heard = replicas[0].running.services.fleet
        await eventually(lambda: any(len(b.acks) == 2 for b in heard._own.values()))
        for api in apis:
            await eventually(functools.partial(applied, api, revision, "mover"))
            receipt = (await api.get(f"/api/changes/{revision}/receipt")).json
            assert (receipt["applied"], receipt["pending"]) == (["mover/1"], [])


async def test_a_batch_is_written_once_an_interval(
    replicas: list[InLoopServer], apis: list[Api]
) -> None:
    """However often backends ack, their server writes of all of them in one row an interval."""
    await replicas[1].stop()
    await replicas[1].start(fleet_interval_seconds=0.5)
    services, loop = replicas[1].running.services, asyncio.get_running_loop()

    async def rows() -> int:
        mine = select(func.count()).where(BACKENDS.c.replica == services.fleet.replica)
        read = services.database.read
        return int(await read(lambda connection: connection.execute(mine).scalar_one()))

    api = Api(replicas[1], apis[1].session, replicas[0].backend_token)
    async with api.stream() as one, api.stream() as two:
        for stream in (one, two):
            await stream.frame()
            await stream.send(ack=1)
        await eventually(lambda: _live(apis[0], 2))
        first, began, sent = await rows(), loop.time(), 0
        while loop.time() < began + 1.5:
            for stream in (one, two):
                await stream.send(ack=1, keys={"default": sent})
            sent += 1
            await asyncio.sleep(0.005)
        last = await rows()
        took = loop.time() - began
        assert sent > 20
        assert first < last <= first + took / 0.5 + 1


async def _live(api: Api, count: int) -> bool:
    told = (await api.get("/api/fleet")).json["backends"]
    return [each["state"] for each in told].count("live") == count


async def test_what_a_receipt_waits_for_is_told_at_once(
    replicas: list[InLoopServer], apis: list[Api]
) -> None:
    """A server that tells of its backends once an hour tells at once while a receipt waits."""
    await replicas[1].stop()
    await replicas[1].start(fleet_interval_seconds=3600)
    async with sdk(replicas[1].url, replicas[0].backend_token, "there") as client:
        await eventually(lambda: applied(apis[1], client.revision, "there"))
        for model in ("a", "b", "c"):
            change = {"llm_model": model}
            answer = await apis[0].call("PUT", "/api/agents/default?wait=30s", json=change)
            receipt = answer.json["receipt"]
            assert [name.partition("/")[0] for name in receipt["applied"]] == ["there"]
            assert receipt["elapsed_ms"] is not None


async def test_a_receipt_outlives_a_server(replicas: list[InLoopServer], apis: list[Api]) -> None:
    """Who took a change is known after its server has stopped, since it told the others."""
    async with sdk(replicas[1].url, replicas[0].backend_token, "one") as client:
        await eventually(lambda: applied(apis[0], client.revision, "one"))
        answer = await apis[1].call("PUT", "/api/agents/default?wait=30s", json={"llm_model": "n"})
        (name,) = answer.json["receipt"]["applied"]
    await replicas[1].stop()
    await replicas[1].start()
    for api in apis:
        receipt = (await api.get(f"/api/changes/{answer.json['revision']}/receipt")).json
        assert (receipt["applied"], receipt["pending"]) == ([name], [])
