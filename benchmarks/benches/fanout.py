"""One change to N subscribers: until the last has the frame, beside a C loop on the same sockets.

The server is on one core, the subscriber farm on the other. In each round the C `send()` loop, a
real change (PUT, commit, feed, hub) and the naive loop take their turn on the same connections; a
ratio is taken round by round, so that what disturbs the machine for a while disturbs both.

Those subscribers only listen, so that the loops are compared on how they write. What backends cost
that name themselves and ack every change, as the SDK's do, is measured beside it on servers of its
own: the time in such rounds, and the memory once the server holds as many acks as it keeps.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import machine, stats
from benchmarks.harness.run import Bench, Options, say
from benchmarks.harness.slm_server import BenchServer
from benchmarks.native import Farm, Received

FULL_SIZES = (100, 1_000, 5_000, 10_000)
QUICK_SIZES = (100, 1_000)
WARM_UP = 2
ACKING_SIZE = 1_000
"""Acking backends are measured at this size and at the largest."""

ACKED_CHANGES = 1_300
"""More acks of a backend than the server keeps."""

BURST = 20
"""So many changes are made at once before their acks are waited for."""


async def measure(options: Options) -> dict[str, Any]:
    sizes = QUICK_SIZES if options.quick else FULL_SIZES
    rounds = 5 if options.quick else 9
    per_size: dict[str, list[dict[str, Any]]] = {str(size): [] for size in sizes}
    for repeat in range(options.repeats):
        one = await _one(sizes, rounds)
        for size, taken in (await _acking(sizes, rounds)).items():
            one[size] |= taken
        for size, taken in one.items():
            say(f"fan-out {repeat + 1}: {size}", taken)
            per_size[str(size)].append(taken)
    memory_acked = []
    if not options.quick:
        # Once: it takes longer than all else in a repeat, and noise is not in memory.
        memory_acked.append(await _memory_acked(ACKING_SIZE))
        say("fan-out, acked", {"bytes_a_subscriber": memory_acked[0]})
    return {
        "sizes": sizes,
        "rounds": rounds,
        "per_size": per_size,
        "acking_size": ACKING_SIZE,
        "acked_changes": ACKED_CHANGES,
        "memory_acked": memory_acked,
    }


async def _one(sizes: tuple[int, ...], rounds: int) -> dict[int, dict[str, Any]]:
    """One server for what a subscriber costs, and one for the rounds; their number grows."""
    server_core, farm_core = machine.cores()
    found: dict[int, dict[str, Any]] = {}
    async with BenchServer(core=server_core) as server:
        empty = (await server.ask("memory"))["rss_bytes"]
        async with Farm(server.port, server.backend_token, max(sizes), farm_core) as farm:
            connected = 0
            for size in sizes:
                seconds = await farm.grow(size)
                await server.live(size)
                memory = (await server.ask("memory"))["rss_bytes"] - empty
                found[size] = {
                    "bytes_a_subscriber": memory / size,
                    "accepted_a_second": (size - connected) / seconds,
                }
                connected = size
    async with (
        BenchServer(core=server_core) as server,
        Farm(server.port, server.backend_token, max(sizes), farm_core) as farm,
    ):
        for size in sizes:
            await farm.grow(size)
            await server.live(size)
            found[size] |= await _rounds(server, farm, size, rounds)
    return found


async def _acking(sizes: tuple[int, ...], rounds: int) -> dict[int, dict[str, Any]]:
    """One server whose subscribers all ack: what a change takes then, beside the C loop."""
    server_core, farm_core = machine.cores()
    found: dict[int, dict[str, Any]] = {}
    async with (
        BenchServer(core=server_core) as server,
        Farm(server.port, server.backend_token, max(sizes), farm_core, acks=True) as farm,
    ):
        for size in sorted({ACKING_SIZE, max(sizes)}):
            await farm.grow(size)
            await server.live(size)
            await server.acked(size)
            found[size] = await _acking_rounds(server, farm, size, rounds)
    return found


async def _memory_acked(size: int) -> float:
    """Return the bytes of an acking subscriber after more changes than acks are kept of.

    The server makes as many changes before anyone is connected, so that what it keeps of changes
    and of writes is in the memory that it is compared with.
    """
    server_core, farm_core = machine.cores()
    async with BenchServer(core=server_core) as server:
        for first in range(0, ACKED_CHANGES, BURST):
            await _burst(server, first)
        empty: int = (await server.ask("memory"))["rss_bytes"]
        async with Farm(server.port, server.backend_token, size, farm_core, acks=True) as farm:
            await farm.grow(size)
            await server.live(size)
            for first in range(0, ACKED_CHANGES, BURST):
                await _burst(server, first)
                await server.acked(size)
            if (fewest := (await server.ask("acks"))["fewest"]) < ACKED_CHANGES:
                raise RuntimeError(f"a subscriber acked {fewest} of {ACKED_CHANGES} changes")
            memory: int = (await server.ask("memory"))["rss_bytes"]
    return (memory - empty) / size


async def _burst(server: BenchServer, first: int) -> None:
    """Make changes at once, so that their frames, and then their acks, travel together."""
    numbers = range(first, first + BURST)
    await asyncio.gather(*(server.put("agent-00001", llm_max_tokens=1 + n) for n in numbers))


async def _rounds(server: BenchServer, farm: Farm, size: int, rounds: int) -> dict[str, Any]:
    """Milliseconds to the last subscriber: medians over the rounds of this repeat."""
    floor, change, naive, push, put, first = [], [], [], [], [], []
    farm_late, farm_cpu = [], []
    pause = _pause(size)
    for number in range(WARM_UP + rounds):
        committed, received = await _change(server, farm, size, number)
        await asyncio.sleep(pause)
        floor_turn = await _turn(server, farm, "floor")
        await asyncio.sleep(pause)
        naive_turn = await _turn(server, farm, "naive")
        await asyncio.sleep(pause)
        if number < WARM_UP:
            continue
        change.append((received.last - committed) / 1e6)
        push.append((received.last - received.first) / 1e6)
        first.append((received.first - committed) / 1e6)
        put.append((received.p99 - committed) / 1e6)
        floor.append(floor_turn.milliseconds)
        naive.append(naive_turn.milliseconds)
        farm_late.append(floor_turn.farm_late_ms)
        farm_cpu.append(floor_turn.farm_cpu)
    return {
        "floor_ms": stats.quantile(floor, 0.5),
        "change_ms": stats.quantile(change, 0.5),
        "naive_ms": stats.quantile(naive, 0.5),
        "first_ms": stats.quantile(first, 0.5),
        "p99_ms": stats.quantile(put, 0.5),
        "change_ratio": stats.quantile(stats.ratios(change, floor), 0.5),
        "push_ratio": stats.quantile(stats.ratios(push, floor), 0.5),
        "naive_ratio": stats.quantile(stats.ratios(naive, floor), 0.5),
        "farm_late_ms": stats.quantile(farm_late, 0.5),
        "farm_cpu": stats.quantile(farm_cpu, 0.5),
    }


async def _acking_rounds(server: BenchServer, farm: Farm, size: int, rounds: int) -> dict[str, Any]:
    """The same of a change that everyone acks; the C loop's turn comes when all acks are in."""
    floor, change = [], []
    pause = _pause(size)
    for number in range(WARM_UP + rounds):
        committed, received = await _change(server, farm, size, number)
        await server.acked(size)
        await asyncio.sleep(pause)
        # It sends the change that was acked, and nobody acks that twice.
        floor_turn = await _turn(server, farm, "floor")
        await asyncio.sleep(pause)
        if number >= WARM_UP:
            change.append((received.last - committed) / 1e6)
            floor.append(floor_turn.milliseconds)
    return {
        "acking_ms": stats.quantile(change, 0.5),
        "acking_floor_ms": stats.quantile(floor, 0.5),
        "acking_ratio": stats.quantile(stats.ratios(change, floor), 0.5),
    }


