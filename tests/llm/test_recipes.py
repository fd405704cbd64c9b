"""docs/providers.md, recipe by recipe: each against a stub that answers as the provider's own
documentation shows it, and the llama.cpp one against a real model too.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from slm.cli.demo.local_model import LocalModel
from slm.endpoints import refused_endpoint
from slm.errors import LLMError, LLMRateLimited, LLMUnavailable
from tests.support.llm.stub import ASK, DONE, KEY, USAGE, Answer, Request, Stub, chunk, stub, whole

PAGE = (Path(__file__).parents[2] / "docs" / "providers.md").read_text()
RECIPES = {
    "Azure": "/openai/v1",
    "Gemini": "/v1beta/openai",
    "Mistral": "/v1",
    "OpenRouter": "/api/v1",
    "DeepSeek": "",
    "Groq": "/openai/v1",
    "vLLM": "/v1",
    "LM Studio": "/v1",
    "llama.cpp": "/v1",
    "LiteLLM proxy": "",
}
"""Each recipe of the page, and the path of the endpoint that it names."""


@pytest.mark.parametrize("name", RECIPES)
async def test_a_recipe_leads_to_the_right_path(name: str) -> None:
    """The page's endpoint is one that can be saved, and what is asked is the provider's route."""
    section = PAGE.partition(f"## {name}\n")[2].partition("\n## ")[0]
    found = re.search(r"--endpoint (\S+)", section)
    assert found is not None, f"docs/providers.md has no command for {name}"
    assert refused_endpoint(found[1].replace("RESOURCE", "resource")) is None
    assert found[1].endswith(RECIPES[name] or found[1].partition("//")[2])
    for path in (RECIPES[name], RECIPES[name] + "/"):
        async with stub(lambda _: whole()) as provider:
            assert (await provider.ask(path)).text == "Hi"
            (request,) = provider.seen
            assert request.path == RECIPES[name] + "/chat/completions"
            assert request.key == KEY
            assert request.body.keys() == {"model", "messages"}, "nothing that nobody chose"


async def refused(provider: Stub, path: str, *, streamed: bool = False, **config: Any) -> LLMError:
    with pytest.raises(LLMError) as caught:
        await provider.ask(path, streamed=streamed, **config)
    assert KEY not in str(caught.value)
    return caught.value


# --- Azure ---


def azure(request: Request) -> Answer:
    """A deployment of a reasoning model behind a content filter."""
    if "max_tokens" in request.body:
        told = (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use"
            " 'max_completion_tokens' instead."
        )
        error = {"message": told, "type": "invalid_request_error", "param": "max_tokens"}
        return 400, {"error": error | {"code": "unsupported_parameter"}}
    if "bomb" in json.dumps(request.body):
        filtered = {"hate": {"filtered": False}, "violence": {"filtered": True}}
        filter_error = {
            "message": "The response was filtered due to the prompt triggering our policy.",
            "type": None,
            "param": "prompt",
            "code": "content_filter",
            "status": 400,
            "innererror": {"content_filter_result": filtered},
        }
        return 400, {"error": filter_error}
    if not request.streamed:
        return whole()
    first: dict[str, Any] = {"prompt_filter_results": [{"prompt_index": 0}]}
    return (
        chunk(**first)
        + chunk({"role": "assistant", "content": "", "refusal": None})
        + chunk({"content": "Hi"}, content_filter_results={})
        + 'data: {"choices":[{"index":0,"delta":null,"finish_reason":null}]}\n\n'
        + chunk({}, "stop")
        + chunk(usage=USAGE)
        + DONE
    )


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_azure_takes_the_limit_under_its_name(streamed: bool) -> None:
    """A reasoning deployment refuses max_tokens: the limit arrives as max_completion_tokens."""
    async with stub(azure) as provider:
        result = await provider.ask("/openai/v1", streamed=streamed, llm_max_tokens=256)
        assert result.text == "Hi"
        assert provider.seen[-1].body["max_completion_tokens"] == 256
        assert "max_tokens" not in provider.seen[-1].body


async def test_azure_filters_a_prompt() -> None:
    """A prompt that the filter stops is a bad request in Azure's words, and asked once."""
    async with stub(azure) as provider:
        messages = [{"role": "user", "content": "bomb"}]
        error = await refused(provider, "/openai/v1", messages=messages)
        assert "filtered" in str(error)
        assert len(provider.seen) == 1


