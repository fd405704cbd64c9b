"""Fault 8: lower, equal and higher revisions, a late update after a delete, doubled frames."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from tests.support.faults.backends import backend, backends, believes, is_live
from tests.support.faults.network import proxied
from tests.support.faults.scripted import Peer, changed, config, deleted, scripted_slm
from tests.support.faults.site import Operator, Site
from tests.support.servers import eventually


@pytest.mark.history(faults="comes after|is not what others saw")
async def test_only_what_is_newer_applies() -> None:
    """A lower or equal revision changes nothing; a delete is remembered; what is newer applies."""
    said = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.subscribed(5)
        await peer.say(
            changed("billing", 4, "lower"),
            changed("billing", 5, "equal"),
            changed("gone", 6, "there"),
            deleted("gone", 7),
            changed("gone", 6, "late"),
            changed("billing", 8, "newer"),
            changed("billing", 8, "the same again"),
            changed("billing", 3, "much lower"),
            changed("back", 9, "first"),
            deleted("back", 10),
            changed("back", 11, "again"),
        )
        said.set()
        await peer.live(11)

    agents = {
        "default": (1, config("d", is_default=True)),
        "billing": (5, config("snapshot")),
    }
    async with (
        scripted_slm(revision=5, agents=agents, scripts=[script]) as slm,
        backend(slm.url, "t") as client,
    ):
        seen: list[tuple[str, object]] = []
        client.on_change(lambda agent_id, c: seen.append((agent_id, c and c.llm_model)))
        await said.wait()
        await eventually(lambda: is_live(client) and client.revision == 11)
        assert (await client.resolve("billing")).llm_model == "newer"
        assert (await client.resolve("gone")).step == "default"
        assert (await client.resolve("back")).llm_model == "again"
        assert slm.snapshots == 1
        assert not {"lower", "equal", "late", "the same again", "much lower"} & {m for _, m in seen}


@pytest.mark.history(faults="revision 5 comes after 6")
async def test_a_deletion_is_remembered_across_a_reconnect() -> None:
    """A late update of a deleted agent, after a reconnect, does not bring it back."""
    holds_snapshot = asyncio.Event()

    async def first(peer: Peer) -> None:
        await peer.subscribed(5)
        await holds_snapshot.wait()
        await peer.say(deleted("billing", 6))

    async def second(peer: Peer) -> None:
        await peer.subscribed()
        await peer.say(changed("billing", 5, "late"), changed("other", 7, "m"))
        await peer.live(7)

    agents = {"default": (1, config("d", is_default=True)), "billing": (5, config("b"))}
    async with (
        scripted_slm(revision=5, agents=agents, scripts=[first, second]) as slm,
        backend(slm.url, "t") as client,
    ):
        await eventually(lambda: is_live(client))
        holds_snapshot.set()
        await eventually(lambda: client.revision == 7)
        assert [s.get("since") for s in slm.subscriptions] == [None, 6]
        assert (await client.resolve("billing")).step == "default"
        assert (await client.resolve("other")).llm_model == "m"


@pytest.mark.history(faults=r"revision (\d+) comes after \1|a second time")
async def test_every_frame_doubled(sqlite_site: Site, http: aiohttp.ClientSession) -> None:
    """A network that sends each frame twice: each change is told once and the cache is right."""
    server = sqlite_site.in_loop()
    await server.start()
    try:
        operator = Operator(http, server.url, sqlite_site.admin_token)
        async with proxied(server.url) as proxy:
            proxy.doubled = 1.0
            async with backends(3, proxy.url, sqlite_site.backend_token) as clients:
                told: list[tuple[str, object]] = []
                clients[0].on_change(lambda agent_id, c: told.append((agent_id, c and c.revision)))
                await eventually(lambda: all(map(is_live, clients)))
                await operator.create("billing")
                await operator.create("gone")
                for n in range(10):
                    await operator.set("billing", llm_model=f"m{n}")
                last = await operator.delete("gone")
                await eventually(lambda: all(c.revision >= last for c in clients))
                truth = await operator.agents()
                for client in clients:
                    assert await believes(client, truth)
                    assert (await client.resolve("gone")).step == "default"
                assert len(told) == len(set(told)) == 13
    finally:
        await server.stop()
