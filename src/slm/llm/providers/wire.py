"""Decodes bytes from the wire: server-sent events, JSON lines, or a plain body.

A tolerant reader of what servers actually send, whatever they label it. Knows no provider.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

_FIELD: Final = re.compile(rb"(data|event|id|retry)?:|(data|event|id|retry)[\r\n]")
_FIELD_BEGUN: Final = re.compile(rb"(d(at?|ata)?|e(v|ve|ven|vent)?|id?|r(e|et|etr|etry)?)?\Z")
# Words that some servers send instead of a comment to keep a connection open.
_IDLE_WORDS: Final = frozenset({"", "null", "ping", "pong", "keepalive", "keep-alive", "heartbeat"})


class NotOfTheProtocol(ValueError):
    """The data does not follow the protocol; `text` is what arrived instead."""

    def __init__(self, text: str) -> None:
        super().__init__("the answer is not of the provider's protocol")
        self.text = text


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event of a stream: its name, if any, and its JSON object."""

    name: str
    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Body:
    """The response is not a stream but a single body: JSON, HTML or text."""

    data: bytes


class Done(enum.Enum):
    """`[DONE]`, with which many servers mark the end of a stream."""

    DONE = enum.auto()


class _Kind(enum.Enum):
    UNKNOWN = enum.auto()
    EVENTS = enum.auto()
    LINES = enum.auto()
    BODY = enum.auto()


class StreamReader:
    """Decodes the bytes of a response as they arrive.

    Args:
        content_type: the response's declared type; used only if the bytes are ambiguous.
        lines: whether the protocol uses one JSON object per line rather than server-sent events.
    """

    def __init__(self, content_type: str = "", *, lines: bool = False) -> None:
        self._lines = lines or "ndjson" in content_type or "jsonl" in content_type
        self._says_events = content_type == "text/event-stream"
        self._kind = _Kind.UNKNOWN
        # Lines that were already split are not scanned again: a line may be megabytes.
        self._line: list[bytes] = []
        self._after_cr = False
        self._name = ""
        self._data: list[bytes] = []
        self._begun = False

    def feed(self, data: bytes) -> Iterator[ServerSentEvent | Done]:
        """Yield what these bytes complete.

        Raises:
            NotOfTheProtocol: an event does not contain a JSON object.
        """
        if self._kind is _Kind.UNKNOWN:
            self._line.append(data)
            data = b"".join(self._line).lstrip(b"\xef\xbb\xbf \t\r\n")
            self._kind = self._kind_of(data)
            self._line.clear()
        if self._kind in (_Kind.UNKNOWN, _Kind.BODY):
            self._line.append(data)
        elif self._kind is _Kind.LINES:
            yield from self._fed_lines(data)
        else:
            yield from self._fed_events(data)

    def end(self) -> Iterator[ServerSentEvent | Done | Body]:
        """Yield what is left at the end of the data."""
        rest = b"".join(self._line)
        self._line.clear()
        if self._kind in (_Kind.EVENTS, _Kind.LINES):
            # The last event may lack its blank line; half an event only means the stream was cut
            # off.
            try:
                if self._kind is _Kind.LINES:
                    yield from _objects("", rest)
                else:
                    yield from [*self._taken(rest), *self._dispatched()]
            except NotOfTheProtocol:
                if not self._begun:
                    raise
        elif rest.strip():
            yield Body(rest)

    def _kind_of(self, data: bytes) -> _Kind:
        if not data:
            return _Kind.UNKNOWN
        if data[:1] in b"{[":
            return _Kind.LINES if self._lines else _Kind.BODY
        if data[:1] == b"<":
            return _Kind.BODY
        if self._says_events or _FIELD.match(data):
            return _Kind.EVENTS
        return _Kind.UNKNOWN if _FIELD_BEGUN.match(data[:8]) else _Kind.BODY

    def _fed_lines(self, data: bytes) -> Iterator[ServerSentEvent | Done]:
        # Only at "\n": U+2028 and U+0085 can occur inside JSON without ending a line.
        *whole, rest = data.split(b"\n")
        for line in whole:
            self._line.append(line)
            line = b"".join(self._line)
            self._line.clear()
            yield from self._noted(_objects("", line))
        self._line.append(rest)

    def _fed_events(self, data: bytes) -> Iterator[ServerSentEvent | Done]:
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
        self._after_cr = data.endswith(b"\r")
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *whole, rest = data.split(b"\n")
        for line in whole:
            if self._line:
                self._line.append(line)
                line = b"".join(self._line)
                self._line.clear()
            if line:
                yield from self._taken(line)
            else:
                yield from self._dispatched()
        if rest:
            self._line.append(rest)

    def _taken(self, line: bytes) -> Iterator[ServerSentEvent | Done]:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            # Some servers omit the blank line between events.
            yield from self._dispatched()
            self._name = value.decode("utf-8", "replace").strip()

    def _dispatched(self) -> Iterator[ServerSentEvent | Done]:
        name, parts = self._name, self._data
        self._name, self._data = "", []
        if len(parts) < 2:
            yield from self._noted(_objects(name, *parts))
            return
        # An event with several lines is one value; without blank lines, it may be several.
        try:
            found = list(_objects(name, b"\n".join(parts)))
        except NotOfTheProtocol:
            found = [each for part in parts for each in _objects(name, part)]
        yield from self._noted(found)

    def _noted(self, found: Iterable[ServerSentEvent | Done]) -> Iterator[ServerSentEvent | Done]:
        for each in found:
            self._begun = True
            yield each


def _objects(name: str, data: bytes = b"") -> Iterator[ServerSentEvent | Done]:
    if data[:5] == b"data:":
        data = data[5:]
    data = data.strip(b" \t\r\n")
    if not data:
        return
    if data == b"[DONE]":
        yield Done.DONE
        return
    try:
        value = json_of(data)
    except (ValueError, RecursionError):
        value = data.decode("utf-8", "replace")
        if value.lower() in _IDLE_WORDS:
            return
        if name != "error":
            raise NotOfTheProtocol(value[:2048]) from None
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, dict):
            yield ServerSentEvent(name, each)
        elif isinstance(each, str) and each.strip():
            yield ServerSentEvent("error", {"error": each})
        elif each is not None and each != "":
            raise NotOfTheProtocol(data[:2048].decode("utf-8", "replace"))


def json_of(data: bytes) -> Any:
    """Return the JSON value; an invalid UTF-8 byte costs one character, not the response.

    Raises:
        ValueError: it is not JSON.
        RecursionError: it is nested too deeply.
    """
    return json.loads(data.decode("utf-8", "replace"))
