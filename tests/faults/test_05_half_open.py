"""Fault 5: half-open TCP in either direction: found by both ends, and nothing is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import aiohttp
import pytest

from slm.client.status import ClientStatus
from tests.support.faults.backends import backend, believes, is_live
from tests.support.faults.network import DOWN, UP, proxied
from tests.support.faults.site import Operator, Site
from tests.support.servers import eventually

PAUSE_SECONDS = 2.0
"""By how much a busy machine may be late."""

each_direction = pytest.mark.parametrize(
    "directions", [(UP,), (DOWN,), (UP, DOWN)], ids=["up", "down", "both"]
)


async def half_open(
    site: Site,
    http: aiohttp.ClientSession,
    directions: tuple[str, ...],
    ping: float,
    heartbeat: float,
    record: Callable[[str, object], None],
) -> None:
    found_within = 2 * ping  # the interval, and the time to answer
    server = site.in_loop(
        heartbeat_seconds=heartbeat, ping_interval_seconds=ping, ping_timeout_seconds=ping
    )
    await server.start()
    try:
        operator = Operator(http, server.url, site.admin_token)
        before = await operator.create("billing")
        hub = server.running.services.hub
        timings = {"ping_interval_seconds": ping, "request_timeout_seconds": 0.5}
        async with (
            proxied(server.url) as proxy,
            backend(proxy.url, site.backend_token, timings) as client,
        ):
            await eventually(lambda: is_live(client) and client.revision >= before)
            assert len(hub.subscribers()) == 1
            stalled_at = time.monotonic()
            proxy.stall(*directions)
            after = await operator.set("billing", llm_model="new")

            async def found(dead: Callable[[], bool]) -> float:
                await eventually(dead, found_within + PAUSE_SECONDS)
                return round(time.monotonic() - stalled_at, 2)

            by_server, by_client = await asyncio.gather(
                found(lambda: not hub.subscribers()), found(lambda: not is_live(client))
            )
            record("server_found_seconds", by_server)
            record("client_found_seconds", by_client)
            await eventually(lambda: client.status is ClientStatus.DISCONNECTED)
            # Where only the way up is dead, the change still came down it.
            known = "new" if directions == (UP,) else "m"
            assert (await client.resolve("billing")).llm_model == known

            proxy.resume()
            await eventually(lambda: is_live(client) and client.revision >= after)
            assert await believes(client, await operator.agents())
    finally:
        await server.stop()


@each_direction
async def test_half_open(
    sqlite_site: Site,
    http: aiohttp.ClientSession,
    directions: tuple[str, ...],
    record_property: Callable[[str, object], None],
) -> None:
    """Bytes stop in one direction and nobody is told: both ends give the connection up in time."""
    await half_open(sqlite_site, http, directions, 0.4, 0.2, record_property)


@pytest.mark.soak
@each_direction
async def test_half_open_with_the_real_timings(
    sqlite_site: Site,
    http: aiohttp.ClientSession,
    directions: tuple[str, ...],
    record_property: Callable[[str, object], None],
) -> None:
    """By default both ends know within 40 s: a ping every 20 s, and 20 s to answer it."""
    await half_open(sqlite_site, http, directions, 20.0, 20.0, record_property)
