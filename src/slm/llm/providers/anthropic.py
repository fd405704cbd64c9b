"""Anthropic's Messages API, as used by Anthropic and compatible servers.

Knows nothing about agents, retries or deadlines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from slm.endpoints import origin
from slm.llm.providers.anthropic_answer import AnthropicParser, finish, usage
from slm.llm.providers.base import (
    PARTS,
    ChatRequest,
    Completion,
    Message,
    arguments_of,
    data_url,
    parts_of,
    text_of,
)
from slm.llm.providers.failures import Unsupported
from slm.llm.providers.http import HTTPProvider

DEFAULT_MAX_TOKENS: Final = 4096
"""The default if the agent has no llm_max_tokens: this protocol requires a limit."""

VERSION: Final = "2023-06-01"

# Message fields of the common form that this protocol lacks or expresses elsewhere.
_OF_THE_COMMON_FORM: Final = frozenset(
    [
        *("role", "content", "tool_calls", "tool_call_id", "name", "refusal", "annotations"),
        *("audio", "function_call", "reasoning_content", "reasoning", "reasoning_details", PARTS),
    ]
)


class AnthropicProvider(HTTPProvider):
    """The adapter; see `slm.llm.providers.base.Provider`."""

    name = "anthropic"
    route = "/v1/messages"
    members = frozenset({"type", "content", "role", "stop_reason", "id", "usage", "delta", "index"})

    # Anthropic's own SDK sent the key this way before 2.0.
    other_key_header = "X-Api-Key"
    other_key_words = re.compile(r"x-api-key|bearer|authorization")

    def headers(self, request: ChatRequest, *, other: bool) -> dict[str, str]:
        """Return the headers for this protocol."""
        return {"anthropic-version": VERSION} | super().headers(request, other=other)

    def body(self, request: ChatRequest, *, streamed: bool) -> tuple[dict[str, Any], list[str]]:
        """Return the request's body."""
        body, max_tokens = _body(request)
        adjusted = []
        if _goes_on_without_thinking(body):
            # For example after the agent switched providers between a tool call and its result.
            del body["thinking"]
            adjusted.append("thinking dropped, since the turn that goes on began without it")
        if request.max_tokens and request.max_tokens != max_tokens:
            adjusted.append(f"max_tokens raised to {max_tokens}, above thinking.budget_tokens")
        if request.temperature is not None and "temperature" not in body:
            adjusted.append("temperature dropped, which thinking excludes")
        body |= {"model": request.model, "max_tokens": max_tokens}
        if streamed:
            body["stream"] = True
        return {name: value for name, value in body.items() if value is not None}, adjusted

    def completion(self, answer: Mapping[str, Any]) -> Completion:
        """Parse a whole response."""
        content = answer["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parser = AnthropicParser()
        parser.finish_reason = finish(answer.get("stop_reason"))
        for block in blocks or ():
            parser.whole(block)
        return parser.completion(usage(answer.get("usage"), None))

    def parser(self, request: ChatRequest) -> AnthropicParser:
        """Return a parser for one stream."""
        return AnthropicParser()


# --- the request ---


def _body(request: ChatRequest) -> tuple[dict[str, Any], int]:
    """Return the body and its token limit."""
    options = dict(request.options)
    system, messages = _messages(request.messages, origin("anthropic", request.endpoint))
    body: dict[str, Any] = {"messages": messages}
    if system:
        body["system"] = system
    if "stop" in options and "stop_sequences" not in options:
        stop = options.pop("stop")
        options["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    max_tokens = options.pop("max_completion_tokens", None) or request.max_tokens
    max_tokens = max_tokens or DEFAULT_MAX_TOKENS
    thinking = options.get("thinking")
    thinks = isinstance(thinking, Mapping) and thinking.get("type") not in (None, "disabled")
    if isinstance(thinking, Mapping) and isinstance(thinking.get("budget_tokens"), int):
        budget = thinking["budget_tokens"]
        if thinks and max_tokens <= budget:
            # Thinking counts towards the limit; keep what was meant for the answer.
            max_tokens += budget
    if request.temperature is not None and not thinks:
        # The protocol's range ends at 1, that of an agent at 2.
        body["temperature"] = min(request.temperature, 1.0)
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
        if request.tool_choice is not None:
            body["tool_choice"] = _tool_choice(request.tool_choice)
    if request.response_format is not None:
        body["output_config"] = _output_config(request)
    return options | body, max_tokens


def _goes_on_without_thinking(body: Mapping[str, Any]) -> bool:
    """Whether the turn continued after a tool result started without the requested thinking."""
    thinking = body.get("thinking")
    if not isinstance(thinking, Mapping) or thinking.get("type") != "enabled":
        return False
    began: Any = None
    answered = False
    for turn in body["messages"]:
        if turn["role"] == "assistant":
            began = began or turn["content"][0].get("type")
            answered = False
        else:
            answered = any(part.get("type") == "tool_result" for part in turn["content"])
            began = began if answered else None
    return answered and began is not None and began not in _THOUGHTS


def _messages(messages: Sequence[Message], place: str) -> tuple[Any, list[dict[str, Any]]]:
    """Return the system prompt, which is separate here, and the alternating turns."""
    system: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    for message in messages:
        role = message["role"]
        if role in ("system", "developer"):
            system += _marked(_parts(message.get("content")), message)
            continue
        # The results of all tool calls of a turn must be in the one turn after it.
        role = "assistant" if role == "assistant" else "user"
        blocks = _blocks(message, place)
        more = {name: each for name, each in message.items() if name not in _OF_THE_COMMON_FORM}
        more.pop("cache_control", None)
        if message["role"] == "tool":
            # Fields of a tool result, such as `is_error`: `_blocks` adds them there.
            more.clear()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
            turns[-1] |= more
        elif blocks:
            turns.append({"role": role, "content": blocks} | more)
    plain = all(block.keys() == {"type", "text"} and block["type"] == "text" for block in system)
    if plain:
        return "\n\n".join(block["text"] for block in system), turns
    return system, turns


def _marked(blocks: list[dict[str, Any]], message: Message) -> list[dict[str, Any]]:
    """Put a message's cache marker where this protocol expects it: on its last block."""
    mark = message.get("cache_control")
    if mark is not None and blocks:
        blocks[-1] = blocks[-1] | {"cache_control": mark}
    return blocks


def _blocks(message: Message, place: str) -> list[dict[str, Any]]:
    content = message.get("content")
    if message["role"] == "tool":
        answer: dict[str, Any] = {
            "type": "tool_result",
            "tool_use_id": message["tool_call_id"],
            "content": content if isinstance(content, str) else _parts(content),
        }
        more = {name: each for name, each in message.items() if name not in _OF_THE_COMMON_FORM}
        return [more | answer]
    own = parts_of(message, "anthropic", place).get("content") or []
    calls = message.get("tool_calls") or ()
    if own and _says_the_same(own, content, calls):
        return _marked([dict(block) for block in own], message)
    # The caller changed the text, but not the thinking before it.
    blocks = [dict(block) for block in own if block.get("type") in _THOUGHTS]
    blocks += _parts(content)
    for call in calls:
        blocks.append(
            {
                "type": "tool_use",
                "id": call["id"],
                "name": call["function"]["name"],
                "input": arguments_of(call),
            }
        )
    return _marked(blocks, message)


_THOUGHTS: Final = ("thinking", "redacted_thinking")


def _says_the_same(own: Sequence[Any], content: Any, calls: Sequence[Mapping[str, Any]]) -> bool:
    text = "".join(block.get("text") or "" for block in own if block.get("type") == "text")
    uses = [
        (block.get("id"), block.get("name"), block.get("input"))
        for block in own
        if block.get("type") == "tool_use"
    ]
    called = [(call.get("id"), call["function"]["name"], arguments_of(call)) for call in calls]
    return text == text_of(content) and uses == called


def _parts(content: Any) -> list[dict[str, Any]]:
    if content is None or isinstance(content, str):
        # The provider rejects empty text blocks.
        return [{"type": "text", "text": content}] if content else []
    parts = [_part(part) for part in content]
    return [part for part in parts if part.get("type") != "text" or part.get("text")]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = part.get("type")
    if kind == "file" and isinstance(part.get("file"), Mapping):
        return _file(part)
    if kind == "input_audio":
        raise Unsupported("anthropic takes no audio")
    if kind != "image_url":
        return dict(part)
    more = {name: value for name, value in part.items() if name not in ("type", "image_url")}
    inline = data_url(part)
    if inline is None:
        return more | {"type": "image", "source": {"type": "url", "url": part["image_url"]["url"]}}
    source = {"type": "base64", "media_type": inline[0], "data": inline[1]}
    return more | {"type": "image", "source": source}


def _file(part: Mapping[str, Any]) -> dict[str, Any]:
    file = part["file"]
    more = {name: value for name, value in part.items() if name not in ("type", "file")}
    if file.get("file_id"):
        source = {"type": "file", "file_id": file["file_id"]}
    else:
        inline = data_url({"image_url": {"url": file["file_data"]}})
        if inline is None:
            raise Unsupported("anthropic takes files as data URLs or by their id")
        source = {"type": "base64", "media_type": inline[0], "data": inline[1]}
    title = {"title": file["filename"]} if file.get("filename") else {}
    return more | {"type": "document", "source": source} | title


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        return dict(tool)
    function = tool["function"]
    named = {name: value for name, value in tool.items() if name not in ("type", "function")}
    named |= {name: value for name, value in function.items() if name != "parameters"}
    named["input_schema"] = function.get("parameters") or {"type": "object", "properties": {}}
    return {name: value for name, value in named.items() if value is not None}


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
