"""Fault 2: `since` at, below and beyond the compacted and the head revision: no silent hole."""

from __future__ import annotations

import aiohttp
import pytest

from slm.server.lifecycle.compaction import compact
from tests.support.faults.history import final_position, violations
from tests.support.faults.site import Operator, Site, rows_of, wire_frame
from tests.support.faults.subscriber import heard, subscribers
from tests.support.servers import eventually


@pytest.mark.history(resyncs=["compacted", "ahead", "epoch"], committed=False)
async def test_every_position(site: Site, http: aiohttp.ClientSession) -> None:
    """From every `since` there is: the whole rest at or above the floor, a resync elsewhere."""
    # A page of three, so that a replay is several.
    server = site.in_loop(heartbeat_seconds=0.05, replay_page=3)
    await server.start()
    try:
        operator = Operator(http, server.url, site.admin_token)
        await operator.create("billing")
        for n in range(20):
            head = await operator.set("billing", llm_model=f"m{n}")
        rows = await rows_of(server, "SELECT revision, type, agent, change_id FROM changes")
        epoch = server.running.services.feed.epoch
        committed = {(epoch, r): wire_frame(kind, r, agent, i) for r, kind, agent, i in rows}
        await compact(server.running.services.database, keep=8, batch=5)
        floor = head - 8

        for since in range(head + 4):
            one = await heard(http, server.url, site.backend_token, since, epoch, upto=head)
            kinds = [frame["type"] for frame in one.frames]
            if since < floor:
                assert one.frames[1]["reason"] == "compacted"
            elif since > head:
                assert one.frames[1]["reason"] == "ahead"
            else:
                assert "resync" not in kinds
                changes = [f["revision"] for f in one.frames if "config" in f]
                assert changes == list(range(since + 1, head + 1))
            expected = ["compacted"] if since < floor else ["ahead"] if since > head else []
            assert violations([one], resyncs=expected, committed=committed) == []
            assert final_position([one]) == (epoch, head)

        other = await heard(http, server.url, site.backend_token, head, "another-life", upto=head)
        assert other.frames[1]["reason"] == "epoch"
        assert violations([other], resyncs=["epoch"]) == []
        fresh = await heard(http, server.url, site.backend_token, upto=head)
        assert violations([fresh]) == []
        assert final_position([fresh]) == (epoch, head)
    finally:
        await server.stop()


@pytest.mark.history(resyncs=["compacted"], committed=False)
async def test_compacted_under_a_slow_replay(site: Site, http: aiohttp.ClientSession) -> None:
    """What is compacted away while it is being replayed becomes a resync, not a hole."""
    server = site.in_loop(
        heartbeat_seconds=0.05, replay_page=2, changes_keep=3, compact_interval_seconds=0.02
    )
    await server.start()
    try:
        operator = Operator(http, server.url, site.admin_token)
        await operator.create("billing")
        epoch = server.running.services.feed.epoch
        found = []
        for n in range(25):
            head = await operator.set("billing", llm_model=f"m{n}")
            since = max(0, head - 6)
            found.append(await heard(http, server.url, site.backend_token, since, epoch, upto=head))
        for one in found:
            assert violations([one], resyncs=["compacted"]) == []

        async def trimmed() -> bool:
            return await rows_of(server, "SELECT floor FROM state") == [(head - 3,)]

        await eventually(trimmed)
        exact = await heard(http, server.url, site.backend_token, head - 3, epoch, upto=head)
        assert violations([exact]) == []
        assert final_position([exact]) == (epoch, head)
    finally:
        await server.stop()


@pytest.mark.parametrize(
    ("held_seconds", "waits_seconds"), [(0.5, 10.0), (2.0, 0.1)], ids=["waits", "sent-away"]
)
async def test_ahead_of_a_replica_that_is_behind(
    postgres_site: Site, http: aiohttp.ClientSession, held_seconds: float, waits_seconds: float
) -> None:
    """Told more elsewhere, a client waits until this replica has it, or is sent away (1013)."""
    site = postgres_site
    quick, slow = site.process(0), site.process(1, min_revision_wait_seconds=waits_seconds)
    async with quick, slow:
        operator = Operator(http, quick.url, site.admin_token)
        await operator.create("billing")
        await slow.terminate()
        # From now on that one's feed is late with whatever it reads.
        await slow.start(failpoint=f"before_push:hold:{held_seconds}")
        told = await operator.set("billing", llm_model="new")
        _, headers, _ = await Operator(http, slow.url, site.admin_token).ask("GET", "/api/agents")
        assert int(headers["SLM-Revision"]) < told
        async with subscribers(1, slow.url, site.backend_token, believes=False) as subs:
            subs[0].epoch, subs[0].revision = headers["SLM-Epoch"], told
            await eventually(lambda: subs[0].connected)
            after = await operator.set("billing", llm_model="newer")
            await eventually(lambda: subs[0].reached(after))
        # Nothing that it had already, and what it was sent away with is the only difference.
        assert [frame["revision"] for frame in subs[0].changes] == [after]
        assert (1013 in subs[0].closes) == (waits_seconds < held_seconds)
