"""Receipts on one server: who took a change, who refused it, and how long it took."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from slm.protocol import ClientInfo
from slm.server.fleet.ack_log import RECEIPT_REVISIONS, Acked
from slm.server.fleet.backend import Backend
from slm.server.fleet.tracker import KEEP_GONE_SECONDS
from tests.support.raw import Api, Socket
from tests.support.servers import InLoopServer, eventually

REASON = "anthropic is not approved here"


async def joined(socket: Socket) -> None:
    """Read `subscribed` and ack it, as the SDK does."""
    first = await socket.frame()
    assert first["type"] == "subscribed"
    await socket.send(ack=first["revision"])


async def acks(socket: Socket, **refused: str) -> None:
    """Ack every change as it comes, refusing those of the agents named."""
    not_in_force: dict[str, Any] = {}
    while True:
        frame = await socket.next()
        if frame["agent_id"] in refused:
            reason = refused[frame["agent_id"]]
            not_in_force[frame["agent_id"]] = {"revision": frame["revision"], "reason": reason}
        await socket.send(ack=frame["revision"], not_in_force=not_in_force)


def client(name: str) -> dict[str, Any]:
    """Who subscribes."""
    return {"name": name, "instance": "1", "version": "0", "host": "here", "pid": 1}


async def told(admin: Api) -> dict[str, Any]:
    """Return what the fleet view has, by backend."""
    fleet = (await admin.get("/api/fleet")).json
    return {backend["backend"]: backend for backend in fleet["backends"]}


async def test_a_receipt_names_who_applied_refused_and_hangs(admin: Api, backend: Api) -> None:
    """A write with wait tells of each backend what became of the change, and why."""
    await admin.create("a")
    async with (
        backend.stream(client=client("good")) as good,
        backend.stream(client=client("bad")) as bad,
        backend.stream(client=client("stuck")) as stuck,
        backend.stream(client=client("mute")) as mute,
        asyncio.TaskGroup() as group,
    ):
        for socket in (good, bad, stuck):
            await joined(socket)
        await mute.frame()
        await eventually(lambda: _acked(admin, 3))
        tasks = [group.create_task(acks(good)), group.create_task(acks(bad, a=REASON))]
        answer = await admin.call("PUT", "/api/agents/a?wait=300ms", json={"llm_model": "n"})
        assert answer.status == 200
        receipt = answer.json["receipt"]
        assert receipt["revision"] == answer.json["revision"]
        assert receipt["applied"] == ["good/1"]
        assert receipt["refused"] == [{"backend": "bad/1", "reason": REASON}]
        assert receipt["pending"] == ["stuck/1"]
        assert receipt["unknown"] == ["mute/1"]
        assert (await mute.until(receipt["revision"]))[-1]["config"]["llm_model"] == "n"
        assert (await told(admin))["mute/1"]["state"] == "unknown"
        assert 0 < receipt["elapsed_ms"] == receipt["p50_ms"] == receipt["p99_ms"] < 10_000
        await stuck.send(ack=receipt["revision"])
        await eventually(lambda: _acked(admin, 3, receipt["revision"]))
        later = (await admin.get(f"/api/changes/{receipt['revision']}/receipt")).json
        assert later["applied"] == ["good/1", "stuck/1"]
        assert later["pending"] == []
        for task in tasks:
            task.cancel()


async def _acked(admin: Api, count: int, revision: int = 0) -> bool:
    backends = (await told(admin)).values()
    acked = [b for b in backends if b["applied"] is not None and b["applied"] >= revision]
    return len(acked) == count


async def test_a_receipt_does_not_wait_for_who_answered(admin: Api, backend: Api) -> None:
    """With every backend's answer in, the write is answered long before the limit."""
    async with backend.stream(client=client("good")) as socket, asyncio.TaskGroup() as group:
        await joined(socket)
        await eventually(lambda: _acked(admin, 1))
        task = group.create_task(acks(socket))
        created = await admin.call(
            "POST",
            "/api/agents?wait=60s",
            json={"agent_id": "a", "name": "a", "llm_provider": "ollama", "llm_model": "m"},
        )
        assert created.status == 201
        assert created.json["receipt"]["applied"] == ["good/1"]
        deleted = await admin.call("DELETE", "/api/agents/a?wait=60")
        assert deleted.status == 200
        assert deleted.json["receipt"]["applied"] == ["good/1"]
        assert deleted.json["receipt"]["revision"] == deleted.revision
        task.cancel()


