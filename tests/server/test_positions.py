"""Positions have identity: what a failover lost is noticed and told, however the numbers look."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Table, delete, select, text, update

from slm.server.agents.credentials import ITSELF
from slm.server.agents.schemas import AgentCreate, AgentUpdate
from slm.server.db.database import Database
from slm.server.db.tables import AGENTS, STATE, TOKENS
from slm.server.lifecycle.compaction import compact
from slm.server.lifecycle.startup import _config
from slm.server.security.agent_scope import EVERYTHING
from slm.server.security.audit import Who
from slm.server.security.token_store import TokenStore
from slm.server.security.token_table import TokenTable
from slm.server.services import Services
from tests.support.failover import Standby, ids_of
from tests.support.faults import history
from tests.support.faults.history import untold_losses, violations
from tests.support.postgres import connect
from tests.support.raw import Api, Socket
from tests.support.servers import InLoopServer, eventually
from tests.support.store import KEY

QUIET = {"poll_interval_seconds": 60.0, "heartbeat_seconds": 60.0, "behind_after_seconds": 600.0}
"""Timings with which nothing but a write or a wake-up makes the feed look."""


@contextlib.asynccontextmanager
async def _served(data_dir: Path, database_url: str, **settings: Any) -> AsyncIterator[Api]:
    server = InLoopServer(data_dir, database_url=database_url, encryption_keys=KEY, **settings)
    await server.start()
    try:
        async with aiohttp.ClientSession() as session:
            yield Api(server, session, server.admin_token, key_token=server.backend_token)
    finally:
        await server.stop()


@pytest.fixture
async def quiet(tmp_path: Path, database_url: str) -> AsyncIterator[Api]:
    """A server whose feed looks only when something wakes it, on each engine in turn."""
    async with _served(tmp_path / "data", database_url, **QUIET) as api:
        yield api


def _parts(api: Api) -> Services:
    return api.server.running.services


class _Ears:
    """Hears one stream and keeps every frame, so that the history checker can judge it."""

    def __init__(self, socket: Socket, **asked: Any) -> None:
        self.connection = history.Connection("ears", **asked)
        self._task = asyncio.create_task(self._hear(socket))

    async def _hear(self, socket: Socket) -> None:
        with contextlib.suppress(TypeError, ValueError, TimeoutError):
            while True:
                self.connection.frames.append(await socket.frame(60))

    def last(self, *kinds: str) -> dict[str, Any] | None:
        """Return the last frame of these types."""
        return next((f for f in reversed(self.connection.frames) if f["type"] in kinds), None)

    def position(self) -> tuple[int, str, str]:
        """Return where the frames lead: revision, epoch, change id."""
        start = self.last("subscribed", "resync")
        end = self.last("subscribed", "resync", *history.CHANGES)
        assert start is not None
        assert end is not None
        return end["revision"], start["epoch"], end["change_id"]

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.mark.parametrize("by", ["this server", "another server"])
@pytest.mark.parametrize("lost", [1, 3])
async def test_a_failover_that_lost_changes_is_noticed(quiet: Api, lost: int, by: str) -> None:
    """Some changes are lost; fewer, as many or more are new before anybody looks: all are told.

    Each write is answered once plain reads are right, the epoch is made anew once, every stream
    gets a resync, and a client that comes back with a lost position gets one too.
    """
    for new in range(5):
        await _fail_over(quiet, lost, new, by)


async def _fail_over(api: Api, lost: int, new: int, by: str) -> None:
    services, feed = _parts(api), _parts(api).feed
    await api.put("default", description=f"before {lost} {new}")
    epoch, kept = feed.epoch, feed.position
    standby = await Standby.of(services.database)
    async with api.stream() as socket:
        ears = _Ears(socket)
        await eventually(lambda: ears.connection.frames)
        for n in range(lost):
            await api.put("default", description=f"lost {lost} {new} {n}")
        await eventually(lambda: ears.position()[0] == kept + lost)
        since, of_epoch, change_id = ears.position()
        await standby.promote()
        for n in range(new):
            await _write(api, f"new {lost} {new} {n}", by)
        if new == 0 or by == "another server":
            feed.wake()
        await eventually(lambda: feed.epoch != epoch)
        await eventually(lambda: ears.position()[:2] == (kept + new, feed.epoch))
        renewed = feed.epoch
        # A look more makes no other epoch.
        await feed.look_again(10)
        assert feed.epoch == renewed
        survived = await ids_of(services.database)
        assert untold_losses([ears.connection], survived) == []
        # Where the revision fell, nothing is at the position; a write is noticed at once.
        seen = new if by == "another server" else min(new, 1)
        reason = "epoch" if seen < lost else "forked"
        assert violations([ears.connection], resyncs=[reason]) == []
        assert survived[kept + new] == ears.position()[2]
        read = (await api.get("/api/agents/default")).json["description"]
        assert read == (f"new {lost} {new} {new - 1}" if new else f"before {lost} {new}")
        await ears.close()
    async with api.stream(since=since, epoch=of_epoch, change_id=change_id) as socket:
        first, second = await socket.frame(), await socket.frame()
        assert (first["revision"], second["type"]) == (kept + new, "resync")


async def _write(api: Api, description: str, by: str) -> None:
    """Change the default agent; another server's commit is one that this feed is not told of."""
    if by == "this server":
        answer = await api.put("default", description=description)
        assert answer.status == 200
        read = await api.get("/api/agents/default")
        assert "SLM-Stale" not in answer.headers
        assert read.json["description"] == description
        return
    registry = _parts(api).registry
    told, registry.committed = registry.committed, None
    await registry.update("default", AgentUpdate(description=description), who=Who("another"))
    registry.committed = told


