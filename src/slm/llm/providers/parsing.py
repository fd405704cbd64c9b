"""What every reader of an answer shares: what has come so far, and how it ends.

Knows no protocol: each adapter says what an event or a whole answer adds.
"""

from __future__ import annotations

from typing import Any, Final

from slm.llm.providers.base import Completion, End, StreamChunk, ToolCallDelta, Usage
from slm.llm.providers.tool_calls import ToolCalls
from slm.llm.providers.wire import ServerSentEvent

NOTHING: Final = StreamChunk()


class AnswerParser:
    """Reads the events of one stream, or one whole answer.

    Attributes:
        finish_reason: None until the provider said that it is done.
        done: whether the protocol's own end mark was seen; nothing comes after it.
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
        """Return what the event adds to the answer, None where it only says that it is there."""
        raise NotImplementedError

    def end(self) -> StreamChunk | None:
        """Return the last piece, with its `end`; None where the stream was cut."""
        raise NotImplementedError

    def ended(self) -> End:
        """Return what is known only at the end."""
        raise NotImplementedError

    def completion(self, usage: Usage | None) -> Completion:
        """Return the whole answer that was read."""
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
        """Return the last piece, which says why it ends where the provider did not."""
        end = self.ended()
        reason = None
        if self.finish_reason is None:
            reason = self.finish_reason = "tool_calls" if end.tool_calls else "stop"
        return StreamChunk(tool_calls=pieces, finish_reason=reason, end=end)


def shown(chunk: StreamChunk) -> StreamChunk | None:
    """Return the piece, or None where it adds nothing."""
    return None if chunk == NOTHING else chunk


def string(value: Any) -> str:
    """Return a member of an answer that has to be text, where it is there."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError("a member of the answer is not text")
    return value
