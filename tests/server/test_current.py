"""A server is current once it has passed on what it read; and where a stream begins and lives."""

from __future__ import annotations

import asyncio
import logging
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select, update
from sqlalchemy.engine import make_url

from slm.server.agents.changes import CommittedChange
from slm.server.db.tables import CHANGES, STATE
from slm.server.lifecycle.compaction import compact
from slm.server.security.agent_scope import EVERYTHING, View
from slm.server.services import Services
from slm.server.stream import change_reader as news_module
from slm.server.stream import outbox
from slm.server.stream.change_reader import far_behind
from slm.server.stream.encoding import encode_change
from tests.support.faults.history import Connection, violations
from tests.support.postgres import connect
from tests.support.raw import Api, Socket
from tests.support.servers import eventually, running_server
from tests.support.store import KEY


def _parts(api: Api) -> Services:
    return api.server.running.services


async def _is_red(api: Api, saying: str) -> bool:
    answer = await api.get("/readyz")
    if answer.status == 200:
        return False
    assert (answer.status, answer.json["feed"], answer.json["database"]) == (503, False, True)
    return saying in answer.json["reason"]


async def _beat(socket: Socket, *, behind: bool) -> None:
    async with asyncio.timeout(10):
        while (await socket.frame()).get("behind") is not behind:
            pass


