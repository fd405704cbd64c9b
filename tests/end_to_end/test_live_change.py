"""An operator changes an agent; the very next request of every loop uses it, and no key leaks."""

from __future__ import annotations

import asyncio
import logging
import random
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from slm import LLMInterface, SLMClient
from tests.support.gateway import gateway
from tests.support.recorder import Recorder, recording_provider
from tests.support.servers import InLoopServer, ServerProcess, eventually, running_server

CANARY = "sk-canary-4f1d"
HELLO = [{"role": "user", "content": "hello"}]


class Operator:
    """What an operator does, over plain HTTP."""

    def __init__(self, http: aiohttp.ClientSession, server: ServerProcess | InLoopServer) -> None:
        self._http, self._server = http, server

    async def send(self, method: str, path: str, body: Any = None) -> int:
        """Do it and return the revision that the answer names."""
        async with self._http.request(
            method,
            f"{self._server.url}/api/agents{path}",
            json=body,
            headers={"Authorization": f"Bearer {self._server.admin_token}"},
        ) as answer:
            assert answer.status < 300, await answer.text()
            return int(answer.headers["SLM-Revision"])

    async def create(self, agent_id: str, **fields: Any) -> int:
        return await self.send("POST", "", {"agent_id": agent_id, "name": agent_id} | fields)

    async def set(self, agent_id: str, **fields: Any) -> int:
        return await self.send("PUT", f"/{agent_id}", fields)


