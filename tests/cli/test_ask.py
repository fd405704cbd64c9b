"""`slm ask`: one request as a backend makes it, and which config answered."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from slm.cli.demo.local_model import LocalModel, missing
from tests.end_to_end.test_live_change import Operator
from tests.support.command import CANARY, slm
from tests.support.llm.providers import Dialect, RecordingServer, answering
from tests.support.servers import InLoopServer, running_server

SAID = "Hellothere"
"""What the recording provider streams, in two tokens."""


@asynccontextmanager
async def stage(
    data: Path, provider: str = "openai"
) -> AsyncIterator[tuple[InLoopServer, Operator, RecordingServer, int]]:
    """A server with the agent `code-assistant` at a provider that streams; its revision."""
    dialect = Dialect(provider)
    async with (
        running_server(data) as server,
        aiohttp.ClientSession() as http,
        RecordingServer(answering(dialect)).running() as model,
    ):
        (data / "server.url").write_text(server.url)
        operator = Operator(http, server)
        revision = await operator.create(
            "code-assistant",
            llm_provider=provider,
            llm_endpoint=dialect.endpoint(model.url),
            llm_model="model-1",
            llm_api_key=CANARY,
        )
        yield server, operator, model, revision


@pytest.mark.parametrize("provider", ["openai", "anthropic", "ollama"])
async def test_the_answer_and_the_config_that_made_it(tmp_path: Path, provider: str) -> None:
    """The answer alone is on stdout; stderr says agent, provider, model, step, revision and why."""
    async with stage(tmp_path, provider) as (_, _, model, revision):
        done = await slm("ask", "code-assistant", "hello", data=tmp_path)
    assert done.code == 0, done.err
    assert done.out == f"{SAID}\n"
    why, how = done.err.splitlines()
    assert why == (
        f"code-assistant: {provider}/model-1 (its own config; step agent, revision {revision})"
    )
    assert how.endswith("s, finished: stop, 11 + 7 tokens")
    assert len(model.received) == 1


async def test_the_backends_token_is_used_and_the_admins_reads_no_key(tmp_path: Path) -> None:
    """`slm ask` shows backend.token, and with admin.token it says which scope is missing."""
    async with stage(tmp_path) as (_, _, model, _):
        done = await slm("ask", "code-assistant", "hello", data=tmp_path)
        refused = await slm(
            *("ask", "code-assistant", "hello", "--token-file", str(tmp_path / "admin.token")),
            data=tmp_path,
        )
        assert done.code == 0, done.err
        assert model.received[0].headers["authorization"] == f"Bearer {CANARY}"
        assert len(model.received) == 1
    assert "key:read" in refused.err


async def test_json(tmp_path: Path) -> None:
    """With --json one object says the text and everything about it."""
    async with stage(tmp_path) as (_, _, _, revision):
        done = await slm("ask", "code-assistant", "hello", "--json", data=tmp_path)
    answer = done.json
    assert answer.pop("seconds") >= 0
    assert answer == {
        "agent_id": "code-assistant",
        "text": SAID,
        "provider": "openai",
        "model": "model-1",
        "step": "agent",
        "revision": revision,
        "stale": False,
        "finish_reason": "stop",
        "input_tokens": 11,
        "output_tokens": 7,
    }


async def test_what_is_asked(tmp_path: Path) -> None:
    """Prompt, system message and overrides reach the provider; a prompt also comes by pipe."""
    async with stage(tmp_path) as (_, _, model, _):
        given = await slm(
            *("ask", "code-assistant", "hello", "--system", "Be brief."),
            *("--temperature", "0.1", "--max-tokens", "9"),
            data=tmp_path,
        )
        piped = await slm("ask", "code-assistant", "-", stdin="from a pipe", data=tmp_path)
        assert (given.code, piped.code) == (0, 0)
        first, second = (received.body for received in model.received)
    assert first["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
    ]
    assert first["temperature"] == 0.1
    assert 9 in (first.get("max_tokens"), first.get("max_completion_tokens"))
    assert second["messages"] == [{"role": "user", "content": "from a pipe"}]


async def test_an_agent_that_is_not_there(tmp_path: Path) -> None:
    """An unknown agent is answered by the default one, and the line says so."""
    async with stage(tmp_path) as (_, operator, _, _):
        revision = await operator.set("code-assistant", is_default=True)
        done = await slm("ask", "nobody", "hello", data=tmp_path)
    assert done.code == 0
    assert done.err.splitlines()[0].endswith(
        f"(not there or inactive, so the default agent code-assistant; step default, "
        f"revision {revision - 1})"
    )


async def test_without_an_slm_it_goes_on_as_a_backend_does(tmp_path: Path) -> None:
    """No SLM: a warning, and the environment's config answers."""
    dialect = Dialect("openai")
    async with RecordingServer(answering(dialect)).running() as model:
        done = await slm(
            *("ask", "code-assistant", "hello"),
            SLM_URL="http://127.0.0.1:9",
            SLM_TOKEN="slm_x",
            AUTOBOT_LLM_PROVIDER="openai",
            AUTOBOT_LLM_ENDPOINT=dialect.endpoint(model.url),
            AUTOBOT_LLM_MODEL="model-1",
        )
    assert (done.code, done.out) == (0, f"{SAID}\n")
    warning, why, _ = done.err.splitlines()
    assert warning.startswith("warning: the SLM at http://127.0.0.1:9 gave no config: ")
    assert "step environment" in why


async def test_a_provider_that_refuses(tmp_path: Path) -> None:
    """A failed call is one line with provider, model, agent and revision, and no key."""
    async with stage(tmp_path) as (_, operator, _, _):
        revision = await operator.set(
            "code-assistant", llm_endpoint="http://127.0.0.1:9/v1", llm_api_key=CANARY
        )
        done = await slm("ask", "code-assistant", "hello", data=tmp_path)
    assert (done.code, done.out) == (1, "")
    why, error = done.err.splitlines()
    assert f"revision {revision}" in why
    assert error.startswith("error: [openai/model-1, agent code-assistant, step agent, revision")


@pytest.mark.real_llm
@pytest.mark.xdist_group("real_llm")
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
async def test_a_real_model(tmp_path: Path) -> None:
    """The same with a real language model, over both of its protocols."""
    with LocalModel() as model:
        async with running_server(tmp_path) as server, aiohttp.ClientSession() as http:
            (tmp_path / "server.url").write_text(server.url)
            operator = Operator(http, server)
            for provider, url in (
                ("openai", model.openai_url),
                ("anthropic", model.anthropic_url),
            ):
                await operator.create(
                    f"with-{provider}",
                    llm_provider=provider,
                    llm_endpoint=url,
                    llm_model="any",
                    llm_temperature=0.0,
                    llm_max_tokens=24,
                    llm_timeout=60,
                )
                done = await slm(
                    "ask", f"with-{provider}", "What does the heart do?", data=tmp_path
                )
                assert done.code == 0, done.err
                assert "heart" in done.out
