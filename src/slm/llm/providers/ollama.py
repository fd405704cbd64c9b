"""Ollama's own chat protocol, through its own SDK.

Knows nothing of agents, retries or deadlines.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Final

import httpx
import ollama

from slm.errors import LLMUnavailable
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
    causes,
    connection_failure,
    other_failure,
    status_failure,
)
from slm.llm.transport import Connections, no_cookies

# These stand beside `options` in a request; everything else is the model's own and goes inside.
_TOP_LEVEL: Final = frozenset({"format", "keep_alive", "logprobs", "think", "top_logprobs"})


class OllamaProvider:
    """The adapter; see `slm.llm.providers.base.Provider`."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def chat(self, request: ChatRequest) -> Completion:
        """Return the whole answer."""
        client = await self._client(request)
        # Not client.chat(): that cuts a tool's JSON Schema down to the members it knows, nested
        # objects, anyOf and $ref among the lost.
        answer = await client._request(
            ollama.ChatResponse, "POST", "/api/chat", json=translated(_body, request)
        )
        calls = tuple(
            ToolCall(
                id=f"call_{index}",
                name=call.function.name,
                arguments_json=json.dumps(call.function.arguments),
            )
            for index, call in enumerate(answer.message.tool_calls or ())
        )
        return Completion(
            text=answer.message.content or "",
            reasoning=answer.message.thinking or "",
            tool_calls=calls,
            finish_reason="tool_calls" if calls else answer.done_reason or "stop",
            usage=_usage(answer),
        )

    async def stream(self, request: ChatRequest) -> AsyncGenerator[StreamChunk, None]:
        """Yield the answer as it comes."""
        client = await self._client(request)
        body = translated(_body, request) | {"stream": True}
        stream: Any = await client._request(
            ollama.ChatResponse, "POST", "/api/chat", json=body, stream=True
        )
        calls = 0
        try:
            async for part in stream:
                whole = tuple(
                    ToolCallDelta(
                        index=calls + offset,
                        id=f"call_{calls + offset}",
                        name=call.function.name,
                        arguments_json=json.dumps(call.function.arguments),
                    )
                    for offset, call in enumerate(part.message.tool_calls or ())
                )
                calls += len(whole)
                finish = (part.done_reason or "stop") if part.done else None
                chunk = StreamChunk(
                    text=part.message.content or "",
                    reasoning=part.message.thinking or "",
                    tool_calls=whole,
                    finish_reason="tool_calls" if finish and calls else finish,
                    usage=_usage(part) if part.done else None,
                )
                if chunk != _NOTHING:
                    yield chunk
        finally:
            await stream.aclose()

    def explain(self, error: Exception) -> Failure:
        """Say what an exception of this SDK means."""
        if isinstance(error, ollama.ResponseError):
            if error.status_code < 0:
                # A line of the stream that says `error`; it comes with no status of its own.
                return Failure(LLMUnavailable, str(error.error))
            below = (cause for cause in causes(error) if isinstance(cause, httpx.HTTPStatusError))
            response = next((cause.response for cause in below), None)
            headers: Mapping[str, str] = {} if response is None else response.headers
            return status_failure(error.status_code, str(error.error), headers)
        if isinstance(error, httpx.HTTPError):
            return connection_failure(error)
        return other_failure(error)

    async def _client(self, request: ChatRequest) -> ollama.AsyncClient:
        connections = await self._connections.current()

        def build() -> ollama.AsyncClient:
            # Without host and authorization the SDK takes OLLAMA_HOST and OLLAMA_API_KEY.
            return ollama.AsyncClient(
                host=request.endpoint,
                headers={"authorization": f"Bearer {request.secret()}"},
                follow_redirects=False,
                trust_env=False,
                timeout=None,
                transport=connections.httpx_transport(request.endpoint),
                cookies=no_cookies(),
            )

        return connections.sdk_client("ollama", request.endpoint, request.secret(), build)


_NOTHING: Final = StreamChunk()


def _body(request: ChatRequest) -> dict[str, Any]:
    given = dict(request.options)
    body = {name: given.pop(name) for name in _TOP_LEVEL & given.keys()}
    # As the request itself has an `options` member, it may have been written out.
    nested = given.pop("options", None)
    options = (dict(nested) if isinstance(nested, Mapping) else {}) | given
    if request.temperature is not None:
        options["temperature"] = request.temperature
    if request.max_tokens is not None:
        options["num_predict"] = request.max_tokens
    if request.response_format is not None:
        body["format"] = _format(request.response_format)
    if request.tools and _wants_tools(request.tool_choice):
        body["tools"] = list(request.tools)
    return body | {
        "model": request.model,
        "messages": _messages(request.messages),
        "options": options,
        "stream": False,
    }


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    names: dict[str, str] = {}
    turns = []
    for message in messages:
        role = message["role"]
        turn: dict[str, Any] = {
            "role": "system" if role == "developer" else role,
            "content": text_of(message.get("content")),
        }
        images = _images(message.get("content"))
        if images:
            turn["images"] = images
        if message.get("tool_calls"):
            turn["tool_calls"] = []
            for call in message["tool_calls"]:
                names[str(call.get("id"))] = name = call["function"]["name"]
                turn["tool_calls"].append(
                    {"function": {"name": name, "arguments": arguments_of(call)}}
                )
        if role == "tool":
            # The protocol names the tool, not the call.
            name = message.get("name") or names.get(str(message.get("tool_call_id")), "")
            turn["tool_name"] = name
        turns.append(turn)
    return turns


def _images(content: Any) -> list[str]:
    if content is None or isinstance(content, str):
        return []
    images = []
    for part in content:
        if part.get("type") == "image_url":
            inline = data_url(part)
            if inline is None:
                raise Unsupported("ollama takes images as data URLs alone")
            images.append(inline[1])
    return images


def _wants_tools(choice: str | Mapping[str, Any] | None) -> bool:
    if choice in (None, "auto"):
        return True
    if choice == "none":
        return False
    raise Unsupported("of tool_choice, ollama knows auto and none alone")


def _format(wanted: Mapping[str, Any]) -> Any:
    if wanted.get("type") == "json_object":
        return "json"
    if wanted.get("type") == "json_schema":
        return wanted["json_schema"]["schema"]
    raise Unsupported("of response_format, ollama knows json_object and json_schema alone")


def _usage(answer: ollama.ChatResponse) -> Usage | None:
    if answer.prompt_eval_count is None and answer.eval_count is None:
        return None
    return Usage(
        input_tokens=counted(answer.prompt_eval_count), output_tokens=counted(answer.eval_count)
    )