async def test_no_request_after_on_change_uses_an_older_revision(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """1,000 changes under 50 request loops: each request is as new as what on_change told."""
    caplog.set_level(logging.DEBUG, logger="slm")
    changes, loops = 1000, 50
    async with (
        ServerProcess(tmp_path / "data", log_level="debug") as server,
        recording_provider() as provider,
        aiohttp.ClientSession() as http,
        gateway(server.url) as gate,
        SLMClient(gate.url, token=server.backend_token) as client,
        LLMInterface(client) as llm,
    ):
        operator = Operator(http, server)
        first = await operator.create(
            "code-assistant",
            llm_provider="openai",
            llm_endpoint=provider.openai_url,
            llm_model="model-0",
            llm_api_key=CANARY,
        )
        await eventually(lambda: client.revision >= first)
        told = first
        stop = asyncio.Event()

        def on_change(agent_id: str, *_: object) -> None:
            nonlocal told
            if agent_id == "code-assistant":
                told = max(told, client.revision)

        client.on_change(on_change)
        served: list[int] = []

        async def ask() -> None:
            while not stop.is_set():
                at_least = told
                result = await llm.chat("code-assistant", HELLO)
                assert result.revision is not None
                assert result.revision >= at_least
                assert result.text == f"from model-{result.revision - first}"
                served.append(result.revision)
                # Fifty loops at full speed would only measure how slowly one core calls an SDK.
                await asyncio.sleep(random.uniform(0, 2))

        async with asyncio.TaskGroup() as group:
            for _ in range(loops):
                group.create_task(ask())
            for n in range(1, changes + 1):
                await operator.set("code-assistant", llm_model=f"model-{n}")
            await eventually(lambda: told == first + changes)
            stop.set()

        assert told == first + changes
        assert len(served) > loops
        assert provider.keys() == {CANARY}
        assert sum("agent_config_changed" in frame for frame in gate.frames) == changes
        assert CANARY not in "".join(gate.frames)
        assert CANARY not in server.log
        assert CANARY not in caplog.text
        assert CANARY not in repr(await client.resolve("code-assistant"))
        assert CANARY not in repr(await client.get_agent_config("code-assistant"))


async def test_a_new_key_goes_with_its_new_endpoint_only(tmp_path: Path) -> None:
    """Key and endpoint change together 40 times under load: each place sees its own key only."""
    async with (
        running_server(tmp_path) as server,
        recording_provider() as red,
        recording_provider() as blue,
        aiohttp.ClientSession() as http,
        SLMClient(server.url, token=server.backend_token) as client,
        LLMInterface(client) as llm,
    ):
        operator = Operator(http, server)
        places: list[tuple[Recorder, str]] = [(red, "sk-red"), (blue, "sk-blue")]
        place, key = places[0]
        await operator.create(
            "billing",
            llm_provider="openai",
            llm_endpoint=place.openai_url,
            llm_model="m",
            llm_api_key=key,
        )
        stop = asyncio.Event()

        async def ask() -> None:
            while not stop.is_set():
                await llm.chat("billing", HELLO)

        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(ask())
            for n in range(1, 41):
                place, key = places[n % 2]
                revision = await operator.set(
                    "billing", llm_endpoint=place.openai_url, llm_api_key=f"{key}-{n}"
                )
                await eventually(lambda revision=revision: client.revision >= revision)  # type: ignore[misc]
                result = await llm.chat("billing", HELLO)
                assert result.revision == revision
                assert f"{key}-{n}" in {seen.key for seen in place.seen}
            stop.set()
        assert all(str(seen.key).startswith("sk-red") for seen in red.seen)
        assert all(str(seen.key).startswith("sk-blue") for seen in blue.seen)


async def test_while_the_key_cannot_be_fetched_the_old_whole_config_serves(tmp_path: Path) -> None:
    """The key fetch fails: the previous config with its own key, marked stale; then the new one."""
    async with (
        running_server(tmp_path) as server,
        recording_provider() as red,
        recording_provider() as blue,
        aiohttp.ClientSession() as http,
        gateway(server.url) as gate,
        SLMClient(gate.url, token=server.backend_token, key_wait=0.2) as client,
        LLMInterface(client) as llm,
    ):
        operator = Operator(http, server)
        old = await operator.create(
            "billing",
            llm_provider="openai",
            llm_endpoint=red.openai_url,
            llm_model="old-model",
            llm_api_key="sk-red",
        )
        await eventually(lambda: client.revision >= old)
        assert (await client.resolve("billing")).revision == old

        gate.refuse = lambda path: 503 if path.endswith("/llm") else None
        new = await operator.set(
            "billing", llm_endpoint=blue.openai_url, llm_model="new-model", llm_api_key="sk-blue"
        )
        await eventually(lambda: client.revision >= new)
        config = await client.resolve("billing")
        assert (config.revision, config.llm_model, config.stale) == (old, "old-model", True)
        result = await llm.chat("billing", HELLO)
        assert result.revision == old
        assert red.keys() == {"sk-red"}
        assert not blue.seen

        gate.refuse = lambda _path: None

        async def swapped() -> bool:
            return (await client.resolve("billing")).revision == new

        await eventually(swapped)
        result = await llm.chat("billing", HELLO)
        assert (result.revision, result.text) == (new, "from new-model")
        assert not (await client.resolve("billing")).stale
        assert blue.keys() == {"sk-blue"}
        assert red.keys() == {"sk-red"}


async def test_hostile_environment_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Provider variables and proxies of the environment reach no request, whatever the provider."""
    async with (
        recording_provider() as honest,
        recording_provider() as hostile,
        running_server(tmp_path) as server,
        aiohttp.ClientSession() as http,
    ):
        for name in (
            "OPENAI_API_KEY",
            "ANTHROPIC_API_KEY",
            "ANTHROPIC_AUTH_TOKEN",
            "OLLAMA_API_KEY",
        ):
            monkeypatch.setenv(name, "sk-hostile")
        for name in ("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "OLLAMA_HOST"):
            monkeypatch.setenv(name, hostile.origin)
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, hostile.origin)
        monkeypatch.setenv("NO_PROXY", "")
        operator = Operator(http, server)
        async with (
            SLMClient(server.url, token=server.backend_token) as client,
            LLMInterface(client) as llm,
        ):
            for provider, endpoint in (
                ("openai", honest.openai_url),
                ("anthropic", honest.origin),
                ("ollama", honest.origin),
            ):
                for key in (None, "sk-own"):
                    agent_id = f"{provider}-{'with' if key else 'no'}-key"
                    await operator.create(
                        agent_id,
                        llm_provider=provider,
                        llm_endpoint=endpoint,
                        llm_model="m",
                        llm_api_key=key,
                    )
                    assert (await llm.chat(agent_id, HELLO)).text == "from m"
        assert not hostile.seen
        assert len(honest.seen) == 6
        assert "sk-hostile" not in str(honest.seen)
