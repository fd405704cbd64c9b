"""The demo's backend: a process of its own that has the SDK, the LLM interface and nothing else.

Started as `python -m slm.cli.demo.backend URL`. Takes `{"ask": agent, "prompt": …}` as JSON lines
on its standard input, reports as JSON lines what it did and when a change was in its cache, and
ends when its input closes. It learns of a change from the SLM alone: nobody tells it anything else.
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
"""As by default, but a lost SLM is tried every second at least, so that nobody waits in a demo."""


def report(event: str, **fields: Any) -> None:
    """Write one line; `at` is the machine's monotonic clock, the same in every process of it."""
    at = time.monotonic()
    print(json.dumps({"event": event, "at": at} | fields), flush=True)


def in_force(agent_id: str, config: ResolvedConfig | None) -> None:
    """Report that the cache holds another config of the agent from this moment on."""
    report("in force", agent_id=agent_id, revision=config.revision if config is not None else None)


async def answer(client: SLMClient, llm: LLMInterface, agent_id: str, prompt: str) -> None:
    """Make one request and report the answer with the config that made it."""
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
    """Be a backend until standard input closes."""
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
