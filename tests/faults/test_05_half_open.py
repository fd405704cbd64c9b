"""Fault 5: half-open TCP in either direction: found by both ends, and nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Callable

import aiohttp
import pytest

from slm.client.retry import ClientStatus
from tests.faults.backends import backend, believes, is_live
from tests.faults.network import DOWN, UP, proxied
from tests.faults.site import Operator, Site
from tests.servers import eventually

PING = 0.4
FOUND_WITHIN = 2 * PING
"""The ping interval and the time to answer."""


@pytest.mark.parametrize("directions", [(UP,), (DOWN,), (UP, DOWN)], ids=["up", "down", "both"])
async def test_half_open(
    sqlite_site: Site,
    http: aiohttp.ClientSession,
    directions: tuple[str, ...],
    record_property: Callable[[str, object], None],
) -> None:
    """Bytes stop in one direction and nobody is told: both ends give the connection up."""
    server = sqlite_site.in_loop(
        heartbeat_seconds=0.2, ping_interval_seconds=PING, ping_timeout_seconds=PING
    )
    await server.start()
    try:
        operator = Operator(http, server.url, sqlite_site.admin_token)
        before = await operator.create("billing")
        hub = server.running.services.hub
        timings = {"ping_interval_seconds": PING, "request_timeout_seconds": 0.5}
        async with (
            proxied(server.url) as proxy,
            backend(proxy.url, sqlite_site.backend_token, timings) as client,
        ):
            await eventually(lambda: is_live(client) and client.revision >= before)
            assert len(hub.subscribers()) == 1
            stalled_at = time.monotonic()
            proxy.stall(*directions)
            after = await operator.set("billing", llm_model="new")
            await eventually(lambda: not hub.subscribers(), 20 * FOUND_WITHIN)
            record_property("server_found_seconds", time.monotonic() - stalled_at)
            await eventually(lambda: not is_live(client), 20 * FOUND_WITHIN)
            record_property("client_found_seconds", time.monotonic() - stalled_at)
            await eventually(lambda: client.status is ClientStatus.DISCONNECTED)
            # Where only the way up is dead, the change still came down it.
            known = "new" if directions == (UP,) else "m"
            assert (await client.resolve("billing")).llm_model == known

            proxy.resume()
            await eventually(lambda: is_live(client) and client.revision >= after)
            assert await believes(client, await operator.agents())
    finally:
        await server.stop()
