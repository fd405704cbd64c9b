"""Anthropic's Messages, through its own SDK.

Knows nothing of agents, retries or deadlines.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Final

import anthropic
import httpx2
from anthropic.types import Message as AnthropicMessage

from slm.errors import LLMError
from slm.llm.providers.base import (
    ChatRequest,
    Completion,
    Message,
    StreamChunk,
    ToolCall,
    ToolCallDelta,
    Usage,
    arguments_of,
    counted,
    data_url,
    text_of,
    translated,
)
from slm.llm.providers.failures import (
    Failure,
    Unsupported,
    by_status,
    connection_failure,
    other_failure,
    retry_after_seconds,
    status_failure,
)
from slm.llm.transport import Connections

DEFAULT_MAX_TOKENS: Final = 4096
"""Used where the agent has no llm_max_tokens: this protocol has no request without a limit."""

_FINISH: Final = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}

# An error inside a stream comes with the stream's own 200; its type says what it would have been.
_STATUS_OF_TYPE: Final = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}


class AnthropicProvider:
    """The adapter; see `slm.llm.providers.base.Provider`."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def chat(self, request: ChatRequest) -> Completion:
        """Return the whole answer."""
        client = await self._client(request)
        body, max_tokens = translated(_body, request)
        answer = await client.messages.create(
            model=request.model, messages=[], max_tokens=max_tokens, extra_body=body
        )
        # Another content type than JSON comes back as a string.
        if not isinstance(answer, AnthropicMessage):
            raise TypeError("not a message")
        texts, thoughts, calls = [], [], []
        for block in answer.content:
            if block.type == "text":
                texts.append(text_of(block.text))
            elif block.type == "thinking":
                thoughts.append(block.thinking)
            elif block.type == "tool_use":
                arguments = json.dumps(block.input)
                calls.append(ToolCall(id=block.id, name=block.name, arguments_json=arguments))
        return Completion(
            text="".join(texts),
            reasoning="".join(thoughts),
            tool_calls=tuple(calls),
            finish_reason=_finish(answer.stop_reason) or "stop",
            usage=_usage(answer.usage, 0),
        )

    async def stream(self, request: ChatRequest) -> AsyncGenerator[StreamChunk, None]:
        """Yield the answer as it comes."""
        client = await self._client(request)
        body, max_tokens = translated(_body, request)
        stream = await client.messages.create(
            model=request.model, messages=[], max_tokens=max_tokens, stream=True, extra_body=body
        )
        prompt: Any = None
        async with stream:
            async for event in stream:
                if event.type == "message_start":
                    prompt = event.message.usage
                elif event.type == "content_block_start" and event.content_block.type == "tool_use":
                    call = ToolCallDelta(
                        index=event.index, id=event.content_block.id, name=event.content_block.name
                    )
                    yield StreamChunk(tool_calls=(call,))
                elif event.type == "content_block_delta":
                    chunk = _delta(event)
                    if chunk is not None:
                        yield chunk
                elif event.type == "message_delta":
                    yield StreamChunk(
                        finish_reason=_finish(event.delta.stop_reason),
                        usage=_usage(prompt, event.usage.output_tokens),
                    )

    def explain(self, error: Exception) -> Failure:
        """Say what an exception of this SDK means."""
        if isinstance(error, anthropic.APIStatusError):
            text = error.api_message if isinstance(error.api_message, str) else error.message
            if error.status_code < 300:
                status = _STATUS_OF_TYPE.get(str(error.type), 500)
                wait = retry_after_seconds(error.response.headers)
                return Failure(by_status(status), text, status, wait)
            return status_failure(error.status_code, text, error.response.headers)
        if isinstance(error, anthropic.APIConnectionError | httpx2.HTTPError):
            return connection_failure(error)
        if isinstance(error, anthropic.AnthropicError):
            return Failure(LLMError, "the provider's SDK failed")
        return other_failure(error)

    async def _client(self, request: ChatRequest) -> anthropic.AsyncAnthropic:
        connections = await self._connections.current()

        def build() -> anthropic.AsyncAnthropic:
            client = anthropic.AsyncAnthropic(
                api_key=request.secret(),
                base_url=request.endpoint,
                webhook_key="",
                open_telemetry=False,
                http_client=connections.httpx2_client(request.endpoint),
                max_retries=0,
                timeout=None,
            )
            # ANTHROPIC_CUSTOM_HEADERS, an Authorization among them, is taken whatever is given.
            client._custom_headers = {}
            return client

        return connections.sdk_client("anthropic", request.endpoint, request.secret(), build)