# --- Gemini ---

SIGNED: dict[str, Any] = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city":"Ulm"}'},
    "extra_content": {"google": {"thought_signature": "c2lnbmF0dXJl"}},
}


def gemini(request: Request) -> Answer:
    """A thinking model that refuses a tool call whose signature did not come back."""
    if request.key != KEY:
        told = "API key not valid. Please pass a valid API key."
        return 400, [{"error": {"code": 400, "message": told, "status": "INVALID_ARGUMENT"}}]
    calls = [c for m in request.body["messages"] for c in m.get("tool_calls", ())]
    if calls and calls[0].get("extra_content") != SIGNED["extra_content"]:
        told = "Function call is missing a thought_signature in functionCall parts."
        return 400, [{"error": {"code": 400, "message": told, "status": "INVALID_ARGUMENT"}}]
    if calls:
        return whole("Sunny.")
    if not request.streamed:
        return whole("", tool_calls=[SIGNED])
    delta = {"role": "assistant", "tool_calls": [{"index": 0} | SIGNED]}
    return chunk(delta) + chunk({"role": "assistant"}, "tool_calls", usage=USAGE) + DONE


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_gemini_gets_its_signatures_back(streamed: bool) -> None:
    """The assistant's turn, appended as it is, carries the thought signature of each tool call."""
    async with stub(gemini) as provider:
        first = await provider.ask("/v1beta/openai", streamed=streamed)
        (call,) = first.tool_calls
        answered = {"role": "tool", "tool_call_id": call.id, "content": "22 degrees"}
        messages = [*ASK, first.message, answered]
        second = await provider.ask("/v1beta/openai", streamed=False, messages=messages)
        assert second.text == "Sunny."


async def test_gemini_words_its_errors_as_a_list() -> None:
    """The list's one error is quoted."""
    async with stub(gemini) as provider:
        error = await refused(provider, "/v1beta/openai", key="sk-other")
        assert "API key not valid" in str(error)


# --- Mistral ---


def mistral(request: Request) -> Answer:
    """A thinking model; parameters that it does not know are refused."""
    unknown = request.body.keys() & {"max_completion_tokens", "logit_bias"}
    if unknown:
        detail = [
            {
                "type": "extra_forbidden",
                "loc": ["body", name],
                "msg": "Extra inputs are not allowed",
            }
            for name in sorted(unknown)
        ]
        return 422, {"object": "error", "message": {"detail": detail}, "type": "invalid_request"}
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "Hmm."}]}
    if not request.streamed:
        return whole(content=[thought, {"type": "text", "text": "Hi"}])
    return (
        chunk({"role": "assistant", "content": [thought]})
        + chunk({"content": "Hi"}, "stop", usage=USAGE)
        + DONE
    )


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_mistral_thinks_in_parts(streamed: bool) -> None:
    """What Magistral thinks is told apart from what it says; max_tokens is its limit."""
    async with stub(mistral) as provider:
        result = await provider.ask("/v1", streamed=streamed, llm_max_tokens=9)
        assert (result.text, result.reasoning) == ("Hi", "Hmm.")
        assert provider.seen[-1].body["max_tokens"] == 9


async def test_mistral_goes_without_a_parameter_that_it_does_not_know() -> None:
    """A 422 with a list of details names the parameter; the result says that it was left out."""
    async with stub(mistral) as provider:
        result = await provider.ask("/v1", llm_options={"logit_bias": {"1": 2}})
        assert "logit_bias" in " ".join(result.adjusted)
        assert "logit_bias" not in provider.seen[-1].body


# --- OpenRouter ---