def _pause(size: int) -> float:
    """Return for how many seconds a round lets everything settle."""
    return 0.03 + size * 5e-6


async def _change(server: BenchServer, farm: Farm, size: int, number: int) -> tuple[int, Received]:
    """Make one change; return when it was committed and when everyone got it."""
    await farm.expect()
    revision = await server.put("agent-00001", llm_max_tokens=size + number)
    received = await farm.received()
    if received.count != size:
        raise RuntimeError(f"{received.count} of {size} got the change")
    return (await server.commit_times())[revision], received


@dataclass(frozen=True)
class _Turn:
    """One frame sent to everyone by a loop.

    Attributes:
        milliseconds: from the loop's begin until the last subscriber had the frame.
        farm_late_ms: how long after the loop's end that was: what the farm was behind.
        farm_cpu: the share of that time in which the farm was busy, 0 to 1.
    """

    milliseconds: float
    farm_late_ms: float
    farm_cpu: float


async def _turn(server: BenchServer, farm: Farm, way: str) -> _Turn:
    """Have a frame sent to everyone in this way."""
    await farm.expect()
    sent = await server.ask(way)
    received = await farm.received()
    if sent["refused"]:
        raise RuntimeError(f"{sent['refused']} sockets did not take the frame")
    elapsed = received.last - sent["begin"]
    return _Turn(elapsed / 1e6, (received.last - sent["end"]) / 1e6, received.cpu_ns / elapsed)


BENCH = Bench("fanout", "One change to many subscribers", measure)
