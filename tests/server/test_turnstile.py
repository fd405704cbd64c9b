"""A crowd of key reads is let in a few at a time, so that whoever writes need not wait for all."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from slm.server.agents.catalog import Catalog
from slm.server.api.middleware import Edge
from slm.server.metrics import Metrics
from slm.server.services import RequestCounts
from slm.server.tasks.turnstile import AT_A_TURN, MOST_A_TURN, Turnstile


async def turns(count: int) -> None:
    """Let the loop come round so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


@settings(max_examples=50, deadline=None)
@given(
    crowds=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    leaves=st.sets(st.integers(0, 60), max_size=10),
)
def test_all_get_through_in_order_and_few_in_a_turn(crowds: list[int], leaves: set[int]) -> None:
    """Nobody is lost, or overtaken by more than a turn, whoever else gives up waiting."""

    async def check() -> None:
        turnstile = Turnstile(clock=lambda: 0.0)
        through: list[tuple[int, int]] = []
        turn = 0

        async def one(number: int) -> None:
            await turnstile.enter()
            through.append((number, turn))

        tasks: list[asyncio.Task[None]] = []
        for crowd in crowds:
            tasks += [asyncio.create_task(one(len(tasks) + n)) for n in range(crowd)]
            await asyncio.sleep(0)
            turn += 1
            for number in leaves:
                if number < len(tasks):
                    tasks[number].cancel()
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            turn += 1
            assert turn < 1000
        numbers = [number for number, _ in through]
        for place, number in enumerate(numbers):
            # Whoever finds a place free is through at once; who was called needs one more step.
            assert sum(other > number for other in numbers[:place]) <= AT_A_TURN
        assert set(range(len(tasks))) - set(numbers) <= leaves
        at = [when for _, when in through]
        # Who comes in a turn and who waited for it are each a few.
        assert all(at.count(each) <= 2 * AT_A_TURN for each in at)
        await turns(2)
        assert len(turnstile) == 0
        assert turnstile._turn is None  # an idle server does not look again and again

    asyncio.run(check())


async def test_where_turns_are_long_more_get_through_in_each() -> None:
    """A server that is busy with something else does not leave the crowd waiting for ever."""
    now = 0.0

    async def through_in(count: int, seconds: float) -> int:
        nonlocal now
        turnstile = Turnstile(clock=lambda: now)
        tasks = [asyncio.ensure_future(turnstile.enter()) for _ in range(count)]
        taken = 0
        while not all(task.done() for task in tasks):
            now += seconds
            await asyncio.sleep(0)
            taken += 1
        return taken

    assert await through_in(320, 0.001) <= 320 / AT_A_TURN + 2
    assert await through_in(320, 0.020) <= 320 / 6 + 2
    assert 320 / MOST_A_TURN <= await through_in(320, 10) <= 320 / MOST_A_TURN + 3


async def test_a_write_passes_a_crowd_that_reads_keys() -> None:
    """Of five hundred backends that ask for a new key a few are answered before a later write."""
    order: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        order.append(scope["method"])
        await asyncio.sleep(0)

    edge = Edge(app, Catalog(), Metrics(), RequestCounts(), {})

    def ask(method: str, path: str) -> asyncio.Task[None]:
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode()}
        return asyncio.ensure_future(edge(scope, cast("Any", None), cast("Any", None)))

    asked = [ask("GET", "/api/agents/a/llm") for _ in range(300)]
    asked += [ask("GET", "/api/snapshot") for _ in range(200)]
    asked.append(ask("PUT", "/api/agents/a"))
    asked.append(ask("GET", "/api/agents/a"))
    await asyncio.gather(*asked)
    assert len(order) == len(asked)
    assert order.index("PUT") <= AT_A_TURN
