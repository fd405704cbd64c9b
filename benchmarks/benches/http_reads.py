"""GETs a second on one core, and what a broadcast does to them.

The server is on one core; a C load over 32 kept connections on the other. During the broadcasts the
load is at a fixed rate, and only the requests that were under way while a change was going out to
10,000 subscribers count.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import machine, stats
from benchmarks.harness.run import Bench, Options, say
from benchmarks.harness.slm_server import BenchServer
from benchmarks.native import Farm, http_load

CONNECTIONS = 32
GZIP = "Accept-Encoding: gzip"


async def measure(options: Options) -> dict[str, Any]:
    seconds = 1.0 if options.quick else 3.0
    loads: dict[str, list[dict[str, float]]] = {}
    during: list[dict[str, float]] = []
    subscribers = 1_000 if options.quick else 10_000
    for repeat in range(options.repeats):
        async with BenchServer(agents=1_000, keys=True, core=machine.cores()[0]) as server:
            for name, taken in (await _loads(server, seconds)).items():
                say(f"http {repeat + 1}: {name}", taken)
                loads.setdefault(name, []).append(taken)
            during.append(await _during_broadcasts(server, subscribers, seconds))
            say(f"http {repeat + 1}: during broadcasts", during[-1])
    return {
        "connections": CONNECTIONS,
        "subscribers": subscribers,
        "loads": loads,
        "during": during,
    }


async def _loads(server: BenchServer, seconds: float) -> dict[str, dict[str, float]]:
    async def get(
        path: str, *headers: str, connections: int = CONNECTIONS, not_modified: bool = False
    ) -> dict[str, float]:
        load = await http_load(
            server.port,
            server.backend_token,
            path,
            core=machine.cores()[1],
            connections=connections,
            seconds=seconds,
            headers=headers,
        )
        as_meant = load.not_modified if not_modified else load.ok
        if as_meant != load.requests:
            raise RuntimeError(f"{load.requests - as_meant} answers for {path} were not as meant")
        return {
            "per_second": load.per_second,
            "p50_ms": load.p50,
            "p99_ms": load.p99,
            "bytes": load.answer_bytes,
        }

    one = "/api/agents/agent-00500"
    tag = await server.etag(one)
    return {
        "one agent": await get(one),
        "one agent, not modified": await get(one, f"If-None-Match: {tag}", not_modified=True),
        "the default agent": await get("/api/agents/default"),
        "the list of 1,000": await get("/api/agents"),
        "the list of 1,000, gzip": await get("/api/agents", GZIP),
        "one agent with its key": await get(f"{one}/llm"),
        "keyed snapshot of 1,000": await get("/api/snapshot", connections=4),
    }


async def _during_broadcasts(
    server: BenchServer, subscribers: int, seconds: float
) -> dict[str, float]:
    core = machine.cores()[1]
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples"
        async with Farm(server.port, server.backend_token, subscribers, core) as farm:
            await farm.grow(subscribers)
            await server.live(subscribers)
            await server.commit_times()
            load = asyncio.create_task(
                http_load(
                    server.port,
                    server.backend_token,
                    "/api/agents/agent-00500",
                    core=core,
                    connections=8,
                    seconds=seconds + 1,
                    rate=200,
                    samples=samples,
                )
            )
            broadcasts = []
            number = 0
            while not load.done():
                number += 1
                await farm.expect()
                revision = await server.put("agent-00001", llm_max_tokens=number)
                received = await farm.received()
                if received.count != subscribers:
                    raise RuntimeError(f"{received.count} of {subscribers} got the change")
                commits = await server.commit_times()
                broadcasts.append((commits[revision], received.last))
                await asyncio.sleep(0.05)
            if failed := (await load).failed:
                raise RuntimeError(f"{failed} requests failed during the broadcasts")
        took = [
            (end - due) / 1e6
            for due, end in (map(int, line.split()) for line in samples.read_text().splitlines())
            if any(due < last and end > commit for commit, last in broadcasts)
        ]
    return {
        "requests": len(took),
        "broadcasts": len(broadcasts),
        "p50_ms": stats.quantile(took, 0.5),
        "p99_ms": stats.quantile(took, 0.99),
    }


BENCH = Bench("http", "GETs from the catalog", measure)
