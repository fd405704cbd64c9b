"""The demo's backend: a separate process with the SDK and the LLM interface, nothing else.

Started as `python -m slm.cli.demo.backend URL`. Reads `{"ask": agent, "prompt": …}` as JSON lines
from standard input, reports its actions and cache changes as JSON lines, and ends when its input
closes. It learns about changes only from the SLM.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from slm import LLMInterface, ResolvedConfig, SLMClient, Timings
from slm.errors import SLMError

TIMINGS = Timings(backoff_max_seconds=1.0)
"""The defaults, but a lost SLM is retried at least every second, to keep the demo short."""


def report(event: str, **fields: Any) -> None:
    """Write one line; `at` is the monotonic clock, which all processes on the machine share."""
    at = time.monotonic()
    print(json.dumps({"event": event, "at": at} | fields), flush=True)


def in_force(agent_id: str, config: ResolvedConfig | None) -> None:
    """Report that the agent's config in the cache has just changed."""
    report("in force", agent_id=agent_id, revision=config.revision if config is not None else None)


async def answer(client: SLMClient, llm: LLMInterface, agent_id: str, prompt: str) -> None:
    """Make one request and report the answer with the config that produced it."""
    started = time.monotonic()
    try:
        result = await llm.chat(agent_id, [{"role": "user", "content": prompt}])
    except SLMError as error:
        report("failed", error=str(error))
        return
    report(
        "answered",
        text=result.text,
        provider=result.provider,
        model=result.model,
        step=result.step.value,
        revision=result.revision,
        stale=result.stale,
        finish_reason=result.finish_reason,
        output_tokens=result.usage.output_tokens if result.usage else None,
        seconds=time.monotonic() - started,
        status=client.status.value,
    )


async def main(slm_url: str) -> None:
    """Act as a backend until standard input closes."""
    async with (
        SLMClient(slm_url, name="demo-backend", cache_file=True, timings=TIMINGS) as client,
        LLMInterface(client) as llm,
    ):
        client.on_change(in_force)
        report("ready", status=client.status.value)
        while line := await asyncio.to_thread(sys.stdin.readline):
            request = json.loads(line)
            await answer(client, llm, request["ask"], request["prompt"])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
