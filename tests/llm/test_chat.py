"""What an application gets: answers, streams, tools, and the config that made them."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from slm.client.config import Step
from slm.errors import ConfigurationError, LLMBadRequest, LLMProviderMissing
from slm.llm import Usage
from tests.llm.conftest import ASK, Bench
from tests.support.llm.providers import Answer, Received, answering

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place.",
        "parameters": {
            "type": "object",
            "additionalProperties": False,
            "required": ["place"],
            "properties": {
                "place": {
                    "type": "object",
                    "properties": {"city": {"type": "string", "minLength": 2}},
                    "required": ["city"],
                },
                "unit": {"anyOf": [{"enum": ["C", "F"]}, {"type": "null"}]},
            },
        },
    },
}


async def test_an_answer_says_which_config_made_it(bench: Bench) -> None:
    """A result carries text, usage, finish reason, and agent, step and revision of its config."""
    result = await bench.llm.chat("code-assistant", ASK)
    assert result.text == "Hello there"
    assert result.usage == Usage(input_tokens=11, output_tokens=7)
    assert result.finish_reason == "stop"
    assert (result.provider, result.model) == (bench.dialect.provider, "model-1")
    assert (result.agent_id, result.source_agent_id) == ("code-assistant", "code-assistant")
    assert (result.step, result.revision, result.stale) == (Step.AGENT, 43, False)
    assert result.tool_calls == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.text = "other"  # type: ignore[misc]


async def test_a_request_carries_the_config(bench: Bench) -> None:
    """Model, temperature, token limit and the provider's own options reach the provider."""
    bench.set(llm_temperature=0.25, llm_max_tokens=99, llm_options={"top_p": 0.5, "seed": 7})
    await bench.llm.chat("a", ASK)
    request = bench.server.received[0]
    body = request.body
    assert (request.method, request.path) == ("POST", bench.dialect.path)
    assert body["model"] == "model-1"
    settings = body["options"] if bench.dialect.provider == "ollama" else body
    limit = "num_predict" if bench.dialect.provider == "ollama" else "max_tokens"
    assert settings["temperature"] == 0.25
    assert settings[limit] == 99
    assert (settings["top_p"], settings["seed"]) == (0.5, 7)


async def test_an_override_counts_for_one_call(bench: Bench) -> None:
    """What a call sets itself wins over llm_options, which win over the columns, for that call."""
    bench.set(llm_temperature=0.25, llm_max_tokens=99, llm_options={"top_p": 0.5, "seed": 7})
    options = {"top_p": 0.9, "top_k": 3}
    await bench.llm.chat("a", ASK, model="model-2", temperature=0.75, max_tokens=5, options=options)
    await bench.llm.chat("a", ASK)
    first, second = (
        {"model": r.body["model"]} | (r.body.get("options") or r.body)
        for r in bench.server.received
    )
    limit = "num_predict" if bench.dialect.provider == "ollama" else "max_tokens"
    names = ("model", "temperature", limit, "top_p", "top_k", "seed")
    assert [first.get(name) for name in names] == ["model-2", 0.75, 5, 0.9, 3, 7]
    assert [second.get(name) for name in names] == ["model-1", 0.25, 99, 0.5, None, 7]


async def test_a_model_that_takes_no_temperature_gets_none(bench: Bench) -> None:
    """`"temperature": null` in llm_options, or temperature=None in a call, sends none."""
    bench.set(llm_options={"temperature": None})
    await bench.llm.chat("a", ASK)
    bench.set()
    await bench.llm.chat("a", ASK, temperature=None)
    for request in bench.server.received:
        assert b"temperature" not in request.raw


async def test_an_option_named_as_the_limit_is_the_limit(bench: Bench) -> None:
    """max_completion_tokens or num_predict in llm_options stands alone, with an override in it."""
    bench.set(llm_max_tokens=99, llm_options={"max_completion_tokens": 50})
    await bench.llm.chat("a", ASK)
    await bench.llm.chat("a", ASK, max_tokens=5)
    sent = [r.body.get("options") or r.body for r in bench.server.received]
    # Anthropic has one word for it.
    name = "max_tokens" if bench.dialect.provider == "anthropic" else "max_completion_tokens"
    assert [body[name] for body in sent] == [50, 5]
    assert not any("num_predict" in body or body.get("max_tokens") == 99 for body in sent)


