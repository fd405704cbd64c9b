"""A backend in a process of its own, so that it can be stopped: `python -m … URL`, SLM_TOKEN set.

Prints one JSON line for each change: the agent_id and the model now in force.
"""

from __future__ import annotations

import asyncio
import json
import sys

from tests.support.faults.backends import TENTH, backend


async def main(url: str, token: str) -> None:
    """Follow the SLM for ever."""
    quick = TENTH | {"ping_interval_seconds": 0.4, "request_timeout_seconds": 1.0}
    async with backend(url, token, quick) as client:
        client.on_change(
            lambda agent_id, config: print(
                json.dumps([agent_id, config and config.llm_model]), flush=True
            )
        )
        print(json.dumps(["ready", (await client.resolve("billing")).llm_model]), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.stdin.readline().strip()))
