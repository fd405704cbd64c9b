"""The feed is told of what its own server commits; what that must not change."""

from __future__ import annotations

import asyncio

from slm.server.registry import Written
from tests.server.raw import Api
from tests.servers import InLoopServer, eventually


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
