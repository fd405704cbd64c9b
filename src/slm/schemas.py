"""The types of the REST API: each field, and agents as read, with and without their key.

Rules apply on write (`slm.server.agents.schemas`; docs/protocol.md 1 and 3). Reads (`Agent`,
`LLMConfig`, …) return what is stored, since a database created by others may break those rules; so
the reading models only check types and ignore unknown fields.
"""

from __future__ import annotations

import json
import re
import unicodedata
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    StrictInt,
)

from slm.endpoints import refused_endpoint

AGENT_ID_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,63}$"
WITHOUT_NUL: Final = r"^[^\x00]*$"
MAX_OPTIONS_BYTES: Final = 16 * 1024
MAX_OPTIONS_DEPTH: Final = 32
MAX_KEY_LENGTH: Final = 4096
_CONTROLS: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
_TURNS: Final = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
_AGENT_ID: Final = re.compile(AGENT_ID_PATTERN.strip("^$"))
_KEY: Final = re.compile(r"[\x21-\x7e]+")
# As written in a .env file. Base64 has "=" only at its end.
_ASSIGNED: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^=]")
# Spaces of every width, the tab, and two invisible characters; no line break.
_BLANK: Final = r"[\t \u00a0\u1680\u2000-\u200b\u202f\u205f\u3000\ufeff]+"
_AROUND: Final = re.compile(rf"\A{_BLANK}|{_BLANK}\Z")
_QUOTES: Final = "\"'`\u2018\u2019\u201c\u201d"

Provider = Literal["ollama", "openai", "anthropic"]


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds a control character or one that cannot be printed")
    return text


def _without_controls(text: str) -> str:
    """Reject control characters and line breaks; other scripts need joiners and wide spaces.

    Of the format characters, only those that change the text direction are rejected.
    """
    for char in text:
        if unicodedata.category(char) in _CONTROLS or unicodedata.bidirectional(char) in _TURNS:
            raise ValueError("holds a control character")
    return text


def check_storable(text: str) -> str:
    """Reject what a database or a UTF-8 encoder cannot store: NUL and lone surrogates."""
    if "\x00" in text:
        raise ValueError("holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate") from None
    return text


def _allowed_endpoint(url: str) -> str:
    reason = refused_endpoint(url)
    if reason is not None:
        raise ValueError(reason)
    return url


def _depth(value: Any) -> int:
    deepest = 0
    pending = [(value, 1)]
    while pending:
        item, level = pending.pop()
        deepest = max(deepest, level)
        if isinstance(item, dict):
            pending.extend((child, level + 1) for child in item.values())
        elif isinstance(item, list):
            pending.extend((child, level + 1) for child in item)
    return deepest


def _bounded_options(options: dict[str, Any]) -> dict[str, Any]:
    if _depth(options) > MAX_OPTIONS_DEPTH:
        raise ValueError(f"is nested deeper than {MAX_OPTIONS_DEPTH} levels")
    try:
        text = json.dumps(options, ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except (ValueError, UnicodeEncodeError):
        raise ValueError("holds a number or a character that JSON cannot carry") from None
    if "\\u0000" in text:
        raise ValueError("holds a NUL character")
    if size > MAX_OPTIONS_BYTES:
        raise ValueError(f"is larger than {MAX_OPTIONS_BYTES} bytes as JSON")
    return options


def _usable_key(key: SecretStr) -> SecretStr:
    text = key.get_secret_value()
    if len(text) > MAX_KEY_LENGTH:
        raise ValueError(f"is longer than {MAX_KEY_LENGTH} characters")
    if not text:
        raise ValueError("is empty; null stands for no key")
    if text[0] in _QUOTES or text[-1] in _QUOTES:
        raise ValueError("is in quotes; send what is between them")
    if any(char.isspace() for char in text):
        raise ValueError(
            "holds blanks or a line break; send the key alone, without a word before it"
        )
    if not _KEY.fullmatch(text):
        raise ValueError("holds a character that no key has: it must be printable ASCII")
    if _ASSIGNED.match(text):
        raise ValueError("has a name and an equals sign before it; send only what follows them")
    return key


def _agent_id(text: str) -> str:
    if not _AGENT_ID.fullmatch(text):
        raise ValueError(
            "must be 1 to 64 characters: lower-case letters, digits, dots, underscores and hyphens,"
            " beginning with a letter or digit"
        )
    return text


def _trimmed(value: Any) -> Any:
    """Strip blanks that come from pasting; line breaks are rejected later."""
    return _AROUND.sub("", value) if isinstance(value, str) else value


def _strict_secret(value: Any) -> Any:
    if not isinstance(value, str | SecretStr):
        raise ValueError("must be a string")
    return value


AgentId = Annotated[
    str, AfterValidator(_agent_id), Field(json_schema_extra={"pattern": AGENT_ID_PATTERN})
]
_Trimmed = BeforeValidator(_trimmed, json_schema_input_type=str)
_SOME_TEXT: Final[dict[str, Any]] = {"pattern": r"\S"}
Name = Annotated[
    str,
    _Trimmed,
    Field(min_length=1, max_length=128, json_schema_extra=_SOME_TEXT),
    AfterValidator(_without_controls),
]
Description = Annotated[str, Field(max_length=16_384), AfterValidator(check_storable)]
Endpoint = Annotated[str, _Trimmed, Field(max_length=256), AfterValidator(_allowed_endpoint)]
Model = Annotated[
    str,
    _Trimmed,
    Field(min_length=1, max_length=256, json_schema_extra=_SOME_TEXT),
    AfterValidator(_printable),
]
ApiKey = Annotated[SecretStr, BeforeValidator(_strict_secret), AfterValidator(_usable_key)]
TimeoutSeconds = Annotated[StrictInt, Field(ge=1, le=3600)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False, strict=True)]
MaxTokens = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]
Options = Annotated[dict[str, Any], AfterValidator(_bounded_options)]
Comment = Annotated[
    str,
    Field(min_length=1, max_length=1024, json_schema_extra={"pattern": WITHOUT_NUL}),
    AfterValidator(check_storable),
]


