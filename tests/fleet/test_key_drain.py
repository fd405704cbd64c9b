"""A key rotated at the provider under load, and a rollback: what an operator does, end to end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from slm import LLMError, LLMInterface, SLMClient
from slm.cli.commands.fleet import holders
from slm.schemas import Agent
from tests.support.raw import Api
from tests.support.sdk import applied, fleet_of, sdk
from tests.support.servers import InLoopServer, eventually

BACKENDS = 4
LOOPS = 5
ROTATIONS = 3
HELLO = [{"role": "user", "content": "hello"}]


@dataclass
class Provider:
    """An OpenAI-compatible provider whose keys can be revoked while it works.

    Attributes:
        valid: the keys that it takes.
        used: how many calls each key made.
        refused: how many calls came with a key that does not count any more.
    """

    valid: set[str] = field(default_factory=set)
    used: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    url: str = ""

    async def chat(self, request: web.Request) -> web.Response:
        key = request.headers["Authorization"].removeprefix("Bearer ")
        body = await request.json()
        # Looked at when the work is done: a call in flight needs its key to the end.
        await asyncio.sleep(0.4 if body["messages"][0]["content"] == "slow" else 0.02)
        if key not in self.valid:
            self.refused += 1
            return web.json_response({"error": {"message": "revoked"}}, status=401)
        self.used[key] = self.used.get(key, 0) + 1
        message = {"role": "assistant", "content": "hi"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return web.json_response(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 1,
                "model": "m",
                "choices": [choice],
            }
        )


@asynccontextmanager
async def provider() -> AsyncIterator[Provider]:
    """Run a provider on a free port of this machine."""
    running = Provider()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", running.chat)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    running.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield running
    finally:
        await runner.cleanup()


def used_by(upstream: Provider, key: str, calls: int, failures: list[LLMError]) -> Any:
    """Return a condition: so many calls were made with the key, and none has failed so far."""

    def condition() -> bool:
        assert failures == []
        return upstream.used.get(key, 0) > calls

    return condition


async def test_a_key_rotated_under_load_fails_no_request(server: InLoopServer, admin: Api) -> None:
    """New key at the SLM, wait until nobody holds the old one, revoke it: no call ever fails."""
    failures: list[LLMError] = []
    stop = asyncio.Event()

    async def load(llm: LLMInterface, text: str) -> None:
        while not stop.is_set():
            try:
                await llm.chat("a", [{"role": "user", "content": text}])
            except LLMError as error:
                failures.append(error)

    async with provider() as upstream, AsyncExitStack() as stack:
        upstream.valid.add("sk-0")
        await admin.create(
            "a", llm_provider="openai", llm_endpoint=upstream.url, llm_api_key="sk-0"
        )
        names = [f"backend-{n}" for n in range(BACKENDS)]
        clients = [
            await stack.enter_async_context(sdk(server.url, server.backend_token, name))
            for name in names
        ]
        llms = [await stack.enter_async_context(LLMInterface(client)) for client in clients]
        await eventually(lambda: applied(admin, clients[0].revision, *names))
        tasks = [
            asyncio.create_task(load(llm, "slow" if n == 0 else "hello"))
            for llm in llms
            for n in range(LOOPS)
        ]
        held_up = 0
        for n in range(1, ROTATIONS + 1):
            await eventually(used_by(upstream, f"sk-{n - 1}", 20, failures), 60)
            upstream.valid.add(f"sk-{n}")
            answer = await admin.call(
                "PUT", "/api/agents/a?wait=30s", json={"llm_api_key": f"sk-{n}"}
            )
            assert len(answer.json["receipt"]["applied"]) == BACKENDS
            agent = Agent.model_validate((await admin.get("/api/agents/a")).json)
            while holders(list((await fleet_of(admin)).values()), agent):
                held_up += 1
                await asyncio.sleep(0.01)
            upstream.valid.discard(f"sk-{n - 1}")
        await eventually(used_by(upstream, f"sk-{ROTATIONS}", 50, failures), 60)
        stop.set()
        await asyncio.gather(*tasks)
    assert failures == []
    assert upstream.refused == 0
    assert held_up, "no call was in flight at any rotation: nothing was shown"


async def test_a_rollback_is_on_every_backend(server: InLoopServer, admin: Api) -> None:
    """After five edits, one of the key and one of the endpoint, the old config is everywhere.

    To its last field, but without a key: that is never brought back.
    """
    old = {
        "llm_provider": "openai",
        "llm_endpoint": "https://one.example.com/v1",
        "llm_model": "gpt-6.1-sol",
        "llm_timeout": 45,
        "llm_temperature": 0.25,
        "llm_max_tokens": 100,
        "llm_options": {"top_p": 0.5},
    }
    created = await admin.create("a", **old, llm_api_key="sk-first")
    names = ["one", "two"]
    async with AsyncExitStack() as stack:
        clients: list[SLMClient] = [
            await stack.enter_async_context(sdk(server.url, server.backend_token, name))
            for name in names
        ]
        await eventually(lambda: applied(admin, clients[0].revision, *names))
        for edit in (
            {"llm_model": "gpt-6.1-terra", "comment": "newer"},
            {"llm_temperature": 1.0, "llm_options": {}},
            {"llm_api_key": "sk-second"},
            {"llm_endpoint": "https://two.example.com/v1", "llm_api_key": "sk-third"},
            {"llm_timeout": 60, "llm_max_tokens": None},
        ):
            await admin.put("a", **edit)
        back = await admin.call(
            "POST", "/api/agents/a/rollback?wait=30s", json={"to": created.revision}
        )
        assert back.json["api_key_cleared"] is True
        assert len(back.json["receipt"]["applied"]) == len(names)
        for client in clients:
            config = await client.get_agent_config("a")
            assert config.pop("llm_api_key") is None
            assert config == old
    history = (await admin.get("/api/agents/a/history")).json["changes"]
    assert len(history) == 1 + 5 + 1
    assert {change["actor"] for change in history} == {"admin"}
    assert history[0]["comment"] == f"restores revision {created.revision}"
