"""The WebSocket messages of docs/protocol.md section 4 as tagged types, encoded and parsed.

Pure: no I/O, no clock. Readers ignore unknown fields and message types; a message of a known type
with the wrong shape is a `ProtocolError`, which never includes the message's text.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
    ValidationError,
)

from slm.errors import NotJSON, ProtocolError, UnclearAnswer
from slm.schemas import WITHOUT_NUL, AgentConfig

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

CHANNEL: Final = "agent_config"
"""The only channel."""

MAX_FRAME_BYTES: Final = 64 * 1024
"""The maximum size of a client's message, except acks."""

MAX_ACK_BYTES: Final = 1024 * 1024

MAX_REASON: Final = 1024
"""The maximum length of a reason why something is not in use."""

MAX_NAMED: Final = 10_000
"""The maximum number of agents that an ack may report as not in use."""

MAX_STEPS: Final = 64
"""The maximum number of steps in an explanation."""

Traceparent = Annotated[str, Field(max_length=128)]
"""The trace in which a change was made, if it was traced (W3C Trace Context)."""

Revision = Annotated[StrictInt, Field(ge=0, le=2**63 - 1)]

# A client's texts are stored, shown and passed on, so each of them, including dict keys, is one of
# these. The pattern rejects NUL; with any constraint, pydantic also rejects lone surrogates.
Name = Annotated[str, Field(max_length=128, pattern=WITHOUT_NUL)]
ShortText = Annotated[str, Field(max_length=255, pattern=WITHOUT_NUL)]
Reason = Annotated[str, Field(max_length=MAX_REASON, pattern=WITHOUT_NUL)]
Text = Annotated[str, Field(max_length=4096, pattern=WITHOUT_NUL)]
Integer = Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1)]

ChangeId = Annotated[str, Field(max_length=128, pattern=WITHOUT_NUL)]
"""Distinguishes a revision's change from another with the same number, as after a failover."""


class _Message(BaseModel):
    model_config = ConfigDict(
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        protected_namespaces=(),
        defer_build=True,  # when first used; it is a third of the import's time
    )


_M = TypeVar("_M", bound=_Message)


def _few(named: Any) -> Any:
    """Reject more names than an ack may have, before checking each of them."""
    if isinstance(named, dict) and len(named) > MAX_NAMED:
        raise ValueError("names too many agents")
    return named


# --- client to server ---


class ClientInfo(_Message):
    """The subscribing client, as shown in the fleet view."""

    name: Name | None = None
    instance: Name | None = None
    version: Annotated[str, Field(max_length=64, pattern=WITHOUT_NUL)] | None = None
    host: ShortText | None = None
    pid: Integer | None = None
    plain_http: bool | None = None


class Subscribe(_Message):
    """Request live changes; with `since`, its epoch and id, first every change after it."""

    subscribe: Literal["agent_config"]
    since: Revision | None = None
    epoch: Name | None = None
    change_id: ChangeId | None = None
    client: ClientInfo | None = None


class NotInForce(_Message):
    """Why the backend does not use a revision that it received."""

    revision: Revision
    reason: Reason


class Ack(_Message):
    """Everything up to `ack` was received; the full state each time."""

    ack: Revision
    not_in_force: Annotated[dict[Text, NotInForce], BeforeValidator(_few)] = Field(
        default_factory=dict
    )
    keys: dict[Text, Revision | None] = Field(default_factory=dict)


class ExplainedStep(_Message):
    """The result of one step of the chain; never a key, only its source.

    `answers`: whether this step was used. `said`: its result in words, including why it was
    skipped.
    """

    step: Annotated[str, Field(max_length=32, pattern=WITHOUT_NUL)]
    answers: StrictBool = False
    said: Text
    agent_id: Text | None = None
    llm_provider: Text | None = None
    llm_endpoint: Text | None = None
    llm_model: Text | None = None
    revision: Integer | None = None
    age_seconds: FiniteFloat | None = None
    stale: bool | None = None
    key: Text | None = None


class Explanation(_Message):
    """How a client resolves an agent now: every step of the chain, and the client's status.

    `answered_by` names the step used, or is null if resolving raises `error`.
    """

    agent_id: Text
    answered_by: Text | None = None
    error: Text | None = None
    status: Text
    revision: Revision
    epoch: Text | None = None
    last_error: Text | None = None
    steps: Annotated[list[ExplainedStep], Field(max_length=MAX_STEPS)]


class Explained(_Message):
    """The answer to the `Explain` with the same id."""

    explained: Name
    report: Explanation


ClientMessage = Subscribe | Ack | Explained


# --- server to client ---


class Subscribed(_Message):
    """The first answer: the stream starts after `revision`, with a heartbeat every `heartbeat` s.

    `head`: a client that has received everything up to it is live.
    """

    type: Literal["subscribed"] = "subscribed"
    channel: Literal["agent_config"] = "agent_config"
    revision: Revision
    epoch: str
    heartbeat: float
    head: Revision | None = None
    change_id: ChangeId | None = None


class AgentChanged(_Message):
    """An agent was created or changed; `config` is its whole configuration without the key."""

    type: Literal["agent_config_changed", "agent_created"]
    agent_id: str
    revision: Revision
    change_id: ChangeId | None = None
    config: AgentConfig
    traceparent: Traceparent | None = None


