"""What every provider adapter takes and gives: the request, and the answer in pieces or whole.

Knows no provider and nothing of agents; an adapter translates between these values and a protocol.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

from pydantic import SecretStr

from slm.llm.providers.failures import Failure, Unsupported
from slm.llm.transport import Connections

T = TypeVar("T")

PARTS: Final = "provider_parts"
"""The member of a message that holds what its provider wants back; see `Parts`."""

Message = Mapping[str, Any]
"""A message in the common form: `role`, `content`, and for tools `tool_calls`, `tool_call_id`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a tool that the model asks for.

    Attributes:
        id: what the tool's answer names as its `tool_call_id`.
        name: the tool's name.
        arguments_json: the arguments as the model wrote them; a model may write what is no JSON.
    """

    id: str
    name: str
    arguments_json: str

    def __post_init__(self) -> None:
        texts(self.id, self.name, self.arguments_json)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments as a dict.

        Raises:
            ValueError: the model wrote something that is not a JSON object.
        """
        parsed = json.loads(self.arguments_json or "{}")
        if not isinstance(parsed, dict):
            raise ValueError("the arguments of the tool call are not a JSON object")
        return parsed


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How many tokens a request took, as the provider counted.

    Attributes:
        input_tokens: all of the prompt's, cached ones included.
        output_tokens: what was generated, reasoning included.
        cached_input_tokens: how many of `input_tokens` came from the provider's cache.
    """

    input_tokens: int
    output_tokens: int
    cached_input_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Input and output together."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """A piece of a tool call; `index` says which of the answer's calls it belongs to."""

    index: int
    id: str = ""
    name: str = ""
    arguments_json: str = ""

    def __post_init__(self) -> None:
        texts(self.id, self.name, self.arguments_json)
        if not isinstance(self.index, int):
            raise TypeError("the index of a tool call is not a number")


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """What is known only when a stream is over.

    Attributes:
        tool_calls: whole.
        parts: what the provider wants back with the next request, in its own form.
        adjusted: what of the request the model refused, and was sent differently.
    """

    tool_calls: tuple[ToolCall, ...] = ()
    parts: Mapping[str, Any] = field(default_factory=dict)
    adjusted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamChunk:
    """A piece of a streamed answer; most hold a few characters of `text` and nothing else.

    Attributes:
        text: the next piece of the answer.
        reasoning: the next piece of what the model thinks, where the provider shows it.
        tool_calls: pieces of tool calls; whole ones are in the stream's `result`.
        finish_reason: set in the piece with which the provider says that it is done.
        usage: what the provider has counted so far, where this piece says so.
        end: set in the last piece, for `LLMStream.result`.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    end: End | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        texts(self.text, self.reasoning, self.finish_reason or "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer, before it is known which agent's config made it."""

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    usage: Usage | None
    parts: Mapping[str, Any] = field(default_factory=dict)
    adjusted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        texts(self.text, self.reasoning, self.finish_reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """One request, with everything that it needs.

    Attributes:
        endpoint: the base URL, checked.
        key: the API key, or None.
        max_tokens: None leaves it to the provider.
        temperature: None leaves it to the provider.
        tools: in OpenAI's form.
        tool_choice: `auto`, `none`, `required` or `{"type": "function", "function": {"name": …}}`.
        response_format: in OpenAI's form (`json_object` or `json_schema`).
        options: further members of the request's body, in the provider's own words.
    """

    endpoint: str
    key: SecretStr | None
    model: str
    messages: Sequence[Message]
    temperature: float | None
    max_tokens: int | None
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str | Mapping[str, Any] | None = None
    response_format: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def secret(self) -> str | None:
        """Return the key in plain text; never to be kept in a variable of a frame."""
        return self.key.get_secret_value() if self.key is not None else None


class Provider(Protocol):
    """What an adapter does. Its methods raise whatever comes; `explain` reads that."""

    def __init__(self, connections: Connections) -> None: ...

    async def chat(self, request: ChatRequest) -> Completion:
        """Return the whole answer."""

    def stream(self, request: ChatRequest) -> AsyncGenerator[StreamChunk, None]:
        """Yield the answer as it comes; each piece is progress, so pings are not yielded."""

    def secrets(self, endpoint: str) -> list[str]:
        """Return what else is sent to the endpoint that an error must not repeat."""

    def explain(self, error: Exception) -> Failure:
        """Say what an exception of the adapter's methods means."""


class Accumulator:
    """Puts the pieces of a stream together.

    Attributes:
        finish_reason: None until the provider said why it is done.
        started: whether anything came.
    """

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._usage: Usage | None = None
        self._end: End | None = None
        self.finish_reason: str | None = None
        self.started = False

    @property
    def ended(self) -> bool:
        """Whether the answer is whole."""
        return self._end is not None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._text)

    def add(self, chunk: StreamChunk) -> None:
        """Take the next piece."""
        self.started = True
        if chunk.text:
            self._text.append(chunk.text)
        if chunk.reasoning:
            self._reasoning.append(chunk.reasoning)
        self._usage = chunk.usage or self._usage
        self._end = chunk.end or self._end
        self.finish_reason = chunk.finish_reason or self.finish_reason

    def completion(self) -> Completion:
        """Return the whole, once `finish_reason` is set."""
        end = self._end or End()
        return Completion(
            text=self.text,
            reasoning="".join(self._reasoning),
            tool_calls=end.tool_calls,
            finish_reason=self.finish_reason or "",
            usage=self._usage,
            parts=end.parts,
            adjusted=end.adjusted,
        )


