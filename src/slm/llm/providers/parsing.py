"""The common base of response parsers: what has arrived so far, and how it ends.

Knows no protocol: each adapter says what an event or a whole response adds.
"""

from __future__ import annotations

from typing import Any, Final

from slm.llm.providers.base import Completion, End, StreamChunk, ToolCallDelta, Usage
from slm.llm.providers.tool_calls import ToolCalls
from slm.llm.providers.wire import ServerSentEvent

NOTHING: Final = StreamChunk()


class AnswerParser:
    """Reads the events of one stream, or one whole response.

    Attributes:
        finish_reason: None until the provider has said that it is done.
        done: whether the protocol's own end marker was seen; nothing comes after it.
    """

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.done = False
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls = ToolCalls()

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(self._reasoning)

    def take(self, event: ServerSentEvent) -> StreamChunk | None:
        """Return what the event adds to the response; None if it is only a sign of life."""
        raise NotImplementedError

    def end(self) -> StreamChunk | None:
        """Return the last piece, with its `end`; None if the stream was cut off."""
        raise NotImplementedError

    def ended(self) -> End:
        """Return what is only known at the end."""
        raise NotImplementedError

    def completion(self, usage: Usage | None) -> Completion:
        """Return the whole response that was read."""
        last = self.last()
        end = last.end or End()
        return Completion(
            text=self.text,
            reasoning=self.reasoning,
            tool_calls=end.tool_calls,
            finish_reason=self.finish_reason or "",
            usage=usage,
            parts=end.parts,
        )

    def last(self, pieces: tuple[ToolCallDelta, ...] = ()) -> StreamChunk:
        """Return the last piece, which says why the stream ends if the provider did not."""
        end = self.ended()
        reason = None
        if self.finish_reason is None:
            reason = self.finish_reason = "tool_calls" if end.tool_calls else "stop"
        return StreamChunk(tool_calls=pieces, finish_reason=reason, end=end)


def shown(chunk: StreamChunk) -> StreamChunk | None:
    """Return the piece, or None if it adds nothing."""
    return None if chunk == NOTHING else chunk


def string(value: Any) -> str:
    """Return a field of a response that must be text if it is present."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError("a member of the answer is not text")
    return value
