"""LLMInterface over the real client and a real SLM: which step of the chain a result names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from slm import AgentKeyUnavailable, LLMError, LLMInterface, SLMClient, Step
from slm.llm.retry import RetrySettings
from tests.llm.conftest import ASK
from tests.support.llm.providers import Dialect, RecordingServer, answering, failing
from tests.support.servers import InLoopServer, eventually, running_server


async def write(server: InLoopServer, method: str, path: str, body: dict[str, Any]) -> int:
    """Write to the SLM as an operator does, and return the revision."""
    headers = {"authorization": f"Bearer {server.admin_token}"}
    async with (
        aiohttp.ClientSession(headers=headers) as http,
        http.request(method, f"{server.url}/api/agents{path}", json=body) as answer,
    ):
        assert answer.status < 300, await answer.text()
        return int(answer.headers["SLM-Revision"])


async def test_a_result_names_the_step_that_answered(dialect: Dialect, tmp_path: Path) -> None:
    """Its own config, then the default's: each result says whose it was, and its revision."""
    async with (
        RecordingServer(answering(dialect)).running() as provider,
        running_server(tmp_path) as server,
        SLMClient(server.url, token=server.backend_token) as client,
        LLMInterface(client) as llm,
    ):
        config = {
            "llm_provider": dialect.provider,
            "llm_endpoint": dialect.endpoint(provider.url),
            "llm_model": "model-1",
            "llm_api_key": "sk-own",
        }
        agent = {"agent_id": "code-assistant", "name": "Code assistant"}
        own = await write(server, "POST", "", agent | config)
        default = await write(server, "PUT", "/default", config | {"llm_api_key": "sk-default"})
        await eventually(lambda: client.revision >= default)

        first = await llm.chat("code-assistant", ASK)
        assert (first.step, first.source_agent_id) == (Step.AGENT, "code-assistant")
        assert (first.revision, first.stale) == (own, False)

        await write(server, "PUT", "/code-assistant", {"is_active": False})
        gone = await write(server, "PUT", "/default", {"llm_model": "model-2"})
        await eventually(lambda: client.revision >= gone)
        second = await llm.chat("code-assistant", ASK)
        assert (second.step, second.source_agent_id) == (Step.DEFAULT, "default")
        assert (second.agent_id, second.model) == ("code-assistant", "model-2")
        assert second.revision == gone
        keys = [request.headers["authorization"] for request in provider.received]
        assert keys == ["Bearer sk-own", "Bearer sk-default"]


async def test_every_log_line_names_agent_step_and_revision(
    dialect: Dialect, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An answer, a stream, a failure and a second try: each line says which config was at work."""
    caplog.set_level(logging.DEBUG, "slm.llm")
    patient = RetrySettings(backoff_seconds=0.01)
    async with (
        RecordingServer(answering(dialect)).running() as provider,
        running_server(tmp_path) as server,
        SLMClient(server.url, token=server.backend_token) as client,
        LLMInterface(client, retry=patient) as llm,
    ):
        agent = {
            "agent_id": "code-assistant",
            "name": "Code assistant",
            "llm_provider": dialect.provider,
            "llm_endpoint": dialect.endpoint(provider.url),
            "llm_model": "model-1",
            "llm_api_key": "sk-canary-log",
        }
        own = await write(server, "POST", "", agent)
        await eventually(lambda: client.revision >= own)
        where = f"agent code-assistant, step agent, revision {own}"

        def lines() -> list[str]:
            said = [r.getMessage() for r in caplog.records if r.name.startswith("slm.llm")]
            caplog.clear()
            assert not [line for line in said if "sk-canary-log" in line]
            return said

        await llm.chat("code-assistant", ASK)
        async for _ in llm.stream("code-assistant", ASK):
            pass
        answered = lines()
        assert len(answered) == 2
        assert all(where in line and "answered" in line for line in answered), answered

        provider.handler = failing(dialect, 500, "overloaded")
        with pytest.raises(LLMError):
            await llm.chat("code-assistant", ASK)
        failed = lines()
        assert len(failed) == 1 + patient.max_retries
        assert all(where in line for line in failed), failed
        assert "trying again" in failed[0]

        provider.handler = answering(dialect)
        default = {name: value for name, value in agent.items() if name.startswith("llm_")}
        await write(server, "PUT", "/default", default)
        gone = await write(server, "DELETE", "/code-assistant", {})
        await eventually(lambda: client.revision >= gone)
        await llm.chat("code-assistant", ASK)
        (line,) = lines()
        assert f"agent code-assistant, step default, revision {gone - 1}" in line


async def test_with_no_slm_the_environment_answers(
    dialect: Dialect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An SLM that is not there leaves what the environment says, and the result says so."""
    async with RecordingServer(answering(dialect)).running() as provider:
        monkeypatch.setenv("AUTOBOT_LLM_PROVIDER", dialect.provider)
        monkeypatch.setenv("AUTOBOT_LLM_ENDPOINT", dialect.endpoint(provider.url))
        monkeypatch.setenv("AUTOBOT_LLM_MODEL", "model-env")
        monkeypatch.setenv("AUTOBOT_LLM_API_KEY", "sk-env")
        async with (
            SLMClient("http://127.0.0.1:1", token="none", start_timeout=0.5) as client,
            LLMInterface(client) as llm,
        ):
            result = await llm.chat("code-assistant", ASK)
        assert (result.step, result.model) == (Step.ENVIRONMENT, "model-env")
        assert (result.revision, result.source_agent_id) == (None, None)
        assert provider.received[0].headers["authorization"] == "Bearer sk-env"


async def test_a_key_that_cannot_be_had_is_told() -> None:
    """An agent whose key the SLM cannot decrypt raises; it does not go on with another's key."""

    class Locked:
        async def resolve(self, agent_id: str) -> Any:
            raise AgentKeyUnavailable(agent_id, "it does not decrypt")

    async with LLMInterface(Locked()) as llm:
        with pytest.raises(AgentKeyUnavailable):
            await llm.chat("code-assistant", ASK)
        with pytest.raises(AgentKeyUnavailable):
            await anext(llm.stream("code-assistant", ASK))
