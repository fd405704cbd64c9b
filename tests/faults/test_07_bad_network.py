"""Fault 7: 75±50 ms delay, half of the connections dropped, changes all the while: all converge."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

import aiohttp
import pytest

from tests.support.faults.backends import backends, believes, is_live
from tests.support.faults.network import proxied
from tests.support.faults.site import Operator, Site
from tests.support.faults.subscriber import subscribers
from tests.support.servers import eventually


async def through_a_bad_network(
    site: Site,
    http: aiohttp.ClientSession,
    seconds: float,
    drop_after_seconds: float,
    record: Callable[[str, object], None],
) -> None:
    # The network is the fault here; a busy disk may take its time.
    server = site.in_loop(heartbeat_seconds=0.5, database_timeout_seconds=5.0)
    await server.start()
    try:
        operator = Operator(http, server.url, site.admin_token)
        dice = random.Random(7)
        async with proxied(server.url) as proxy:
            proxy.delay_seconds = (0.025, 0.125)
            proxy.dropped = 0.5
            proxy.drop_after_seconds = drop_after_seconds
            async with (
                subscribers(10, proxy.url, site.backend_token) as subs,
                backends(10, proxy.url, site.backend_token) as clients,
            ):
                end = time.monotonic() + seconds
                made = 0
                revision = await operator.create("billing")
                while time.monotonic() < end:
                    name = f"agent-{dice.randrange(6)}"
                    if name not in await operator.agents():
                        revision = await operator.create(name)
                    elif dice.random() < 0.2:
                        revision = await operator.delete(name)
                    else:
                        revision = await operator.set(name, llm_timeout=1 + made)
                    made += 1
                    await asyncio.sleep(dice.uniform(0, 0.04))  # the pace of the changes
                ended = time.monotonic()
                await eventually(lambda: all(s.reached(revision) for s in subs), 60)
                await eventually(lambda: all(c.revision >= revision for c in clients), 60)
                await eventually(lambda: all(map(is_live, clients)), 60)
                record("seconds_to_converge", round(time.monotonic() - ended, 2))
                record("changes", made)
                record("connections", len(proxy.passages))
                truth = await operator.agents()
                assert all(s.agents == truth for s in subs)
                for client in clients:
                    assert await believes(client, truth)
            assert any(len(s.connections) > 1 for s in subs)
    finally:
        await server.stop()


async def test_bad_network(
    site: Site, http: aiohttp.ClientSession, record_property: Callable[[str, object], None]
) -> None:
    """Seconds of changes through such a network: every subscriber and backend is right after."""
    await through_a_bad_network(site, http, 4.0, 1.0, record_property)


@pytest.mark.soak
@pytest.mark.timeout(300)
async def test_bad_network_for_a_minute(
    site: Site, http: aiohttp.ClientSession, record_property: Callable[[str, object], None]
) -> None:
    """The same for the sixty seconds that it is meant to be."""
    await through_a_bad_network(site, http, 60.0, 10.0, record_property)
