"""The feed is told of what its own server commits; what that must not change."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from slm.server import failpoints
from slm.server.agents.changes import CommittedChange, Written
from tests.support.raw import Api
from tests.support.servers import InLoopServer, eventually, running_server
from tests.support.store import KEY


async def test_every_change_once_whichever_look_is_first(admin: Api, server: InLoopServer) -> None:
    """Looks after commits and looks of the feed's own overlap, and no change comes twice."""
    feed = server.running.services.feed
    async with admin.stream() as socket:
        assert (await socket.next())["type"] == "subscribed"
        stop = asyncio.Event()

        async def look_all_the_time() -> None:
            while not stop.is_set():
                feed.wake()
                await asyncio.sleep(0)

        looking = asyncio.create_task(look_all_the_time())

        async def write(name: str) -> None:
            await admin.create(name)
            for turn in range(25):
                await admin.put(name, llm_model=f"m{turn}")

        before = feed.position
        await asyncio.gather(*(write(f"agent-{number}") for number in range(4)))
        frames = await socket.until(before + 104)
        stop.set()
        await looking
    changes = [frame["revision"] for frame in frames if frame["type"] != "heartbeat"]
    assert changes == list(range(before + 1, before + 105))


async def test_a_feed_that_cannot_be_told_harms_no_write(admin: Api, server: InLoopServer) -> None:
    """The write is durable and answered; the feed finds it by itself."""
    services = server.running.services

    def failing(_: Written) -> None:
        raise RuntimeError("not told")

    services.registry.committed = failing
    answer = await admin.create("alpha")
    assert answer.status == 201
    assert "SLM-Stale" not in answer.headers
    await eventually(lambda: services.catalog.get("alpha") is not None)


async def test_what_a_feed_is_told_is_what_every_other_reads(
    tmp_path: Path, database_url: str, session: aiohttp.ClientSession
) -> None:
    """Told or read, a change is the same to the last field, or two replicas would differ."""
    async with running_server(
        tmp_path / "data", database_url=database_url, encryption_keys=KEY
    ) as server:
        services = server.running.services
        told: list[CommittedChange] = []
        tell = services.registry.committed
        assert tell is not None

        def noted(written: Written) -> None:
            told.extend(written.changes)
            tell(written)

        services.registry.committed = noted
        before = services.feed.position
        admin = Api(server, session, server.admin_token)
        await admin.create("alpha", llm_temperature=0.1, llm_options={"seed": 1, "top_p": 1.0})
        await admin.create("beta", name="Ünïcode \U0001f41d", llm_timeout=7, llm_api_key="sk-one")
        await admin.put("alpha", llm_temperature=1, llm_options={"z": [1, None, {}], "a": 1e-7})
        await admin.put("alpha", is_default=True)
        await admin.put("beta", llm_endpoint="https://two.example/v1")
        await admin.put("default", is_active=False)
        await admin.delete("beta")
        head = services.feed.position
        page = await services.feed.read(before, 100, upto=head)
        assert [change.revision for change in told] == list(range(before + 1, head + 1))
        assert told == list(page.changes)
        # 1, 1.0 and true are equal, and not the same.
        as_text = [change.agent.model_dump_json() for change in told]
        assert as_text == [change.agent.model_dump_json() for change in page.changes]


async def test_steady_writes_do_not_keep_the_feed_looking(
    admin: Api, server: InLoopServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look that a write overtakes is over: what is passed on already is not read again."""
    services = server.running.services
    feed = services.feed
    names = [f"agent-{number}" for number in range(4)]
    for name in names:
        await admin.create(name)
    look, looks = feed._poll, 0

    async def counted() -> None:
        nonlocal looks
        looks += 1
        await look()

    monkeypatch.setattr(feed, "_poll", counted)
    begun, before = asyncio.get_running_loop().time(), feed.position

    async def write(name: str) -> None:
        for turn in range(25):
            await admin.put(name, llm_model=f"m{turn}")

    feed.wake()
    await asyncio.gather(*map(write, names))
    polls = (asyncio.get_running_loop().time() - begun) / services.settings.poll_interval_seconds
    assert feed.position == before + 100
    assert 1 <= looks <= 2 + polls


async def test_an_armed_failpoint_leaves_the_way_as_it_is(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """With a failpoint armed, a commit still reaches the streams without a look at the database."""
    async with running_server(tmp_path, poll_interval_seconds=60) as server:
        admin = Api(server, session, server.admin_token)
        feed = server.running.services.feed
        looks = feed._polls
        failpoints.arm("in_compaction:raise", testing=True)
        try:
            async with admin.stream() as socket:
                written = await admin.put("default", llm_model="told")
                assert (await socket.until(written.revision))[-1]["config"]["llm_model"] == "told"
        finally:
            failpoints.arm(None, testing=True)
        assert feed._polls == looks


async def test_a_hold_before_the_push_holds_the_short_way_too(
    tmp_path: Path, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a feed is told is held as long as what it reads, and holds no other transaction."""
    async with running_server(tmp_path, poll_interval_seconds=60) as server:
        admin = Api(server, session, server.admin_token)
        services = server.running.services

        async def no_look() -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(services.feed, "_poll", no_look)
        loop, before = asyncio.get_running_loop(), services.feed.position
        failpoints.arm("before_push:hold:0.4", testing=True)
        try:
            began = loop.time()
            writing = asyncio.create_task(admin.put("default", llm_model="held"))
            while (await services.feed.horizon()).revision == before:
                pass
            assert loop.time() - began < 0.4
            assert services.feed.position == before
            await eventually(lambda: services.feed.position == before + 1)
            assert loop.time() - began >= 0.4
            assert (await writing).status == 200
        finally:
            failpoints.arm(None, testing=True)
