"""What a backend pays at its start: `import slm`, and `connect()` to an SLM with 10,000 agents."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.harness import machine, stats
from benchmarks.harness.run import Bench, Options, say
from benchmarks.harness.slm_server import BenchServer

_IMPORT = """
import time
begin = time.perf_counter()
{statements}
print(time.perf_counter() - begin)
"""
IMPORTS = {
    "slm": "import slm; slm.SLMClient; slm.LLMInterface",
    "aiohttp and pydantic": "import aiohttp, pydantic",
    # pydantic 2.14 loads its parts when they are asked for; whoever makes one model asks for these.
    "aiohttp and pydantic's models": "import aiohttp; from pydantic import BaseModel, SecretStr",
    "openai": "import openai",
    "ldclient": "import ldclient",
    "UnleashClient": "import UnleashClient",
}

_CONNECT = """
import asyncio, gc, json, sys, time
from benchmarks.harness import machine
import os

async def main():
    import slm
    url, token_file = sys.argv[1:3]
    token = open(token_file).read().strip()
    client = slm.SLMClient(url, token, start_timeout=60)
    gc.collect()
    before = machine.rss_bytes(os.getpid())
    begin, cpu = time.perf_counter(), time.process_time()
    await client.connect()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    config = await client.resolve("agent-00007")
    assert config.step == "agent" and config.llm_api_key is not None, config
    gc.collect()
    after = machine.rss_bytes(os.getpid())
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "bytes": after - before}))
    await client.close()

asyncio.run(main())
"""


async def measure(options: Options) -> dict[str, Any]:
    imports: dict[str, list[float]] = {}
    connects: list[dict[str, float]] = []
    agents = 1_000 if options.quick else 10_000
    # pip compiles what it installs; what lies here as source is compiled by its first import.
    for statements in IMPORTS.values():
        await _import_seconds(statements)
    async with BenchServer(agents=agents, keys=True, core=machine.cores()[0]) as server:
        for repeat in range(options.repeats):
            rounds: dict[str, list[float]] = {}
            for _ in range(3):
                for name, statements in IMPORTS.items():
                    rounds.setdefault(name, []).append(await _import_seconds(statements))
            for name, seconds in rounds.items():
                imports.setdefault(name, []).append(stats.quantile(seconds, 0.5) * 1e3)
            taken = json.loads(await _python(_CONNECT, server.url, str(server.backend_token)))
            connects.append(
                {
                    "seconds": taken["seconds"],
                    "cpu_seconds": taken["cpu_seconds"],
                    "bytes_an_agent": taken["bytes"] / agents,
                }
            )
            say(f"startup {repeat + 1}", connects[-1] | {n: v[-1] for n, v in imports.items()})
    return {"agents": agents, "imports_ms": imports, "connects": connects}


async def _import_seconds(statements: str) -> float:
    return float(await _python(_IMPORT.format(statements=statements)))


async def _python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter on the load's core; return what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        *arguments,
        stdout=subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"},
        preexec_fn=lambda: machine.pin(machine.cores()[1]),
    )
    answer, _ = await asyncio.wait_for(process.communicate(), 120)
    if process.returncode:
        raise RuntimeError("a fresh interpreter failed")
    return answer.decode()


BENCH = Bench("startup", "What a backend pays at its start", measure)
