"""Fault 24: the primary dies with commits that its standby never got, and the standby takes over.

Real streaming replication, asynchronous; three servers, fifty clients, writes all the while.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from slm import SLMClient
from tests.faults.test_20_replicas import writes
from tests.support.faults import recording
from tests.support.faults.backends import backend, believes, is_live
from tests.support.faults.history import Connection
from tests.support.faults.network import proxied
from tests.support.faults.site import Operator, Site
from tests.support.faults.subscriber import Subscriber, subscribers
from tests.support.servers import eventually
from tests.support.standby import Pair, primary_and_standby

SERVERS = 3

lost_commits = pytest.mark.history(
    # Whatever a client held that survived nowhere, it is sent to a snapshot.
    resyncs=["forked", "epoch", "ahead"],
    # The lost revisions are in no database any more.
    committed=False,
)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """A primary with an empty database, and its streaming standby."""
    async with primary_and_standby() as pair:
        yield pair


def shown(connections: Iterable[Connection]) -> list[tuple[int, str] | None]:
    """Return every position that a client was shown, in order, and None where it began anew.

    It begins anew with a resync, and with a snapshot of another epoch that it took by itself.
    """
    found: list[tuple[int, str] | None] = []
    epoch: str | None = None
    for connection in connections:
        if connection.snapshots and connection.epoch != epoch:
            found.append(None)
        for frame in connection.frames:
            if frame["type"] == "resync":
                found.append(None)
            if "change_id" in frame:
                found.append((frame["revision"], frame["change_id"]))
            epoch = frame.get("epoch", epoch)
    return found


def stranded(
    connections: Iterable[Connection], survived: set[tuple[int, str]]
) -> list[tuple[int, str]]:
    """Return the positions that survived nowhere and that no resync follows."""
    left: list[tuple[int, str]] = []
    for position in shown(connections):
        if position is None:
            left = []
        elif position[0] and position not in survived:
            left.append(position)
    return left


async def fail_over(
    pair: Pair,
    root: Path,
    http: aiohttp.ClientSession,
    record: Callable[[str, object], None],
    *,
    seed: int,
    stopped: bool = False,
    raw: int = 38,
    sdk: int = 12,
) -> None:
    """Run one failover and judge every client.

    Args:
        pair: of PostgreSQL servers.
        root: a folder of the test's own.
        http: a session.
        record: takes what is measured.
        seed: decides how much is lost, and how many writes follow.
        stopped: all servers stand still meanwhile, and another one, which never saw what is lost,
            writes past their position before they look again.
        raw: how many clients know the contract alone.
        sdk: how many are the SDK's.
    """
    dice = random.Random(seed)
    site = Site("postgresql", root, str(pair.standby.url(pair.database)), pair.url)
    servers = [site.process(n) for n in range(SERVERS)]
    async with AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(server)
        urls = [server.url for server in servers]
        proxies = [await stack.enter_async_context(proxied(url)) for url in urls]
        clients: list[SLMClient] = [
            backend(proxies[n % SERVERS].url, site.backend_token) for n in range(sdk)
        ]
        await asyncio.gather(*(stack.enter_async_context(client) for client in clients))
        subs: list[Subscriber] = await stack.enter_async_context(
            subscribers(raw, lambda n: urls[n % SERVERS], site.backend_token)
        )
        await eventually(lambda: all(s.connected for s in subs), 60, 0.05)
        done = asyncio.Event()
        operators = [Operator(http, url, site.admin_token) for url in urls]
        writers = [
            asyncio.create_task(writes(operator, random.Random(seed + n), done, 0.02))
            for n, operator in enumerate(operators)
        ]
        await eventually(lambda: pair.revision(pair.standby) > 10, 30, 0.05)

        pair.hold_replication()
        wanted = dice.randrange(1, 40)
        await eventually(
            lambda: pair.revision(pair.primary) - pair.revision(pair.standby) >= wanted, 30, 0.05
        )
        head = max(s.revision for s in subs)
        kept = pair.revision(pair.standby)
        assert head > kept, "no client was shown a revision that will be lost"
        ahead = head + dice.randrange(0 if stopped else -10, 30)
        if stopped:
            for server in servers:
                server.send_signal(signal.SIGSTOP)
        await pair.fail_over()
        began = time.monotonic()
        if stopped:
            other = await stack.enter_async_context(site.process(SERVERS))
            operator = Operator(http, other.url, site.admin_token)
            last = await operator.create("after-the-failover")
            while last <= ahead:
                last = await operator.set("after-the-failover", llm_max_tokens=last)
            for server in servers:
                server.send_signal(signal.SIGCONT)
        await eventually(lambda: pair.revision(pair.standby) > ahead, 60, 0.05)
        done.set()
        await asyncio.gather(*writers)

        # A write through each server: none of them may be stuck where it was.
        for n, operator in enumerate(operators):
            last = await written(operator, f"last-{n}")
        record("lost_revisions", head - kept)
        await eventually(lambda: all(s.reached(last) for s in subs), 60, 0.05)
        await eventually(lambda: all(c.revision >= last and is_live(c) for c in clients), 60, 0.05)
        record("seconds_from_promotion_to_equal", round(time.monotonic() - began, 2))

        truth = database_agents(site)
        for operator in operators:
            assert (await operator.ask("GET", f"/api/agents?min_revision={last}"))[0] == 200
            answered = await operator.agents()
            assert {a: f["llm_model"] for a, f in answered.items()} == truth
            assert (await operator.ask("GET", "/readyz"))[0] == 200
        [first, *_] = [await operator.agents() for operator in operators]
        assert [s.name for s in subs if s.agents != first] == []
        for client in clients:
            assert await believes(client, first)
        survived = {(int(r), i) for r, i in site.rows("SELECT revision, change_id FROM changes")}
        everyone = list(recording.now.heard.values())
        assert any(
            position is not None and position[0] and position not in survived
            for history in everyone
            for position in shown(history)
        ), "nobody was shown what was lost"
        assert [c[0].name for c in everyone if c and stranded(c, survived)] == []


async def written(operator: Operator, agent_id: str) -> int:
    """Create an agent, trying again while its server finds the new primary."""
    body = {"agent_id": agent_id, "name": agent_id, "llm_provider": "ollama", "llm_model": "m"}
    deadline = time.monotonic() + 30
    while True:
        status, headers, _ = await operator.ask("POST", "/api/agents", body)
        if status == 201:
            return int(headers["SLM-Revision"])
        assert status in (409, 503), status
        if status == 409:
            return await operator.set(agent_id, llm_timeout=random.randrange(1, 3600))
        assert time.monotonic() < deadline, "the server takes no write"
        await asyncio.sleep(0.05)


def database_agents(site: Site) -> dict[str, Any]:
    """Return the model of each agent, as the new primary's table has it."""
    return dict(site.rows("SELECT agent_id, llm_model FROM agents"))


@lost_commits
@pytest.mark.timeout(180)
async def test_a_standby_takes_over_without_the_last_commits(
    pair: Pair,
    tmp_path: Path,
    http: aiohttp.ClientSession,
    record_property: Callable[[str, object], None],
) -> None:
    """The primary dies with commits that the standby never got: every client ends up right."""
    await fail_over(pair, tmp_path, http, record_property, seed=24)


@lost_commits
@pytest.mark.timeout(180)
async def test_servers_that_stood_still_during_the_failover(
    pair: Pair,
    tmp_path: Path,
    http: aiohttp.ClientSession,
    record_property: Callable[[str, object], None],
) -> None:
    """By the time the servers look again, new changes hide the loss; they notice all the same."""
    await fail_over(pair, tmp_path, http, record_property, seed=25, stopped=True)


@lost_commits
@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(20))
async def test_twenty_failovers(
    pair: Pair,
    tmp_path: Path,
    http: aiohttp.ClientSession,
    record_property: Callable[[str, object], None],
    seed: int,
) -> None:
    """Twenty failovers, each losing another number of commits: every client ends up right."""
    await fail_over(pair, tmp_path, http, record_property, seed=seed, stopped=seed % 2 == 1)
