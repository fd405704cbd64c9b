"""Only what was chosen is sent; what a model refuses is left out once, and remembered."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from slm.errors import LLMBadRequest
from slm.llm import spans
from slm.llm.providers.adjustments import MAX_MODELS, Adjustments
from slm.llm.providers.failures import refused
from tests.support.llm.providers import Handler
from tests.support.llm.talking import (
    WEATHER,
    by_body,
    chunk,
    completion,
    message,
    refusal,
    says,
    sse,
    streams,
    talking,
)


def without(name: str, text: str, well: Handler | None = None, **more: Any) -> Handler:
    """Return a handler that refuses whatever has this parameter."""
    well = well or says(completion())
    return by_body(lambda body: refusal(text, **more) if name in body else well)


@pytest.mark.parametrize("provider", ["openai", "anthropic", "ollama"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_what_nobody_chose_is_not_sent(provider: str, streamed: bool) -> None:
    """An agent with a model alone sends no sampling parameter, and no limit that it need not."""
    async with talking(provider, says(b"{}", status=400)) as talk:
        await talk.fails(streamed=streamed)
        sent = set(talk.bodies[0]) | set(talk.bodies[0].get("options", {}))
    assert not sent & {"temperature", "top_p", "top_k", "seed", "num_predict", "tools"}
    assert ("max_tokens" in sent) == (provider == "anthropic")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("temperature", "Unsupported value: 'temperature' does not support 0.3 with this model. "
                        "Only the default (1) value is supported."),
        ("temperature", "temperature is deprecated for this model"),
        ("temperature", "invalid temperature: only 1 is allowed for this model"),
        ("top_p", "Unsupported parameter: 'top_p' is not supported with this model."),
        ("seed", "property 'seed' is unsupported"),
        ("user", "Unrecognized request argument supplied: 'user'"),
        ("parallel_tool_calls", "Unknown name \"parallel_tool_calls\": Cannot find field."),
        ("logit_bias", "logit_bias: Extra inputs are not permitted"),
        ("reasoning_effort", "openai does not support parameters: ['reasoning_effort']"),
    ],
)  # fmt: skip
async def test_a_refused_parameter_is_dropped_once_and_remembered(
    name: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One refusal is paid for; from then on the parameter stays at home, and everybody is told."""
    handler = without(name, text)
    chosen: dict[str, Any] = {"llm_options": {name: 1}}
    if name == "temperature":
        chosen = {"llm_temperature": 0.3}
    async with talking("openai", handler, **chosen) as talk:
        first, second = await talk.ask(), await talk.ask()
        assert [name in body for body in talk.bodies] == [True, False, False]
        assert first.adjusted == second.adjusted == (f"{name} dropped",)
        assert first.text == "Hello"
        # Another model may take it.
        await talk.ask(model="other")
        assert name in talk.bodies[3]
    told = [record for record in caplog.records if f"refuses {name}" in record.getMessage()]
    assert [record.levelno for record in told] == [logging.WARNING] * 2


async def test_a_limit_is_sent_under_the_name_that_the_model_takes() -> None:
    """max_tokens and max_completion_tokens are one limit, whichever a server knows; never lost."""
    azure = (
        "Unsupported parameter: 'max_tokens' is not supported with this model. "
        "Use 'max_completion_tokens' instead."
    )
    async with talking("openai", without("max_tokens", azure), llm_max_tokens=256) as talk:
        for _ in range(2):
            result = await talk.ask()
        assert [body.get("max_completion_tokens") for body in talk.bodies] == [None, 256, 256]
        assert result.adjusted == ("max_tokens sent as max_completion_tokens",)
    older = "Unrecognized request argument supplied: max_completion_tokens"
    options = {"max_completion_tokens": 256}
    handler = without("max_completion_tokens", older)
    async with talking("openai", handler, llm_options=options) as talk:
        await talk.ask()
        assert talk.bodies[1]["max_tokens"] == 256
    # A server that takes neither is not asked for an answer without a limit, nor for ever.
    neither = refusal("Unsupported parameter: max_tokens, max_completion_tokens")
    async with talking("openai", neither, llm_max_tokens=256) as talk:
        assert type(await talk.fails()) is LLMBadRequest
        assert len(talk.bodies) == 2


@pytest.mark.parametrize(
    "host", ["api.openai.com", "eu.api.openai.com", "API.OpenAI.com", "x.openai.azure.com", "h"]
)
def test_no_host_name_decides(host: str) -> None:
    """The same request goes to every host: what a model takes is learnt from the model."""
    from slm.llm.providers.base import ChatRequest
    from slm.llm.providers.openai import _body

    request = ChatRequest(
        endpoint=f"https://{host}/v1",
        key=None,
        model="gpt-x",
        messages=[{"role": "user", "content": "x"}],
        temperature=0.7,
        max_tokens=100,
    )
    assert _body(request)["max_tokens"] == 100


