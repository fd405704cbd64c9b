"""The interface of provider adapters: the request, and the response in pieces or whole.

Knows no provider and nothing about agents; an adapter translates between these values and a
protocol.
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
"""The field of a message that holds what its provider needs back; see `Parts`."""

Message = Mapping[str, Any]
"""A message in the common form: `role`, `content`, and for tools `tool_calls`, `tool_call_id`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A tool call requested by the model.

    Attributes:
        id: the tool's result refers to it as `tool_call_id`.
        name: the tool's name.
        arguments_json: the arguments as written by the model, which may not be valid JSON.
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
    """The number of tokens a request used, as counted by the provider.

    Attributes:
        input_tokens: all tokens of the prompt, including cached ones.
        output_tokens: the generated tokens, including reasoning.
        cached_input_tokens: how many of `input_tokens` came from the provider's cache.
    """

    input_tokens: int
    output_tokens: int
    cached_input_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Input and output tokens together."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """A piece of a tool call; `index` is the call's position in the response."""

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
    """What is only known once a stream has ended.

    Attributes:
        tool_calls: the complete calls.
        parts: what the provider needs back with the next request, in its own format.
        adjusted: the parameters that the model refused and that were changed.
    """

    tool_calls: tuple[ToolCall, ...] = ()
    parts: Mapping[str, Any] = field(default_factory=dict)
    adjusted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamChunk:
    """A piece of a streamed response; most hold a few characters of `text` and nothing else.

    Attributes:
        text: the next piece of the response.
        reasoning: the next piece of the model's reasoning, if the provider shows it.
        tool_calls: pieces of tool calls; the complete ones are in the stream's `result`.
        finish_reason: set in the piece in which the provider says that it is done.
        usage: the tokens counted so far, if this piece contains them.
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
    """A whole response, before it is combined with the agent's config."""

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
    """A request with everything it needs.

    Attributes:
        endpoint: the base URL, checked.
        key: the API key, or None.
        max_tokens: None for the provider's default.
        temperature: None for the provider's default.
        tools: in OpenAI's format.
        tool_choice: `auto`, `none`, `required` or `{"type": "function", "function": {"name": …}}`.
        response_format: in OpenAI's format (`json_object` or `json_schema`).
        options: further fields of the request body, in the provider's own terms.
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
        """Return the key in plain text; never keep it in a frame's variable."""
        return self.key.get_secret_value() if self.key is not None else None


class Provider(Protocol):
    """The interface of an adapter. Its methods raise any exception; `explain` interprets it."""

    def __init__(self, connections: Connections) -> None: ...

    async def chat(self, request: ChatRequest) -> Completion:
        """Return the whole response."""

    def stream(self, request: ChatRequest) -> AsyncGenerator[StreamChunk, None]:
        """Yield the response as it arrives; each piece is progress, so pings are not yielded."""

    def secrets(self, endpoint: str) -> list[str]:
        """Return other secrets sent to the endpoint, which an error must not repeat."""

    def explain(self, error: Exception) -> Failure:
        """Return the meaning of an exception from the adapter's methods."""


class Accumulator:
    """Assembles the pieces of a stream.

    Attributes:
        finish_reason: None until the provider has said why it is done.
        started: whether anything arrived.
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
        """Whether the response is complete."""
        return self._end is not None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._text)

    def add(self, chunk: StreamChunk) -> None:
        """Add the next piece."""
        self.started = True
        if chunk.text:
            self._text.append(chunk.text)
        if chunk.reasoning:
            self._reasoning.append(chunk.reasoning)
        self._usage = chunk.usage or self._usage
        self._end = chunk.end or self._end
        self.finish_reason = chunk.finish_reason or self.finish_reason

    def completion(self) -> Completion:
        """Return the whole response, once `finish_reason` is set."""
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
    """Return the request's body in the provider's format.

    Raises:
        Unsupported: the caller's messages or tools are not in the common form. Distinguishes this
            from an invalid response, which raises the same built-in errors.
    """
    try:
        return build(request)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        what = type(error).__name__
    raise Unsupported(f"the messages, tools or options are not of the common form ({what})")


def texts(*values: object) -> None:
    """Check that values are text where the protocol requires it.

    Raises:
        TypeError: one of the values is not a string.
    """
    for value in values:
        if not isinstance(value, str):
            raise TypeError("a member of the answer is not text")


def counted(number: object) -> int:
    """Return a token count as an integer; 0 for an invalid one."""
    if isinstance(number, str):
        number = int(number) if len(number) < 19 and number.isdecimal() else 0
    if not isinstance(number, int | float) or not 0 <= number < 2**63:
        return 0
    return int(number)


def text_of(content: Any) -> str:
    """Return the text of a message's content, which is a string or a list of parts."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = (part.get("text", "") for part in content if part.get("type") in (None, "text"))
    return "\n".join(part for part in parts if part)


def data_url(part: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return media type and base64 data of an `image_url` part with a data URL, or None."""
    url = part["image_url"]["url"]
    head, comma, data = url.partition(",")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        return None
    return head[len("data:") : -len(";base64")], data


def arguments_of(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an assistant message's tool call as a dict."""
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
    """Return what the message's own provider needs back, if the request goes to that provider.

    Signatures and reasoning are meaningless elsewhere; another server would reject them, or see
    data that was not meant for it.

    Args:
        message: an earlier turn.
        provider: the provider the request goes to.
        place: the origin it goes to.
    """
    held = message.get(PARTS)
    if not isinstance(held, Mapping):
        return {}
    if held.get("provider") != provider or held.get("origin") != place:
        return {}
    parts = held.get("parts")
    return parts if isinstance(parts, Mapping) else {}
