"""How soon a client comes back: at once after a sound connection, ever later after none."""

from __future__ import annotations

import asyncio

import pytest

from slm import ClientStatus, SLMClient, Timings
from slm.client.sync.backoff import Backoff
from tests.support.faults.backends import TENTH
from tests.support.faults.scripted import Peer, config, scripted_slm
from tests.support.servers import InLoopServer, eventually


@pytest.fixture
def longest(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The longest that each wait might have been; none is really waited for so long."""
    waits: list[float] = []
    delay_after = Backoff.delay_after

    def noted(self: Backoff, error: BaseException) -> float:
        self._uniform = lambda low, high: high
        waits.append(delay_after(self, error))
        return min(waits[-1], 0.02)

    monkeypatch.setattr(Backoff, "delay_after", noted)
    return waits


async def test_a_balancer_that_ends_every_connection_costs_the_first_wait_each_time(
    server: InLoopServer, longest: list[float]
) -> None:
    """However often healthy connections are cut, the client's waits do not grow."""
    hub = server.running.services.hub
    loop = asyncio.get_running_loop()
    timings = Timings(**TENTH)
    async with SLMClient(server.url, token=server.backend_token, timings=timings) as client:
        for _ in range(6):
            await eventually(lambda: client.status is ClientStatus.LIVE)
            until = loop.time() + timings.healthy_seconds
            await eventually(lambda until=until: loop.time() > until)  # type: ignore[misc]
            for subscriber in hub.subscribers():
                subscriber.sink.abort()
            await eventually(lambda: client.status is not ClientStatus.LIVE)
        await eventually(lambda: client.status is ClientStatus.LIVE)
    assert longest == [timings.backoff_initial_seconds] * 6


async def test_a_server_that_accepts_and_drops_is_left_alone(longest: list[float]) -> None:
    """Being subscribed, and caught up for a moment, is not enough for the first wait."""

    async def drops(peer: Peer) -> None:
        await peer.subscribed(5)
        await eventually(lambda: client.status is ClientStatus.LIVE)

    agents = {"default": (1, config("d", is_default=True))}
    timings = Timings(**(TENTH | {"healthy_seconds": 60.0}))
    async with scripted_slm(revision=5, agents=agents, scripts=[drops]) as slm:
        client = SLMClient(slm.url, token="t", timings=timings)
        async with client:
            await eventually(lambda: len(longest) >= 5)
    first = timings.backoff_initial_seconds
    assert longest[:5] == pytest.approx([first * 2**n for n in range(5)])


async def test_a_server_that_does_not_bring_its_clients_up_to_date_is_left_alone(
    longest: list[float],
) -> None:
    """A connection on which the client was never caught up does not reset the backoff."""
    timings = Timings(**(TENTH | {"healthy_seconds": 0.05}))
    loop = asyncio.get_running_loop()

    async def behind(peer: Peer) -> None:
        await peer.subscribed(5)
        await peer.say({"type": "heartbeat", "revision": 5, "behind": True})
        until = loop.time() + 2 * timings.healthy_seconds
        await eventually(lambda: loop.time() > until)

    agents = {"default": (1, config("d", is_default=True))}
    async with (
        scripted_slm(revision=5, agents=agents, scripts=[behind]) as slm,
        SLMClient(slm.url, token="t", timings=timings, start_timeout=0.1),
    ):
        slm.agents = {}
        await eventually(lambda: len(longest) >= 4)
    first = timings.backoff_initial_seconds
    assert longest[1:4] == pytest.approx([first * 2**n for n in range(1, 4)])
