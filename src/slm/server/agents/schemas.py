"""The bodies of writes: strict, with the rules of docs/protocol.md section 1.

Separate from `slm.schemas`, because a backend writes nothing, and building these takes as long as
everything else of ours that it imports.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    StrictBool,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from slm.errors import InvalidRequest
from slm.schemas import (
    Agent,
    AgentId,
    ApiKey,
    Comment,
    Description,
    Endpoint,
    MaxTokens,
    Model,
    Name,
    Options,
    Provider,
    Temperature,
    TimeoutSeconds,
)


class _Written(BaseModel):
    """What a client sends: strict types, unknown fields refused, no input in any error."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        hide_input_in_errors=True,
        frozen=True,
        protected_namespaces=(),
    )


class AgentCreate(_Written):
    """The body of POST /api/agents (docs/protocol.md section 3)."""

    agent_id: AgentId
    name: Name
    description: Description | None = None
    llm_provider: Provider
    llm_endpoint: Endpoint | None = None
    llm_model: Model
    llm_api_key: ApiKey | None = None
    llm_timeout: TimeoutSeconds = 30
    llm_temperature: Temperature | None = None
    llm_max_tokens: MaxTokens | None = None
    llm_options: Options = Field(default_factory=dict)
    is_default: StrictBool = False
    is_active: StrictBool = True
    comment: Comment | None = None


VALUE_FIELDS: Final = tuple(
    name for name in AgentCreate.model_fields if name not in ("agent_id", "llm_api_key", "comment")
)
"""What a write can set, apart from the key and the comment."""

RESTORED_FIELDS: Final = tuple(name for name in VALUE_FIELDS if name != "is_default")
"""What a rollback restores. Not the key, which is not in the history, and not is_default, which
concerns the fleet rather than this agent."""

_STORED: Final = frozenset(RESTORED_FIELDS) - {"is_active"}
"""Fields with stored values that may break a rule: the table was adopted, or the rule is newer."""

_NOT_NULL: Final = tuple(
    name
    for name, field in AgentCreate.model_fields.items()
    if field.is_required() or field.get_default(call_default_factory=True) is not None
)


class AgentUpdate(_Written):
    """The body of PUT /api/agents/{agent_id}: fields not sent stay as they are.

    `model_fields_set` distinguishes a field sent as null from one that was not sent. A null clears
    a nullable field and is refused for any other (docs/protocol.md section 3).
    """

    # Fields that a rule refuses or changes, as they were sent, and the rules broken: a value equal
    # to the stored one is not checked again (docs/protocol.md section 3).
    _as_sent: dict[str, Any] = PrivateAttr(default_factory=dict)
    _broken: dict[str, list[dict[str, Any]]] = PrivateAttr(default_factory=dict)

    # Not checked against the pattern: a path's agent_id is taken literally, and this must equal it.
    agent_id: str | None = None
    name: Name | None = None
    description: Description | None = None
    llm_provider: Provider | None = None
    llm_endpoint: Endpoint | None = None
    llm_model: Model | None = None
    llm_api_key: ApiKey | None = None
    llm_timeout: TimeoutSeconds | None = None
    llm_temperature: Temperature | None = None
    llm_max_tokens: MaxTokens | None = None
    llm_options: Options | None = None
    is_default: StrictBool | None = None
    is_active: StrictBool | None = None
    comment: Comment | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _judge_later(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Defer the check of a value that a row may already contain until the row is known."""
        broken: dict[str, list[dict[str, Any]]] = {}
        try:
            update = handler(value)
        except ValidationError as error:
            for each in error.errors(include_url=False, include_input=False):
                rule = {
                    "loc": ["body", *each["loc"][:1]],
                    "msg": each["msg"].removeprefix("Value error, "),
                    "type": each["type"],
                }
                broken.setdefault(str(each["loc"][0]) if each["loc"] else "", []).append(rule)
            if not _STORED.issuperset(broken):
                raise
            update = handler({k: v for k, v in value.items() if k not in broken})
        if isinstance(value, dict):
            update._broken = broken
            update._as_sent = {
                name: value[name]
                for name in _STORED & value.keys()
                if name in broken or value[name] != getattr(update, name)
            }
        return update

    def judged_beside(self, stored: Agent) -> dict[str, Any]:
        """Return the fields to write to an agent with this stored state.

        Raises:
            InvalidRequest: a field breaks a rule and differs from what is stored.
        """
        same = {
            name
            for name, value in self._as_sent.items()
            if type(value) is type(getattr(stored, name)) and value == getattr(stored, name)
        }
        broken = [
            rule for name, rules in self._broken.items() if name not in same for rule in rules
        ]
        if broken:
            raise InvalidRequest(errors=broken)
        return {name: getattr(self, name) for name in self.model_fields_set - same}

    @field_validator(*_NOT_NULL, mode="before")
    @classmethod
    def _not_null(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("cannot be null")
        return value


class Rollback(_Written):
    """The body of POST /api/agents/{agent_id}/rollback.

    `to` is a revision of the database: the agent returns to its state at that revision. Without it,
    to its state before its last change.
    """

    to: Annotated[StrictInt, Field(ge=1, le=2**63 - 1)] | None = None
    comment: Comment | None = None