async def test_a_default_that_changes_is_one_receipt(admin: Api, backend: Api) -> None:
    """Making an agent the default is two changes; its receipt is of the agent that was named."""
    await admin.create("a")
    async with backend.stream(client=client("good")) as socket, asyncio.TaskGroup() as group:
        await joined(socket)
        await eventually(lambda: _acked(admin, 1))
        task = group.create_task(acks(socket))
        answer = await admin.call("PUT", "/api/agents/a?wait=60s", json={"is_default": True})
        assert answer.json["receipt"]["revision"] == answer.json["revision"]
        assert answer.revision == answer.json["revision"] + 1
        assert answer.json["receipt"]["applied"] == ["good/1"]
        task.cancel()


async def test_who_went_away_in_between_is_named(admin: Api, backend: Api) -> None:
    """A backend that is gone before it acked the change stays pending in its receipt."""
    async with backend.stream(client=client("gone")) as socket:
        await joined(socket)
        await eventually(lambda: _acked(admin, 1))
        await admin.create("a")
    await eventually(lambda: _state(admin, "gone/1", "gone"))
    revision = (await admin.get("/api/fleet")).json["revision"]
    receipt = (await admin.get(f"/api/changes/{revision}/receipt")).json
    assert (receipt["applied"], receipt["pending"]) == ([], ["gone/1"])
    assert receipt["elapsed_ms"] is None


async def _state(admin: Api, name: str, state: str) -> bool:
    return bool((await told(admin))[name]["state"] == state)


async def test_who_came_later_is_not_expected(admin: Api, backend: Api) -> None:
    """A backend that connects after the change is in no receipt of it."""
    revision = (await admin.create("a")).revision
    async with backend.stream(client=client("late")) as socket:
        await joined(socket)
        await eventually(lambda: _acked(admin, 1))
        receipt = (await admin.get(f"/api/changes/{revision}/receipt?wait=5s")).json
        assert not receipt["applied"] + receipt["pending"] + receipt["unknown"]


async def test_the_fleet_says_who_runs_what(admin: Api, backend: Api) -> None:
    """Each backend is there with who it says it is, what it applied and how far it is behind."""
    async with backend.stream(client=client("one")) as socket:
        await joined(socket)
        await eventually(lambda: _acked(admin, 1))
        one = (await told(admin))["one/1"]
        assert one["state"] == "live"
        assert (one["lag"], one["lag_ms"]) == (0, 0)
        assert (one["name"], one["host"], one["pid"]) == ("one", "here", 1)
        assert one["token"] == "backend"
        await admin.create("a")
        behind = (await told(admin))["one/1"]
        assert behind["lag"] == 1
        assert behind["lag_ms"] > 0
        assert behind["applied"] == one["applied"]
        await eventually(lambda: _state(admin, "one/1", "stale"))
    await eventually(lambda: _state(admin, "one/1", "gone"))


async def test_a_backend_that_comes_and_goes_is_still_expected(admin: Api, backend: Api) -> None:
    """However often it has connected since, a backend stays in the receipt of what it heard."""
    async with backend.stream(client=client("flapping")) as socket:
        await joined(socket)
        await eventually(lambda: _acked(admin, 1))
        revision = (await admin.create("a")).revision
    for _ in range(25):
        async with backend.stream(client=client("flapping")) as socket:
            await socket.frame()
    receipt = (await admin.get(f"/api/changes/{revision}/receipt")).json
    assert (receipt["applied"], receipt["pending"]) == ([], ["flapping/1"])
    later = (await admin.create("b")).revision
    receipt = (await admin.get(f"/api/changes/{later}/receipt")).json
    assert receipt["pending"] == []


