"""Places for streams on their way to live: tokens share them, silent peers give them back."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm.errors import Overloaded
from slm.server.stream.openings import Opening, Openings
from tests.support.servers import eventually


async def test_one_token_has_half_of_the_places_and_the_others_get_in() -> None:
    """However many streams a token opens, another token's handshake waits for nobody."""
    openings = Openings(4, seconds=60)
    mine = [await openings.place("greedy") for _ in range(2)]
    waiting = asyncio.create_task(openings.place("greedy"))
    await asyncio.sleep(0)
    other = await asyncio.wait_for(openings.place("other"), 1)
    assert not waiting.done()
    mine[0].end()
    (await waiting).end()
    mine[1].end()
    other.end()
    assert len(openings) == 0
    assert not openings.is_busy


async def test_a_fleet_with_one_token_waits_and_is_not_refused() -> None:
    """A thousand handshakes of one token come in one after the other, with no 503."""
    openings = Openings(1000, seconds=60)

    async def opens() -> None:
        place = await openings.place("fleet")
        place.subscribed()
        await asyncio.sleep(0)
        place.end()

    await asyncio.gather(*(opens() for _ in range(1000)))
    assert len(openings) == 0


async def test_silent_peers_give_their_places_back_and_their_token_does_not_wait() -> None:
    """Whoever is let in and says nothing keeps its place a second; its token is then refused."""
    openings = Openings(4, seconds=0.05)
    silent = [await openings.place("silent") for _ in range(2)]
    await eventually(lambda: len(openings) == 0)
    again = [await openings.place("silent") for _ in range(2)]
    with pytest.raises(Overloaded):
        await openings.place("silent")
    assert not openings.is_busy
    for place in silent + again:
        place.end()


async def test_who_waits_too_long_is_told_to_come_back() -> None:
    """A handshake waits some seconds for a place, and leaves nothing behind."""
    openings = Openings(2, seconds=0.05)
    openings.silent_seconds = 60
    held = await openings.place("a")
    with pytest.raises(Overloaded):
        await openings.place("a")
    held.end()
    assert not openings.is_busy
    (await openings.place("a")).end()


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["open", "end", "leave"])), max_size=60
    ),
    st.integers(1, 6),
)
def test_no_place_is_lost_whoever_comes_and_goes(steps: list[tuple[str, str]], limit: int) -> None:
    """Never more places than there are, nobody over its half, and all are free in the end."""

    async def example() -> None:
        openings = Openings(limit, seconds=60)
        tasks: dict[str, list[asyncio.Task[Opening]]] = {"a": [], "b": [], "c": []}
        for key, step in steps:
            if step == "open":
                tasks[key].append(asyncio.create_task(openings.place(key)))
            elif tasks[key]:
                task = tasks[key].pop(0)
                if not task.done():
                    task.cancel()
                elif task.exception() is None:
                    task.result().end()
            for _ in range(3):
                await asyncio.sleep(0)
            assert len(openings) <= limit
            assert max(openings._held.values(), default=0) <= (limit + 1) // 2
        for task in [task for some in tasks.values() for task in some]:
            if not task.done():
                task.cancel()
            await asyncio.wait({task})
            if not task.cancelled() and task.exception() is None:
                task.result().end()
        await asyncio.sleep(0)
        assert len(openings) == 0
        assert not openings.is_busy

    asyncio.run(example())
