"""OpenAI's chat completions, through its own SDK; also for any server that speaks the same.

Knows nothing of agents, retries or deadlines.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final

import httpx2
import openai
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from slm.endpoints import origin
from slm.errors import LLMBadResponse
from slm.llm.providers.base import (
    NO_KEY,
    ChatRequest,
    Completion,
    StreamChunk,
    ToolCall,
    ToolCallDelta,
    Usage,
    counted,
    json_text,
    text_of,
    translated,
)
from slm.llm.providers.failures import (
    Failure,
    by_status,
    causes,
    connection_failure,
    other_failure,
    status_failure,
    status_of,
)
from slm.llm.transport import Connections

_OPENAI: Final = origin("openai", None)


class OpenAIProvider:
    """The adapter; see `slm.llm.providers.base.Provider`."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        # The SDK imports its larger half when a client is made and its resources are looked at:
        # 0.4 s, here in the thread that makes the adapter rather than in the first call's loop.
        idle = httpx2.AsyncClient(transport=httpx2.AsyncBaseTransport(), trust_env=False)
        _ = openai.AsyncOpenAI(
            api_key=NO_KEY, base_url="http://x", http_client=idle
        ).chat.completions

    async def chat(self, request: ChatRequest) -> Completion:
        """Return the whole answer."""
        client = await self._client(request)
        answer = await client.chat.completions.create(
            model=request.model,
            messages=[],
            extra_body=translated(_body, request),
        )
        # Another content type than JSON comes back as a string, other members as they are.
        if not isinstance(answer, ChatCompletion):
            raise TypeError("not a chat completion")
        choice = answer.choices[0]
        message = choice.message
        calls = tuple(
            ToolCall(
                id=str(call.id or f"call_{index}"),
                name=call.function.name,
                arguments_json=json_text(call.function.arguments),
            )
            for index, call in enumerate(message.tool_calls or ())
            if call.type != "custom"
        )
        return Completion(
            text=text_of(message.content or message.refusal),
            reasoning=_reasoning(message),
            tool_calls=calls,
            finish_reason=choice.finish_reason or ("tool_calls" if calls else "stop"),
            usage=_usage(answer.usage),
        )

    async def stream(self, request: ChatRequest) -> AsyncGenerator[StreamChunk, None]:
        """Yield the answer as it comes."""
        client = await self._client(request)
        body = {"stream_options": {"include_usage": True}} | translated(_body, request)
        stream = await client.chat.completions.create(
            model=request.model, messages=[], stream=True, extra_body=body
        )
        calls = 0
        async with stream:
            async for event in stream:
                chunk = _chunk(event, calls)
                calls += sum(1 for call in chunk.tool_calls if call.id)
                if chunk != _NOTHING:
                    yield chunk

    def explain(self, error: Exception) -> Failure:
        """Say what an exception of this SDK means."""
        if isinstance(error, openai.APIStatusError):
            return status_failure(
                error.status_code, _text(error.body) or error.message, error.response.headers
            )
        if isinstance(error, openai.APIConnectionError | httpx2.HTTPError):
            return connection_failure(error)
        if isinstance(error, openai.APIResponseValidationError):
            return Failure(LLMBadResponse, "the answer is not of the provider's protocol")
        if isinstance(error, openai.APIError):
            # An error inside the stream has no HTTP status; vLLM and others give it as `code`.
            status = status_of(error.code) or 500
            return Failure(by_status(status), error.message, status)
        if any(isinstance(cause, httpx2.HTTPError) for cause in causes(error)):
            return connection_failure(error)
        return other_failure(error)

    async def _client(self, request: ChatRequest) -> openai.AsyncOpenAI:
        connections = await self._connections.current()

        def build() -> openai.AsyncOpenAI:
            client = openai.AsyncOpenAI(
                api_key=request.secret(),
                base_url=request.endpoint,
                http_client=connections.httpx2_client(request.endpoint),
                max_retries=0,
                timeout=None,
            )
            # Taken from the environment where not given (OPENAI_ORG_ID, OPENAI_PROJECT_ID, …), and
            # OPENAI_CUSTOM_HEADERS, an Authorization among them, whatever is given.
            client.organization = client.project = None
            client.admin_api_key = client.webhook_secret = None
            client._custom_headers = {}
            return client

        return connections.sdk_client("openai", request.endpoint, request.secret(), build)


_NOTHING: Final = StreamChunk()


def _body(request: ChatRequest) -> dict[str, Any]:
    """Return the request's body; `extra_body` wins over arguments, so all of it goes there."""
    options = dict(request.options)
    body: dict[str, Any] = {"messages": [_message(message) for message in request.messages]}
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.max_tokens is not None:
        # OpenAI's newer models refuse max_tokens; most compatible servers know only that.
        ours = origin("openai", request.endpoint) == _OPENAI
        body["max_completion_tokens" if ours else "max_tokens"] = request.max_tokens
    if request.tools:
        body["tools"] = list(request.tools)
    if request.tool_choice is not None:
        body["tool_choice"] = request.tool_choice
    if request.response_format is not None:
        body["response_format"] = request.response_format
    return options | body


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message as OpenAI takes it: arguments of tool calls are text there."""
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    return dict(message) | {"tool_calls": [_call(call) for call in calls]}


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    function["arguments"] = json_text(function.get("arguments"))
    return {"type": "function"} | dict(call) | {"function": function}


def _chunk(event: ChatCompletionChunk, calls: int) -> StreamChunk:
    usage = _usage(event.usage)
    if not event.choices:
        return StreamChunk(usage=usage)
    choice = event.choices[0]
    delta = choice.delta
    return StreamChunk(
        text=text_of(delta.content),
        reasoning=_reasoning(delta),
        tool_calls=tuple(
            ToolCallDelta(
                # Some servers send each call whole and without an index.
                index=calls + offset if call.index is None else call.index,
                id=str(call.id or ""),
                name=(call.function and call.function.name) or "",
                arguments_json=json_text((call.function and call.function.arguments) or ""),
            )
            for offset, call in enumerate(delta.tool_calls or ())
        ),
        finish_reason=choice.finish_reason or None,
        usage=usage,
    )


def _reasoning(message: Any) -> str:
    # Not OpenAI's own: vLLM, llama.cpp and DeepSeek name it so.
    text = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    return text if isinstance(text, str) else ""


def _usage(usage: CompletionUsage | None) -> Usage | None:
    if usage is None:
        return None
    details = usage.prompt_tokens_details
    return Usage(
        input_tokens=counted(usage.prompt_tokens),
        output_tokens=counted(usage.completion_tokens),
        cached_input_tokens=counted(details and details.cached_tokens),
    )


def _text(body: object) -> str:
    """Return the error's own words, where the body has them where OpenAI puts them."""
    message = body.get("message") if isinstance(body, dict) else None
    return message if isinstance(message, str) else ""
