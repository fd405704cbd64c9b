"""The providers' own SDKs beside ours, at both ends of each range (`make test-integrations`).

Our adapters speak the protocols by themselves; these tests hold them to what the SDKs send, of
whatever version is installed, and to sharing an environment with any of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.support.llm.stub import ASK, KEY, Answer, Request, stub, whole

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
SDKS = ("openai", "anthropic", "ollama")
ENVIRONMENT = os.environ.get("SLM_TEST_ENVIRONMENT")
ANTHROPIC = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [{"type": "text", "text": "Hi"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "output_tokens": 2},
}
OLLAMA = {
    "model": "m",
    "created_at": "2026-01-01T00:00:00Z",
    "message": {"role": "assistant", "content": "Hi"},
    "done": True,
    "done_reason": "stop",
}


def extra(name: str) -> Requirement:
    """Return what our extra of this name asks of the SDK of the same name."""
    (text,) = PROJECT["optional-dependencies"][name]
    requirement = Requirement(text)
    assert requirement.name == name
    return requirement


@pytest.mark.parametrize("name", SDKS)
def test_the_installed_sdk_is_in_the_extras_range(name: str) -> None:
    """The two environments stand at the ends of the range; the range has no upper pin."""
    try:
        installed = version(name)
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed here")
    range_ = extra(name).specifier
    assert range_.contains(installed)
    assert {each.operator for each in range_} == {">="}
    if ENVIRONMENT == "sdks-low":
        (lowest,) = (each.version for each in range_)
        assert installed.startswith(lowest)


def test_ours_moves_nobody_elses_sdk() -> None:
    """What a backend installs of ours asks for no SDK and no HTTP library of theirs."""
    base = {Requirement(each).name for each in PROJECT["dependencies"]}
    assert not base & {"httpx", "httpx2", *SDKS}


def test_the_adapters_import_no_sdk() -> None:
    """Calling a provider needs none of them, of whatever version."""
    code = (
        "import sys, slm.llm.providers.openai, slm.llm.providers.anthropic,"
        " slm.llm.providers.ollama;"
        f" print([name for name in ({SDKS!r} + ('httpx', 'httpx2')) if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def same(ours: Request, theirs: Request) -> None:
    """Both ask for the same thing at the same place, with the same key."""
    assert ours.path == theirs.path
    assert {k: v for k, v in theirs.body.items() if k != "stream"} == {
        k: v for k, v in ours.body.items() if k != "stream"
    }
    for request in (ours, theirs):
        keys = {request.key, request.headers.get("x-api-key")}
        assert KEY in keys, request.headers


async def test_openai_asks_as_ours_does() -> None:
    """The SDK's call and an agent's are one request: route, key and body."""
    openai = pytest.importorskip("openai")
    async with stub(lambda _: whole()) as provider:
        await provider.ask("/v1", llm_temperature=0.5, llm_options={"top_p": 0.5, "seed": 7})
        client = openai.AsyncOpenAI(api_key=KEY, base_url=provider.origin + "/v1", max_retries=0)
        answer = await client.chat.completions.create(
            model="m", messages=ASK, temperature=0.5, top_p=0.5, seed=7
        )
        await client.close()
        assert answer.choices[0].message.content == "Hi"
        same(*provider.seen)


async def test_anthropic_asks_as_ours_does() -> None:
    """The same, and the key goes in a header that this version of the SDK knows."""
    anthropic = pytest.importorskip("anthropic")
    stops = {"stop_sequences": ["END"]}
    async with stub(lambda _: ANTHROPIC) as provider:
        await provider.ask("", provider="anthropic", llm_max_tokens=9, llm_options=stops)
        client = anthropic.AsyncAnthropic(api_key=KEY, base_url=provider.origin, max_retries=0)
        said = [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}]
        answer = await client.messages.create(model="m", messages=said, max_tokens=9, **stops)
        await client.close()
        assert answer.content[0].text == "Hi"
        ours, theirs = provider.seen
        same(ours, theirs)
        # Ours is the version that every gateway knows; the SDK's 2.x sends one of 2026.
        assert ours.headers["anthropic-version"] <= theirs.headers["anthropic-version"]


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
async def test_a_server_that_knows_one_header_for_the_key(header: str) -> None:
    """Older SDKs sent X-Api-Key, newer ones send Authorization: servers of either kind answer."""

    def answer(request: Request) -> Answer:
        if KEY not in request.headers.get(header, ""):
            error = {"type": "authentication_error", "message": f"{header} header is required"}
            return 401, {"type": "error", "error": error}
        return ANTHROPIC

    async with stub(answer) as provider:
        assert (await provider.ask("", provider="anthropic")).text == "Hi"


async def test_ollama_asks_as_ours_does() -> None:
    """The same for Ollama's own protocol."""
    ollama = pytest.importorskip("ollama")
    async with stub(lambda _: OLLAMA) as provider:
        await provider.ask("", provider="ollama", llm_options={"num_ctx": 8})
        client = ollama.AsyncClient(
            host=provider.origin, headers={"Authorization": f"Bearer {KEY}"}
        )
        answer: Any = await client.chat(model="m", messages=ASK, options={"num_ctx": 8})
        assert answer.message.content == "Hi"
        ours, theirs = provider.seen
        assert ours.path == theirs.path
        assert ours.body["options"] == theirs.body["options"]