class AgentDeleted(_Message):
    """An agent was deleted, or is no longer visible to the token."""

    type: Literal["agent_deleted"] = "agent_deleted"
    agent_id: str
    revision: Revision
    change_id: ChangeId | None = None
    traceparent: Traceparent | None = None


class Resync(_Message):
    """`since` cannot be resumed: fetch a snapshot at `revision` or later."""

    type: Literal["resync"] = "resync"
    revision: Revision
    epoch: str
    reason: str
    change_id: ChangeId | None = None


class Heartbeat(_Message):
    """The stream is alive and complete up to `revision`; `behind`: the database is unreachable."""

    type: Literal["heartbeat"] = "heartbeat"
    revision: Revision
    behind: StrictBool = False
    change_id: ChangeId | None = None


class Explain(_Message):
    """Explain how you resolve this agent; clients that don't know the question ignore it."""

    type: Literal["explain"] = "explain"
    id: str
    agent_id: str


class Error(_Message):
    """The last message was not understood; the stream continues."""

    type: Literal["error"] = "error"
    code: str
    detail: str


ServerMessage = Subscribed | AgentChanged | AgentDeleted | Resync | Heartbeat | Explain | Error


_LEFT_OUT: Final = ("change_id", "head", "traceparent")


def _is_none(message: _Message, name: str) -> bool:
    return getattr(message, name, ...) is None


def storable(text: str, limit: int = 4096) -> str:
    """Return a text that a message may contain: shortened, with unstorable characters replaced."""
    return text[:limit].encode(errors="replace").decode().replace("\x00", "\ufffd")


def encode(message: ServerMessage | ClientMessage) -> str:
    """Return the message as one line of JSON, without optional fields that are None."""
    if isinstance(message, Subscribe):
        return message.model_dump_json(exclude_none=True)
    if isinstance(message, Ack | Explained | Explain | Error):
        return message.model_dump_json()
    return message.model_dump_json(exclude={name for name in _LEFT_OUT if _is_none(message, name)})


def parse_server_message(text: str) -> ServerMessage | None:
    """Return the server's message, or None for a type that this version does not know.

    Raises:
        NotJSON: it is not JSON.
        ProtocolError: it is not a JSON object with a `type`, or has the wrong shape for its type.
    """
    try:
        return _any_server_message().validate_json(text)
    except ValidationError as error:
        first = _first(error)
        match first["type"]:
            case "union_tag_invalid" if isinstance(_json_object(text)["type"], str):
                return None  # from a later version
            case "json_invalid":
                raise NotJSON("a message is not JSON") from None
            case "union_tag_invalid" | "union_tag_not_found":
                raise ProtocolError("a message of the server has no type") from None
            case "dict_type" if not first["loc"]:
                raise ProtocolError("a message is not a JSON object") from None
        kind, *where = first["loc"] or ("server's",)
        raise _misshapen(kind, where) from None


@functools.cache
def _any_server_message() -> TypeAdapter[ServerMessage]:
    from pydantic import TypeAdapter  # here, so that importing slm is fast

    return TypeAdapter(Annotated[ServerMessage, Field(discriminator="type")])


def parse_client_message(text: str) -> ClientMessage | None:
    """Return the client's message, or None if this version does not know its type.

    Raises:
        NotJSON: it is not JSON.
        ProtocolError: it is not a JSON object, violates the protocol, has a `since` without an
            epoch, or contains what cannot be stored: NUL, a lone surrogate, a number beyond 64 bits
            or a non-finite one.
        UnclearAnswer: the same, for an answer to `Explain`.
    """
    data = _json_object(text)
    if "subscribe" in data:
        message = _validated(Subscribe, data)
        if message.since is not None and message.epoch is None:
            raise ProtocolError("since needs the epoch that it belongs to")
        return message
    if "ack" in data:
        return _validated(Ack, data)
    if "explained" in data:
        return _explained(data)
    return None


def _explained(data: dict[str, Any]) -> Explained:
    try:
        return Explained.model_validate(data)
    except ValidationError as error:
        # Only field names and step numbers: nothing here contains a name chosen by a client.
        place = ".".join(map(str, _first(error)["loc"]))
        question = data["explained"] if isinstance(data["explained"], str) else None
        text = f"a message of type Explained is not of the contract's shape at {place}"
        raise UnclearAnswer(text, question) from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise NotJSON("a message is not JSON") from None
    except ValueError:
        # A number has more digits than Python converts; the rest may still not be JSON.
        if not _is_json(text):
            raise NotJSON("a message is not JSON") from None
        raise ProtocolError("a number in a message is too long") from None
    if not isinstance(data, dict):
        raise ProtocolError("a message is not a JSON object")
    return data


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_int=len)
    except (ValueError, RecursionError):
        return False
    return True


def _validated(model: type[_M], data: dict[str, Any]) -> _M:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _misshapen(model.__name__, _first(error)["loc"]) from None


def _misshapen(kind: object, where: Sequence[object]) -> ProtocolError:
    place = where[0] if where else "its top"
    return ProtocolError(f"a message of type {kind} is not of the contract's shape at {place}")


def _first(error: ValidationError) -> ErrorDetails:
    return error.errors(include_url=False, include_input=False)[0]