async def test_a_lost_position_is_not_resumed_in_the_same_epoch(quiet: Api) -> None:
    """Before any server noticed: the same number and epoch, another change: `resync`, forked."""
    services = _parts(quiet)
    standby = await Standby.of(services.database)
    answer = await quiet.put("default", description="lost")
    lost_id = services.feed.held.change_id
    epoch = services.feed.epoch
    await services.feed.stop()
    await standby.promote()
    await _write(quiet, "new", "another server")
    await _write(quiet, "newer", "another server")
    since = {"since": answer.revision, "epoch": epoch}
    async with quiet.stream(**since, change_id=lost_id) as socket:
        subscribed = await socket.frame()
        # This server's hub stands at the lost position itself, until it looks.
        assert subscribed["change_id"] == lost_id
        services.feed.follow()
        assert (await socket.next())["reason"] == "forked"
    survived = await ids_of(services.database)
    async with quiet.stream(**since, change_id=lost_id) as socket:
        assert [(await socket.frame())["type"] for _ in range(2)] == ["subscribed", "resync"]
    async with quiet.stream(
        since=answer.revision, epoch=services.feed.epoch, change_id=survived[answer.revision]
    ) as socket:
        assert (await socket.frame())["revision"] == answer.revision
        assert (await socket.next())["change_id"] == survived[answer.revision + 1]
    async with quiet.stream(
        since=answer.revision, epoch=services.feed.epoch, change_id=lost_id
    ) as socket:
        named = [await socket.frame(), await socket.frame()]
        assert named[1]["reason"] == "forked"
        assert named[0]["change_id"] == named[1]["change_id"] == services.feed.held.change_id
    # A client of the version before this one sends no id, and resumes as it did.
    async with quiet.stream(since=answer.revision, epoch=services.feed.epoch) as socket:
        assert (await socket.frame())["change_id"] == survived[answer.revision]
        assert (await socket.next())["revision"] == answer.revision + 1


async def test_a_position_that_was_compacted_away_is_still_known(quiet: Api) -> None:
    """With every change removed, the head is resumed from, and its loss is noticed."""
    services = _parts(quiet)
    for n in range(5):
        await quiet.put("default", description=str(n))
    standby = await Standby.of(services.database)
    await quiet.put("default", description="lost")
    held = services.feed.held
    await compact(services.database, keep=0, batch=2)
    await services.feed.look_again(10)
    assert services.feed.held == held
    async with quiet.stream(
        since=held.revision, epoch=held.epoch, change_id=held.change_id
    ) as socket:
        first = await socket.frame()
        assert (first["revision"], first["change_id"]) == (held.revision, held.change_id)
        await quiet.put("default", description="one more")
        assert (await socket.next())["revision"] == held.revision + 1
    await standby.promote()
    for description in ("new", "newer"):
        await _write(quiet, description, "another server")
    await compact(services.database, keep=0)
    services.feed.wake()
    await eventually(lambda: services.feed.epoch != held.epoch)


async def test_a_loss_below_the_floor_is_noticed(quiet: Api) -> None:
    """Where nothing but an unchanged agent tells of the loss, its old ETag is of no use."""
    services = _parts(quiet)
    standby = await Standby.of(services.database)
    lost = await quiet.put("default", description="lost")
    epoch = services.feed.epoch
    await standby.promote()
    registry = services.registry
    told, registry.committed = registry.committed, None
    await registry.update("default", AgentUpdate(description="new"), who=Who("another"))
    for n in range(3):
        made = AgentCreate(agent_id=f"a{n}", name="n", llm_provider="ollama", llm_model="m")
        await registry.create(made, who=Who("another"))
    registry.committed = told
    await compact(services.database, keep=0)
    services.feed.wake()
    await eventually(lambda: services.feed.epoch != epoch)
    read = await quiet.get("/api/agents/default", headers={"If-None-Match": lost.headers["ETag"]})
    assert (read.status, read.json["description"]) == (200, "new")
    assert read.json["revision"] == lost.json["revision"]


