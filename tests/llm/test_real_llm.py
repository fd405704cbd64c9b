"""A real language model, over both protocols that it speaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from slm.cli.demo.local_model import LocalModel
from slm.client.config import ResolvedConfig, Step
from slm.llm import LLMInterface
from tests.support.llm.providers import Configs

pytestmark = pytest.mark.real_llm

ASK = [
    {"role": "system", "content": "You are a helpful assistant. Answer in one short sentence."},
    {"role": "user", "content": "What is the capital of France?"},
]


def config(local: LocalModel, provider: str, **fields: Any) -> ResolvedConfig:
    endpoint = local.openai_url if provider == "openai" else local.anthropic_url
    given: dict[str, Any] = {
        "agent_id": "a",
        "step": Step.AGENT,
        "llm_provider": provider,
        "llm_endpoint": endpoint,
        "llm_model": "smollm2",
        "llm_temperature": 0.0,
        "llm_max_tokens": 24,
        "llm_timeout": 60,
        "revision": 43,
    }
    return ResolvedConfig(**(given | fields))


@pytest.fixture
async def configs(local: LocalModel) -> Configs:
    """What the operator has set: OpenAI's protocol, to begin with."""
    return Configs(config(local, "openai"))


@pytest.fixture
async def llm(configs: Configs) -> AsyncIterator[LLMInterface]:
    """An interface over it."""
    async with LLMInterface(configs) as interface:
        yield interface


async def test_the_next_request_uses_the_other_provider(
    local: LocalModel, configs: Configs, llm: LLMInterface
) -> None:
    """The same call answers over OpenAI's protocol, then, the config changed, over Anthropic's."""
    first = await llm.chat("a", ASK)
    configs.current = config(local, "anthropic", revision=44)
    second = await llm.chat("a", ASK)
    assert (first.provider, first.revision) == ("openai", 43)
    assert (second.provider, second.revision) == ("anthropic", 44)
    for result in (first, second):
        assert "Paris" in result.text
        assert result.finish_reason in ("stop", "length")
        assert result.usage is not None
        assert result.usage.input_tokens > 20
        assert 0 < result.usage.output_tokens <= 24


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
async def test_a_stream_says_what_chat_says(
    local: LocalModel, configs: Configs, llm: LLMInterface, provider: str
) -> None:
    """At temperature 0 the streamed answer is the whole one, piece by piece."""
    configs.current = config(local, provider)
    whole = await llm.chat("a", ASK)
    stream = llm.stream("a", ASK)
    pieces = [chunk.text async for chunk in stream if chunk.text]
    assert len(pieces) > 3
    assert "".join(pieces) == stream.result.text == whole.text
    assert stream.result.usage is not None
    assert stream.result.usage.output_tokens > 3
    assert stream.result.finish_reason == whole.finish_reason


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
async def test_the_limit_in_force_is_obeyed(
    local: LocalModel, configs: Configs, llm: LLMInterface, provider: str
) -> None:
    """A changed llm_max_tokens cuts the very next answer, which says so."""
    configs.current = config(local, provider, llm_max_tokens=3)
    result = await llm.chat("a", ASK)
    assert result.finish_reason == "length"
    assert result.usage is not None
    assert result.usage.output_tokens == 3


async def test_calls_side_by_side(configs: Configs, llm: LLMInterface) -> None:
    """Several calls at once each get their own answer."""
    questions = ["Say the word apple.", "Say the word house.", "What is 2+2?"]
    asked = [llm.chat("a", [{"role": "user", "content": text}]) for text in questions]
    results = await asyncio.gather(*asked)
    assert all(result.text for result in results)
    assert configs.asked == 3
