"""One change to N subscribers: until the last has the frame, beside a C loop on the same sockets.

The server is on one core, the subscriber farm on the other. In each round the C `send()` loop, a
real change (PUT, commit, feed, hub) and the naive loop take their turn on the same connections; a
ratio is taken round by round, so that what disturbs the machine for a while disturbs both.
"""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks import machine, stats
from benchmarks.native import Farm
from benchmarks.run import Bench, Options, say
from benchmarks.slm_server import BenchServer

FULL_SIZES = (100, 1_000, 5_000, 10_000)
QUICK_SIZES = (100, 1_000)
WARM_UP = 2


async def measure(options: Options) -> dict[str, Any]:
    sizes = QUICK_SIZES if options.quick else FULL_SIZES
    rounds = 5 if options.quick else 9
    per_size: dict[str, list[dict[str, Any]]] = {str(size): [] for size in sizes}
    for repeat in range(options.repeats):
        for size, taken in (await _one(sizes, rounds)).items():
            say(f"fan-out {repeat + 1}: {size}", taken)
            per_size[str(size)].append(taken)
    return {"sizes": sizes, "rounds": rounds, "per_size": per_size}


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


async def _rounds(server: BenchServer, farm: Farm, size: int, rounds: int) -> dict[str, Any]:
    """Milliseconds to the last subscriber: medians over the rounds of this repeat."""
    floor, change, naive, push, put, first = [], [], [], [], [], []
    pause = 0.03 + size * 5e-6
    for number in range(WARM_UP + rounds):
        await farm.expect()
        revision = await server.put("agent-00001", llm_max_tokens=size + number)
        received = await farm.received()
        committed = (await server.commit_times())[revision]
        await asyncio.sleep(pause)
        if received.count != size:
            raise RuntimeError(f"{received.count} of {size} got the change")
        floor_last = await _turn(server, farm, "floor")
        await asyncio.sleep(pause)
        naive_last = await _turn(server, farm, "naive")
        await asyncio.sleep(pause)
        if number < WARM_UP:
            continue
        change.append((received.last - committed) / 1e6)
        push.append((received.last - received.first) / 1e6)
        first.append((received.first - committed) / 1e6)
        put.append((received.p99 - committed) / 1e6)
        floor.append(floor_last)
        naive.append(naive_last)
    return {
        "floor_ms": stats.quantile(floor, 0.5),
        "change_ms": stats.quantile(change, 0.5),
        "naive_ms": stats.quantile(naive, 0.5),
        "first_ms": stats.quantile(first, 0.5),
        "p99_ms": stats.quantile(put, 0.5),
        "change_ratio": stats.quantile(stats.ratios(change, floor), 0.5),
        "push_ratio": stats.quantile(stats.ratios(push, floor), 0.5),
        "naive_ratio": stats.quantile(stats.ratios(naive, floor), 0.5),
    }


async def _turn(server: BenchServer, farm: Farm, way: str) -> float:
    """Return how many ms it took until the last one had a frame that was sent in this way."""
    await farm.expect()
    sent = await server.ask(way)
    received = await farm.received()
    if sent["refused"]:
        raise RuntimeError(f"{sent['refused']} sockets did not take the frame")
    milliseconds: float = (received.last - sent["begin"]) / 1e6
    return milliseconds


BENCH = Bench("fanout", "One change to many subscribers", measure)