async def test_a_change_that_cannot_be_encoded_is_never_skipped(
    admin: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing after it is passed on; /readyz, plain reads, heartbeats and the log say so.

    Once it can be encoded the stream goes on, with each change once.
    """
    poison = 3

    def failing(change: CommittedChange, view: View = EVERYTHING) -> str:
        if change.revision == poison:
            raise RuntimeError("sk-canary-in-an-error")
        return encode_change(change, view)

    monkeypatch.setattr(outbox, "encode_change", failing)
    async with admin.stream() as socket:
        await socket.frame()
        for n in range(2, 6):
            answer = await admin.put("default", description=f"revision {n}")
            assert answer.status == 200
            assert ("SLM-Stale" in answer.headers) == (n >= poison)
        assert (await socket.next())["revision"] == 2
        await _beat(socket, behind=True)
        assert await _is_red(admin, f"change {poison} cannot be passed on: RuntimeError")
        read = await admin.get("/api/agents/default")
        assert (read.json["description"], read.headers["SLM-Stale"]) == ("revision 2", "true")
        monkeypatch.undo()
        assert [frame["revision"] for frame in await socket.until(5)] == [3, 4, 5]
        await eventually(lambda: _parts(admin).feed.current)
    assert (await admin.get("/readyz")).status == 200
    assert "SLM-Stale" not in (await admin.get("/api/agents/default")).headers
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert sum(f"change {poison} cannot be passed on" in line for line in said) == 1
    assert "canary" not in caplog.text


@pytest.mark.parametrize("part", ["catalog.apply", "hub.outbox.publish"])
async def test_what_fails_half_way_is_done_once(
    admin: Api, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Whichever half of passing a change on fails: red until both are done, and no frame twice."""
    services = _parts(admin)
    name, _, method = part.rpartition(".")
    owner = operator.attrgetter(name)(services)
    works: Callable[..., None] = getattr(owner, method)

    def failing(*given: Any) -> None:
        raise ValueError

    async with admin.stream() as socket:
        await socket.frame()
        monkeypatch.setattr(owner, method, failing)
        for n in range(3):
            assert (await admin.put("default", description=str(n))).headers["SLM-Stale"] == "true"
        await _beat(socket, behind=True)
        assert await _is_red(admin, "ValueError")
        monkeypatch.setattr(owner, method, works)
        await eventually(lambda: services.feed.current)
        await admin.put("default", description="after")
        await eventually(lambda: services.hub.head == 5)
        frames = [frame["revision"] for frame in await socket.until(5)]
    assert frames == sorted(set(frames))
    assert (await admin.get("/api/agents/default")).json["description"] == "after"


async def test_a_database_that_cannot_take_the_new_epoch(
    tmp_path: Path, postgres_url: str, session: Any
) -> None:
    """The revision fell and the database is read-only: red and stale until it can be written."""
    name = make_url(postgres_url).database
    kill = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    async with running_server(
        tmp_path / "data", database_url=postgres_url, encryption_keys=KEY
    ) as server:
        api = Api(server, session, server.admin_token)
        await api.put("default", description="lost")
        epoch = _parts(api).feed.epoch
        with connect(postgres_url) as plain:
            plain.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on".encode())
            plain.execute("SET default_transaction_read_only = off")
            with plain.transaction():
                plain.execute("UPDATE state SET revision = 1")
                plain.execute("DELETE FROM changes WHERE revision > 1")
                # Whoever comes back finds it read-only, and the revision fallen.
                plain.execute((kill + " AND pid <> pg_backend_pid()").encode())
        await eventually(lambda: _is_red(api, "its new epoch cannot be written"))
        assert (await api.get("/api/agents/default")).headers["SLM-Stale"] == "true"
        assert _parts(api).feed.epoch == epoch
        with connect(postgres_url) as plain:
            plain.execute("SET default_transaction_read_only = off")
            plain.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only".encode())
            plain.execute((kill + " AND pid <> pg_backend_pid()").encode())
        await eventually(lambda: _parts(api).feed.epoch != epoch and _parts(api).feed.current)
        assert (await api.get("/readyz")).status == 200


async def test_a_standby_is_not_current(
    tmp_path: Path, postgres_url: str, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that is in recovery may be behind the one that takes the writes: red and stale."""
    async with running_server(
        tmp_path / "data", database_url=postgres_url, encryption_keys=KEY
    ) as server:
        api = Api(server, session, server.admin_token)
        await api.put("default", description="known")
        # What a standby answers when it is asked for its timeline.
        monkeypatch.setattr(news_module, "_SELECT_NEWS_AND_TIMELINE", news_module._SELECT_NEWS)
        await eventually(lambda: _is_red(api, "the database is a standby"))
        read = await api.get("/api/agents/default")
        assert (read.json["description"], read.headers["SLM-Stale"]) == ("known", "true")
        monkeypatch.undo()
        await eventually(lambda: _parts(api).feed.current)
        assert (await api.get("/readyz")).status == 200


async def test_compacted_between_subscribing_and_the_first_page(
    admin: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compaction that comes just then: `subscribed` names where the resync after it is."""
    services = _parts(admin)
    for n in range(6):
        await admin.put("default", description=str(n))
    head, epoch, change_id = services.feed.held
    read = services.feed.read

    async def compacting(since: int, limit: int, upto: int) -> Any:
        await compact(services.database, keep=1)
        return await read(since, limit, upto)

    monkeypatch.setattr(services.feed, "read", compacting)
    async with admin.stream(since=3, epoch=epoch) as socket:
        frames = [await socket.frame(), await socket.frame()]
    assert [frame["type"] for frame in frames] == ["subscribed", "resync"]
    assert {(f["revision"], f["change_id"]) for f in frames} == {(head, change_id)}
    heard = Connection("c", 3, epoch, frames)
    assert violations([heard], resyncs=["compacted"]) == []


async def test_a_live_stream_is_never_resynced_right_after_subscribed(admin: Api) -> None:
    """Everything is loaded anew while a stream begins: what it got is confirmed, then `resync`."""
    services = _parts(admin)
    for n in range(3):
        await admin.put("default", description=str(n))
    async with admin.stream() as socket:
        assert (await socket.frame())["revision"] == 4
        epoch = update(STATE).values(epoch="feedbeef")
        await services.database.run(lambda connection: connection.execute(epoch) and None)
        confirmed, resync = await socket.frame(), await socket.frame()
        assert (confirmed["type"], confirmed["revision"]) == ("heartbeat", 4)
        assert (resync["type"], resync["epoch"]) == ("resync", "feedbeef")


async def test_a_hole_in_the_changes_ends_a_replay_with_a_resync(admin: Api) -> None:
    """Where a change is missing or unreadable a replay does not wait for it, nor skip it."""
    for n in range(4):
        await admin.put("default", description=str(n))
    services = _parts(admin)
    gone = delete(CHANGES).where(CHANGES.c.revision == 4)
    await services.database.run(lambda connection: connection.execute(gone) and None)
    for since in (2, 3):
        async with admin.stream(since=since, epoch=services.feed.epoch) as socket:
            kinds = [(await socket.frame())["type"] for _ in range(4 - since + 1)]
        assert kinds[-1] == "resync"
    assert (await admin.get("/readyz")).status == 200


async def test_far_behind_is_a_resync(admin: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """More changes than are worth telling one by one: a snapshot instead; and `head` is named."""
    monkeypatch.setattr("slm.server.stream.feed.far_behind", lambda agents: 5)
    services = _parts(admin)
    for n in range(9):
        await admin.put("default", description=str(n))
    epoch = services.feed.epoch
    async with admin.stream(since=4, epoch=epoch) as socket:
        subscribed, resync = await socket.frame(), await socket.frame()
        assert (resync["reason"], resync["revision"]) == ("far-behind", 10)
        assert (subscribed["revision"], subscribed["head"]) == (10, 10)
    async with admin.stream(since=5, epoch=epoch) as socket:
        subscribed = await socket.frame()
        assert (subscribed["revision"], subscribed["head"]) == (5, 10)
        assert [f["revision"] for f in await socket.until(10)] == [6, 7, 8, 9, 10]


def test_a_gap_is_far_by_the_number_of_agents() -> None:
    """A thousand changes, or four times as many as there are agents."""
    assert [far_behind(n) for n in (1, 250, 251, 10_000)] == [1000, 1000, 1004, 40_000]


async def test_a_limited_streams_heartbeats_carry_the_position(
    admin: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a token may not see moves its position too, with the change's id."""
    made = await admin.call(
        "POST",
        "/api/admin/tokens",
        json={"name": "limited", "scopes": ["config:read"], "agents": ["billing-*"]},
    )
    limited = Api(admin.server, admin.session, made.json["token"])
    await eventually(lambda: _parts(admin).tokens.name_of(made.json["id"]) == "limited")
    async with limited.stream() as socket:
        await socket.frame()
        await admin.create("other")
        beat = await socket.frame()
    ids = select(CHANGES.c.revision, CHANGES.c.change_id).order_by(CHANGES.c.revision.desc())
    rows = await _parts(admin).database.read(lambda connection: connection.execute(ids).all())
    assert beat["type"] == "heartbeat"
    assert (beat["revision"], beat["change_id"]) == tuple(rows[0])
