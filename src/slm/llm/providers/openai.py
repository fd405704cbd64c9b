"""OpenAI's chat completions, as used by OpenAI and all compatible servers.

Knows nothing about agents, retries or deadlines. Does not depend on the host.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Final

from slm.endpoints import origin
from slm.llm.providers.base import (
    PARTS,
    ChatRequest,
    Completion,
    End,
    StreamChunk,
    Usage,
    counted,
    parts_of,
)
from slm.llm.providers.http import HTTPProvider
from slm.llm.providers.parsing import AnswerParser, shown, string
from slm.llm.providers.wire import ServerSentEvent

# Other fields of a response message are the provider's own, and are sent back to it.
_COMMON: Final = frozenset(
    [
        *("role", "content", "tool_calls", "refusal", "annotations", "audio", "function_call"),
        *("name", "finish_reason", "index", "padding", "obfuscation", "token_ids", "logprobs"),
    ]
)


class OpenAIProvider(HTTPProvider):
    """The adapter; see `slm.llm.providers.base.Provider`."""

    name = "openai"
    route = "/chat/completions"
    # OpenAI's newer models reject the former name; most compatible servers only know that one.
    renamed: ClassVar[Mapping[str, str]] = {
        "max_tokens": "max_completion_tokens",
        "max_completion_tokens": "max_tokens",
    }
    members = frozenset({"choices", "usage", "id", "object", "model", "prompt_filter_results"})

    def body(self, request: ChatRequest, *, streamed: bool) -> tuple[dict[str, Any], list[str]]:
        """Return the request's body."""
        body = _body(request)
        if streamed:
            body["stream"] = True
            # Null in llm_options turns it off, as with every field.
            body.setdefault("stream_options", {"include_usage": True})
        return {name: value for name, value in body.items() if value is not None}, []

    def completion(self, answer: Mapping[str, Any]) -> Completion:
        """Parse a whole response."""
        choice = _choice(answer["choices"], None)
        if choice is None:
            raise TypeError("an answer without a choice")
        parser = OpenAIParser()
        parser.choose(choice, delta=False)
        message = choice.get("message")
        if not isinstance(message, Mapping) and not parser.finish_reason:
            raise TypeError("a choice without a message")
        return parser.completion(_usage(answer.get("usage")))

    def parser(self, request: ChatRequest) -> OpenAIParser:
        """Return a parser for one stream."""
        several = request.options.get("n") not in (None, 1)
        return OpenAIParser(0 if several else None)


def _body(request: ChatRequest) -> dict[str, Any]:
    place = origin("openai", request.endpoint)
    body: dict[str, Any] = {
        "model": request.model,
        "messages": [_message(message, place) for message in request.messages],
    }
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.max_tokens is not None:
        body["max_tokens"] = request.max_tokens
    if request.tools:
        body["tools"] = list(request.tools)
    if request.tool_choice is not None:
        body["tool_choice"] = request.tool_choice
    if request.response_format is not None:
        body["response_format"] = request.response_format
    return dict(request.options) | body