def translated(build: Callable[[ChatRequest], T], request: ChatRequest) -> T:
    """Return the request's body in the provider's words.

    Raises:
        Unsupported: the caller's messages or tools are not of the common form; told apart from an
            answer that is not of the provider's protocol, which raises the same errors.
    """
    try:
        return build(request)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        what = type(error).__name__
    raise Unsupported(f"the messages, tools or options are not of the common form ({what})")


def texts(*values: object) -> None:
    """Refuse what is not text where the protocol has text.

    Raises:
        TypeError: one of the values is not a string.
    """
    for value in values:
        if not isinstance(value, str):
            raise TypeError("a member of the answer is not text")


def counted(number: object) -> int:
    """Return a number of tokens as an integer, 0 for what is no such number."""
    if isinstance(number, str):
        number = int(number) if len(number) < 19 and number.isdecimal() else 0
    if not isinstance(number, int | float) or not 0 <= number < 2**63:
        return 0
    return int(number)


def text_of(content: Any) -> str:
    """Return the text of a message's content, a string or a list of parts."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = (part.get("text", "") for part in content if part.get("type") in (None, "text"))
    return "\n".join(part for part in parts if part)


def data_url(part: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return media type and base64 text of an `image_url` part that is a data URL, else None."""
    url = part["image_url"]["url"]
    head, comma, data = url.partition(",")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        return None
    return head[len("data:") : -len(";base64")], data


def arguments_of(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an assistant message's tool call as the dict that they stand for."""
    arguments = call["function"].get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, Mapping):
        raise Unsupported("the arguments of a tool call in the messages are not a JSON object")
    return dict(arguments)


def parts_of(message: Message, provider: str, place: str) -> Mapping[str, Any]:
    """Return what the message's own provider wants back, if it goes to that provider again.

    Signatures and reasoning mean nothing elsewhere; another server refuses them, or is told what
    was not meant for it.

    Args:
        message: an earlier turn.
        provider: where the request goes.
        place: the origin it goes to.
    """
    held = message.get(PARTS)
    if not isinstance(held, Mapping):
        return {}
    if held.get("provider") != provider or held.get("origin") != place:
        return {}
    parts = held.get("parts")
    return parts if isinstance(parts, Mapping) else {}