async def test_options_cannot_make_another_request_of_it(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """llm_options replace neither model, messages nor stream, and no argument of the SDK."""
    from slm.llm import call

    call._warn_of_reserved.cache_clear()
    evil = {
        "model": "evil-model",
        "messages": [{"role": "user", "content": "evil-message"}],
        "system": "evil-system",
        "stream": True,
        "base_url": "http://evil-host.invalid",
        "host": "http://evil-host.invalid",
        "api_key": "evil-key",
        "extra_headers": {"authorization": "Bearer evil-header", "x-evil": "evil"},
        "headers": {"x-evil": "evil"},
        "extra_body": {"model": "evil-model"},
        "extra_query": {"evil": "1"},
        "timeout": 0.001,
    }
    bench.set(llm_options=evil)
    result = await bench.llm.chat("a", ASK)
    assert result.text == "Hello there"
    assert b"evil" not in bench.server.received[0].raw
    assert "base_url in llm_options is ignored" in caplog.text
    assert "evil" not in caplog.text


async def test_a_stream_comes_in_pieces_and_ends_in_a_result(bench: Bench) -> None:
    """The pieces of a stream make up its result's text, and the result is the same as chat's."""
    stream = bench.llm.stream("code-assistant", ASK)
    with pytest.raises(ConfigurationError, match="after its last chunk"):
        _ = stream.result
    chunks = [chunk async for chunk in stream]
    assert [chunk.text for chunk in chunks if chunk.text] == ["Hello", "there"]
    assert stream.text == stream.result.text == "Hellothere"
    assert stream.result.usage == Usage(input_tokens=11, output_tokens=7)
    assert stream.result.finish_reason == "stop"
    assert (stream.result.step, stream.result.revision) == (Step.AGENT, 43)


async def test_a_stream_left_early_closes_its_connection(bench: Bench) -> None:
    """Leaving a stream's block after the first chunk ends the request at the provider."""
    gone = asyncio.Event()

    async def handler(request: Received, answer: Answer) -> None:
        await answer.begin(bench.dialect.stream_type)
        for piece in bench.dialect.opening():
            await answer.piece(piece)
        try:
            while True:
                await answer.piece(bench.dialect.token("more "))
                await asyncio.sleep(0.001)
        except ConnectionError:
            gone.set()
            raise

    bench.server.handler = handler
    async with bench.llm.stream("a", ASK) as stream:
        async for chunk in stream:
            assert chunk.text == "more "
            break
    await asyncio.wait_for(gone.wait(), 10)


async def test_a_call_finishes_on_the_config_it_began_with(bench: Bench) -> None:
    """A config changed in mid-call counts for the next call, not for the one in flight."""
    asked, go = asyncio.Event(), asyncio.Event()
    well = answering(bench.dialect)

    async def handler(request: Received, answer: Answer) -> None:
        asked.set()
        await go.wait()
        await well(request, answer)

    bench.server.handler = handler
    bench.set(revision=43, llm_model="old")
    first = asyncio.create_task(bench.llm.chat("a", ASK))
    await asked.wait()
    bench.set(revision=44, llm_model="new")
    go.set()
    second = await bench.llm.chat("a", ASK)
    assert ((await first).model, (await first).revision) == ("old", 43)
    assert (second.model, second.revision) == ("new", 44)
    assert [r.body["model"] for r in bench.server.received] == ["old", "new"]


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_tool_call_comes_out_typed(bench: Bench, streamed: bool) -> None:
    """Whatever the provider, a tool call has an id, a name and its arguments as a dict."""
    arguments = '{"place": {"city": "Riga"}, "unit": "C"}'

    async def handler(request: Received, answer: Answer) -> None:
        if not request.body.get("stream"):
            parsed = {"place": {"city": "Riga"}, "unit": "C"}
            await answer.whole(bench.dialect.answer("Let me see", ("weather", parsed)))
            return
        await answer.begin(bench.dialect.stream_type)
        pieces = [*bench.dialect.opening(), bench.dialect.token("Let me see")]
        pieces += bench.dialect.tool_pieces("weather", arguments)
        for piece in [*pieces, *bench.dialect.closing(tool=True)]:
            await answer.piece(piece)
        await answer.end()

    bench.server.handler = handler
    if streamed:
        stream = bench.llm.stream("a", ASK, tools=[WEATHER])
        deltas = [delta async for chunk in stream for delta in chunk.tool_calls]
        assert deltas[0].name == "weather"
        result = stream.result
    else:
        result = await bench.llm.chat("a", ASK, tools=[WEATHER])
    (call,) = result.tool_calls
    assert call.name == "weather"
    assert call.id
    assert call.arguments == {"place": {"city": "Riga"}, "unit": "C"}
    assert result.finish_reason == "tool_calls"
    assert result.text == "Let me see"


async def test_a_tool_reaches_the_provider_whole(bench: Bench) -> None:
    """A tool's JSON Schema arrives to the last member, nested objects and anyOf included."""
    await bench.llm.chat("a", ASK, tools=[WEATHER], tool_choice="auto")
    (tool,) = bench.server.received[0].body["tools"]
    function = WEATHER["function"]
    if bench.dialect.provider == "anthropic":
        assert tool == {
            "name": "weather",
            "description": "The weather at a place.",
            "input_schema": function["parameters"],
        }
    else:
        assert tool == WEATHER


async def test_a_tool_conversation_goes_round(bench: Bench) -> None:
    """A result's own message, then the tools' answers, are taken back by every provider."""
    bench.server.handler = answering(bench.dialect, tool=("weather", {"place": {"city": "Riga"}}))
    result = await bench.llm.chat("a", ASK, tools=[WEATHER])
    (call,) = result.tool_calls
    messages = [
        {"role": "system", "content": "Be short."},
        *ASK,
        result.as_message(),
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
        {"role": "user", "content": "And?"},
    ]
    await bench.llm.chat("a", messages, tools=[WEATHER])
    body = bench.server.received[1].body
    sent = body["messages"]
    arguments = {"place": {"city": "Riga"}}
    if bench.dialect.provider == "openai":
        assert sent == messages
    elif bench.dialect.provider == "anthropic":
        assert body["system"] == "Be short."
        tool_use = {"type": "tool_use", "id": call.id, "name": "weather", "input": arguments}
        said = {"type": "text", "text": "Hello there"}
        assert sent == [
            {"role": "user", "content": [{"type": "text", "text": "Hello?"}]},
            {"role": "assistant", "content": [said, tool_use]},
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": call.id, "content": "rain"},
                    {"type": "text", "text": "And?"},
                ],
            },
        ]
    else:
        assert sent == [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Hello?"},
            {
                "role": "assistant",
                "content": "Hello there",
                "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}],
            },
            {"role": "tool", "content": "rain", "tool_name": "weather"},
            {"role": "user", "content": "And?"},
        ]


