"""Backends as users write them, on the SDK, with every timing at a tenth."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from slm import SLMClient
from slm.client.status import ClientStatus
from slm.client.timings import Timings
from tests.support.faults.subscriber import CONFIG_FIELDS

TENTH: Final[dict[str, float]] = {
    "backoff_initial_seconds": 0.05,
    "backoff_max_seconds": 3.0,
    "healthy_seconds": 0.2,
    "refused_retry_seconds": 1.0,
    "ping_interval_seconds": 2.0,
    "request_timeout_seconds": 2.0,
    "snapshot_timeout_seconds": 6.0,
    "unknown_seconds": 0.5,
    "save_interval_seconds": 0.1,
    "close_timeout_seconds": 0.1,
}
"""The SDK's durations at a tenth (a request may take longer: two cores are shared)."""


def backend(
    url: str, token: str, timings: dict[str, float] | None = None, **more: Any
) -> SLMClient:
    """Return a client that is not connected yet."""
    given = Timings(**(TENTH | (timings or {})))
    return SLMClient(url, token=token, ttl_seconds=30, timings=given, **more)


def is_live(client: SLMClient) -> bool:
    """Say whether the client holds itself to be up to date."""
    return client.status is ClientStatus.LIVE


async def believes(client: SLMClient, truth: dict[str, dict[str, Any]]) -> bool:
    """Say whether the client answers what the database holds, for every agent and no other."""
    for agent_id, fields in truth.items():
        if not fields["is_active"]:
            continue
        config = await client.resolve(agent_id)
        if config.source_agent_id != agent_id:
            return False
        shown = {name: getattr(config, name) for name in CONFIG_FIELDS if hasattr(config, name)}
        if any(fields[name] != value for name, value in shown.items()):
            return False
    return True


@contextlib.asynccontextmanager
async def backends(
    count: int, url: str | Callable[[int], str], token: str, **options: Any
) -> AsyncIterator[list[SLMClient]]:
    """Run `count` backends for as long as the block lasts."""
    async with contextlib.AsyncExitStack() as stack:
        found = []
        for number in range(count):
            where = url if isinstance(url, str) else url(number)
            found.append(await stack.enter_async_context(backend(where, token, **options)))
        yield found
