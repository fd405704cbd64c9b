"""The SLM goes away, comes back, or was never there: backends go on."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from slm import LLMInterface, SLMClient
from tests.end_to_end.test_live_change import HELLO, Operator
from tests.support.gateway import gateway
from tests.support.recorder import recording_provider
from tests.support.servers import ServerProcess, eventually

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there


@pytest.fixture(autouse=True)
def _no_environment_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PROVIDER", "ENDPOINT", "MODEL", "API_KEY", "TIMEOUT", "TEMPERATURE"):
        monkeypatch.delenv(f"AUTOBOT_LLM_{name}", raising=False)


async def test_killed_and_back(tmp_path: Path) -> None:
    """Killed: the cache serves, stale after the TTL. Back: caught up by `since`, no full fetch."""
    async with (
        ServerProcess(tmp_path / "data") as server,
        recording_provider() as provider,
        aiohttp.ClientSession() as http,
        gateway(server.url) as gate,
        SLMClient(gate.url, token=server.backend_token, ttl_seconds=0.3) as client,
        LLMInterface(client) as llm,
    ):
        operator = Operator(http, server)
        before = await operator.create(
            "billing", llm_provider="ollama", llm_endpoint=provider.origin, llm_model="old"
        )
        await eventually(lambda: client.revision >= before)
        snapshots = gate.passed.count("/api/snapshot")
        server.kill()

        async def stale() -> bool:
            return (await client.resolve("billing")).stale

        await eventually(stale)
        result = await llm.chat("billing", HELLO)
        assert (result.text, result.revision, result.step) == ("from old", before, "agent")

        await server.start()
        after = await operator.set("billing", llm_model="new")
        await eventually(lambda: client.revision >= after)
        result = await llm.chat("billing", HELLO)
        assert (result.text, result.revision) == ("from new", after)
        assert not (await client.resolve("billing")).stale
        assert gate.passed.count("/api/snapshot") == snapshots


async def test_never_there_hardcoded(tmp_path: Path) -> None:
    """No SLM and nothing in the environment: connect() returns, the hardcoded values answer."""
    async with SLMClient(NOBODY, token="slm_x", start_timeout=0.5) as client:
        config = await client.resolve("anything")
    assert config.step == "hardcoded"
    assert config.llm_provider == "ollama"
    assert config.llm_endpoint == "http://localhost:11434"
    assert config.llm_model == "mistral:7b-instruct"
    assert (config.llm_timeout, config.llm_temperature) == (30, 0.7)


async def test_never_there_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No SLM, AUTOBOT_LLM_* set: the environment answers, and the request goes there."""
    async with recording_provider() as provider:
        monkeypatch.setenv("AUTOBOT_LLM_PROVIDER", "openai")
        monkeypatch.setenv("AUTOBOT_LLM_ENDPOINT", provider.openai_url)
        monkeypatch.setenv("AUTOBOT_LLM_MODEL", "from-the-environment")
        monkeypatch.setenv("AUTOBOT_LLM_API_KEY", "sk-environment")
        async with (
            SLMClient(NOBODY, token="slm_x", start_timeout=0.5) as client,
            LLMInterface(client) as llm,
        ):
            result = await llm.chat("anything", HELLO)
        assert (result.step, result.revision) == ("environment", None)
        assert [(seen.model, seen.key) for seen in provider.seen] == [
            ("from-the-environment", "sk-environment")
        ]


async def test_the_missions_literal_order(tmp_path: Path) -> None:
    """`max_stale_seconds=0`: once the TTL is over without an SLM, the next step answers."""
    async with (
        ServerProcess(tmp_path / "data") as server,
        SLMClient(
            server.url, token=server.backend_token, ttl_seconds=0.3, max_stale_seconds=0
        ) as client,
    ):
        assert (await client.resolve("default")).step == "agent"
        assert (await client.resolve("nobody")).step == "default"
        server.kill()

        async def gone() -> bool:
            return (await client.resolve("default")).step == "hardcoded"

        await eventually(gone)


async def test_a_restart_of_the_backend_without_the_slm(tmp_path: Path) -> None:
    """A backend that starts while the SLM is away goes on from its snapshot file."""
    cache_file = tmp_path / "last-known-good.json"
    async with ServerProcess(tmp_path / "data") as server:
        async with (
            aiohttp.ClientSession() as http,
            SLMClient(server.url, token=server.backend_token, cache_file=cache_file) as client,
        ):
            revision = await Operator(http, server).create(
                "billing", llm_provider="ollama", llm_model="kept"
            )
            await eventually(lambda: client.revision >= revision)
        server.kill()
        async with SLMClient(
            server.url, token="slm_x", cache_file=cache_file, start_timeout=0.5
        ) as client:
            config = await client.resolve("billing")
            assert (config.step, config.llm_model, config.stale) == ("agent", "kept", True)
            assert (await client.resolve("unknown")).step == "default"