def openrouter(request: Request) -> Answer:
    """Comments while the model is busy; an error after the answer has begun comes in a 200."""
    assert request.body["model"] == "vendor/model:free"
    raw = '{"error":{"message":"Provider is overloaded"}}'
    failed = {"code": 502, "message": "Provider returned error", "metadata": {"raw": raw}}
    if "fail" in json.dumps(request.body):
        if not request.streamed:
            return {"error": failed, "user_id": "u"}
        delta = chunk({"content": ""}, "error", error=failed)
        return ": OPENROUTER PROCESSING\n\n" + chunk({"content": "H"}) + delta
    if not request.streamed:
        return whole()
    busy = ": OPENROUTER PROCESSING\n\n"
    return (
        busy * 3
        + chunk({"role": "assistant", "content": "Hi"}, provider="Vendor")
        + busy
        + chunk({"content": ""}, "stop", native_finish_reason="STOP")
        + chunk({"role": "assistant", "content": ""}, usage=USAGE | {"cost": 0.1})
        + DONE
    )


async def test_openrouter_comments_are_no_part_of_a_stream() -> None:
    """A stream with comments between its events is read whole, the usage at its end included."""
    async with stub(openrouter) as provider:
        result = await provider.ask("/api/v1", streamed=True, llm_model="vendor/model:free")
        assert (result.text, result.finish_reason) == ("Hi", "stop")
        assert result.usage is not None


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_openrouter_fails_in_a_200(streamed: bool) -> None:
    """An error in a 200 or in the midst of a stream is an error, and the provider's words stay."""
    async with stub(openrouter) as provider:
        messages = [{"role": "user", "content": "fail"}]
        error = await refused(
            provider,
            "/api/v1",
            streamed=streamed,
            messages=messages,
            llm_model="vendor/model:free",
        )
        assert "Provider returned error" in str(error)


# --- DeepSeek ---


def deepseek(request: Request) -> Answer:
    """A thinking model under load: it keeps the connection open with blank lines or comments."""
    if request.key != KEY:
        told = {"message": "Insufficient Balance", "type": "unknown_error", "param": None}
        return 402, {"error": told | {"code": "invalid_request_error"}}
    thought = {"role": "assistant", "content": None, "reasoning_content": "Hmm."}
    if not request.streamed:
        answer = whole("Hi", reasoning_content="Hmm.")
        text = "\n" * 20 + json.dumps(answer)
        return web.Response(text=text, content_type="application/json")
    return (
        ": keep-alive\n\n" * 5
        + chunk(thought)
        + chunk({"content": "Hi", "reasoning_content": None})
        + chunk({"content": ""}, "stop", usage=USAGE)
        + DONE
    )


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", ["", "/v1"])
async def test_deepseek_keeps_busy_connections_open(path: str, streamed: bool) -> None:
    """Blank lines before the JSON, and comments in a stream, are no part of the answer."""
    async with stub(deepseek) as provider:
        result = await provider.ask(path, streamed=streamed)
        assert (result.text, result.reasoning) == ("Hi", "Hmm.")


async def test_deepseek_without_balance_is_not_asked_again() -> None:
    """402: nobody is paid by asking again."""
    async with stub(deepseek) as provider:
        error = await refused(provider, "", key="sk-other", retries=3)
        assert "Insufficient Balance" in str(error)
        assert len(provider.seen) == 1


# --- Groq ---


def groq(request: Request) -> Answer:
    """Usage comes in a member of its own; over the limit it says when to come back."""
    if "wait" in json.dumps(request.body):
        error = {
            "message": "Rate limit reached for model `m` on tokens per minute (TPM)",
            "type": "tokens",
            "code": "rate_limit_exceeded",
        }
        return web.json_response({"error": error}, status=429, headers={"retry-after": "7"})
    if not request.streamed:
        return whole() | {"x_groq": {"id": "req_1"}}
    return (
        chunk({"role": "assistant", "content": ""}, x_groq={"id": "req_1"})
        + chunk({"content": "Hi"})
        + chunk({}, "stop", x_groq={"id": "req_1", "usage": USAGE})
        + DONE
    )


async def test_groq_says_when_to_come_back() -> None:
    """429 with retry-after is a rate limit, and the error carries the time."""
    async with stub(groq) as provider:
        messages = [{"role": "user", "content": "wait"}]
        error = await refused(provider, "/openai/v1", messages=messages)
        assert isinstance(error, LLMRateLimited)
        assert error.retry_after_seconds == 7


async def test_groq_streams() -> None:
    """Members that only Groq has harm nobody."""
    async with stub(groq) as provider:
        assert (await provider.ask("/openai/v1", streamed=True)).text == "Hi"


