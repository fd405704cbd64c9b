"""A loop that is busy, and one that is not."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from functools import partial

from slm.client.runtime.idle import TURN_SECONDS, Quiet
from tests.support.servers import eventually


def work(seconds: float) -> None:
    """Hold the loop as a callback does."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


async def test_an_idle_loop_is_quiet_at_once() -> None:
    """Who asks in a loop with nothing to do is called back in its next turn, all together."""
    called: list[int] = []
    for number in range(3):
        Quiet.of_running_loop().then(partial(called.append, number), 60)
    assert called == []
    for _ in range(100):
        if not called:
            await asyncio.sleep(0)
    assert called == [0, 1, 2]


async def test_a_busy_loop_is_waited_for() -> None:
    """Nobody is called back between two long turns; once they end, everybody is."""
    called: list[float] = []
    quiet = Quiet.of_running_loop()
    quiet.then(lambda: called.append(time.monotonic()), 60)
    for _ in range(20):
        work(3 * TURN_SECONDS)
        await asyncio.sleep(0)
    assert called == []
    await eventually(lambda: called)


async def test_a_loop_that_stays_busy_is_not_waited_for_for_ever() -> None:
    """After the time that was given it is called back all the same."""
    called: list[float] = []
    began = time.monotonic()
    Quiet.of_running_loop().then(lambda: called.append(time.monotonic()), 0.1)
    while not called:
        work(3 * TURN_SECONDS)
        await asyncio.sleep(0)
    assert called[0] - began >= 0.1


def test_each_loop_has_its_own_and_is_not_held_by_it() -> None:
    """A loop that has ended is freed, though it was asked."""

    async def ask() -> tuple[weakref.ref[asyncio.AbstractEventLoop], weakref.ref[Quiet]]:
        quiet = Quiet.of_running_loop()
        assert Quiet.of_running_loop() is quiet
        called = asyncio.Event()
        quiet.then(called.set, 60)
        await called.wait()
        return weakref.ref(asyncio.get_running_loop()), weakref.ref(quiet)

    first, its_own = asyncio.run(ask())
    gc.collect()
    assert first() is None
    assert its_own() is None
