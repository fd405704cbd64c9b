"""Fault 13: the wall clock jumps a day either way: no storm, and no cache that never expires."""

from __future__ import annotations

import datetime as real
import time
from pathlib import Path

import aiohttp
import pytest

from slm.client.status import ClientStatus
from tests.support.faults.backends import backend, backends, believes, is_live
from tests.support.faults.site import Operator, Site
from tests.support.faults.subscriber import subscribers
from tests.support.servers import eventually

DAY = 86_400.0


class WallClock:
    """Moves what this process takes for the time of day; the monotonic clock goes on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shift = 0.0
        plain_time = time.time
        clock = self

        class AnyDatetime(type):
            def __instancecheck__(cls, instance: object) -> bool:
                return isinstance(instance, real.datetime)

        class Shifted(real.datetime, metaclass=AnyDatetime):
            @classmethod
            def now(cls, tz: real.tzinfo | None = None) -> Shifted:
                return cls.fromtimestamp(plain_time() + clock.shift, tz)

        monkeypatch.setattr(time, "time", lambda: plain_time() + clock.shift)
        for module in ("db.tables", "security.token_table", "security.token_store"):
            # Where the server takes the time of day from.
            monkeypatch.setattr(f"slm.server.{module}.datetime", Shifted)


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    return WallClock(monkeypatch)


@pytest.mark.parametrize("shift", [DAY, -DAY], ids=["ahead", "back"])
async def test_the_clock_jumps_while_all_is_well(
    site: Site, http: aiohttp.ClientSession, wall: WallClock, shift: float
) -> None:
    """Nobody reconnects, nothing is fetched anew, and changes come as before."""
    # A client lives for two of these without a frame: no less than a busy machine may pause us.
    server = site.in_loop(heartbeat_seconds=1.0)
    await server.start()
    try:
        operator = Operator(http, server.url, site.admin_token)
        before = await operator.create("billing")
        async with (
            subscribers(5, server.url, site.backend_token) as subs,
            backends(3, server.url, site.backend_token) as clients,
        ):
            await eventually(lambda: all(s.reached(before) for s in subs))
            await eventually(lambda: all(map(is_live, clients)))
            reads = server.running.services.counts.key_reads
            wall.shift = shift
            for n in range(5):
                after = await operator.set("billing", llm_model=f"m{n}")
                await eventually(lambda: all(s.reached(after) for s in subs))  # noqa: B023
            await eventually(lambda: all(c.revision >= after for c in clients))
            beats = [len(s.frames) for s in subs]
            await eventually(
                lambda: all(len(s.frames) > n + 1 for s, n in zip(subs, beats, strict=True))
            )
            assert all(map(is_live, clients))
            assert all(len(s.connections) == 1 for s in subs)
            assert server.running.services.counts.key_reads == reads
            assert (await operator.ask("GET", "/readyz"))[0] == 200
            truth = await operator.agents()
            for client in clients:
                assert await believes(client, truth)
    finally:
        await server.stop()


@pytest.mark.parametrize("shift", [DAY, -DAY], ids=["ahead", "back"])
async def test_a_value_expires_by_the_time_that_passed(
    sqlite_site: Site, wall: WallClock, shift: float
) -> None:
    """With the SLM away a value is not stale a day early, and is stale when its time is over."""
    server = sqlite_site.in_loop()
    await server.start()
    try:
        client = backend(server.url, sqlite_site.backend_token)
        client._cache.liveness.ttl_seconds = 1.0
        async with client:
            await eventually(lambda: is_live(client))
            wall.shift = shift
            await server.stop()
            await eventually(lambda: client.status is ClientStatus.DISCONNECTED)
            config = await client.resolve("default")
            assert 0 <= config.age < DAY / 2

            async def stale() -> bool:
                return (await client.resolve("default")).stale

            await eventually(stale)
    finally:
        await server.stop()


@pytest.mark.parametrize("shift", [DAY, -DAY], ids=["saved-in-the-past", "saved-in-the-future"])
async def test_a_snapshot_file_of_another_day(
    sqlite_site: Site, tmp_path: Path, wall: WallClock, shift: float
) -> None:
    """A file saved a day off is served as stale, and with a limit it ends as any value does."""
    file = tmp_path / "cache.json"
    server = sqlite_site.in_loop()
    await server.start()
    token = sqlite_site.backend_token
    async with backend(server.url, token, cache_file=file) as client:
        await eventually(lambda: is_live(client))
    await server.stop()
    assert file.exists()
    wall.shift = shift
    async with backend(server.url, token, cache_file=file, start_timeout=0.1) as client:
        config = await client.resolve("default")
        assert (config.step, config.stale) == ("agent", True)
        assert config.age >= 0
    limited = backend(server.url, token, cache_file=file, start_timeout=0.1, max_stale_seconds=0.3)
    limited._cache.liveness.ttl_seconds = 0.2
    async with limited:

        async def ended() -> bool:
            return (await limited.resolve("default")).step == "hardcoded"

        await eventually(ended)
