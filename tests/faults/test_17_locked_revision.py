"""Fault 17: on PostgreSQL transaction A holds its revision and B comes: A, then B, for everyone."""

from __future__ import annotations

import asyncio

import aiohttp

from tests.support.faults.site import Operator, Site
from tests.support.faults.subscriber import subscribers
from tests.support.servers import ServerProcess, eventually

HOLDS_A_REVISION = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    " AND state = 'idle in transaction' AND backend_xid IS NOT NULL"
)


async def two_writes(
    site: Site, http: aiohttp.ClientSession, slow: ServerProcess, quick: ServerProcess
) -> tuple[tuple[int, str | None], tuple[int, str | None]]:
    """Write A through `slow`, B through `quick` once A holds its revision; return both answers."""
    a = Operator(http, slow.url, site.admin_token)
    b = Operator(http, quick.url, site.admin_token)
    first = asyncio.create_task(a.ask("PUT", "/api/agents/billing", {"llm_model": "a"}))
    await eventually(lambda: first.done() or site.rows(HOLDS_A_REVISION) == [(1,)])
    assert not first.done(), first.result()
    second = await b.ask("PUT", "/api/agents/billing", {"llm_timeout": 60})
    found = [(status, headers["SLM-Revision"]) for status, headers, _ in (await first, second)]
    return found[0], found[1]


async def test_b_waits_for_a(postgres_site: Site, http: aiohttp.ClientSession) -> None:
    """Within the lock time-out B waits, and comes after A for every reader of every replica."""
    site = postgres_site
    # No time-out of an idle transaction may come in between.
    settings = {"lock_timeout_seconds": 5.0, "idle_in_transaction_seconds": 5.0}
    settings |= {"database_timeout_seconds": 10.0}
    slow, quick = site.process(0, **settings), site.process(1, **settings)
    async with slow, quick:
        before = await Operator(http, quick.url, site.admin_token).create("billing")
        await slow.terminate()
        await slow.start(failpoint="before_commit:hold:0.5")
        urls = [slow.url, quick.url]
        async with subscribers(6, lambda n: urls[n % 2], site.backend_token) as subs:
            await eventually(lambda: all(s.reached(before) for s in subs))
            a, b = await two_writes(site, http, slow, quick)
            assert (a, b) == ((200, str(before + 1)), (200, str(before + 2)))
            await eventually(lambda: all(s.reached(before + 2) for s in subs))
            for one in subs:
                assert [f["config"]["llm_model"] for f in one.changes] == ["a", "a"]
                assert [f["config"]["llm_timeout"] for f in one.changes] == [30, 60]


async def test_b_gives_up(postgres_site: Site, http: aiohttp.ClientSession) -> None:
    """Past the lock time-out B is 503 with nothing changed, and can be tried again."""
    site = postgres_site
    settings = {"lock_timeout_seconds": 0.2, "idle_in_transaction_seconds": 5.0}
    settings |= {"database_timeout_seconds": 10.0}
    slow, quick = site.process(0, **settings), site.process(1, **settings)
    async with slow, quick:
        operator = Operator(http, quick.url, site.admin_token)
        before = await operator.create("billing")
        await slow.terminate()
        await slow.start(failpoint="before_commit:hold:1")
        urls = [slow.url, quick.url]
        async with subscribers(6, lambda n: urls[n % 2], site.backend_token) as subs:
            await eventually(lambda: all(s.reached(before) for s in subs))
            a, b = await two_writes(site, http, slow, quick)
            assert a == (200, str(before + 1))
            assert b[0] == 503
            again = await operator.set("billing", llm_timeout=60)
            assert again == before + 2
            await eventually(lambda: all(s.reached(again) for s in subs))
