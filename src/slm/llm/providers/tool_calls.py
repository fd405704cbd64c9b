"""Assigns the pieces of streamed tool calls to their calls: the right one, or an error.

Knows OpenAI's pieces and the variations of compatible servers. Also handles whole calls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from slm.llm.providers.base import ToolCall, ToolCallDelta

MAX_CALLS: Final = 1000
"""Per response; no model makes this many."""

_decoder: Final = json.JSONDecoder()


@dataclass(slots=True)
class _Call:
    index: int
    id: str = ""
    wire_id: str = ""
    name: str = ""
    parts: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> str:
        if len(self.parts) > 1:
            self.parts = ["".join(self.parts)]
        return self.parts[0] if self.parts else ""

    def is_whole(self) -> bool:
        # Called for each piece that repeats the name, so it must be cheap until the end.
        ends = bool(self.parts) and self.parts[-1].rstrip().endswith("}")
        return ends and _objects_in(self.arguments()) == 1


class ToolCalls:
    """The tool calls of one response, assembled from pieces.

    Some servers give every call index 0, some give none; some repeat a call's id in each piece,
    some send none at all. A new id starts a new call, a repeated one continues it. Without ids, a
    new name starts one, or the same name after complete arguments.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        self._by_wire_id: dict[str, _Call] = {}
        self._ids: set[str] = set()

    def __len__(self) -> int:
        return len(self._calls)

    def piece(self, piece: Mapping[str, Any]) -> ToolCallDelta | None:
        """Return the piece with the number of its call, or None if it is a repetition.

        Raises:
            TypeError: it belongs to no known call, or a field has the wrong type.
        """
        function = _mapping(piece.get("function"))
        index = _index(piece.get("index"))
        identity, name = _text(piece.get("id")), _text(function.get("name"))
        given = function.get("arguments")
        arguments = _arguments(given)
        call = self._named(index, identity, name, arguments) or self._continued(
            index, identity, name
        )
        if call is None:
            if not name and not identity:
                raise TypeError("a piece of a tool call belongs to none")
            call = self._begun()
        elif name and identity and call.is_whole() and call.arguments() == arguments:
            return None
        if index is not None:
            self._by_index[index] = call
        if given is not None and not isinstance(given, str) and call.parts:
            raise TypeError("a tool call has arguments twice")
        return self._added(call, identity, name, arguments, piece)

    def whole(self, piece: Mapping[str, Any]) -> ToolCallDelta:
        """Add a whole call, and return it as a piece."""
        function = _mapping(piece.get("function"))
        identity, name = _text(piece.get("id")), _text(function.get("name"))
        arguments = _arguments(function.get("arguments"))
        return self._added(self._begun(), identity, name, arguments, piece)

    def result(self) -> tuple[ToolCall, ...]:
        """Return the calls.

        Raises:
            TypeError: a call has no name, or the arguments of two calls were sent as one.
        """
        result = []
        for call in self._calls:
            if not call.name:
                raise TypeError("a tool call has no name")
            if _objects_in(call.arguments()) > 1:
                raise TypeError("a tool call has the arguments of more than one")
            if not call.id:
                call.id = self._free(f"call_{call.index}")
            result.append(
                ToolCall(id=call.id, name=call.name, arguments_json=call.arguments() or "{}")
            )
        return tuple(result)

    def extras(self) -> dict[str, dict[str, Any]]:
        """Return the provider's additional fields for each call, by the call's id."""
        return {call.id: call.extra for call in self._calls if call.extra}

    def _named(self, index: int | None, identity: str, name: str, arguments: str) -> _Call | None:
        """Return the call that already has this id, if the piece can belong to it."""
        known = self._by_wire_id.get(identity)
        if known is None:
            return None
        at_index = self._by_index.get(index) if index is not None else known
        if at_index is not None and at_index.wire_id == identity:
            known = at_index
        if not name:
            return known
        # Two calls with one id: start the second, and give it its own id.
        another = arguments and known.is_whole() and known.arguments() != arguments
        return None if at_index is not known or another else known

    def _continued(self, index: int | None, identity: str, name: str) -> _Call | None:
        """Return the call that the piece continues by position."""
        last = self._calls[-1] if self._calls else None
        found = self._by_index.get(index) if index is not None else last
        if found is None or (identity and found.id):
            return None
        if name and found.name and (name != found.name or found.is_whole()):
            return None
        return found

    def _begun(self) -> _Call:
        if len(self._calls) >= MAX_CALLS:
            raise TypeError("an answer has more tool calls than make sense")
        call = _Call(len(self._calls))
        self._calls.append(call)
        return call

    def _added(
        self, call: _Call, identity: str, name: str, arguments: str, piece: Mapping[str, Any]
    ) -> ToolCallDelta:
        new_id = ""
        if identity and not call.id:
            call.wire_id, call.id = identity, self._free(identity)
            self._by_wire_id[identity] = call
            new_id = call.id
        new_name = "" if call.name else name
        call.name = call.name or name
        if arguments:
            call.parts.append(arguments)
        call.extra |= extra_of(piece)
        return ToolCallDelta(index=call.index, id=new_id, name=new_name, arguments_json=arguments)

    def _free(self, wanted: str) -> str:
        number, found = 0, wanted
        while found in self._ids:
            number += 1
            found = f"{wanted}_{number}"
        self._ids.add(found)
        return found


def extra_of(piece: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call's fields beyond the common form, such as a signature."""
    known = ("id", "index", "type", "function")
    extra = {
        name: value for name, value in piece.items() if name not in known and value is not None
    }
    within = {
        name: value
        for name, value in _mapping(piece.get("function")).items()
        if name not in ("name", "arguments", "index") and value is not None
    }
    return extra | {"function": within} if within else extra


def _arguments(given: Any) -> str:
    if given is None or isinstance(given, str):
        return given or ""
    if not isinstance(given, Mapping):
        raise TypeError("the arguments of a tool call are no object")
    return json.dumps(given)


def _index(given: Any) -> int | None:
    if isinstance(given, str) and given.isascii() and given.isdecimal() and len(given) < 9:
        given = int(given)
    if given is not None and (isinstance(given, bool) or not isinstance(given, int)):
        raise TypeError("the index of a tool call is not a number")
    return given


def _text(given: Any) -> str:
    if given is None:
        return ""
    if isinstance(given, int) and not isinstance(given, bool):
        return str(given)
    if not isinstance(given, str):
        raise TypeError("a member of a tool call is not text")
    return given


def _mapping(given: Any) -> Mapping[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError("a tool call is no object")
    return given


def _objects_in(text: str) -> int:
    """Return how many consecutive JSON objects the text contains; 0 if anything else."""
    count, at = 0, 0
    if not text.rstrip().endswith("}"):
        return 0
    while True:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        if at == len(text):
            return count
        try:
            value, at = _decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return 0
        if not isinstance(value, dict):
            return 0
        count += 1