async def test_tokens_that_a_failover_lost_or_brought_back(quiet: Api) -> None:
    """As many changes of tokens follow as were lost: what counts is what the database holds."""
    services = _parts(quiet)
    elsewhere = TokenStore(services.database, TokenTable())
    written, token = await services.token_store.create(
        "kept", ["config:read"], EVERYTHING, who=ITSELF
    )
    kept = Api(quiet.server, quiet.session, token.get_secret_value())
    standby = await Standby.of(services.database)
    await services.token_store.revoke(written.token.id, who=ITSELF)
    assert (await kept.get("/api/agents")).status == 401
    await standby.promote()
    _, token = await elsewhere.create("new", ["config:read"], EVERYTHING, who=ITSELF)
    new = Api(quiet.server, quiet.session, token.get_secret_value())
    await services.feed.look_again(10)
    assert [(await api.get("/api/agents")).status for api in (kept, new)] == [200, 200]


@pytest.mark.parametrize("table", [TOKENS, AGENTS], ids=["tokens", "agents"])
async def test_a_restore_that_is_half_done(quiet: Api, table: Table) -> None:
    """pg_restore fills one table after the other: what was known stands until all are there."""
    services = _parts(quiet)
    standby = await Standby.of(services.database)
    await quiet.put("default", description="lost")
    epoch = services.feed.epoch

    def empty(connection: Connection) -> None:
        connection.execute(delete(table))

    await standby.promote(empty)
    await services.feed.look_again(0.3)
    assert services.feed.trouble is not None
    assert "restore" in services.feed.trouble
    assert (await quiet.get("/api/agents/default")).status == 200
    await standby.promote()
    await services.feed.look_again(10)
    await eventually(lambda: services.feed.epoch != epoch and services.feed.trouble is None)
    assert (await quiet.get("/api/agents/default")).json["description"] != "lost"
    assert (await quiet.put("default", description="new")).status == 200


