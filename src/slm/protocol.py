"""The WebSocket messages of docs/protocol.md section 4 as tagged types, encoded and parsed.

Pure: no I/O, no clock. A reader ignores fields and message types that it does not know; a message
of a known type and the wrong shape is a `ProtocolError`, which never holds the message's text.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from slm.errors import NotJSON, ProtocolError
from slm.schemas import AgentConfig

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

CHANNEL: Final = "agent_config"
"""The only channel there is."""

MAX_FRAME_BYTES: Final = 64 * 1024
"""The largest message a client may send, acks apart."""

MAX_ACK_BYTES: Final = 1024 * 1024

MAX_REASON: Final = 1024
"""The most characters that say why something is not in force."""

Traceparent = Annotated[str, Field(max_length=128)]
"""The trace that a change was made in, where it is traced (W3C Trace Context)."""

Revision = Annotated[StrictInt, Field(ge=0, le=2**63 - 1)]

ChangeId = Annotated[str, Field(max_length=128)]
"""Tells the change of a revision from any other of that number, such as after a failover."""


class _Message(BaseModel):
    model_config = ConfigDict(
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        protected_namespaces=(),
        defer_build=True,  # when first used; it is a third of the import's time
    )


_M = TypeVar("_M", bound=_Message)


# --- client to server ---


class ClientInfo(_Message):
    """Who subscribes, as the fleet view shows it."""

    name: Annotated[str, Field(max_length=128)] | None = None
    instance: Annotated[str, Field(max_length=128)] | None = None
    version: Annotated[str, Field(max_length=64)] | None = None
    host: Annotated[str, Field(max_length=255)] | None = None
    pid: StrictInt | None = None


class Subscribe(_Message):
    """Ask for live changes; with `since`, its epoch and its id, for every change after it first."""

    subscribe: Literal["agent_config"]
    since: Revision | None = None
    epoch: Annotated[str, Field(max_length=128)] | None = None
    change_id: ChangeId | None = None
    client: ClientInfo | None = None


class NotInForce(_Message):
    """Why a revision that was received is not what the backend uses."""

    revision: Revision
    reason: Annotated[str, Field(max_length=MAX_REASON)]


class Ack(_Message):
    """Everything up to `ack` was received; the full state, each time."""

    ack: Revision
    not_in_force: dict[str, NotInForce] = Field(default_factory=dict)
    keys: dict[str, Revision | None] = Field(default_factory=dict)


class ExplainedStep(_Message):
    """What one step of the chain says; never a key, only where one came from.

    `answers`: whether this step gave the answer. `said`: in words, and why it was passed over.
    """

    step: Annotated[str, Field(max_length=32)]
    answers: StrictBool = False
    said: Annotated[str, Field(max_length=4096)]
    agent_id: str | None = None
    llm_provider: str | None = None
    llm_endpoint: str | None = None
    llm_model: str | None = None
    revision: int | None = None
    age_seconds: float | None = None
    stale: bool | None = None
    key: str | None = None


class Explanation(_Message):
    """How a client resolves an agent now: every step of the chain, and how it stands to its SLM.

    `answered_by` names the step, or is null where resolving raises `error`.
    """

    agent_id: str
    answered_by: str | None = None
    error: str | None = None
    status: str
    revision: Revision
    epoch: str | None = None
    last_error: str | None = None
    steps: list[ExplainedStep]


class Explained(_Message):
    """The answer to `Explain` of the same id."""

    explained: Annotated[str, Field(max_length=128)]
    report: Explanation


ClientMessage = Subscribe | Ack | Explained


# --- server to client ---


class Subscribed(_Message):
    """The first answer: what follows starts after `revision`; a heartbeat every `heartbeat` s.

    `head`: who has been told everything up to it is live.
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
    """An agent is gone, or left what the token may see."""

    type: Literal["agent_deleted"] = "agent_deleted"
    agent_id: str
    revision: Revision
    change_id: ChangeId | None = None
    traceparent: Traceparent | None = None


class Resync(_Message):
    """`since` cannot be resumed: take a snapshot at `revision` or later."""

    type: Literal["resync"] = "resync"
    revision: Revision
    epoch: str
    reason: str
    change_id: ChangeId | None = None


class Heartbeat(_Message):
    """The stream is alive and whole up to `revision`; `behind`: the database is out of sight."""

    type: Literal["heartbeat"] = "heartbeat"
    revision: Revision
    behind: StrictBool = False
    change_id: ChangeId | None = None


class Explain(_Message):
    """Say how you resolve this agent; a client that does not know the question ignores it."""

    type: Literal["explain"] = "explain"
    id: str
    agent_id: str


class Error(_Message):
    """The last message was not understood; the stream goes on."""

    type: Literal["error"] = "error"
    code: str
    detail: str


ServerMessage = Subscribed | AgentChanged | AgentDeleted | Resync | Heartbeat | Explain | Error


_LEFT_OUT: Final = ("change_id", "head", "traceparent")


def _is_none(message: _Message, name: str) -> bool:
    return getattr(message, name, ...) is None


def encode(message: ServerMessage | ClientMessage) -> str:
    """Return the message as one line of JSON; fields that are None and optional are left out."""
    if isinstance(message, Subscribe):
        return message.model_dump_json(exclude_none=True)
    if isinstance(message, Ack | Explained | Explain | Error):
        return message.model_dump_json()
    return message.model_dump_json(exclude={name for name in _LEFT_OUT if _is_none(message, name)})


def parse_server_message(text: str) -> ServerMessage | None:
    """Return what the server sent, or None for a type that this version does not know.

    Raises:
        NotJSON: it is not JSON.
        ProtocolError: it is not a JSON object with a `type`, or not of that type's shape.
    """
    try:
        return _any_server_message().validate_json(text)
    except ValidationError as error:
        first = _first(error)
        match first["type"]:
            case "union_tag_invalid" if isinstance(_json_object(text)["type"], str):
                return None  # of a later version
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
    from pydantic import TypeAdapter  # here: who imports slm need not wait for it

    return TypeAdapter(Annotated[ServerMessage, Field(discriminator="type")])


def parse_client_message(text: str) -> ClientMessage | None:
    """Return what a client sent, or None where it is nothing that this version knows.

    Raises:
        NotJSON: it is not JSON.
        ProtocolError: it is not a JSON object, or not of the contract's shape, or has a `since`
            without an epoch.
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
        return _validated(Explained, data)
    return None


def _json_object(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise NotJSON("a message is not JSON") from None
    if not isinstance(data, dict):
        raise ProtocolError("a message is not a JSON object")
    return data


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
