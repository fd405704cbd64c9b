"""LLMInterface beside the bare official SDK: the same call to a model that answers at once.

The SDK is there twice: as it comes, and on an HTTP client without proxies, netrc and time-outs,
which is leaner and fairer: the interface looks for none of these either.

All keep their connection; blocks of calls take turns in one process on one core, the model and the
SLM run on the other. CPU is this process's own.
"""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.harness import machine, stats
from benchmarks.harness.errors import Missing
from benchmarks.harness.run import Bench, Options, say
from benchmarks.harness.slm_server import BenchServer
from slm import LLMInterface, SLMClient

# The name that the results have had since both stood on one HTTP library.
LEAN = "sdk, same transport"
MESSAGES = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What is the capital of France?"},
]


async def measure(options: Options) -> dict[str, Any]:
    with machine.pinned(machine.cores()[1]):
        return await _measure(options)


async def _measure(options: Options) -> dict[str, Any]:
    try:
        from httpx2 import AsyncClient
        from openai import AsyncOpenAI
    except ImportError:
        raise Missing("openai (PyPI)") from None
    server_core = machine.cores()[0]
    blocks, calls = (6, 30) if options.quick else (14, 60)
    model = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.harness.model_server",
        stdout=subprocess.PIPE,
        preexec_fn=lambda: machine.pin(server_core),
    )
    assert model.stdout is not None
    endpoint = f"http://127.0.0.1:{(await model.stdout.readline()).split()[1].decode()}/v1"
    taken: dict[str, list[float]] = {}
    try:
        async with BenchServer(core=server_core) as server:
            await server.put(
                "agent-00001", llm_endpoint=endpoint, llm_api_key="sk-bench", llm_max_tokens=100
            )
            token = server.backend_token.read_text().strip()
            async with SLMClient(server.url, token) as client:
                config = await client.resolve("agent-00001")
                llm = LLMInterface(client)
                bare = AsyncOpenAI(api_key="sk-bench", base_url=endpoint, max_retries=0)
                lean = AsyncOpenAI(
                    api_key="sk-bench",
                    base_url=endpoint,
                    max_retries=0,
                    http_client=AsyncClient(trust_env=False, timeout=None),
                    timeout=None,
                )

                async def ours() -> None:
                    await llm.chat("agent-00001", MESSAGES)

                async def theirs(sdk: AsyncOpenAI) -> None:
                    await sdk.chat.completions.create(
                        model=config.llm_model,
                        messages=MESSAGES,  # type: ignore[arg-type]
                        temperature=config.llm_temperature,
                        max_tokens=config.llm_max_tokens,
                    )

                ways: dict[str, Callable[[], Awaitable[None]]] = {
                    "slm": ours,
                    "sdk": functools.partial(theirs, bare),
                    LEAN: functools.partial(theirs, lean),
                }
                for repeat in range(options.repeats):
                    one = await _blocks(blocks, calls, ways)
                    say(f"llm {repeat + 1}", one)
                    for name, value in one.items():
                        taken.setdefault(name, []).append(value)
                await llm.close()
                await bare.close()
                await lean.close()
    finally:
        model.kill()
        await model.wait()
    return taken


async def _blocks(
    blocks: int, calls: int, ways: dict[str, Callable[[], Awaitable[None]]]
) -> dict[str, float]:
    """Take turns in blocks; the first block of each is the warm-up."""
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    for block in range(1 + blocks):
        for name in _order(list(ways), block):
            call = ways[name]
            took = []
            spent = time.process_time()
            for _ in range(calls):
                begin = time.perf_counter()
                await call()
                took.append((time.perf_counter() - begin) * 1e3)
            spent = time.process_time() - spent
            if block:
                cpu[name].append(spent / calls * 1e3)
                wall[name].append(stats.quantile(took, 0.5))
    found = {f"{name}_cpu_ms": stats.quantile(cpu[name], 0.5) for name in ways}
    found |= {f"{name}_p50_ms": stats.quantile(wall[name], 0.5) for name in ways}
    for sdk, suffix in (("sdk", ""), (LEAN, ", same transport")):
        added = [a - b for a, b in zip(wall["slm"], wall[sdk], strict=True)]
        found[f"cpu_ratio{suffix}"] = stats.quantile(stats.ratios(cpu["slm"], cpu[sdk]), 0.5)
        found[f"added_ms{suffix}"] = stats.quantile(added, 0.5)
    return found


def _order(names: list[str], block: int) -> list[str]:
    """Return the names so that each has every place, and comes after every other one."""
    first = block // 2 % len(names)
    turned = [*names[first:], *names[:first]]
    return turned[::-1] if block % 2 else turned


BENCH = Bench("llm", "LLMInterface beside the bare official SDK", measure)
