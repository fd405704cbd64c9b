"""Whether cost grows with the number of agents: a PUT and a resolve with 10 to 100,000 of them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from benchmarks.benches.reads import read_ns
from benchmarks.harness import machine, stats
from benchmarks.harness.run import Bench, Options, say
from benchmarks.harness.seed import agent_id
from benchmarks.harness.slm_server import BenchServer
from slm import SLMClient

FULL_SIZES = (10, 100, 1_000, 10_000, 100_000)
QUICK_SIZES = (10, 10_000)
WARM_UP = 20
PASSES = 7
"""Resolving is measured so often in a repeat, as in the bench of reads; its median is kept."""


async def measure(options: Options) -> dict[str, Any]:
    with machine.pinned(machine.cores()[1]):
        return await _measure(options)


async def _measure(options: Options) -> dict[str, Any]:
    sizes = QUICK_SIZES if options.quick else FULL_SIZES
    puts = 100 if options.quick else 300
    found: dict[str, dict[str, list[float]]] = {str(size): {} for size in sizes}
    # Interleaved: all servers are up at once, idle but for the one whose turn it is.
    servers = [BenchServer(agents=size, core=machine.cores()[0]) for size in sizes]
    clients: list[SLMClient] = []
    try:
        for server in servers:
            await server.__aenter__()
            token = server.backend_token.read_text().strip()
            clients.append(SLMClient(server.url, token, start_timeout=120))
            await clients[-1].connect()
        for repeat in range(options.repeats):
            turn = list(zip(sizes, servers, clients, strict=True))
            # Up and down in turn, so that what gets worse with time is not taken for growth.
            for size, server, client in turn[::-1] if repeat % 2 else turn:
                wanted = agent_id(size // 2)
                taken = {
                    "put_p50_ms": await _put_ms(server, wanted, puts),
                    "resolve_ns": await _resolve_ns(client, wanted),
                }
                say(f"growth {repeat + 1}: {size}", taken)
                for name, value in taken.items():
                    found[str(size)].setdefault(name, []).append(value)
    finally:
        for client in clients:
            await client.close()
        for server in servers:
            await server.__aexit__(None, None, None)
    return {"sizes": sizes, "per_size": found}


async def _put_ms(server: BenchServer, wanted: str, count: int) -> float:
    took = []
    for _ in range(WARM_UP + count):
        begin = time.perf_counter()
        await server.put(wanted, llm_max_tokens=time.monotonic_ns() // 1000 % 2**30)
        took.append((time.perf_counter() - begin) * 1e3)
        await asyncio.sleep(0.001)
    return stats.quantile(took[WARM_UP:], 0.5)


async def _resolve_ns(client: SLMClient, wanted: str) -> float:
    passes = []
    for _ in range(PASSES):
        passes.append(await read_ns(client.resolve, wanted))
        # The stream's own work gets its turn between the passes.
        await asyncio.sleep(0.01)
    return stats.quantile(passes, 0.5)


BENCH = Bench("growth", "Cost against the number of agents", measure)
