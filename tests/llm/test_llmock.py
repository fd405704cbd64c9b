"""OpenAI's and Anthropic's protocols as llmock speaks them, with the faults that it can make.

llmock judges the client as well: retrying before Retry-After, retrying what is no use to retry and
taking a cut stream for a whole answer are failures of `assert_resilient`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from llmock.pytest_plugin import LLMock
from pydantic import SecretStr

from slm.client.config import ResolvedConfig, Step
from slm.errors import (
    LLMBadRequest,
    LLMRateLimited,
    LLMStreamBroken,
    LLMTimeout,
    LLMUnavailable,
)
from slm.llm import LLMInterface
from tests.llm.conftest import ASK, QUICK_RETRY, ask
from tests.llm.test_chat import WEATHER
from tests.support.llm.providers import Configs


@dataclass
class Mocked:
    """llmock with an interface that resolves to it."""

    mock: LLMock
    llm: LLMInterface


@pytest.fixture(params=["openai", "anthropic"])
async def mocked(request: pytest.FixtureRequest, llmock: LLMock) -> AsyncIterator[Mocked]:
    """Each protocol that llmock speaks, in turn."""
    config = ResolvedConfig(
        agent_id="a",
        step=Step.AGENT,
        llm_provider=request.param,
        llm_endpoint=llmock.base_url(request.param),
        llm_model="model-1",
        llm_api_key=SecretStr("sk-mine"),
        llm_timeout=20,
        revision=43,
    )
    async with LLMInterface(Configs(config), retry=QUICK_RETRY) as llm:
        yield Mocked(llmock, llm)


@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
async def test_a_scripted_answer(mocked: Mocked, streamed: bool) -> None:
    """An answer arrives with its usage and finish reason, whole or streamed."""
    mocked.mock.reply("The answer is forty-two.")
    result = await ask(mocked.llm, streamed=streamed)
    assert result.text == "The answer is forty-two."
    assert result.finish_reason == "stop"
    assert result.usage is not None
    assert result.usage.input_tokens > 0
    assert result.usage.output_tokens > 0
    mocked.mock.assert_resilient()


@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
async def test_rate_limits_are_waited_out(mocked: Mocked, streamed: bool) -> None:
    """Two 429 with a Retry-After are waited out, each as long as it says."""
    mocked.mock.rate_limit(times=2, retry_after=0.2)
    result = await ask(mocked.llm, streamed=streamed)
    assert result.text
    assert len(mocked.mock.requests) == 3
    mocked.mock.assert_resilient()


@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
async def test_rate_limits_that_do_not_end(mocked: Mocked, streamed: bool) -> None:
    """A limit that outlasts the tries is told, with what the provider asked for."""
    mocked.mock.rate_limit(times=None, retry_after=0.1)
    with pytest.raises(LLMRateLimited) as caught:
        await ask(mocked.llm, streamed=streamed)
    assert caught.value.retry_after_seconds == pytest.approx(0.1)
    assert len(mocked.mock.requests) == 3
    mocked.mock.assert_resilient()


async def test_an_outage(mocked: Mocked) -> None:
    """A provider that answers 500 to everything is unavailable, after three tries."""
    mocked.mock.outage(status=500)
    with pytest.raises(LLMUnavailable) as caught:
        await ask(mocked.llm)
    assert caught.value.status == 500
    assert len(mocked.mock.requests) == 3
    mocked.mock.assert_resilient()


async def test_a_prompt_that_is_too_long(mocked: Mocked) -> None:
    """A prompt beyond the model's context is the caller's error, and is not tried again."""
    mocked.mock.context_overflow()
    with pytest.raises(LLMBadRequest, match="maximum context length"):
        await ask(mocked.llm)
    assert len(mocked.mock.requests) == 1
    mocked.mock.assert_resilient()


async def test_a_slow_answer(mocked: Mocked) -> None:
    """An answer that takes longer than the time-out ends as a time-out."""
    mocked.mock.delay(2)
    with pytest.raises(LLMTimeout):
        await ask(mocked.llm, timeout=0.3)


async def test_a_slow_first_token(mocked: Mocked) -> None:
    """A stream whose first token takes longer than the time-out ends as a time-out."""
    mocked.mock.slow_first_token(2)
    with pytest.raises(LLMTimeout):
        await ask(mocked.llm, streamed=True, timeout=0.3)


FAULTS: dict[str, Any] = {
    "disconnect": LLMStreamBroken,
    "truncate": LLMStreamBroken,
    "corrupt": LLMStreamBroken,
    "stall": LLMTimeout,
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_stream_that_breaks(mocked: Mocked, fault: str) -> None:
    """A stream dropped, cut short, corrupted or stalled after its first words is an error."""
    mocked.mock.reply("One two three four five six seven eight nine ten.")
    getattr(mocked.mock, fault)(after_chunks=4, **({"seconds": 2} if fault == "stall" else {}))
    stream = mocked.llm.stream("a", ASK, timeout=0.5)
    with pytest.raises(FAULTS[fault]) as caught:
        async for _ in stream:
            pass
    assert stream.text
    assert "One two three".startswith(stream.text[:7])
    assert not stream.text.endswith("ten.")
    if isinstance(caught.value, LLMStreamBroken):
        assert caught.value.partial == stream.text
    assert len(mocked.mock.requests) == 1, "an answer that has begun is not asked for again"
    if fault in ("disconnect", "corrupt"):
        # Of a stream cut short it would want a retry, the only sign it has that we noticed.
        mocked.mock.assert_resilient()


@pytest.mark.parametrize("streamed", [False, True], ids=["chat", "stream"])
async def test_a_tool_call_and_its_answer(mocked: Mocked, streamed: bool) -> None:
    """A tool is called with arguments of its schema, and its answer leads to the model's."""
    mocked.mock.call_tool("weather", {"place": {"city": "Riga"}})
    first = await ask(mocked.llm, streamed=streamed, tools=[WEATHER])
    (call,) = first.tool_calls
    assert (call.name, call.arguments) == ("weather", {"place": {"city": "Riga"}})
    assert first.finish_reason == "tool_calls"
    mocked.mock.reply("It rains.")
    answer = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    second = await mocked.llm.chat("a", [*ASK, first.as_message(), answer], tools=[WEATHER])
    assert second.text == "It rains."
    mocked.mock.assert_resilient()


async def test_a_tool_call_with_broken_arguments(mocked: Mocked) -> None:
    """Arguments that are no JSON come out as the model wrote them; reading them says so."""
    mocked.mock.break_tool_call("malformed_arguments")
    result = await ask(mocked.llm, streamed=True, tools=[WEATHER])
    (call,) = result.tool_calls
    with pytest.raises(ValueError, match=r"line 1|not a JSON object"):
        _ = call.arguments
