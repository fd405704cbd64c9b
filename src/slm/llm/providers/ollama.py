"""Ollama's own chat protocol.

Knows nothing about agents, retries or deadlines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from slm.endpoints import origin
from slm.llm.providers.base import (
    PARTS,
    ChatRequest,
    Completion,
    End,
    Message,
    StreamChunk,
    Usage,
    arguments_of,
    counted,
    data_url,
    parts_of,
    text_of,
)
from slm.llm.providers.failures import Unsupported
from slm.llm.providers.http import HTTPProvider
from slm.llm.providers.parsing import AnswerParser, shown, string
from slm.llm.providers.wire import ServerSentEvent

# These are next to `options` in a request; everything else is the model's and goes inside.
_TOP_LEVEL: Final = frozenset({"format", "keep_alive", "logprobs", "think", "top_logprobs"})
# Fields of the common form that this protocol expresses elsewhere, or not at all.
_OTHERS: Final = frozenset(
    [
        *("tool_calls", "tool_call_id", "name", "refusal", "annotations", "audio"),
        *("function_call", "reasoning_content", "reasoning", PARTS),
    ]
)
_COMMON: Final = frozenset({"role", "content", "tool_calls", "images", "tool_name"})


class OllamaProvider(HTTPProvider):
    """The adapter; see `slm.llm.providers.base.Provider`."""

    name = "ollama"
    route = "/api/chat"
    lines = True
    members = frozenset({"message", "done", "model", "created_at"})

    def body(self, request: ChatRequest, *, streamed: bool) -> tuple[dict[str, Any], list[str]]:
        """Return the request's body."""
        return _body(request) | {"stream": streamed}, []

    def completion(self, answer: Mapping[str, Any]) -> Completion:
        """Parse a whole response."""
        if not isinstance(answer.get("message"), Mapping) and not answer.get("done"):
            raise TypeError("an answer without a message")
        parser = OllamaParser()
        parser.read(answer)
        return parser.completion(_usage(answer))

    def parser(self, request: ChatRequest) -> OllamaParser:
        """Return a parser for one stream."""
        return OllamaParser()


def _body(request: ChatRequest) -> dict[str, Any]:
    given = dict(request.options)
    body = {name: given.pop(name) for name in _TOP_LEVEL & given.keys()}
    # The request itself has an `options` field, so a user may have spelled it out.
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
        "messages": _messages(request.messages, origin("ollama", request.endpoint)),
        "options": options,
        "stream": False,
    }


def _messages(messages: Sequence[Message], place: str) -> list[dict[str, Any]]:
    names: dict[str, str] = {}
    turns = []
    for message in messages:
        role = message["role"]
        turn: dict[str, Any] = {
            **{name: each for name, each in message.items() if name not in _OTHERS},
            "role": "system" if role == "developer" else role,
            "content": text_of(message.get("content")),
        }
        images = _images(message.get("content"))
        if images:
            turn["images"] = [*turn.get("images", ()), *images]
        parts = parts_of(message, "ollama", place)
        for name, value in parts.get("message", {}).items():
            turn.setdefault(name, value)
        if message.get("tool_calls"):
            extras = parts.get("tool_calls") or {}
            turn["tool_calls"] = []
            for call in message["tool_calls"]:
                names[str(call.get("id"))] = name = call["function"]["name"]
                extra = extras.get(call.get("id")) or {}
                function = {**(extra.get("function") or {}), "name": name}
                function["arguments"] = arguments_of(call)
                turn["tool_calls"].append({**extra, "function": function})
        if role == "tool":
            # The protocol refers to the tool, not the call.
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


class OllamaParser(AnswerParser):
    """Reads one stream, or the single part of a whole response."""

    def __init__(self) -> None:
        super().__init__()
        self._answered = False
        self._extra: dict[str, Any] = {}

    def take(self, event: ServerSentEvent) -> StreamChunk | None:
        """Return what the event adds to the response."""
        chunk = self.read(event.value)
        return shown(chunk)

    def read(self, part: Mapping[str, Any]) -> StreamChunk:
        """Process one part, and return what it adds."""
        message = part.get("message")
        if message is None:
            message = {}
        if not isinstance(message, Mapping):
            raise TypeError("a message is no object")
        self._answered = self._answered or bool(message) or bool(part.get("done"))
        text, reasoning = string(message.get("content")), string(message.get("thinking"))
        self._text.append(text)
        self._reasoning.append(reasoning)
        # Each call arrives whole, and all of them with index 0.
        pieces = tuple(self._calls.whole(call) for call in message.get("tool_calls") or ())
        for name, value in message.items():
            if name not in _COMMON and name != "thinking" and value not in (None, "", [], {}):
                self._extra[name] = value
        finish = None
        if part.get("done") in (True, "true"):
            self.done = True
            reason = string(part.get("done_reason")) or "stop"
            finish = self.finish_reason = "tool_calls" if len(self._calls) else reason
        return StreamChunk(
            text=text,
            reasoning=reasoning,
            tool_calls=pieces,
            finish_reason=finish,
            usage=_usage(part) if finish else None,
        )

    def end(self) -> StreamChunk | None:
        """Return the last piece; None if the stream was cut off."""
        if not (self._answered and self.done):
            return None
        return self.last()

    def ended(self) -> End:
        """Return what is only known at the end."""
        calls = self._calls.result()
        extra = dict(self._extra)
        if self.reasoning:
            # Without it, thinking models lose their train of thought between the calls of a turn.
            extra["thinking"] = self.reasoning
        parts: dict[str, Any] = {"message": extra} if extra else {}
        if extras := self._calls.extras():
            parts["tool_calls"] = extras
        return End(tool_calls=calls, parts=parts)


def _usage(part: Mapping[str, Any]) -> Usage | None:
    if part.get("prompt_eval_count") is None and part.get("eval_count") is None:
        return None
    return Usage(
        input_tokens=counted(part.get("prompt_eval_count")),
        output_tokens=counted(part.get("eval_count")),
    )
