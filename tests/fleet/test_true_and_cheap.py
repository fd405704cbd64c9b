"""The fleet is true whatever others write, and costs nothing where nobody reads it."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import func, insert, select, text, update

from slm.protocol import Ack, ClientInfo
from slm.server.db.tables import BACKENDS, REPLICAS
from slm.server.fleet import replication as fleet_sync
from slm.server.fleet import replication_rows as told_rows
from slm.server.fleet.replication_rows import TellTale
from slm.server.fleet.tracker import KEEP_GONE_SECONDS, Fleet
from slm.server.serve import SLMServer
from slm.server.stream.subscriber import Subscriber
from tests.support.raw import Api
from tests.support.sdk import fleet_of
from tests.support.servers import InLoopServer, eventually

GOOD = {"name": "good", "instance": "1"}


async def rows(server: SLMServer) -> int:
    """Return how many rows of backends there are."""
    count = select(func.count()).select_from(BACKENDS)
    read = server.services.database.read
    return int(await read(lambda connection: connection.execute(count).scalar_one()))


async def states(api: Api) -> dict[str, str]:
    """Return what the fleet view says of each backend."""
    told = (await api.get("/api/fleet")).json["backends"]
    return {each["backend"]: each["state"] for each in told}


@pytest.mark.parametrize("seconds", [-20, 3600], ids=["run-out", "by-a-clock-that-was-set-back"])
async def test_a_lease_that_comes_back_brings_its_backends_back(
    replicas: list[InLoopServer], apis: list[Api], seconds: int
) -> None:
    """While a lease has lapsed its backends are gone; afterwards they are live, and in receipts."""
    token = replicas[0].backend_token
    async with Api(replicas[1], apis[1].session, token).stream(client=GOOD) as stream:
        await stream.send(ack=(await stream.frame())["revision"])
        await eventually(lambda: _is(apis[0], {"good/1": "live"}))
        database = replicas[0].running.services.database
        mine = REPLICAS.c.id == replicas[1].running.services.fleet.replica
        lapse = update(REPLICAS).where(mine).values(seen_at=REPLICAS.c.seen_at + seconds)

        async def lapsed() -> bool:
            await database.run(lambda connection: connection.execute(lapse) and None)
            return await _is(apis[0], {"good/1": "gone"})

        await eventually(lapsed)
        await eventually(lambda: _is(apis[0], {"good/1": "live"}))
        changing = asyncio.create_task(
            apis[0].call("PUT", "/api/agents/default?wait=30s", json={"llm_model": "n"})
        )
        revision = (await stream.next())["revision"]
        await stream.send(ack=revision)
        receipt = (await changing).json["receipt"]
        assert (receipt["applied"], receipt["pending"]) == (["good/1"], [])


async def _is(api: Api, expected: dict[str, str]) -> bool:
    return await states(api) == expected


async def test_nothing_is_written_where_nobody_else_lives(
    replicas: list[InLoopServer], apis: list[Api]
) -> None:
    """A server alone writes no row, however much its backends say; one that comes is told all."""
    await replicas[1].stop()
    server = replicas[0].running
    await eventually(lambda: not server.services.fleet_sync._others_live)
    before = await rows(server)
    token = replicas[0].backend_token
    async with Api(replicas[0], apis[0].session, token).stream(client=GOOD) as stream:
        await stream.frame()
        for n in range(20):
            revision = (await apis[0].put("default", llm_model=f"m{n}")).revision
            await stream.until(revision)
            await stream.send(ack=revision)
        fleet = server.services.fleet
        await eventually(lambda: fleet.own()[0].applied == revision)
        await server.services.fleet_sync._check()
        assert await rows(server) == before
        await replicas[1].start()
        await eventually(lambda: _is(apis[1], {"good/1": "live"}), 5)
        told = (await apis[1].get(f"/api/changes/{revision}/receipt")).json
        assert told["applied"] == ["good/1"]


@pytest.mark.parametrize("live", [False, True], ids=["of-a-dead-one", "of-one-that-lives"])
async def test_rows_that_cannot_be_read_are_left_out(
    replicas: list[InLoopServer], apis: list[Api], live: bool
) -> None:
    """Whatever anybody writes into the table, the other rows are read and receipts are right."""
    token = replicas[0].backend_token
    server = replicas[0].running
    async with Api(replicas[1], apis[1].session, token).stream(client=GOOD) as stream:
        await stream.send(ack=(await stream.frame())["revision"])
        await eventually(lambda: _is(apis[0], {"good/1": "live"}))
        good = next(b for b in replicas[1].running.services.fleet.own()).to_json(0.0)
        odd: dict[str, Any] = {
            "client": good | {"client": {"name": "\x00"}},
            "since": good | {"since": 1e300},
            "stretches": good | {"stretches": [[1, 2]]},
            "acks": good | {"acks": [[2**70, 1.0]]},
            "keys": good | {"keys": {"\ud800": 1}},
            "acked": good | {"acked": -1},
            "nothing": None,
        }
        texts = ["", "nonsense", "[]", "null", '{"head": "x"}', '{"head": 1e999, "backends": 5}']
        texts += [json.dumps(each) for each in odd.values()]
        texts += [json.dumps({"head": 0, "backends": odd}), "[" * 100_000]

        def write(connection: Any) -> None:
            now = time.time()
            connection.execute(
                insert(BACKENDS),
                [
                    {"id": key, "replica": "a", "seq": n, "data": data, "connected": True}
                    | {"written_at": now}
                    for n, data in enumerate(texts)
                    for key in (f"batch/{n}/0", f"1:b/{n}")
                ],
            )
            if live:
                lease = {"id": "a", "name": "a", "fingerprints": "[]", "seen_at": now}
                connection.execute(insert(REPLICAS), lease)

        await server.services.database.run(write)
        for api in apis:
            assert await states(api) == {"good/1": "live"}
        assert sum(server.services.fleet_sync.rows.unreadable.values()) >= len(texts)
        path = "/api/agents/default?wait=500ms"
        changing = asyncio.create_task(apis[0].call("PUT", path, json={"llm_model": "n"}))
        await stream.send(ack=(await stream.next())["revision"])
        receipt = (await changing).json["receipt"]
        assert receipt["applied"] == ["good/1"] or live


async def test_old_rows_are_neither_read_nor_kept(
    replicas: list[InLoopServer], apis: list[Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    """50,000 rows of servers long gone hold nobody up, and go by the clock, unasked."""
    server = replicas[0].running
    backend = Fleet("old", "s", lambda token_id: "t")
    subscriber = Subscriber(None, token_id=1)  # type: ignore[arg-type]
    subscriber.client = ClientInfo(**GOOD)
    backend.joined(subscriber)
    backend.acked(subscriber, Ack(ack=1))
    [data] = [json.dumps(each.to_json(0.0)) for each in backend.own()]
    many = text(
        "INSERT INTO backends SELECT 'b' || n, 'old', n, :data, false, :at"
        " FROM generate_series(1, 50000) n"
    )
    values = {"data": data, "at": time.time() - 2 * KEEP_GONE_SECONDS}
    await server.services.database.run(lambda c: c.execute(many, values) and None)
    before = len(server.services.fleet._elsewhere._backends)
    answer = await asyncio.wait_for(apis[0].get("/api/fleet"), 5)
    assert answer.json["backends"] == []
    assert len(server.services.fleet._elsewhere._backends) == before
    monkeypatch.setattr(fleet_sync, "_CLEAN_SECONDS", 0.1)
    await eventually(lambda: _few(server), 30, every=0.2)


async def _few(server: SLMServer) -> bool:
    return await rows(server) < 100


async def test_a_slow_page_of_recent_rows_holds_nobody_up(
    replicas: list[InLoopServer], apis: list[Api]
) -> None:
    """Thousands of backends that another server told of are taken in without a long turn."""
    loop = asyncio.get_running_loop()
    other = Fleet("gone", "s", lambda token_id: "t")
    other.moved(1, restarted=True)
    for number in range(3000):
        subscriber = Subscriber(None, token_id=1)  # type: ignore[arg-type]
        subscriber.client = ClientInfo(name="b", instance=str(number))
        other.joined(subscriber)
        other.acked(subscriber, Ack(ack=1))
        other.left(subscriber)
    sync = replicas[0].running.services.fleet_sync
    pages = await fleet_sync.FleetSync(sync._database, other, 1.0, 1.0)._pages(
        1, other.own(), full=True
    )
    told = TellTale("gone")
    await sync._database.run(lambda c: told.write(c, 1, pages, full=True, last=True))
    # However much is told, one transaction reads a bounded part of it, and the next one goes on.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(told_rows, "MAX_PAGE_BYTES", 1)
        page = await sync._database.read(lambda c: sync.rows.read(c, {}, 3600.0))
    assert len(page.batches) == 1
    assert page.after is not None
    longest, began = 0.0, loop.time()
    asking = asyncio.create_task(apis[0].get("/api/fleet"))
    while not asking.done():
        at = loop.time()
        await asyncio.sleep(0)
        longest = max(longest, loop.time() - at)
    assert len((await asking).json["backends"]) == 3000
    # Half of it in one turn would be a merge on the loop, on however slow a machine.
    assert longest < max(0.25, (loop.time() - began) / 2)


# --- names ---


async def test_a_name_is_nobody_elses(admin: Api, backend: Api) -> None:
    """A backend that calls itself like another is shown with its token, and answers for itself."""
    created = await admin.call(
        "POST", "/api/admin/tokens", json={"name": "limited", "scopes": ["config:read"]}
    )
    limited = Api(admin.server, admin.session, created.json["token"])
    async with backend.stream(client=GOOD) as first, limited.stream(client=GOOD) as second:
        for stream in (first, second):
            await stream.send(ack=(await stream.frame())["revision"])
        both = {"good/1": "live", "good/1 (token limited)": "live"}
        await eventually(lambda: _is(admin, both))
        tokens = {
            b["backend"]: b["token"] for b in (await admin.get("/api/fleet")).json["backends"]
        }
        assert tokens == {"good/1": "backend", "good/1 (token limited)": "limited"}
        changing = asyncio.create_task(
            admin.call("PUT", "/api/agents/default?wait=30s", json={"llm_model": "n"})
        )
        for stream in (first, second):
            await stream.send(ack=(await stream.next())["revision"])
        assert sorted((await changing).json["receipt"]["applied"]) == sorted(both)
        for name, stream in zip(both, (first, second), strict=True):
            path = f"/api/explain?agent_id=a&backend={quote(name)}"
            asking = asyncio.create_task(admin.get(path))
            question = await stream.next()
            assert question["type"] == "explain"
            report = {"agent_id": "a", "status": name, "revision": 1, "steps": []}
            await stream.send(explained=question["id"], report=report)
            assert (await asking).json["status"] == name
        assert (await admin.get("/api/explain?agent_id=a&backend=good")).status == 404
    # Nor does it get the name while the other is away for a moment.
    async with limited.stream(client=GOOD) as second:
        await second.frame()
        await eventually(lambda: _is(admin, {"good/1": "gone", "good/1 (token limited)": "live"}))
        assert (await admin.get("/api/explain?agent_id=a&backend=good/1")).status == 404


async def test_a_rotated_token_keeps_the_name(admin: Api, backend: Api) -> None:
    """A token that follows another under its name is the same backend, and is there once."""
    made = []
    for _ in range(2):
        body = {"name": "rotated", "scopes": ["config:read"]}
        made.append((await admin.call("POST", "/api/admin/tokens", json=body)).json)
        api = Api(admin.server, admin.session, made[-1]["token"])
        async with api.stream(client=GOOD) as stream:
            await stream.send(ack=(await stream.frame())["revision"])
            await eventually(lambda: _is(admin, {"good/1": "live"}))
            assert (await fleet_of(admin))["good"]["token"] == "rotated"
        await admin.call("DELETE", f"/api/admin/tokens/{made[-1]['id']}")