async def test_tool_choice_is_translated_or_refused(bench: Bench) -> None:
    """A tool_choice that a provider has no word for is a clear error, not another request."""
    named = {"type": "function", "function": {"name": "weather"}}
    sent: list[Any] = []
    for choice in ("auto", "none", "required", named):
        try:
            await bench.llm.chat("a", ASK, tools=[WEATHER], tool_choice=choice)
        except LLMBadRequest as error:
            sent.append((error.provider, "tool_choice" in str(error)))
        else:
            body = bench.server.received[-1].body
            sent.append((body.get("tool_choice"), "tools" in body))
    assert (
        sent
        == {
            "openai": [("auto", True), ("none", True), ("required", True), (named, True)],
            "anthropic": [
                ({"type": "auto"}, True),
                ({"type": "none"}, True),
                ({"type": "any"}, True),
                ({"type": "tool", "name": "weather"}, True),
            ],
            "ollama": [(None, True), (None, False), ("ollama", True), ("ollama", True)],
        }[bench.dialect.provider]
    )


async def test_a_response_format_is_translated(bench: Bench) -> None:
    """A JSON Schema for the answer goes where each provider has its place for it."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    await bench.llm.chat("a", ASK, response_format=wanted)
    body = bench.server.received[0].body
    assert {
        "openai": body.get("response_format") == wanted,
        "anthropic": body.get("output_config")
        == {"format": {"type": "json_schema", "schema": schema}},
        "ollama": body.get("format") == schema,
    }[bench.dialect.provider]


async def test_an_image_is_translated(bench: Bench) -> None:
    """A picture in a message, as a data URL, arrives in each provider's own form."""
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    content = [{"type": "text", "text": "What is it?"}, part]
    await bench.llm.chat("a", [{"role": "user", "content": content}])
    (message,) = bench.server.received[0].body["messages"]
    source = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
    text = {"type": "text", "text": "What is it?"}
    assert (
        message
        == {
            "openai": {"role": "user", "content": content},
            "anthropic": {"role": "user", "content": [text, {"type": "image", "source": source}]},
            "ollama": {"role": "user", "content": "What is it?", "images": ["iVBORw0KGgo="]},
        }[bench.dialect.provider]
    )


async def test_an_unknown_override_is_refused(bench: Bench) -> None:
    """A misspelled override is an error that names those there are, and nothing is sent."""
    with pytest.raises(ConfigurationError, match="unknown override temprature; known are model,"):
        await bench.llm.chat("a", ASK, temprature=1)  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match="unknown override top_p"):
        bench.llm.stream("a", ASK, top_p=1)  # type: ignore[call-arg]
    for bad in ("Hello?", [], [{"content": "x"}], [{"role": "tool", "content": "x"}]):
        with pytest.raises(ConfigurationError, match="message"):
            await bench.llm.chat("a", bad)  # type: ignore[arg-type]
    for timeout in (0, -1, "5"):
        with pytest.raises(ConfigurationError, match="timeout"):
            await bench.llm.chat("a", ASK, timeout=timeout)  # type: ignore[arg-type]
    assert bench.server.received == []


async def test_an_unknown_provider_says_which_are_known(bench: Bench) -> None:
    """A row with a provider that this version does not know is a clear error."""
    bench.set(llm_provider="gemini")
    with pytest.raises(LLMProviderMissing, match="known are anthropic, ollama, openai") as caught:
        await bench.llm.chat("a", ASK)
    assert (caught.value.provider, caught.value.revision) == ("gemini", 43)