async def test_who_went_away_is_told_of_for_an_hour(
    server: InLoopServer, admin: Api, backend: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that left is in the fleet view for an hour, and then in it no more."""
    async with backend.stream(client=client("one")) as socket:
        await joined(socket)
        await eventually(lambda: _acked(admin, 1))
    await eventually(lambda: _state(admin, "one/1", "gone"))
    for passed, there in ((KEEP_GONE_SECONDS - 60, ["one/1"]), (KEEP_GONE_SECONDS + 60, [])):
        later = time.time() + passed
        monkeypatch.setattr(server.running.services.fleet, "_clock", lambda later=later: later)
        assert list(await told(admin)) == there
    assert not server.running.services.fleet.dirty
    assert KEEP_GONE_SECONDS == 3600


async def test_a_backend_that_comes_back_is_the_same(admin: Api, backend: Api) -> None:
    """A reconnect under the same instance goes on where the backend was."""
    async with backend.stream(client=client("one")) as socket:
        await joined(socket)
        await eventually(lambda: _acked(admin, 1))
    await eventually(lambda: _state(admin, "one/1", "gone"))
    async with backend.stream(client=client("one")) as socket:
        await socket.frame()
        await eventually(lambda: _state(admin, "one/1", "live"))
        assert len(await told(admin)) == 1


@pytest.mark.parametrize("wait", ["61s", "-1", "soon", "1h", "nan", "1e3", "5 s"])
async def test_a_wait_that_makes_no_sense_is_refused(admin: Api, wait: str) -> None:
    """Nothing is written when the duration cannot be understood, or is over a minute."""
    before = (await admin.get("/api/agents")).revision
    answer = await admin.call("PUT", f"/api/agents/default?wait={wait}", json={"name": "x"})
    assert answer.status == 422
    assert answer.code == "invalid-request"
    assert (await admin.get("/api/agents")).revision == before


async def test_a_receipt_of_no_change_is_not_found(admin: Api) -> None:
    """A revision that never was, or is long past, has no receipt."""
    answer = await admin.get("/api/changes/9999/receipt")
    assert (answer.status, answer.code) == (404, "revision-not-found")


async def test_after_a_restart_nobody_is_said_to_have_been_there(
    server: InLoopServer, admin: Api, backend: Api
) -> None:
    """A server on SQLite that has started since says that it does not know who took a change."""
    async with backend.stream(client=client("one")) as socket:
        await joined(socket)
        await eventually(lambda: _acked(admin, 1))
        revision = (await admin.create("a")).revision
        await socket.until(revision)
        await socket.send(ack=revision)
        await eventually(lambda: _acked(admin, 1, revision))
        known = await admin.get(f"/api/changes/{revision}/receipt")
        assert known.json["applied"] == ["one/1"]
    await server.stop()
    await server.start()
    answer = await admin.get(f"/api/changes/{revision}/receipt?wait=30s")
    assert (answer.status, answer.code) == (404, "revision-not-found")
    assert f"started after revision {revision} and does not know" in answer.json["detail"]
    later = await admin.put("a", llm_model="n")
    assert (await admin.get(f"/api/changes/{later.revision}/receipt")).status == 200


async def test_a_write_that_alters_nothing_asks_who_has_it(admin: Api, backend: Api) -> None:
    """Waiting for what was so already tells who is on it now."""
    await admin.create("a", llm_model="m")
    async with backend.stream(client=client("one")) as socket:
        await joined(socket)
        await eventually(lambda: _acked(admin, 1))
        answer = await admin.call("PUT", "/api/agents/a?wait=5s", json={"llm_model": "m"})
        assert answer.json["receipt"]["applied"] == ["one/1"]


async def test_who_may_not_see_an_agent_is_in_no_receipt_of_it(admin: Api) -> None:
    """A backend of a limited token is waited for where it sees the change, and there alone."""
    answer = await admin.call(
        "POST",
        "/api/admin/tokens",
        json={"name": "team", "scopes": ["config:read", "key:read"], "agents": ["team-*"]},
    )
    limited = Api(admin.server, admin.session, answer.json["token"])
    await admin.create("other")
    await admin.create("team-a")
    async with limited.stream(client=client("team")) as socket, asyncio.TaskGroup() as group:
        await joined(socket)
        await eventually(lambda: _acked(admin, 1))
        task = group.create_task(acks(socket))
        for agent_id, expected in (("other", []), ("team-a", ["team/1"]), ("default", ["team/1"])):
            change = {"llm_model": "n"}
            path = f"/api/agents/{agent_id}?wait=30s"
            receipt = (await admin.call("PUT", path, json=change)).json["receipt"]
            assert receipt["applied"] == expected, agent_id
            assert receipt["pending"] == []
        task.cancel()


async def test_the_fleet_is_closed_to_limited_tokens(admin: Api) -> None:
    """Who may see some agents alone does not learn who serves the others."""
    answer = await admin.call(
        "POST",
        "/api/admin/tokens",
        json={"name": "team", "scopes": ["config:read"], "agents": ["team-*"]},
    )
    assert answer.status == 201, answer.body
    limited = Api(admin.server, admin.session, answer.json["token"])
    assert (await limited.get("/api/fleet")).code == "forbidden"
    revision = (await admin.create("other")).revision
    assert (await limited.get(f"/api/changes/{revision}/receipt")).code == "revision-not-found"


def test_what_others_are_told_is_of_one_moment() -> None:
    """Acks that come in while a backend is written for other servers are not in it."""
    one = Backend("one", ClientInfo(), "backend", "r", "server")
    one.begin(0, 1.0)
    for revision in range(RECEIPT_REVISIONS):
        one.acks.add(Acked(revision, float(revision), {}))
    told = one.to_json(0.0)
    assert [ack[0] for ack in told["acks"]] == [*range(968, 1000)]
    for revision in range(1000, 2000):
        one.acks.add(Acked(revision, float(revision), {}))
    one.begin(2000, 2.0)
    assert [ack[0] for ack in told["acks"]] == [*range(968, 1000)]
    assert told["acked"] == 1000
    assert len(told["stretches"]) == 1
