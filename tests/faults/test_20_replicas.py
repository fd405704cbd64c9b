"""Fault 20: three replicas, writes on all, each killed in turn, clients on all: none diverges."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

import aiohttp
import pytest

from tests.support.faults.backends import backend, believes, is_live
from tests.support.faults.network import proxied
from tests.support.faults.site import Operator, Site
from tests.support.faults.subscriber import subscribers
from tests.support.servers import ServerProcess, eventually

REPLICAS = 3


async def writes(operator: Operator, dice: random.Random, done: asyncio.Event, pause: float) -> int:
    """Create, change, delete and promote agents until told to stop; return how many were done.

    What fails with its replica is not tried again: whether it was done, the database knows.
    """
    made = 0
    while not done.is_set():
        name = f"agent-{dice.randrange(12)}"
        fields = {"llm_timeout": dice.randrange(1, 3600), "llm_model": f"m{made}"}
        if dice.random() < 0.05:
            fields["is_default"] = True
        body = {"agent_id": name, "name": name, "llm_provider": "ollama", "llm_model": "m"}
        try:
            if dice.random() < 0.15:
                status, _, _ = await operator.ask("DELETE", f"/api/agents/{name}")
            else:
                status, _, _ = await operator.ask("PUT", f"/api/agents/{name}", fields)
            if status == 404:
                status, _, _ = await operator.ask("POST", "/api/agents", body)
            # 409: it is the default, or somebody made it first.
            assert status in (200, 201, 204, 404, 409, 503), status
            made += status in (200, 201, 204)
        except (aiohttp.ClientError, TimeoutError):
            pass
        await asyncio.sleep(dice.uniform(0, 2 * pause))  # the pace of the changes
    return made


async def churn(
    site: Site,
    http: aiohttp.ClientSession,
    *,
    raw: int,
    sdk: int,
    kills: int,
    seconds_between_kills: float,
    pause: float,
    record: Callable[[str, object], None],
) -> None:
    dice = random.Random(20)
    servers: list[ServerProcess] = [site.process(n) for n in range(REPLICAS)]
    async with AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(server)
        urls = [server.url for server in servers]
        proxies = [await stack.enter_async_context(proxied(url)) for url in urls]
        clients = [backend(proxies[n % 3].url, site.backend_token) for n in range(sdk)]
        await asyncio.gather(*(stack.enter_async_context(client) for client in clients))
        # As behind a load balancer, each reconnect may lead to another replica.
        subs = await stack.enter_async_context(
            subscribers(raw, lambda _: dice.choice(urls), site.backend_token)
        )
        await eventually(lambda: all(s.connected for s in subs), 60, 0.05)
        done = asyncio.Event()
        writers = [
            asyncio.create_task(
                writes(Operator(http, url, site.admin_token), random.Random(n), done, pause)
            )
            for n, url in enumerate(urls)
        ]
        for turn in range(kills):
            await asyncio.sleep(seconds_between_kills)  # so long the writers have the replicas
            server = servers[turn % REPLICAS]
            server.kill()
            await server.start()
        await asyncio.sleep(seconds_between_kills / 2)
        done.set()
        made = sum(await asyncio.gather(*writers))
        ended = time.monotonic()

        operator = Operator(http, urls[0], site.admin_token)
        name = "the-last-one"
        last = await operator.create(name)
        await eventually(lambda: all(s.reached(last) for s in subs), 60, 0.05)
        await eventually(lambda: all(c.revision >= last and is_live(c) for c in clients), 60, 0.05)
        record("seconds_to_converge", round(time.monotonic() - ended, 2))
        record("changes", made)
        record("connections", sum(len(s.connections) for s in subs))
        committed = site.committed()
        assert {revision for _, revision in committed} == set(range(1, last + 1))
        truth = await operator.agents()
        assert name in truth
        for url in urls:
            other = Operator(http, url, site.admin_token)
            assert (await other.ask("GET", f"/api/agents?min_revision={last}"))[0] == 200
            assert await other.agents() == truth
        divergent = [s.name for s in subs if s.agents != truth]
        assert divergent == []
        for client in clients:
            assert await believes(client, truth)


@pytest.mark.timeout(240)
async def test_three_replicas_killed_in_turn(
    postgres_site: Site,
    http: aiohttp.ClientSession,
    record_property: Callable[[str, object], None],
) -> None:
    """200 clients, writes on all three, each killed -9 and restarted: every client is right."""
    await churn(
        postgres_site,
        http,
        raw=180,
        sdk=20,
        kills=3,
        seconds_between_kills=1.0,
        pause=0.05,
        record=record_property,
    )


@pytest.mark.soak
@pytest.mark.timeout(1500)
async def test_ten_minutes_with_a_kill_every_twenty_seconds(
    postgres_site: Site,
    http: aiohttp.ClientSession,
    record_property: Callable[[str, object], None],
) -> None:
    """300 clients, ten minutes of changes, a replica killed every 20 s: none diverges."""
    await churn(
        postgres_site,
        http,
        raw=250,
        sdk=50,
        kills=30,
        seconds_between_kills=20.0,
        pause=0.1,
        record=record_property,
    )
