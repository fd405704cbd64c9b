"""A stream that has gone quiet: pinged, given up, and the server's own pings answered."""

from __future__ import annotations

import asyncio
import time

import pytest
from aiohttp import WSMsgType

from slm import SLMClient
from slm.client.runtime.background import following
from slm.client.status import ClientStatus
from slm.client.timings import Timings
from tests.support.faults.backends import TENTH
from tests.support.faults.scripted import Peer, scripted_slm
from tests.support.servers import eventually

INTERVAL = 0.3
TIMINGS = Timings(**(TENTH | {"ping_interval_seconds": INTERVAL}))
LONG = 3600.0
"""A heartbeat that is not waited for here."""


def stand_still(seconds: float) -> None:
    """Hold the thread in which the client hears and pings."""
    assert following.loop is not None
    following.loop.call_soon_threadsafe(time.sleep, seconds)


async def test_a_silent_slm_is_pinged_and_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """After an interval without a frame comes one ping; after another the client starts anew."""
    seen: list[tuple[float, WSMsgType]] = []

    async def dead(peer: Peer) -> None:
        await peer.subscribed(1, heartbeat=LONG)
        began = time.monotonic()
        async for message in peer.ws:
            seen.append((time.monotonic() - began, message.type))

    async def again(peer: Peer) -> None:
        await peer.subscribed(1)
        await peer.live(1)

    async with (
        scripted_slm(scripts=[dead, again], autoping=False) as slm,
        SLMClient(slm.url, token="t", timings=TIMINGS) as client,
    ):
        await eventually(lambda: len(slm.subscriptions) == 2)
        await eventually(lambda: client.status is ClientStatus.LIVE)
        pings = [after for after, kind in seen if kind is WSMsgType.PING]
        assert len(pings) == 1
        assert pings[0] >= INTERVAL * 0.9
        assert slm.handshakes[1] - slm.handshakes[0] >= 2 * INTERVAL
    assert f"no frame from the SLM within {2 * INTERVAL:g} s" in caplog.text


async def test_an_slm_that_answers_pings_is_kept() -> None:
    """A pong is as good as a message for the connection: it is pinged again, and not given up."""
    pings = 0

    async def answering(peer: Peer) -> None:
        nonlocal pings
        await peer.subscribed(1, heartbeat=LONG)
        async for message in peer.ws:
            if message.type is WSMsgType.PING:
                pings += 1
                await peer.ws.pong(message.data)

    async with (
        scripted_slm(scripts=[answering], autoping=False) as slm,
        SLMClient(slm.url, token="t", timings=TIMINGS) as client,
    ):
        await eventually(lambda: pings >= 4)
        assert client.status is ClientStatus.LIVE
        assert len(slm.subscriptions) == 1


@pytest.mark.parametrize("intervals", [1.9, 2.2])
async def test_a_ping_has_its_time_after_the_loop_stood_still(intervals: float) -> None:
    """However late the ping was sent, the SLM has an interval to answer it."""
    pings = 0

    async def slow(peer: Peer) -> None:
        nonlocal pings
        await peer.subscribed(1, heartbeat=LONG)
        await live.wait()
        stand_still(intervals * INTERVAL)
        async for message in peer.ws:
            if message.type is WSMsgType.PING:
                pings += 1
                await asyncio.sleep(INTERVAL / 2)  # as long as its answer takes
                await peer.ws.pong(message.data)

    live = asyncio.Event()
    async with (
        scripted_slm(scripts=[slow], autoping=False) as slm,
        SLMClient(slm.url, token="t", timings=TIMINGS),
    ):
        live.set()
        await eventually(lambda: pings >= 2)
        assert len(slm.subscriptions) == 1


async def test_the_slms_pings_are_answered() -> None:
    """The SLM too asks who is still there, and hears its own words back."""
    answers: asyncio.Queue[bytes] = asyncio.Queue()

    async def asking(peer: Peer) -> None:
        await peer.subscribed(1, heartbeat=LONG)
        await peer.ws.ping(b"there?")
        async for message in peer.ws:
            if message.type is WSMsgType.PONG:
                answers.put_nowait(message.data)

    async with (
        scripted_slm(scripts=[asking], autoping=False) as slm,
        SLMClient(slm.url, token="t", timings=Timings(**TENTH)),
    ):
        async with asyncio.timeout(10):
            assert await answers.get() == b"there?"


async def test_a_loop_that_stood_still_gives_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    """What came while this process could not listen is heard before the SLM is called silent."""

    async def speaking(peer: Peer) -> None:
        await peer.subscribed(1, heartbeat=LONG)
        await asyncio.wait_for(live.wait(), 10)
        await peer.say({"type": "heartbeat", "revision": 1, "behind": False})
        stand_still(3 * INTERVAL)
        for revision in (2, 3, 4):
            await peer.say({"type": "heartbeat", "revision": revision, "behind": False})
            await peer.ws.receive()  # the ack: there was time for the client to give up
        await peer.live(5)

    live = asyncio.Event()
    async with (
        scripted_slm(scripts=[speaking]) as slm,
        SLMClient(slm.url, token="t", timings=TIMINGS) as client,
    ):
        live.set()
        await eventually(lambda: client.revision == 5)
    assert len(slm.subscriptions) == 1
    assert "no frame from the SLM" not in caplog.text
