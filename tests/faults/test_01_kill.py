"""Fault 1: the server is killed -9 before a commit, after it, before the push, in a compaction."""

from __future__ import annotations

import asyncio
import contextlib

import aiohttp
import pytest

from tests.support.faults.site import Operator, Site
from tests.support.faults.subscriber import Subscriber, subscribers
from tests.support.servers import ServerProcess, eventually


async def killed_by_a_write(server: ServerProcess, operator: Operator, failpoint: str) -> None:
    """Start the server anew with a failpoint and change an agent; it dies of it."""
    await server.terminate()
    await server.start(failpoint=failpoint)
    with pytest.raises((aiohttp.ClientError, asyncio.TimeoutError)):
        await operator.set("billing", llm_model="fatal")
    assert await server.wait() == -9
    await server.start(failpoint=None)


async def settled(subs: list[Subscriber], revision: int) -> None:
    await eventually(lambda: all(s.reached(revision) for s in subs), 20)


async def test_killed_before_the_commit(site: Site, http: aiohttp.ClientSession) -> None:
    """Killed with its statements done and not committed: no row, no event, no revision used up."""
    async with site.process() as server:
        operator = Operator(http, server.url, site.admin_token)
        async with subscribers(5, server.url, site.backend_token) as subs:
            before = await operator.create("billing", llm_model="old")
            await settled(subs, before)
            await killed_by_a_write(server, operator, "before_commit:kill")

            assert (await operator.agents())["billing"]["llm_model"] == "old"
            after = await operator.set("billing", llm_model="new")
            assert after == before + 1
            await settled(subs, after)
            assert all(s.agents["billing"]["llm_model"] == "new" for s in subs)


@pytest.mark.parametrize("failpoint", ["after_commit:kill", "before_push:kill"])
async def test_killed_after_the_commit(
    site: Site, http: aiohttp.ClientSession, failpoint: str
) -> None:
    """Killed with the change committed and not pushed: it is there, all get it by resuming."""
    async with site.process() as server:
        operator = Operator(http, server.url, site.admin_token)
        async with subscribers(5, server.url, site.backend_token) as subs:
            before = await operator.create("billing", llm_model="old")
            await settled(subs, before)
            await killed_by_a_write(server, operator, failpoint)

            await settled(subs, before + 1)
            truth = await operator.agents()
            assert all(s.agents == truth for s in subs)
            assert all(s.agents["billing"]["llm_model"] == "fatal" for s in subs)


@pytest.mark.history(resyncs=["compacted"], committed=False)
async def test_killed_in_a_compaction(site: Site, http: aiohttp.ClientSession) -> None:
    """Killed with changes deleted and the floor not moved: both are as before, nothing is lost."""
    async with site.process() as server:
        operator = Operator(http, server.url, site.admin_token)
        async with subscribers(3, server.url, site.backend_token) as subs:
            await operator.create("billing")
            for n in range(20):
                head = await operator.set("billing", llm_model=f"m{n}")
            await settled(subs, head)
            await server.terminate()
            everything = site.committed()
            # The first compaction is at the start, so it dies before or after its ready line.
            with contextlib.suppress(AssertionError):
                await server.start(changes_keep=5, failpoint="in_compaction:kill")
            assert await server.wait() == -9
            assert site.rows("SELECT revision, floor FROM state") == [(head, 0)]
            assert site.committed() == everything

            await server.start(failpoint=None)
            after = await operator.set("billing", llm_model="new")
            assert after == head + 1
            await settled(subs, after)
            async with subscribers(1, server.url, site.backend_token) as late:
                late[0].epoch, late[0].revision = subs[0].epoch, 2
                await settled(late, after)
        await server.terminate()
        truth = everything | site.committed()
        assert [one.violations(committed=truth) for one in subs] == [[], [], []]
        assert site.rows("SELECT floor FROM state") == [(after - 5,)]
        assert site.rows("SELECT min(revision) FROM changes") == [(after - 4,)]
