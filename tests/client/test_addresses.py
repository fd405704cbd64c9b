"""Several addresses: two replicas need no load balancer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from slm import ClientStatus, ConfigurationError, SLMClient, Step, Timings
from slm.client.transport.addresses import Addresses
from tests.support.faults.backends import TENTH
from tests.support.gateway import Gateway, gateway
from tests.support.raw import Api
from tests.support.servers import InLoopServer, eventually, running_server
from tests.support.ways import listening

NOBODY = "http://127.0.0.1:9"
QUICK = Timings(**(TENTH | {"next_address_seconds": 0.3, "poll_interval_seconds": 0.1}))


@pytest.fixture
async def gates(server: InLoopServer) -> AsyncIterator[tuple[Gateway, Gateway]]:
    """Two ways to one server, as two replicas on one database are."""
    async with gateway(server.url) as one, gateway(server.url) as other:
        yield one, other


def follow(server: InLoopServer, *urls: str, **options: Any) -> SLMClient:
    return SLMClient(list(urls), server.backend_token, **({"timings": QUICK} | options))


def status_of(client: SLMClient) -> ClientStatus:
    """Return the status; by a call, since a type checker takes a property for unchanging."""
    return client.status


async def test_a_dead_server_is_left_for_the_next(
    server: InLoopServer, admin: Api, gates: tuple[Gateway, Gateway]
) -> None:
    """At the start as later; the stream and the keys come from the same one."""
    one, other = gates
    await admin.create("billing", llm_provider="openai", llm_api_key="sk-1")
    async with follow(server, NOBODY, one.url, other.url) as client:
        assert status_of(client) is ClientStatus.LIVE
        assert (one.passed, other.passed) == (["/api/snapshot"], [])
        one.refuse = lambda _: 502
        await one.cut()
        answer = await admin.put("billing", llm_api_key="sk-2", llm_model="new")
        await eventually(lambda: client.revision >= answer.revision)
        await eventually(lambda: client.peek("billing") is not None)
        assert (await client.resolve("billing")).llm_model == "new"
        assert "/api/agents/billing/llm" in other.passed
        assert status_of(client) is ClientStatus.LIVE
        assert client.last_error is None


async def test_one_that_hangs_does_not_cost_the_start(server: InLoopServer) -> None:
    """A server that takes connections and says nothing is left after a moment."""

    async def handle(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async with listening(handle) as port:
        began = time.monotonic()
        hung = f"http://127.0.0.1:{port}"
        async with follow(server, hung, server.url, start_timeout=5) as client:
            assert status_of(client) is ClientStatus.LIVE
            assert (await client.resolve("default")).step is Step.AGENT
        assert time.monotonic() - began < 4


async def test_a_server_that_is_behind_is_left_for_one_that_is_ready(
    server: InLoopServer, admin: Api
) -> None:
    """One that has lost its database keeps its streams; who has another address moves."""
    async with (
        gateway(server.url) as healthy,
        stalled() as (behind, asked),
        follow(server, behind, healthy.url, start_timeout=0.5) as client,
    ):
        await eventually(lambda: status_of(client) is ClientStatus.LIVE, timeout=5)
        assert "/api/snapshot" in asked
        assert "/readyz" in healthy.passed
        answer = await admin.create("billing", llm_model="m")
        await eventually(lambda: client.revision >= answer.revision)


async def test_nobody_moves_while_no_other_is_ready(server: InLoopServer) -> None:
    """All have lost the same database: the stream stays where it is and hears the end of it."""
    async with gateway(server.url) as unready, stalled() as (behind, _):
        unready.refuse = lambda _: 503
        async with follow(server, behind, unready.url, start_timeout=0.3) as client:
            await eventually(lambda: unready.passed.count("/readyz") >= 3)
            assert status_of(client) in (ClientStatus.BEHIND, ClientStatus.SYNCING)
            assert set(unready.passed) == {"/readyz"}


async def test_all_that_are_away_are_tried_in_turn_with_backoff(server: InLoopServer) -> None:
    """The sentence names the place; the client goes on, and finds whichever comes back."""
    async with gateway(server.url) as one, gateway(server.url) as other:
        one.refuse = other.refuse = lambda _: 502
        async with follow(server, one.url, other.url, start_timeout=0.3) as client:
            assert status_of(client) is ClientStatus.DISCONNECTED
            assert client.last_error is not None
            assert "127.0.0.1:" in client.last_error
            other.refuse = lambda _: None
            await eventually(lambda: status_of(client) is ClientStatus.LIVE)


async def test_a_token_is_refused_once_all_have_refused_it(server: InLoopServer) -> None:
    """`connect` waits for the others before it says so, and not for the time limit."""
    async with gateway(server.url) as one, gateway(server.url) as other:
        began = time.monotonic()
        client = SLMClient([one.url, other.url], "slm_wrong", timings=QUICK, start_timeout=20)
        async with client:
            assert status_of(client) is ClientStatus.UNAUTHORIZED
        assert time.monotonic() - began < 10


async def test_another_database_at_the_other_address_is_taken_as_another_epoch(
    server: InLoopServer, admin: Api, tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """Revisions of one database mean nothing in another: the client takes all anew."""
    await admin.create("billing", llm_model="first")
    await admin.put("billing", llm_model="last of the first")
    async with running_server(tmp_path / "standby") as standby, gateway(server.url) as gate:
        theirs = Api(standby, session, standby.admin_token)
        await theirs.create("billing", llm_model="second")
        token = await theirs.call(
            "POST", "/api/admin/tokens", json={"name": "b", "scopes": ["config:read", "key:read"]}
        )
        file = tmp_path / "token"
        file.write_text(server.backend_token)
        async with SLMClient([gate.url, standby.url], token_file=file, timings=QUICK) as client:
            assert (await client.resolve("billing")).llm_model == "last of the first"
            file.write_text(token.json["token"])
            gate.refuse = lambda _: 502
            await gate.cut()
            await eventually(lambda: status_of(client) is ClientStatus.LIVE)
            await eventually(lambda: _model(client, "billing") == "second")


def test_one_address_that_cannot_be_used_refuses_all(server: InLoopServer) -> None:
    """A token is not sent to the others while one of them is a mistake."""
    with pytest.raises(ConfigurationError, match="https"):
        SLMClient([server.url, "http://slm.internal"], "slm_t")


def _model(client: SLMClient, agent_id: str) -> str | None:
    config = client.peek(agent_id)
    return None if config is None else config.llm_model


@contextlib.asynccontextmanager
async def stalled() -> AsyncIterator[tuple[str, list[str]]]:
    """Run an SLM that is behind: it has no snapshot to give, and its heartbeats say so."""
    asked: list[str] = []

    async def refuse(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.json_response({"code": "behind", "status": 503}, status=503)

    async def stream(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        await ws.receive()
        at = {"epoch": "e-behind", "revision": 3}
        await ws.send_json(
            {"type": "subscribed", "channel": "agent_config", "heartbeat": 2.0, "head": 3} | at
        )
        await ws.send_json({"type": "heartbeat", "revision": 3, "behind": True})
        async for _ in ws:
            pass
        return ws

    app = web.Application()
    app.router.add_get("/ws", stream)
    app.router.add_route("*", "/{path:.*}", refuse)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", asked
    finally:
        await runner.cleanup()


@given(st.integers(2, 6), st.lists(st.booleans(), max_size=40))
def test_each_address_has_its_turn(count: int, served: list[bool]) -> None:
    """Whatever served and failed, every address comes up within one round, and none is skipped."""
    urls = [f"https://h{n}" for n in range(count)]
    addresses = Addresses(urls)
    for success in served:
        before = addresses.current
        if success:
            addresses.arrived()
        assert addresses.leave("https://elsewhere") == addresses.untried
        assert addresses.current == before
        addresses.leave(before)
        assert addresses.current == urls[(urls.index(before) + 1) % count]
    addresses.arrived()
    assert [addresses.leave(addresses.current) for _ in range(count)] == [True] * (count - 1) + [
        False
    ]
    assert addresses.patient
