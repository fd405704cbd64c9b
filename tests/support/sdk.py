"""What the fleet's tests share: an SDK client at test speed, and what a server tells of it."""

from __future__ import annotations

from typing import Any

from slm import SLMClient, Timings
from tests.support.raw import Api

FAST = Timings(
    backoff_initial_seconds=0.05,
    backoff_max_seconds=0.5,
    ack_interval_seconds=0.02,
    close_timeout_seconds=0.2,
)


def sdk(url: str, token: str, name: str, **options: Any) -> SLMClient:
    """Return a client that is called `name`, with timings of a tenth."""
    return SLMClient(url, token=token, name=name, **({"timings": FAST} | options))


async def fleet_of(api: Api) -> dict[str, Any]:
    """Return the fleet view's backends by their own names."""
    fleet = (await api.get("/api/fleet")).json
    return {each["name"] or each["backend"]: each for each in fleet["backends"]}


async def applied(api: Api, revision: int, *names: str) -> bool:
    """Whether all of these are live and have acked `revision`."""
    fleet = await fleet_of(api)
    return all(
        name in fleet
        and fleet[name]["state"] == "live"
        and (fleet[name]["applied"] or 0) >= revision
        for name in names
    )