def _message(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the message in OpenAI's format, with what its own provider needs back."""
    turn = {name: value for name, value in message.items() if name != PARTS}
    parts = parts_of(message, "openai", place)
    calls = turn.get("tool_calls")
    if calls:
        extras = parts.get("tool_calls") or {}
        turn["tool_calls"] = [_call(call, extras.get(call.get("id")) or {}) for call in calls]
    for name, value in (parts.get("message") or {}).items():
        turn.setdefault(name, value)
    content = parts.get("content")
    # The caller changed the text on purpose.
    if content and _joined(content) == turn.get("content"):
        turn["content"] = content
    return turn


def _call(call: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    function = {**(extra.get("function") or {}), **call["function"]}
    given = function.get("arguments")
    # Arguments are text in this protocol; other libraries pass them as an object.
    function["arguments"] = given if isinstance(given, str) else json.dumps(given or {})
    return {**extra, "type": "function", **call, "function": function}


class OpenAIParser(AnswerParser):
    """Reads one stream, or the one choice of a whole response.

    Args:
        wanted: the index of the choice to read; None for the first one that arrives.
    """

    def __init__(self, wanted: int | None = None) -> None:
        super().__init__()
        self._wanted = wanted
        self._answered = False
        self._extra: dict[str, list[Any]] = {}
        self._content: list[dict[str, Any]] = []

    def take(self, event: ServerSentEvent) -> StreamChunk | None:
        """Return what the event adds to the response."""
        usage = _usage(event.value.get("usage"))
        choice = _choice(event.value.get("choices") or (), self._wanted)
        if choice is None:
            return StreamChunk(usage=usage) if usage else None
        if usage is None:
            # Groq and some proxies put it there.
            below = choice.get("usage") or event.value.get("x_groq")
            usage = _usage(below.get("usage", below) if isinstance(below, Mapping) else None)
        if self._wanted is None:
            self._wanted = _number(choice)
        chunk = self.choose(choice, delta=True)
        if usage is not None:
            return replace(chunk, usage=usage)
        return shown(chunk)

    def choose(self, choice: Mapping[str, Any], *, delta: bool) -> StreamChunk:
        """Process one choice, and return what it adds."""
        self._answered = True
        # A single event with the whole message is also a valid stream.
        message = choice.get("delta") if delta else None
        whole = message is None
        message = choice.get("message") if whole else message
        if message is None:
            message = {}
        if not isinstance(message, Mapping):
            raise TypeError("a message is no object")
        content = message.get("content")
        text, reasoning = _said(content if content is not None else choice.get("text"))
        if isinstance(content, list):
            self._content += [dict(part) for part in content]
        elif self._content and text:
            self._content.append({"type": "text", "text": text})
        text = text or string(message.get("refusal"))
        reasoning = reasoning or _reasoning(message)
        pieces = []
        former = message.get("function_call")
        for call in message.get("tool_calls") or ([{"function": former}] if former else ()):
            if call.get("type") != "custom":
                piece = self._calls.whole(call) if whole else self._calls.piece(call)
                pieces += [] if piece is None else [piece]
        for name, value in message.items():
            if name not in _COMMON and value not in (None, "", [], {}):
                self._extra.setdefault(name, []).append(value)
        finish = choice.get("finish_reason") or None
        if finish in ("stop", "function_call") and len(self._calls):
            finish = "tool_calls"
        chunk = StreamChunk(
            text=text, reasoning=reasoning, tool_calls=tuple(pieces), finish_reason=finish
        )
        self._text.append(text)
        self._reasoning.append(reasoning)
        self.finish_reason = finish or self.finish_reason
        return chunk

    def end(self) -> StreamChunk | None:
        """Return the last piece; None if the stream was cut off."""
        if not self._answered or not (self.done or self.finish_reason):
            return None
        return self.last()

    def ended(self) -> End:
        """Return what is only known at the end."""
        calls = self._calls.result()
        parts: dict[str, Any] = {}
        if self._extra:
            parts["message"] = {name: _merged(values) for name, values in self._extra.items()}
        if any(part.get("type") != "text" for part in self._content):
            parts["content"] = _merged_parts(self._content)
        if extras := self._calls.extras():
            parts["tool_calls"] = extras
        return End(tool_calls=calls, parts=parts)


def _choice(choices: Any, wanted: int | None) -> Mapping[str, Any] | None:
    """Return the choice to read; of several, only one is ever read."""
    found = None
    for choice in choices:
        if choice is None:
            continue
        if not isinstance(choice, Mapping):
            raise TypeError("a choice is no object")
        if _number(choice) == (wanted or 0):
            return choice
        if found is None and wanted is None:
            found = choice
    return found


def _number(choice: Mapping[str, Any]) -> int:
    index = choice.get("index")
    return index if isinstance(index, int) else 0


def _said(content: Any) -> tuple[str, str]:
    """Return text and reasoning of a content, which is text or a list of parts."""
    if content is None or isinstance(content, str):
        return content or "", ""
    texts, thoughts = [], []
    for part in content:
        kind = part.get("type")
        if kind in (None, "text", "output_text"):
            texts.append(string(part.get("text")))
        elif kind == "refusal":
            texts.append(string(part.get("refusal")))
        elif kind in ("thinking", "reasoning"):
            inner = part.get(kind) or part.get("text")
            thoughts.append("".join(_said(inner)))
    return "".join(texts), "".join(thoughts)


def _joined(content: Any) -> str:
    return _said(content)[0]


def _reasoning(message: Mapping[str, Any]) -> str:
    # Not OpenAI's own: vLLM, llama.cpp, DeepSeek, OpenRouter and others use this name.
    text = message.get("reasoning_content") or message.get("reasoning")
    return text if isinstance(text, str) else ""


def _merged(values: list[Any]) -> Any:
    """Return one value, assembled from the pieces of a stream."""
    if all(isinstance(value, str) for value in values):
        return "".join(values)
    if all(isinstance(value, list) for value in values):
        return [item for value in values for item in value]
    if all(isinstance(value, dict) for value in values):
        return {name: item for value in values for name, item in value.items()}
    return values[-1]


def _merged_parts(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the parts of a content, merging consecutive ones of the same kind."""
    merged: list[dict[str, Any]] = []
    texts: list[list[str]] = []
    for part in parts:
        kind = part.get("type")
        if kind not in ("text", "thinking"):
            merged.append(part)
            texts.append([])
            continue
        said = "".join(_said(part.get(kind) if kind == "thinking" else part.get("text")))
        if merged and texts[-1] and merged[-1].get("type") == kind:
            texts[-1].append(said)
            merged[-1] |= part
        else:
            merged.append(dict(part))
            texts.append([said])
    for part, said_in in zip(merged, texts, strict=True):
        if part.get("type") == "text":
            part["text"] = "".join(said_in)
        elif part.get("type") == "thinking":
            part["thinking"] = [{"type": "text", "text": "".join(said_in)}]
    return merged


def _usage(usage: Any) -> Usage | None:
    if not isinstance(usage, Mapping) or not usage:
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    # DeepSeek and Moonshot have their own names for it.
    cached = cached or usage.get("prompt_cache_hit_tokens") or usage.get("cached_tokens")
    return Usage(
        input_tokens=counted(usage.get("prompt_tokens")),
        output_tokens=counted(usage.get("completion_tokens")),
        cached_input_tokens=counted(cached),
    )
