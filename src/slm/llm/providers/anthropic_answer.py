"""A response of Anthropic's Messages API: its blocks, whole or as a stream of events.

Knows nothing about requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from slm.llm.providers.base import End, StreamChunk, ToolCallDelta, Usage, counted
from slm.llm.providers.parsing import NOTHING, AnswerParser, shown, string
from slm.llm.providers.wire import ServerSentEvent

_FINISH: Final = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


class AnthropicParser(AnswerParser):
    """Reads one stream block by block, or the blocks of a whole response."""

    def __init__(self) -> None:
        super().__init__()
        self._begun = False
        self._prompt: Any = None
        # The provider's own blocks, and the pieces of those still being read.
        self._blocks: list[dict[str, Any]] = []
        self._pieces: dict[int, list[str]] = {}
        self._stopped: set[int] = set()
        self._by_index: dict[int, int] = {}

    def take(self, event: ServerSentEvent) -> StreamChunk | None:
        """Return what the event adds to the response."""
        value = event.value
        kind = value.get("type") or event.name
        if kind == "message_start":
            message = _mapping(value.get("message"))
            self._prompt = message.get("usage")
            return None
        if kind == "content_block_start":
            block = dict(_mapping(value.get("content_block")))
            self._by_index[_index(value, len(self._blocks))] = len(self._blocks)
            return shown(self.begin(block))
        if kind == "content_block_delta":
            return shown(self._delta(value))
        if kind == "content_block_stop":
            return shown(self.stop(self._by_index.get(_index(value, -1))))
        if kind == "message_delta":
            self.finish_reason = (
                finish(_mapping(value.get("delta")).get("stop_reason")) or self.finish_reason
            )
            counted_so_far = usage(self._prompt, value.get("usage"))
            if self.finish_reason is None and counted_so_far is None:
                return None
            return StreamChunk(finish_reason=self.finish_reason, usage=counted_so_far)
        if kind == "message_stop":
            self.done = True
        elif kind == "message":
            # A whole response as a single event.
            pieces = [self.whole(block) for block in value.get("content") or ()]
            self.finish_reason = finish(value.get("stop_reason")) or "stop"
            return StreamChunk(
                text=self.text,
                reasoning=self.reasoning,
                tool_calls=tuple(call for piece in pieces for call in piece.tool_calls),
                finish_reason=self.finish_reason,
                usage=usage(value.get("usage"), None),
            )
        return None

    def whole(self, block: Mapping[str, Any] | None) -> StreamChunk:
        """Process a block that arrived whole."""
        if block is None:
            return NOTHING
        first = self.begin(dict(block))
        return StreamChunk(tool_calls=first.tool_calls + self.stop().tool_calls)

    def begin(self, block: dict[str, Any]) -> StreamChunk:
        """Process the start of a block, and return what it adds."""
        self._begun = True
        at = len(self._blocks)
        self._blocks.append(block)
        kind = block.get("type")
        text = string(block.get("text")) if kind == "text" else ""
        reasoning = string(block.get("thinking")) if kind == "thinking" else ""
        self._text.append(text)
        self._reasoning.append(reasoning)
        calls: tuple[ToolCallDelta, ...] = ()
        # Server tools run at the provider and are not calls for the caller.
        if kind == "tool_use":
            calls = self._piece(at, id=block.get("id"), function={"name": block.get("name")})
        return StreamChunk(text=text, reasoning=reasoning, tool_calls=calls)

    def stop(self, at: int | None = None) -> StreamChunk:
        """End a block, by default the last one, and return what it still adds."""
        at = len(self._blocks) - 1 if at is None else at
        if at < 0 or at in self._stopped:
            return NOTHING
        self._stopped.add(at)
        block, pieces = self._blocks[at], self._pieces.pop(at, None)
        kind = str(block.get("type"))
        if kind in ("text", "thinking"):
            if pieces:
                block[kind] = string(block.get(kind)) + "".join(pieces)
            return NOTHING
        if not kind.endswith("tool_use"):
            return NOTHING
        # Some servers send the whole block at its start.
        given = "".join(pieces) if pieces else block.get("input")
        block["input"] = _object_or_text(given)
        if kind != "tool_use" or pieces or not given:
            return NOTHING
        return StreamChunk(tool_calls=self._piece(at, function={"arguments": given}))

    def _piece(self, at: int, **piece: Any) -> tuple[ToolCallDelta, ...]:
        delta = self._calls.piece({"index": at, **piece})
        return () if delta is None else (delta,)

    def end(self) -> StreamChunk | None:
        """Return the last piece; None if the stream was cut off."""
        if not self._begun and self.finish_reason is None:
            return None
        if not (self.done or self.finish_reason):
            return None
        pieces = [call for at in range(len(self._blocks)) for call in self.stop(at).tool_calls]
        return self.last(tuple(pieces))

    def ended(self) -> End:
        """Return what is only known at the end."""
        blocks = [b for b in self._blocks if b.get("type") != "text" or b.get("text")]
        plain = all(block.keys() <= _PLAIN.get(block.get("type"), set()) for block in blocks)
        return End(tool_calls=self._calls.result(), parts={} if plain else {"content": blocks})

    def _delta(self, value: Mapping[str, Any]) -> StreamChunk:
        delta = _mapping(value.get("delta"))
        kind = delta.get("type")
        at = self._block_of(value, str(kind))
        block = self._blocks[at]
        if kind == "text_delta":
            text = string(delta.get("text"))
            self._pieces.setdefault(at, []).append(text)
            self._text.append(text)
            return StreamChunk(text=text)
        if kind == "thinking_delta":
            thought = string(delta.get("thinking"))
            self._pieces.setdefault(at, []).append(thought)
            self._reasoning.append(thought)
            return StreamChunk(reasoning=thought)
        if kind == "input_json_delta":
            piece = delta.get("partial_json")
            piece = json.dumps(piece) if isinstance(piece, Mapping) else string(piece)
            self._pieces.setdefault(at, []).append(piece)
            if block.get("type") == "tool_use" and piece:
                return StreamChunk(tool_calls=self._piece(at, function={"arguments": piece}))
        elif kind == "signature_delta":
            block["signature"] = string(block.get("signature")) + string(delta.get("signature"))
        elif kind == "citations_delta":
            block["citations"] = [*(block.get("citations") or ()), delta.get("citation")]
        return NOTHING

    def _block_of(self, value: Mapping[str, Any], kind: str) -> int:
        """Return the block that a piece belongs to; some servers omit its start or its index."""
        at = self._by_index.get(_index(value, -1))
        if at is not None:
            return at
        if value.get("index") is None and self._blocks:
            return len(self._blocks) - 1
        begun = {"text_delta": "text", "thinking_delta": "thinking"}.get(kind)
        if begun is None:
            raise TypeError("a piece of a block that has not begun")
        self.begin({"type": begun})
        at = self._by_index[_index(value, len(self._blocks) - 1)] = len(self._blocks) - 1
        return at


# Blocks with only these fields match the common form and need not be kept separately.
_PLAIN: Final[Mapping[Any, set[str]]] = {
    "text": {"type", "text"},
    "tool_use": {"type", "id", "name", "input"},
}


def _mapping(value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError("a member of the answer is no object")
    return value


def _index(value: Mapping[str, Any], default: int) -> int:
    index = value.get("index")
    if index is None:
        return default
    if isinstance(index, bool) or not isinstance(index, int):
        raise TypeError("the index of a block is not a number")
    return index


def _object_or_text(given: Any) -> Any:
    """Return a tool's input as an object if possible; it should be one."""
    if isinstance(given, str):
        try:
            return json.loads(given or "{}")
        except (ValueError, RecursionError):
            return given
    return {} if given is None else given


def finish(reason: Any) -> str | None:
    """Return the common finish reason, or the provider's own."""
    if not reason:
        return None
    return _FINISH.get(reason, reason) if isinstance(reason, str) else string(reason)


def usage(prompt: Any, last: Any) -> Usage | None:
    """Return the usage; `input_tokens` excludes cached tokens in Anthropic's, not in ours.

    Args:
        prompt: the usage at the start of a stream, or of a whole response.
        last: the usage at the end, which has the output tokens, and the input tokens if they grew
            in between through a server tool.
    """
    if not (isinstance(prompt, Mapping) and prompt) and not (isinstance(last, Mapping) and last):
        return None
    both: dict[str, Any] = dict(prompt) if isinstance(prompt, Mapping) else {}
    if isinstance(last, Mapping):
        both |= {name: value for name, value in last.items() if value is not None}
    cached = counted(both.get("cache_read_input_tokens"))
    uncached = counted(both.get("input_tokens")) + counted(both.get("cache_creation_input_tokens"))
    return Usage(
        input_tokens=uncached + cached,
        output_tokens=counted(both.get("output_tokens")),
        cached_input_tokens=cached,
    )
