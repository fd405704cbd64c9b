"""/metrics: what an operator can see of pushes, lag, replays, requests and refusals."""

from __future__ import annotations

from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from tests.server.test_ws_limits import NO_PINGS, deaf_peers, grow
from tests.support.raw import Api
from tests.support.servers import InLoopServer, eventually, running_server

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def _samples(api: Api) -> Samples:
    answer = await api.get("/metrics")
    assert answer.status == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


async def test_a_push_is_measured_from_its_commit(admin: Api) -> None:
    """Each change written here counts once, with the time until every live stream had it."""
    async with admin.stream() as socket:
        assert (await socket.next())["type"] == "subscribed"
        await admin.create("alpha")
        await admin.put("alpha", llm_model="m2")
        while (await socket.next()).get("revision") != 3:
            pass

        async def pushed() -> bool:
            return (await _samples(admin))["slm_push_latency_seconds_count", ()] == 2

        await eventually(pushed)
        samples = await _samples(admin)
        assert 0 < samples["slm_push_latency_seconds_sum", ()] < 10
        assert samples["slm_feed_lag_seconds_count", ()] == 2
        assert samples["slm_subscribers", ()] == 1
        assert samples["slm_changes_total", ()] == 2
        assert samples["slm_largest_buffer_bytes", ()] == 0


async def test_requests_are_measured_by_route_and_not_by_path(admin: Api, anonymous: Api) -> None:
    """The label is the route's own path: what a stranger asks for makes no new series."""
    await admin.get("/api/agents/default")
    await admin.get("/api/agents/no-such-agent")
    await anonymous.get("/api/agents")
    for number in range(3):
        assert (await anonymous.get(f"/never/{number}")).status == 404
    samples = await _samples(admin)

    def count(route: str, status: str) -> float:
        labels = (("method", "GET"), ("route", route), ("status", status))
        return samples["slm_http_request_seconds_count", labels]

    assert count("/api/agents/{agent_id}", "4xx") == 1
    assert count("/api/agents/default", "2xx") == 1
    assert count("/api/agents", "4xx") == 1
    assert count("none", "4xx") == 3
    assert samples["slm_auth_failures_total", ()] == 1


async def test_a_slow_reader_is_seen_before_and_after_it_is_dropped(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """While it reads nothing its bytes are told, with the largest; then that it was dropped."""
    async with running_server(tmp_path, buffer_bytes=200_000, **NO_PINGS) as server:
        admin = Api(server, session, server.admin_token, key_token=server.backend_token)
        before = await _samples(admin)
        names = ("slm_buffered_bytes", "slm_largest_buffer_bytes", "slm_evictions_total")
        assert [before[name, ()] for name in names] == [0, 0, 0]
        async with deaf_peers(admin, 2):
            samples = before
            while samples["slm_buffered_bytes", ()] == 0:
                await grow(admin, 2)
                samples = await _samples(admin)
                assert samples["slm_changes_total", ()] < 500, "nothing ever waited"
            assert samples["slm_evictions_total", ()] == 0
            assert samples["slm_subscribers", ()] == 2
            while samples["slm_evictions_total", ()] == 0:
                total, largest = (samples[name, ()] for name in names[:2])
                assert largest <= total <= 2 * largest
                await grow(admin, 2)
                samples = await _samples(admin)
                assert samples["slm_changes_total", ()] < 500, "the slow reader was never dropped"
            while samples["slm_evictions_total", ()] < 2:
                await grow(admin, 2)
                samples = await _samples(admin)
            assert samples["slm_subscribers", ()] == 0


async def test_replays_and_key_reads_are_counted(admin: Api, server: InLoopServer) -> None:
    """A stream that is told what it missed is a replay; a key that was handed out is a key read."""
    epoch = (await admin.create("alpha", llm_api_key="sk-of-a-test")).headers["SLM-Epoch"]
    await admin.put("alpha", llm_model="m2")
    async with admin.stream(since=1, epoch=epoch) as socket:
        while (await socket.next()).get("revision") != 3:
            pass
    await admin.get("/api/agents/alpha/llm")
    samples = await _samples(admin)
    assert samples["slm_replays_total", ()] == 1
    assert samples["slm_key_reads_total", ()] == 1