# --- vLLM and LM Studio ---


def vllm(request: Request) -> Answer:
    """Started without --api-key, under the name given by --served-model-name."""
    if request.body["model"] != "served":
        told = f"The model `{request.body['model']}` does not exist."
        error = {"object": "error", "message": told, "type": "NotFoundError", "param": None}
        return 404, error | {"code": 404}
    assert "authorization" not in request.headers
    if not request.streamed:
        return whole("Hi", reasoning_content=None, tool_calls=[])
    return chunk({"role": "assistant", "content": "Hi"}) + chunk({"content": ""}, "stop") + DONE


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_vllm_without_a_key(streamed: bool) -> None:
    """An agent without a key sends none; an unknown model is named in vLLM's words."""
    async with stub(vllm) as provider:
        result = await provider.ask("/v1", streamed=streamed, key=None, llm_model="served")
        assert result.text == "Hi"
        error = await refused(provider, "/v1", streamed=streamed, key=None, llm_model="other")
        assert "`other` does not exist" in str(error)


def lm_studio(request: Request) -> Answer:
    """Its errors are a bare text, or an event of their own in a stream."""
    if request.body["model"] == "unloaded":
        told = "Failed to load model: insufficient system resources"
        if not request.streamed:
            return 400, {"error": told}
        return f"event: error\ndata: {json.dumps({'error': {'message': told}})}\n\n"
    if not request.streamed:
        return whole()
    return chunk({"role": "assistant", "content": "Hi"}) + chunk({}, "stop") + DONE


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_lm_studio_without_the_model(streamed: bool) -> None:
    """A model that does not load is an error in LM Studio's words, streamed or not."""
    async with stub(lm_studio) as provider:
        assert (await provider.ask("/v1", streamed=streamed, key=None)).text == "Hi"
        error = await refused(provider, "/v1", streamed=streamed, key=None, llm_model="unloaded")
        assert "Failed to load model" in str(error)


# --- llama.cpp ---


def llama_cpp(request: Request) -> Answer:
    """While it loads its model."""
    return 503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}


async def test_llama_cpp_while_it_loads() -> None:
    """503 is unavailable for now, and tried again."""
    async with stub(llama_cpp) as provider:
        error = await refused(provider, "/v1", retries=2)
        assert isinstance(error, LLMUnavailable)
        assert "Loading model" in str(error)
        assert len(provider.seen) == 3


@pytest.mark.real_llm
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_llama_cpp_itself(local: LocalModel, streamed: bool) -> None:
    """The recipe against llama.cpp's own server with a real model: text, usage, no key."""
    provider = Stub(local.openai_url.removesuffix("/v1"))
    result = await provider.ask(
        "/v1", streamed=streamed, key=None, llm_max_tokens=8, llm_timeout=120
    )
    assert result.text
    assert result.usage is not None
    assert result.finish_reason in ("stop", "length")


# --- LiteLLM proxy ---


def litellm(request: Request) -> Answer:
    """Error codes are text; what the provider behind it says is part of the message."""
    if request.key != KEY:
        told = "Authentication Error, Invalid proxy server token passed."
        error = {"message": told, "type": "token_not_found_in_db", "param": "key", "code": "401"}
        return 401, {"error": error}
    if request.body["model"] == "over":
        told = "Budget has been exceeded! Current cost: 1.2, Max budget: 1.0"
        over = {"message": told, "type": "budget_exceeded", "param": None, "code": "400"}
        return 400, {"error": over}
    if not request.streamed:
        return whole()
    return chunk({"role": "assistant", "content": "Hi"}) + chunk({}, "stop") + DONE


@pytest.mark.parametrize("path", ["", "/v1"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_litellm_with_a_virtual_key(path: str, streamed: bool) -> None:
    """With or without /v1; a refused key and a spent budget are told in the proxy's words."""
    async with stub(litellm) as provider:
        assert (await provider.ask(path, streamed=streamed)).text == "Hi"
        assert provider.seen[-1].path == f"{path}/chat/completions"
        error = await refused(provider, path, streamed=streamed, key="sk-other")
        assert "Invalid proxy server token" in str(error)
        error = await refused(provider, path, streamed=streamed, llm_model="over")
        assert "Budget has been exceeded" in str(error)
