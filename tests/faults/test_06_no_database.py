"""Fault 6: the server is cut from its database: it says so, serves what it has, and recovers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from sqlalchemy.engine import make_url

from slm.client.status import ClientStatus
from slm.server import failpoints
from tests.support.faults.backends import backend, believes, is_live
from tests.support.faults.network import Proxy, proxied
from tests.support.faults.site import Operator, Site
from tests.support.faults.subscriber import subscribers
from tests.support.servers import eventually


class Cut:
    """Takes the database away and gives it back."""

    def __init__(self, kind: str, proxy: Proxy | None) -> None:
        self.kind = kind
        self.proxy = proxy

    async def off(self) -> None:
        if self.proxy is None:
            failpoints.arm("database:raise", testing=True)
        elif self.kind == "refused":
            await self.proxy.close()
        else:
            self.proxy.stall()

    async def on(self) -> None:
        if self.proxy is None:
            failpoints.arm(None, testing=False)
        elif self.kind == "refused":
            await self.proxy.open()
        else:
            self.proxy.resume()


@contextlib.asynccontextmanager
async def cut_site(
    kind: str, request: pytest.FixtureRequest, root: Path
) -> AsyncIterator[tuple[Site, Cut]]:
    if kind == "sqlite":
        yield Site("sqlite", root, None), Cut(kind, None)
        return
    url = make_url(request.getfixturevalue("postgres_url"))
    direct = url.render_as_string(hide_password=False)
    async with proxied(direct) as proxy:
        through = url.set(port=proxy.port).render_as_string(hide_password=False)
        yield Site("postgresql", root, direct, through), Cut(kind, proxy)


@pytest.mark.parametrize("kind", ["sqlite", "refused", "silent"])
async def test_cut_from_its_database(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    """Writes and keyed reads 503, plain reads stale, heartbeats behind, clients not live; back.

    `refused`: nobody listens there any more; `silent`: the network swallows every byte.
    """
    async with cut_site(kind, request, tmp_path) as (site, cut):
        server = site.in_loop(heartbeat_seconds=0.2)
        await server.start()
        try:
            operator = Operator(http, server.url, site.admin_token)
            before = await operator.create("billing", llm_model="old")
            async with (
                subscribers(5, server.url, site.backend_token) as subs,
                backend(server.url, site.backend_token) as client,
            ):
                await eventually(lambda: all(s.reached(before) for s in subs))
                await eventually(lambda: is_live(client))
                await cut.off()

                await eventually(lambda: all(s.behind for s in subs))
                await eventually(lambda: client.status is ClientStatus.BEHIND)
                status, _, said = await operator.ask(
                    "PUT", "/api/agents/billing", {"llm_model": "x"}
                )
                assert (status, said["code"]) == (503, "database-unavailable")
                reader = Operator(http, server.url, site.backend_token)
                for path in ("/api/agents/billing/llm", "/api/snapshot"):
                    status, headers, said = await reader.ask("GET", path)
                    assert (status, said["code"]) == (503, "database-unavailable")
                    assert int(headers["Retry-After"]) >= 1
                for path in ("/api/agents", "/api/agents/billing", "/api/agents/default"):
                    status, headers, _ = await operator.ask("GET", path)
                    assert (status, headers["SLM-Stale"]) == (200, "true")
                assert (await operator.ask("GET", "/readyz"))[0] == 503
                assert (await operator.ask("GET", "/healthz"))[0] == 200
                assert (await client.resolve("billing")).llm_model == "old"
                assert all(s.connected for s in subs)

                await cut.on()
                await eventually(lambda: not any(s.behind for s in subs), 20)
                await eventually(lambda: is_live(client))

                async def ready() -> bool:
                    return (await operator.ask("GET", "/readyz"))[0] == 200

                await eventually(ready)
                after = await operator.set("billing", llm_model="new")
                assert after == before + 1
                await eventually(lambda: all(s.reached(after) for s in subs))
                await eventually(lambda: client.revision >= after)

                async def fresh() -> bool:
                    return "SLM-Stale" not in (await operator.ask("GET", "/api/agents"))[1]

                # A busy machine may keep the feed from a look for longer than is current here.
                await eventually(fresh)
                truth = await operator.agents()
                assert all(s.agents == truth for s in subs)
                assert await believes(client, truth)
        finally:
            await server.stop()
