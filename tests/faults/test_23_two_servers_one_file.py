"""Fault 23: two `slm serve` on one SQLite file: the second refuses in one sentence."""

from __future__ import annotations

import aiohttp
import pytest

from tests.support.faults.site import Operator, Site
from tests.support.faults.subscriber import subscribers
from tests.support.servers import eventually


async def test_the_second_refuses(sqlite_site: Site, http: aiohttp.ClientSession) -> None:
    """The second ends with one sentence and no traceback; the first one never notices."""
    async with sqlite_site.process() as first:
        operator = Operator(http, first.url, sqlite_site.admin_token)
        async with subscribers(3, first.url, sqlite_site.backend_token) as subs:
            before = await operator.create("billing")
            second = sqlite_site.process(1, database_url=f"sqlite:///{first.data_dir / 'slm.db'}")
            with pytest.raises(AssertionError, match="the server ended"):
                await second.start()
            assert second.process.returncode not in (0, -9)
            [line] = second.log.strip().splitlines()
            assert "Another process holds" in line
            assert "Traceback" not in line

            after = await operator.set("billing", llm_model="new")
            assert after == before + 1
            await eventually(lambda: all(s.reached(after) for s in subs))
            assert all(len(s.connections) == 1 for s in subs)
