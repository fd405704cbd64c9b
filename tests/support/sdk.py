"""SDK clients at test speed, and what a server tells of them."""

from __future__ import annotations

from typing import Any

from slm import SLMClient, Timings
from tests.support.faults.backends import TENTH
from tests.support.raw import Api
from tests.support.servers import InLoopServer

FAST = Timings(
    backoff_initial_seconds=0.05,
    backoff_max_seconds=0.5,
    ack_interval_seconds=0.02,
    close_timeout_seconds=0.2,
)


def sdk(url: str, token: str, name: str, **options: Any) -> SLMClient:
    """Return a client that is called `name`, with timings of a tenth."""
    return SLMClient(url, token=token, name=name, **({"timings": FAST} | options))


def client_of(url: str, server: InLoopServer, **options: Any) -> SLMClient:
    """Return a client of the server, at this address, with every timing at a tenth."""
    options = {"timings": Timings(**TENTH)} | options
    return SLMClient(url, token=server.backend_token, **options)


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