async def test_stream_options_are_left_out_where_they_are_refused() -> None:
    """A strict server (422, FastAPI's words) costs one refusal; null switches them off at once."""
    detail = [{"type": "extra_forbidden", "loc": ["body", "stream_options"], "msg": "Extra inputs"}]
    well = streams(sse(chunk({"content": "Hi"}), chunk({}, "stop"), done=True))
    handler = by_body(
        lambda body: says({"detail": detail}, status=422) if "stream_options" in body else well
    )
    async with talking("openai", handler) as talk:
        for _ in range(2):
            result = await talk.ask(streamed=True)
            assert result.adjusted == ("stream_options dropped",)
        assert len(talk.bodies) == 3
    async with talking("openai", handler, llm_options={"stream_options": None}) as talk:
        assert (await talk.ask(streamed=True)).text == "Hi"
        assert len(talk.bodies) == 1


async def test_of_two_that_exclude_each_other_the_chosen_one_is_kept() -> None:
    """Claude takes temperature or top_p: 0.7, which agents had by default, gives way to top_p."""
    text = "`temperature` and `top_p` cannot both be specified for this model."
    handler = by_body(
        lambda body: (
            refusal(text)
            if {"temperature", "top_p"} <= body.keys()
            else says(message({"type": "text", "text": "Hi"}))
        )
    )
    options = {"top_p": 0.9}
    for temperature, kept in ((0.7, "top_p"), (0.0, "temperature")):
        async with talking(
            "anthropic", handler, llm_options=options, llm_temperature=temperature
        ) as talk:
            await talk.ask()
            assert {"temperature", "top_p"} & talk.bodies[1].keys() == {kept}


@pytest.mark.parametrize(
    ("limit", "adjusted"), [(None, False), (8000, True), (10_000, True), (20_000, False)]
)
async def test_the_limit_is_above_the_thinking_budget(limit: int | None, adjusted: bool) -> None:
    """With a thinking budget, max_tokens leaves room for the answer, and no temperature goes."""

    def choose(body: Any) -> Handler:
        fine = body["max_tokens"] > body["thinking"]["budget_tokens"] and "temperature" not in body
        return says(message({"type": "text", "text": "Hi"})) if fine else refusal("no")

    options = {"thinking": {"type": "enabled", "budget_tokens": 10_000}}
    async with talking(
        "anthropic", by_body(choose), llm_options=options, llm_max_tokens=limit
    ) as talk:
        result = await talk.ask()
        assert any("raised" in text for text in result.adjusted) == adjusted
        result = await talk.ask(temperature=0.2)
        assert "temperature dropped, which thinking excludes" in result.adjusted


@pytest.mark.parametrize(
    "text",
    [
        "temperature must be between 0 and 1.5",
        "Invalid 'max_tokens': integer above maximum value. Expected a value <= 4096",
        "messages: user messages are not supported before a system message",
        "tools are not supported by this model",
        "response_format is not supported",
        "Unknown model. See the user guide about seed models that are not supported",
    ],
)
async def test_what_the_answer_depends_on_is_never_dropped(text: str) -> None:
    """A value out of range, tools, a format or plain English end in the provider's own words."""
    options = {"seed": 1, "user": "x", "stop": ["x"]}
    async with talking(
        "openai", refusal(text), llm_options=options, llm_temperature=2.0, llm_max_tokens=9999
    ) as talk:
        error = await talk.fails(
            tools=[WEATHER], tool_choice="required", response_format={"type": "json_object"}
        )
        assert text in str(error)
        assert len(talk.bodies) == 1


async def test_a_refusal_in_an_answer_of_200_counts_as_well() -> None:
    """OpenRouter says 400 inside a 200."""
    error = {"error": {"code": 400, "message": "Unsupported parameter: 'top_p'"}}
    handler = by_body(lambda body: says(error) if "top_p" in body else says(completion()))
    async with talking("openai", handler, llm_options={"top_p": 1}) as talk:
        assert (await talk.ask()).adjusted == ("top_p dropped",)
        assert (await talk.ask(streamed=True)).adjusted == ("top_p dropped",)


def test_what_is_remembered_has_a_bound() -> None:
    """Models under a million names leave no million entries."""
    known = Adjustments()
    error = refused(400, {"error": {"message": "Unsupported: 'seed'"}}, {}, "/")
    for number in range(MAX_MODELS + 10):
        assert known.learn("https://h:443", f"m{number}", {"seed": 1}, error)
    assert len(known) == MAX_MODELS
    body = {"seed": 1}
    assert known.applied("https://h:443", "m0", body) == ()
    assert known.applied("https://h:443", f"m{MAX_MODELS}", body) == ("seed dropped",)
    assert body == {}


async def test_the_span_says_what_was_adjusted() -> None:
    """A trace shows that the request was not the configured one."""

    class Span(dict[str, Any]):
        set_attribute = dict.__setitem__
        set_attributes = dict.update

        def end(self) -> None:
            self["ended"] = True

    span = Span()
    async with talking(
        "openai", without("seed", "no 'seed': unsupported"), llm_options={"seed": 1}
    ) as talk:
        spans.end(span, await talk.ask())
    assert span["slm.adjusted"] == ("seed dropped",)