async def test_of_several_servers_one_makes_the_epoch(
    tmp_path: Path, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Three servers notice one failover at one moment: they make one new epoch and follow it."""
    caplog.set_level(logging.WARNING)
    async with contextlib.AsyncExitStack() as stack:
        api = await stack.enter_async_context(_served(tmp_path / "0", postgres_url, **QUIET))
        others = [
            await stack.enter_async_context(_another(tmp_path / f"{n}", postgres_url))
            for n in (1, 2)
        ]
        feeds = [_parts(api).feed, *(server.running.services.feed for server in others)]
        standby = await Standby.of(_parts(api).database)
        head = (await api.put("default", description="lost")).revision
        await eventually(lambda: {feed.position for feed in feeds} == {head})
        before = feeds[0].epoch
        await standby.promote()
        await _write(api, "new", "another server")
        for feed in feeds:
            feed.wake()
        await eventually(lambda: before not in {feed.epoch for feed in feeds})
        await asyncio.gather(*(feed.look_again(10) for feed in feeds))
        assert len({feed.held for feed in feeds}) == 1
    assert sum("gets a new epoch" in record.getMessage() for record in caplog.records) == 1


@contextlib.asynccontextmanager
async def _another(data_dir: Path, database_url: str) -> AsyncIterator[InLoopServer]:
    server = InLoopServer(data_dir, database_url=database_url, encryption_keys=KEY, **QUIET)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def test_another_timeline_makes_a_new_epoch_once(tmp_path: Path, postgres_url: str) -> None:
    """A promoted standby is on another timeline: a new epoch at once, and none for a restart."""
    async with _served(tmp_path / "data", postgres_url) as api:
        services = _parts(api)
        first = services.feed.epoch

        async def timeline() -> str:
            found = select(STATE.c.timeline)
            return str(await services.database.read(lambda c: c.execute(found).scalar_one()))

        noted = await eventually(timeline)
        cluster, _, number = noted.partition("/")
        assert int(number, 16) >= 1
        async with api.stream() as socket:
            await socket.frame()
            elsewhere = update(STATE).values(timeline=f"{cluster}/00000000")
            await services.database.run(lambda c: c.execute(elsewhere) and None)
            resync = await socket.next()
            assert (resync["type"], resync["reason"]) == ("resync", "epoch")
        second = services.feed.epoch
        assert resync["epoch"] == second != first
        await services.feed.look_again(10)
        assert (await timeline(), services.feed.epoch) == (noted, second)
        await api.server.stop()
        await api.server.start()
        assert _parts(api).feed.epoch == second
        with connect(postgres_url) as plain:
            plain.execute("UPDATE state SET timeline = 'elsewhere/00000001'")
        await eventually(lambda: _parts(api).feed.epoch != second)


async def test_a_write_with_an_etag_of_another_epoch_is_refused(quiet: Api) -> None:
    """The same revision of the same agent in another life of the database is another version."""
    standby = await Standby.of(_parts(quiet).database)
    lost = await quiet.put("default", description="lost")
    await standby.promote()
    new = await quiet.put("default", description="new")
    assert lost.json["revision"] == new.json["revision"]
    stale = {"If-Match": lost.headers["ETag"]}
    refused = await quiet.put("default", stale, description="on top of what is lost")
    assert (refused.status, refused.code) == (412, "precondition-failed")
    assert (await quiet.delete("default", headers=stale)).status == 412
    read = await quiet.get("/api/agents/default", headers={"If-None-Match": lost.headers["ETag"]})
    assert (read.status, read.json["description"]) == (200, "new")
    now = read.headers["ETag"]
    either = {"If-Match": f"{lost.headers['ETag']}, {now}"}
    assert (await quiet.put("default", either, description="newer")).status == 200
    bare = {"If-Match": f'"{new.json["revision"] + 1}"'}
    assert (await quiet.put("default", bare, description="newest")).status == 200
    for header in ('"x", W/{}', "{}", '"a,b",{}', 'W/"0" , {}'):
        etag = (await quiet.get("/api/agents/default")).headers["ETag"]
        same = {"If-None-Match": header.format(etag)}
        assert (await quiet.get("/api/agents/default", headers=same)).status == 304, header


async def test_an_etag_counts_no_more_once_the_database_runs_elsewhere(
    tmp_path: Path, postgres_url: str
) -> None:
    """Between a failover and the new epoch no If-Match is taken for one of the lost changes."""
    async with _served(tmp_path / "data", postgres_url, **QUIET) as api:
        read = await api.get("/api/agents/default")
        await _parts(api).feed.stop()
        # The same number and the same epoch, and yet another change.
        promoted = update(STATE).values(timeline=STATE.c.timeline + "0")
        await _parts(api).database.run(lambda c: c.execute(promoted) and None)
        seen = {"If-Match": read.headers["ETag"]}
        assert (await api.put("default", seen, description="on top of it")).status == 412
        assert (await api.delete("default", headers=seen)).status == 412
        _parts(api).feed.follow()
        await eventually(lambda: _parts(api).feed.epoch not in read.headers["ETag"])
        now = {"If-Match": (await api.get("/api/agents/default")).headers["ETag"]}
        assert (await api.put("default", now, description="on top of it")).status == 200


async def test_the_snapshot_names_its_position(quiet: Api) -> None:
    """A snapshot's revision, epoch and change id can be resumed from."""
    await quiet.put("default", description="one")
    snapshot = (await quiet.get("/api/snapshot")).json
    assert snapshot["change_id"] == _parts(quiet).feed.held.change_id
    position = {"since": snapshot["revision"], "epoch": snapshot["epoch"]}
    async with quiet.stream(**position, change_id=snapshot["change_id"]) as socket:
        assert (await socket.frame())["revision"] == snapshot["revision"]
        await quiet.put("default", description="two")
        assert (await socket.next())["revision"] == snapshot["revision"] + 1


async def test_old_rows_get_ids(tmp_path: Path, database_url: str) -> None:
    """A database from before there were ids gets one for each change, and its state names them."""

    def make_old(connection: Connection) -> None:
        config = _config(connection)
        migration = ScriptDirectory.from_config(config).get_revision("0005")
        command.upgrade(config, str(migration.down_revision))
        for revision in (3, 4, 5):
            connection.execute(
                text(
                    "INSERT INTO changes (revision, type, agent_id, agent, was_default, actor,"
                    " created_at) VALUES (:revision, 'agent_created', 'a', '{}', FALSE, 'x',"
                    " CURRENT_TIMESTAMP)"
                ),
                {"revision": revision},
            )
        connection.execute(text("UPDATE state SET revision = 5, floor = 2"))

    database = Database(database_url)
    await database.open()
    await database.run(make_old)
    await database.close()
    async with _served(tmp_path / "data", database_url, **QUIET) as api:
        ids = await ids_of(_parts(api).database)
        # The default agent is taken over as revision 6.
        assert sorted(ids) == [3, 4, 5, 6]
        assert len(set(ids.values())) == 4
        assert {len(each) for each in ids.values()} == {16}
        names = select(STATE.c.head_id, STATE.c.before_id, STATE.c.floor_id)
        state = await _parts(api).database.read(lambda c: c.execute(names).one())
        assert (state.head_id, state.before_id) == (ids[6], ids[5])
        assert len(state.floor_id) == 16
        assert (await api.put("default", description="after")).status == 200