def _body(request: ChatRequest) -> tuple[dict[str, Any], int]:
    """Return the body and `max_tokens`; the SDK has no argument for temperature and top_p now."""
    system, messages = _messages(request.messages)
    body: dict[str, Any] = {"messages": messages}
    if system:
        body["system"] = system
    if request.temperature is not None:
        # The protocol's range ends at 1, an agent's at 2.
        body["temperature"] = min(request.temperature, 1.0)
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
        if request.tool_choice is not None:
            body["tool_choice"] = _tool_choice(request.tool_choice)
    if request.response_format is not None:
        body["output_config"] = _output_config(request)
    return dict(request.options) | body, request.max_tokens or DEFAULT_MAX_TOKENS


def _messages(messages: Sequence[Message]) -> tuple[str, list[dict[str, Any]]]:
    """Return the system prompt, which stands apart here, and the turns in alternation."""
    system: list[str] = []
    turns: list[dict[str, Any]] = []
    for message in messages:
        role = message["role"]
        if role in ("system", "developer"):
            system.append(text_of(message.get("content")))
            continue
        blocks = _blocks(message)
        # The answers to all tool calls of a turn must come in the one turn after it.
        role = "assistant" if role == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        elif blocks:
            turns.append({"role": role, "content": blocks})
    return "\n\n".join(text for text in system if text), turns


def _blocks(message: Message) -> list[dict[str, Any]]:
    content = message.get("content")
    if message["role"] == "tool":
        answer: dict[str, Any] = {
            "type": "tool_result",
            "tool_use_id": message["tool_call_id"],
            "content": content if isinstance(content, str) else _parts(content),
        }
        return [answer]
    blocks = _parts(content)
    for call in message.get("tool_calls") or ():
        blocks.append(
            {
                "type": "tool_use",
                "id": call["id"],
                "name": call["function"]["name"],
                "input": arguments_of(call),
            }
        )
    return blocks


def _parts(content: Any) -> list[dict[str, Any]]:
    if content is None or isinstance(content, str):
        # An empty text block is refused by the provider.
        return [{"type": "text", "text": content}] if content else []
    return [_part(part) for part in content]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part.get("type") != "image_url":
        return dict(part)
    inline = data_url(part)
    if inline is None:
        return {"type": "image", "source": {"type": "url", "url": part["image_url"]["url"]}}
    source = {"type": "base64", "media_type": inline[0], "data": inline[1]}
    return {"type": "image", "source": source}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        return dict(tool)
    function = tool["function"]
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    named = {"name": function["name"], "input_schema": schema}
    if function.get("description"):
        named["description"] = function["description"]
    return named


def _tool_choice(choice: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(choice, str):
        named = {"auto": "auto", "none": "none", "required": "any"}
        if choice not in named:
            raise Unsupported(f"tool_choice knows auto, none, required; not {choice!r}")
        return {"type": named[choice]}
    if choice.get("type") == "function":
        return {"type": "tool", "name": choice["function"]["name"]}
    return dict(choice)


def _output_config(request: ChatRequest) -> dict[str, Any]:
    wanted = request.response_format or {}
    if wanted.get("type") != "json_schema":
        raise Unsupported("of response_format, anthropic knows json_schema alone")
    given = request.options.get("output_config")
    schema = {"type": "json_schema", "schema": wanted["json_schema"]["schema"]}
    return (dict(given) if isinstance(given, Mapping) else {}) | {"format": schema}


def _delta(event: Any) -> StreamChunk | None:
    delta = event.delta
    if delta.type == "text_delta":
        return StreamChunk(text=text_of(delta.text))
    if delta.type == "thinking_delta":
        return StreamChunk(reasoning=delta.thinking)
    if delta.type == "input_json_delta":
        call = ToolCallDelta(index=event.index, arguments_json=delta.partial_json)
        return StreamChunk(tool_calls=(call,))
    return None


def _finish(reason: str | None) -> str | None:
    return _FINISH.get(reason, reason) if reason else None


def _usage(usage: Any, output_tokens: Any) -> Usage | None:
    """Return the usage; `input_tokens` counts only what was not cached, ours counts all."""
    if usage is None:
        return None
    cached = counted(usage.cache_read_input_tokens)
    uncached = counted(usage.input_tokens) + counted(usage.cache_creation_input_tokens)
    return Usage(
        input_tokens=uncached + cached,
        output_tokens=counted(output_tokens or usage.output_tokens),
        cached_input_tokens=cached,
    )