class _Read(BaseModel):
    """A server response: checks types but no rules, and ignores unknown fields."""

    model_config = ConfigDict(
        extra="ignore",
        hide_input_in_errors=True,
        frozen=True,
        protected_namespaces=(),
        # Built on first use: a backend that imports this uses few of them.
        defer_build=True,
    )


class AgentConfig(_Read):
    """The configuration in a change frame: the llm_* fields without the key, and flags.

    `api_key_revision` is the revision at which the key was last set, null without a key; a client
    that holds a key of a different revision fetches the new one over HTTPS.
    """

    llm_provider: str
    llm_endpoint: str | None = None
    llm_model: str
    llm_timeout: int = 30
    llm_temperature: float | None = None
    llm_max_tokens: int | None = None
    llm_options: dict[str, Any] = Field(default_factory=dict)
    is_default: bool = False
    is_active: bool = True
    has_api_key: bool = False
    api_key_revision: int | None = None


class LLMConfig(AgentConfig):
    """An agent's configuration with its name and revision, still without the key."""

    agent_id: str
    revision: int


class LLMConfigWithKey(LLMConfig):
    """The response of GET /api/agents/{agent_id}/llm, and a row of GET /api/snapshot.

    `key_error` is `undecryptable` if there is a key that cannot be decrypted or that belongs to a
    different origin; `llm_api_key` is then null, which is not the same as "no key".
    """

    llm_api_key: SecretStr | None = None
    key_error: str | None = None

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON object with the key in plain text; only for responses with keys."""
        data = self.model_dump(mode="json", exclude={"llm_api_key", "key_error"})
        data["llm_api_key"] = self.llm_api_key and self.llm_api_key.get_secret_value()
        if self.key_error is not None:
            data["key_error"] = self.key_error
        return data


class Agent(LLMConfig):
    """An agent as returned by every plain read: all columns except the key (docs/protocol.md 3)."""

    id: int
    name: str
    description: str | None = None
    created_at: datetime
    updated_at: datetime


class AgentList(_Read):
    """The response of GET /api/agents."""

    agents: list[Agent]
    total: int
    revision: int
    epoch: str


class Snapshot(_Read):
    """The response of GET /api/snapshot: all that a backend needs to start, at one revision.

    `change_id` distinguishes that revision's change from another with the same number.
    """

    revision: int
    epoch: str
    change_id: str | None = None
    agents: list[LLMConfigWithKey]


class Change(_Read):
    """One row of the history: the agent after a change, who made it, when and why.

    `agent` is the whole agent without its key; for a delete, its last state.
    """

    revision: int
    type: str
    agent_id: str
    agent: Agent
    was_default: bool
    actor: str
    comment: str | None = None
    created_at: datetime


class ChangeList(_Read):
    """The response of GET /api/changes and GET /api/agents/{agent_id}/history.

    `floor` is the revision up to which changes may have been compacted away. `next` is where the
    next page starts, as `since`, or as `upto` in a list with the newest first; None at the end.
    """

    changes: list[Change]
    floor: int
    revision: int
    epoch: str
    next: int | None = None
