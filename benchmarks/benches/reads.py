"""What one read costs a backend while its SDK is live, beside what others charge for theirs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.harness import machine, stats
from benchmarks.harness.errors import Missing
from benchmarks.harness.run import Bench, Options, say
from benchmarks.harness.slm_server import BenchServer
from benchmarks.peers import readers
from slm import SLMClient

SLM_CALLS = 200_000


async def measure(options: Options) -> dict[str, Any]:
    with machine.pinned(machine.cores()[1]):
        return await _measure(options)


async def _measure(options: Options) -> dict[str, Any]:
    missing: dict[str, str] = {}
    peers: dict[str, readers.Reads] = {}
    for name, (_, prepare, _) in readers.PEERS.items():
        try:
            peers[name] = prepare()
        except Missing as error:
            missing[name] = str(error)
    taken: dict[str, list[float]] = {}
    passes = 3 if options.quick else 7
    async with BenchServer(agents=readers.COUNT, keys=True, core=machine.cores()[0]) as server:
        token = server.backend_token.read_text().strip()
        async with SLMClient(server.url, token) as client:
            if (await client.resolve(readers.WANTED)).stale:
                raise RuntimeError("the client is not live")
            awaited = readers.awaited_dict()
            for repeat in range(options.repeats):
                one: dict[str, list[float]] = {}
                for _ in range(passes):
                    for name, reads in peers.items():
                        calls = readers.PEERS[name][2]
                        begin = time.perf_counter()
                        reads(calls)
                        one.setdefault(name, []).append((time.perf_counter() - begin) / calls * 1e9)
                    begin = time.perf_counter()
                    await awaited(SLM_CALLS)
                    spent = (time.perf_counter() - begin) / SLM_CALLS * 1e9
                    one.setdefault("awaited dict", []).append(spent)
                    for name, call in (
                        ("resolve", client.resolve),
                        ("get_agent_config", client.get_agent_config),
                    ):
                        one.setdefault(name, []).append(await read_ns(call, readers.WANTED))
                    # The stream's own work gets its turn between the passes.
                    await asyncio.sleep(0.01)
                medians = {name: stats.quantile(values, 0.5) for name, values in one.items()}
                say(f"reads {repeat + 1}, ns", medians)
                for name, value in medians.items():
                    taken.setdefault(name, []).append(value)
            if (await client.resolve(readers.WANTED)).stale:
                raise RuntimeError("the client did not stay live")
    labels = {name: label for name, (label, _, _) in readers.PEERS.items()}
    return {"ns": taken, "labels": labels, "missing": missing, "values": readers.COUNT}


async def read_ns(call: Callable[[str], Awaitable[Any]], agent_id: str) -> float:
    """Return what one awaited call costs, the loop around it included."""
    rounds = range(SLM_CALLS)
    begin = time.perf_counter()
    for _ in rounds:
        await call(agent_id)
    return (time.perf_counter() - begin) / SLM_CALLS * 1e9


BENCH = Bench("reads", "What one read costs a backend", measure)
