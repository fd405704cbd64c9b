"""Fault 19: two writers at once: two increments, and one of them 412 if it sent If-Match."""

from __future__ import annotations

import asyncio

import aiohttp

from tests.support.faults.site import Operator, Site
from tests.support.faults.subscriber import subscribers
from tests.support.servers import InLoopServer, eventually


async def started(site: Site) -> list[InLoopServer]:
    """Two replicas, or the one that SQLite allows."""
    servers = [site.in_loop(n) for n in range(1 if site.engine == "sqlite" else 2)]
    for server in servers:
        await server.start()
    return servers


async def test_two_writers_at_once(site: Site, http: aiohttp.ClientSession) -> None:
    """Both are done, one after the other; neither overwrites what the other one set."""
    servers = await started(site)
    try:
        a = Operator(http, servers[0].url, site.admin_token)
        b = Operator(http, servers[-1].url, site.admin_token)
        async with subscribers(
            4, lambda n: servers[n % len(servers)].url, site.backend_token
        ) as subs:
            await eventually(lambda: all(s.reached(0) for s in subs))
            revision = await a.create("billing")
            for n in range(10):
                # Two fields of one agent: a lost update would put one of them back.
                got = await asyncio.gather(
                    a.set("billing", llm_model=f"m{n}"), b.set("billing", llm_timeout=n + 1)
                )
                assert sorted(got) == [revision + 1, revision + 2]
                revision += 2
                status, _, said = await a.ask("GET", f"/api/agents?min_revision={revision}")
                assert status == 200
                config = next(x for x in said["agents"] if x["agent_id"] == "billing")
                assert (config["llm_model"], config["llm_timeout"]) == (f"m{n}", n + 1)
            await eventually(lambda: all(s.reached(revision) for s in subs))
    finally:
        for server in servers:
            await server.stop()


async def test_two_writers_with_if_match(site: Site, http: aiohttp.ClientSession) -> None:
    """Both say which revision they saw: one is done, the other one 412, and one event is sent."""
    servers = await started(site)
    try:
        a = Operator(http, servers[0].url, site.admin_token)
        b = Operator(http, servers[-1].url, site.admin_token)
        async with subscribers(
            4, lambda n: servers[n % len(servers)].url, site.backend_token
        ) as subs:
            await eventually(lambda: all(s.reached(0) for s in subs))
            revision = await a.create("billing")
            for n in range(10):
                seen = {"If-Match": f'"{revision}"'}
                got = await asyncio.gather(
                    a.ask("PUT", "/api/agents/billing", {"llm_model": f"a{n}"}, **seen),
                    b.ask("PUT", "/api/agents/billing", {"llm_model": f"b{n}"}, **seen),
                )
                assert sorted(status for status, _, _ in got) == [200, 412]
                revision += 1
            await eventually(lambda: all(s.reached(revision) for s in subs))
            assert all(s.revision == revision for s in subs)
    finally:
        for server in servers:
            await server.stop()
