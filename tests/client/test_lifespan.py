"""The start-up hook: one line in a FastAPI or Starlette backend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.applications import Starlette

import slm
from slm import ClientStatus, ConfigurationError, SLMClient, Timings
from tests.support.faults.backends import TENTH
from tests.support.raw import Api
from tests.support.servers import InLoopServer, eventually


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Start the application as a server does, by ASGI's lifespan messages, and stop it."""
    inbox: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    outbox: asyncio.Queue[Any] = asyncio.Queue()
    state: dict[str, Any] = {}
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": state}
    task = asyncio.create_task(app(scope, inbox.get, outbox.put))
    await inbox.put({"type": "lifespan.startup"})
    message = await outbox.get()
    assert message["type"] == "lifespan.startup.complete", message

    async def with_state(scope: Any, receive: Any, send: Any) -> None:
        await app(scope | {"state": dict(state)}, receive, send)

    transport = httpx.ASGITransport(app=with_state)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as http:
        yield http
    await inbox.put({"type": "lifespan.shutdown"})
    assert (await outbox.get())["type"] == "lifespan.shutdown.complete"
    await task


async def test_one_line_is_enough(
    server: InLoopServer, admin: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`FastAPI(lifespan=slm.lifespan(url))`: each request finds a live client."""
    monkeypatch.setenv("SLM_TOKEN", server.backend_token)
    app = FastAPI(lifespan=slm.lifespan(server.url))

    @app.get("/model")
    async def model(request: Request) -> str:
        client: SLMClient = request.state.slm
        assert client is request.app.state.slm
        config = await client.resolve("billing")
        return str(config.llm_model)

    answer = await admin.create("billing", llm_model="through-a-backend")
    async with serving(app) as http:
        client: SLMClient = app.state.slm
        assert client.status == "live"
        await eventually(lambda: client.revision >= answer.revision)
        assert (await http.get("/model")).json() == "through-a-backend"
    assert client.status == "closed"


@pytest.mark.parametrize("framework", [FastAPI, Starlette])
async def test_it_goes_with_a_lifespan_of_ones_own(
    server: InLoopServer, framework: type[Starlette]
) -> None:
    """The inner lifespan finds the client, and its own state is kept."""
    order = []

    @asynccontextmanager
    async def mine(app: Any) -> AsyncIterator[dict[str, str]]:
        order.append(("start", app.state.slm.status))
        yield {"mine": "kept"}
        order.append(("stop", app.state.slm.status))

    client = SLMClient(server.url, token=server.backend_token, timings=Timings(**TENTH))
    app = framework(lifespan=slm.lifespan(client, mine))
    async with app.router.lifespan_context(app) as state:
        assert state == {"mine": "kept", "slm": client}
    assert order == [("start", ClientStatus.LIVE), ("stop", ClientStatus.LIVE)]
    assert client.status is ClientStatus.CLOSED


async def test_a_wrong_address_is_told_at_start_up() -> None:
    """Making the application never fails; starting it says what is wrong."""
    app = FastAPI(lifespan=slm.lifespan("http://slm.internal", token="t"))
    with pytest.raises(ConfigurationError, match="https"):
        async with app.router.lifespan_context(app):
            pass
