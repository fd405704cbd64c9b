"""Fault 14: SIGSTOP and SIGCONT of server, client and a replica inside a transaction."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from tests.faults.test_17_locked_revision import HOLDS_A_REVISION
from tests.support.faults.backends import backend, believes, is_live
from tests.support.faults.network import proxied
from tests.support.faults.site import QUICK, Operator, Site
from tests.support.faults.subscriber import subscribers
from tests.support.servers import eventually

PAUSE_SECONDS = 2.0
"""By how much a busy machine may be late."""
PING: dict[str, Any] = {
    "ping_interval_seconds": 0.4,
    "ping_timeout_seconds": 0.4,
    "heartbeat_seconds": 0.2,
}


async def test_a_stopped_server(site: Site, http: aiohttp.ClientSession) -> None:
    """Stopped for longer than the ping time-out: clients notice, and catch up when it goes on."""
    timings = {"ping_interval_seconds": 0.4, "request_timeout_seconds": 0.5}
    async with site.process(0, **PING) as server:
        operator = Operator(http, server.url, site.admin_token)
        before = await operator.create("billing")
        async with (
            subscribers(5, server.url, site.backend_token, heartbeat_seconds=0.6) as subs,
            proxied(server.url) as proxy,
            backend(proxy.url, site.backend_token, timings) as client,
        ):
            await eventually(lambda: all(s.reached(before) for s in subs))
            await eventually(lambda: is_live(client))
            server.send_signal(signal.SIGSTOP)
            await eventually(lambda: not any(s.connected for s in subs))
            await eventually(lambda: not is_live(client))
            assert (await client.resolve("billing")).llm_model == "m"
            server.send_signal(signal.SIGCONT)
            after = await operator.set("billing", llm_model="new")
            assert after == before + 1
            await eventually(lambda: all(s.reached(after) for s in subs), 20)
            await eventually(lambda: is_live(client) and client.revision >= after, 20)
            assert await believes(client, await operator.agents())


def started(url: str) -> subprocess.Popen[str]:
    """Start a backend in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.faults.client_process", url],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


async def test_a_stopped_client(site: Site, http: aiohttp.ClientSession) -> None:
    """Stopped for longer than the ping time-out: the server lets it go, and it resumes."""
    server = site.in_loop(**PING)
    await server.start()
    try:
        hub = server.running.services.hub
        operator = Operator(http, server.url, site.admin_token)
        await operator.create("billing", llm_model="old")
        async with proxied(server.url) as proxy:
            process = started(proxy.url)
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(site.backend_token + "\n")
                process.stdin.flush()
                lines = process.stdout
                said = json.loads(await asyncio.to_thread(lines.readline))
                assert said == ["ready", "old"]
                await eventually(lambda: len(hub.subscribers()) == 1)
                process.send_signal(signal.SIGSTOP)
                models = [f"m{n}" for n in range(5)]
                for model in models:
                    await operator.set("billing", llm_model=model)
                await eventually(lambda: not hub.subscribers())
                process.send_signal(signal.SIGCONT)
                heard: list[str] = []
                while not heard or heard[-1] != models[-1]:
                    agent_id, model = json.loads(await asyncio.to_thread(lines.readline))
                    assert agent_id == "billing"
                    heard.append(model)
                # Each once and in order; none of them is made up.
                assert heard == models
            finally:
                process.kill()
                process.wait()
    finally:
        await server.stop()


async def test_a_replica_stopped_in_a_transaction(
    postgres_site: Site,
    http: aiohttp.ClientSession,
    record_property: Callable[[str, object], None],
) -> None:
    """Others wait no longer than the session time-out; what it had not committed never comes."""
    site = postgres_site
    stopped, other = site.process(0, **PING), site.process(1, **PING)
    async with stopped, other:
        a = Operator(http, stopped.url, site.admin_token)
        b = Operator(http, other.url, site.admin_token)
        before = await b.create("billing", llm_model="before")
        await stopped.terminate()
        await stopped.start(failpoint="before_commit:hold:0.2")
        urls = [stopped.url, other.url]
        async with subscribers(
            6, lambda n: urls[n % 2], site.backend_token, heartbeat_seconds=0.6
        ) as subs:
            await eventually(lambda: all(s.reached(before) for s in subs))
            late = asyncio.create_task(a.ask("PUT", "/api/agents/billing", {"llm_model": "stale"}))
            await eventually(
                lambda: late.done() or site.rows(HOLDS_A_REVISION) == [(1,)], every=0.005
            )
            stopped.send_signal(signal.SIGSTOP)
            assert not late.done()
            began = time.monotonic()

            async def written() -> bool:
                status, _, _ = await b.ask("PUT", "/api/agents/billing", {"llm_model": "current"})
                assert status in (200, 503)
                return status == 200

            await eventually(written, 20)
            waited = time.monotonic() - began
            record_property("others_waited_seconds", round(waited, 2))
            assert waited < QUICK["idle_in_transaction_seconds"] + PAUSE_SECONDS
            assert site.rows("SELECT llm_model FROM agents WHERE agent_id = 'billing'") == [
                ("current",)
            ]
            stopped.send_signal(signal.SIGCONT)
            status, _, said = await late
            assert (status, said["code"]) in (
                (503, "database-unavailable"),
                (503, "outcome-unknown"),
            )
            after = await b.set("billing", llm_timeout=77)
            assert after == before + 2
            await eventually(lambda: all(s.reached(after) for s in subs), 20)
            truth = await b.agents()
            assert truth["billing"]["llm_model"] == "current"
            assert all(s.agents == truth for s in subs)
            assert not any(
                f.get("config", {}).get("llm_model") == "stale" for s in subs for f in s.frames
            )
