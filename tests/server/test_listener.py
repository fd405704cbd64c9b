"""LISTEN/NOTIFY against a real PostgreSQL: wake-ups come, also after it was killed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy.engine import make_url

from slm.server.db.engines import listener as listener_module
from slm.server.db.engines.listener import CHANNEL, ChangeListener
from tests.support.faults.network import Proxy
from tests.support.postgres import connect
from tests.support.servers import eventually


@asynccontextmanager
async def listening(url: str) -> AsyncIterator[tuple[ChangeListener, list[int | None]]]:
    heard: list[int | None] = []
    listener = ChangeListener(make_url(url), heard.append)
    await listener.start()
    try:
        yield listener, heard
    finally:
        await listener.stop()


async def test_a_notification_wakes(postgres_url: str) -> None:
    """It looks once when it begins to listen, then at each commit, which names its revision."""
    async with listening(postgres_url) as (_, heard):
        await eventually(lambda: heard == [None])
        with connect(postgres_url) as other:
            other.execute(f"NOTIFY {CHANNEL}, '43'")
            other.execute(f"NOTIFY {CHANNEL}")
            await eventually(lambda: heard == [None, 43, None])


async def test_a_rolled_back_write_wakes_nobody(postgres_url: str) -> None:
    """What was not committed is not heard of."""
    async with listening(postgres_url) as (_, heard):
        await eventually(lambda: heard == [None])
        with connect(postgres_url) as other:
            other.execute("BEGIN")
            other.execute(f"NOTIFY {CHANNEL}, '43'")
            other.execute("ROLLBACK")
            other.execute(f"NOTIFY {CHANNEL}, '44'")
        await eventually(lambda: 44 in heard)
        assert 43 not in heard


async def test_a_killed_listener_listens_again(postgres_url: str) -> None:
    """pg_terminate_backend ends it; it comes back and looks, since it may have missed something."""
    async with listening(postgres_url) as (listener, heard):
        await eventually(lambda: heard == [None])
        with connect(postgres_url) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'slm-listener' AND datname = current_database()"
            )
            await eventually(lambda: listener.connections == 2 and heard == [None, None])
            other.execute(f"NOTIFY {CHANNEL}, '45'")
            await eventually(lambda: heard[-1] == 45)


async def test_a_relay_that_went_silent_is_noticed(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that is alive and passes nothing on is given up for another."""
    monkeypatch.setattr(listener_module, "CHECK_SECONDS", 0.1)
    monkeypatch.setattr(listener_module, "ANSWER_SECONDS", 0.1)
    url = make_url(postgres_url)
    relay = Proxy(url.host or "", url.port or 0)
    await relay.open()
    try:
        relayed = url.set(host="127.0.0.1", port=relay.port)
        async with listening(relayed.render_as_string(False)) as (listener, heard):
            await eventually(lambda: heard == [None])
            relay.stall()
            await eventually(lambda: not listener.listening)
            relay.resume()
            await eventually(lambda: listener.connections == 2)
            with connect(postgres_url) as other:
                other.execute(f"NOTIFY {CHANNEL}, '46'")
                await eventually(lambda: heard[-1] == 46)
    finally:
        await relay.close()


async def test_nobody_there(unused_tcp_port: int, caplog: pytest.LogCaptureFixture) -> None:
    """A database that is away is tried again, and warned of once, without its password."""
    url = f"postgresql+psycopg://user:canary@127.0.0.1:{unused_tcp_port}/nothing"
    async with listening(url) as (listener, heard):
        await eventually(lambda: bool(caplog.records))
        await asyncio.sleep(0)
        assert not heard
        assert not listener.listening
    assert "canary" not in caplog.text
