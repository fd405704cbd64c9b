"""Ollama's protocol as aimock speaks it, with the faults that it can make."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from slm.client.config import ResolvedConfig, Step
from slm.errors import (
    LLMBadResponse,
    LLMError,
    LLMRateLimited,
    LLMStreamBroken,
    LLMTimeout,
    LLMUnavailable,
)
from slm.llm import ChatResult, LLMInterface
from tests.llm.conftest import QUICK_RETRY
from tests.llm.test_chat import WEATHER
from tests.support.llm import aimock
from tests.support.llm.providers import Configs

LONG = "One two three four five six seven eight nine ten."

FIXTURES: list[dict[str, Any]] = [
    {"match": {"toolCallId": "call_0"}, "response": {"content": "It rains."}},
    {"match": {"hasToolResult": True}, "response": {"content": "It rains."}},
    {
        "match": {"userMessage": "weather"},
        "response": {
            "toolCalls": [{"name": "weather", "arguments": '{"place": {"city": "Riga"}}'}]
        },
    },
    {"match": {"userMessage": "hello"}, "response": {"content": LONG}},
    {
        "match": {"userMessage": "limit"},
        "response": {"content": LONG},
        "chaos": {"rateLimitRate": 1},
    },
    {"match": {"userMessage": "drop"}, "response": {"content": LONG}, "chaos": {"dropRate": 1}},
    {
        "match": {"userMessage": "bad json"},
        "response": {"content": LONG},
        "chaos": {"malformedRate": 1},
    },
    {
        "match": {"userMessage": "vanish"},
        "response": {"content": LONG},
        "chaos": {"disconnectRate": 1},
    },
    {"match": {"userMessage": "cut"}, "response": {"content": LONG}, "truncateAfterChunks": 3},
    {
        "match": {"userMessage": "slow"},
        "response": {"content": LONG},
        "chaos": {"latencyMs": 30000},
    },
    {
        "match": {"userMessage": "overloaded"},
        "response": {
            "error": {"message": "model is loading", "type": "server_error"},
            "status": 503,
        },
    },
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One aimock for all tests of this file."""
    reason = aimock.missing()
    if reason is not None:
        pytest.skip(reason)
    with aimock.running(FIXTURES, tmp_path_factory.mktemp("aimock")) as url:
        yield url


@pytest.fixture
async def llm(url: str) -> AsyncIterator[LLMInterface]:
    """An interface that resolves to it."""
    config = ResolvedConfig(
        agent_id="a",
        step=Step.AGENT,
        llm_provider="ollama",
        llm_endpoint=url,
        llm_model="mistral:7b-instruct",
        llm_timeout=20,
        revision=43,
    )
    async with LLMInterface(Configs(config), retry=QUICK_RETRY) as interface:
        yield interface


async def say(llm: LLMInterface, text: str, *, streamed: bool, **overrides: Any) -> ChatResult:
    messages = [{"role": "user", "content": text}]
    if not streamed:
        return await llm.chat("a", messages, **overrides)
    stream = llm.stream("a", messages, **overrides)
    async for _ in stream:
        pass
    return stream.result


@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
async def test_an_answer(llm: LLMInterface, streamed: bool) -> None:
    """An answer arrives whole, streamed or not."""
    result = await say(llm, "hello", streamed=streamed)
    assert (result.text, result.finish_reason) == (LONG, "stop")
    assert (result.provider, result.revision) == ("ollama", 43)


@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
async def test_a_tool_call_and_its_answer(llm: LLMInterface, streamed: bool) -> None:
    """A tool is called, and its answer leads to the model's."""
    first = await say(llm, "weather", streamed=streamed, tools=[WEATHER])
    (call,) = first.tool_calls
    assert (call.name, call.arguments) == ("weather", {"place": {"city": "Riga"}})
    assert first.finish_reason == "tool_calls"
    answer = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    messages = [{"role": "user", "content": "weather"}, first.as_message(), answer]
    assert (await llm.chat("a", messages, tools=[WEATHER])).text == "It rains."


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("limit", LLMRateLimited),
        ("drop", LLMUnavailable),
        ("bad json", LLMBadResponse),
        ("vanish", LLMUnavailable),
        ("overloaded", LLMUnavailable),
    ],
)
@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
async def test_a_fault(llm: LLMInterface, text: str, kind: type[LLMError], streamed: bool) -> None:
    """429, 500, 503, broken JSON and a dropped connection are each their own error."""
    with pytest.raises(kind) as caught:
        await say(llm, text, streamed=streamed)
    assert caught.value.provider == "ollama"
    if kind is LLMRateLimited:
        assert caught.value.retry_after_seconds is not None
    if text == "overloaded":
        assert caught.value.status == 503


async def test_a_stream_cut_short(llm: LLMInterface) -> None:
    """A stream that ends after three pieces is an error that holds them."""
    with pytest.raises(LLMStreamBroken) as caught:
        await say(llm, "cut", streamed=True)
    assert caught.value.partial
    assert LONG.startswith(caught.value.partial)


@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
async def test_a_slow_answer(llm: LLMInterface, streamed: bool) -> None:
    """An answer that does not begin within the time-out ends as a time-out."""
    with pytest.raises(LLMTimeout):
        await say(llm, "slow", streamed=streamed, timeout=0.3)
