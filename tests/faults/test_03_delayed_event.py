"""Fault 3: heartbeats go on while an event is delayed, and never name what was not sent."""

from __future__ import annotations

import aiohttp

from slm.server import failpoints
from tests.support.faults.site import Operator, Site
from tests.support.faults.subscriber import subscribers
from tests.support.servers import eventually


async def test_heartbeats_while_an_event_waits(site: Site, http: aiohttp.ClientSession) -> None:
    """A change is committed and held back: the heartbeats meanwhile name the one before it."""
    server = site.in_loop(heartbeat_seconds=0.05)
    await server.start()
    try:
        operator = Operator(http, server.url, site.admin_token)
        async with subscribers(10, server.url, site.backend_token) as subs:
            await eventually(lambda: all(s.reached(0) for s in subs))
            before = await operator.create("billing")
            await eventually(lambda: all(s.reached(before) for s in subs))
            failpoints.arm("before_push:hold:0.5", testing=True)
            after = await operator.set("billing", llm_model="new")
            # The database has it, and a keyed read shows it, before anyone was told.
            reader = Operator(http, server.url, site.backend_token)
            status, headers, said = await reader.ask("GET", "/api/agents/billing/llm")
            assert (status, said["llm_model"], headers["SLM-Revision"]) == (200, "new", str(after))
            await eventually(lambda: all(s.reached(after) for s in subs))
            await eventually(lambda: all(s.frames[-1]["type"] == "heartbeat" for s in subs))
        for one in subs:
            kinds = [(f["type"], f["revision"]) for f in one.frames]
            at = kinds.index(("agent_config_changed", after))
            waited = kinds[kinds.index(("agent_created", before)) + 1 : at]
            assert len(waited) >= 3
            assert set(waited) == {("heartbeat", before)}
            assert kinds[-1] == ("heartbeat", after)
    finally:
        await server.stop()
