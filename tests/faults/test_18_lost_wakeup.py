"""Fault 18: the listener is killed, a NOTIFY is lost: changes come within the poll interval."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp

from tests.support.faults.site import Operator, Site
from tests.support.faults.subscriber import Subscriber, subscribers
from tests.support.postgres import connect
from tests.support.servers import InLoopServer, eventually

KILL_LISTENERS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE application_name = 'slm-listener' AND datname = current_database()"
)

PAUSE_SECONDS = 1.0
"""By how much a busy machine may be late."""

# A committed change that nobody was notified of, as another program could make it.
CHANGE_IN_SILENCE = """
WITH next AS (UPDATE state SET revision = revision + 1 RETURNING revision)
INSERT INTO changes (revision, type, agent_id, agent, was_default, actor, created_at)
SELECT next.revision, type, agent_id,
       jsonb_set(agent::jsonb, '{revision}', to_jsonb(next.revision))::text,
       was_default, 'silence', now()
FROM changes, next ORDER BY changes.revision DESC LIMIT 1
"""


@asynccontextmanager
async def two_replicas(
    site: Site, http: aiohttp.ClientSession, **settings: float
) -> AsyncIterator[tuple[InLoopServer, InLoopServer, Operator, list[Subscriber]]]:
    one, other = site.in_loop(0, **settings), site.in_loop(1, **settings)
    await one.start()
    await other.start()
    try:
        operator = Operator(http, one.url, site.admin_token)
        urls = [one.url, other.url]
        async with subscribers(10, lambda n: urls[n % 2], site.backend_token) as subs:
            yield one, other, operator, subs
    finally:
        await one.stop()
        await other.stop()


async def test_listeners_killed_before_each_write(
    postgres_site: Site, http: aiohttp.ClientSession
) -> None:
    """With every listener killed again and again, each change still reaches every replica."""
    async with two_replicas(postgres_site, http) as (_, _, operator, subs):
        revision = await operator.create("billing")
        with connect(str(postgres_site.database_url)) as database:
            for n in range(15):
                killed = database.execute(KILL_LISTENERS).fetchall()
                revision = await operator.set("billing", llm_model=f"m{n}")
                await eventually(lambda: all(s.reached(revision) for s in subs))  # noqa: B023
            # They do come back: otherwise only the poll was tested.
            await eventually(lambda: bool(database.execute(KILL_LISTENERS).fetchall()))
        assert killed is not None


async def test_a_notification_that_never_comes(
    postgres_site: Site,
    http: aiohttp.ClientSession,
    record_property: Callable[[str, object], None],
) -> None:
    """A change committed without NOTIFY is with everyone within the poll interval (1 s)."""
    interval, late = 1.0, []
    async with two_replicas(postgres_site, http, poll_interval_seconds=interval) as (
        _,
        _,
        operator,
        subs,
    ):
        revision = await operator.create("billing")
        await eventually(lambda: all(s.reached(revision) for s in subs))
        with connect(str(postgres_site.database_url)) as database:
            for _ in range(5):
                database.execute(CHANGE_IN_SILENCE)
                committed_at = time.monotonic()
                revision += 1
                await eventually(lambda: all(s.reached(revision) for s in subs))  # noqa: B023
                late.append(max(s.arrivals[revision] for s in subs) - committed_at)
    record_property("latest_seconds", round(max(late), 2))
    assert max(late) < interval + PAUSE_SECONDS


async def test_the_notification_alone_is_enough(
    postgres_site: Site, http: aiohttp.ClientSession
) -> None:
    """With a poll once a minute, a write on one replica reaches the clients of the other one."""
    settings = {"poll_interval_seconds": 60.0, "behind_after_seconds": 120.0}
    async with two_replicas(postgres_site, http, **settings) as (_, other, operator, subs):
        await eventually(lambda: other.running.services.feed.running)
        revision = await operator.create("billing")
        await eventually(lambda: all(s.reached(revision) for s in subs))
        for n in range(10):
            revision = await operator.set("billing", llm_model=f"m{n}")
            await eventually(lambda: all(s.reached(revision) for s in subs))  # noqa: B023
