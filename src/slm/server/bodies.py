"""The bodies of what writes: strict, and the rules of docs/protocol.md section 1 apply.

Apart from `slm.schemas`, since a backend writes nothing and building these takes as long as all the
rest that it imports of ours.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, field_validator

from slm.schemas import (
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
    """What a client sends: strict types, unknown fields refused, the input never in an error."""

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
    llm_temperature: Temperature = 0.7
    llm_max_tokens: MaxTokens | None = None
    llm_options: Options = Field(default_factory=dict)
    is_default: StrictBool = False
    is_active: StrictBool = True
    comment: Comment | None = None


class AgentUpdate(_Written):
    """The body of PUT /api/agents/{agent_id}: fields not sent stay as they are.

    `model_fields_set` tells a field that was sent as null from one that was not sent. A null clears
    a nullable field and is refused for another (docs/protocol.md section 3).
    """

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

    @field_validator(
        "agent_id",
        "name",
        "llm_provider",
        "llm_model",
        "llm_timeout",
        "llm_temperature",
        "llm_options",
        "is_default",
        "is_active",
        mode="before",
    )
    @classmethod
    def _not_null(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("cannot be null")
        return value


class Rollback(_Written):
    """The body of POST /api/agents/{agent_id}/rollback.

    `to` is a revision of the database: the agent gets back what it was at that time. Without it,
    what it was before its last change.
    """

    to: Annotated[StrictInt, Field(ge=1, le=2**63 - 1)] | None = None
    comment: Comment | None = None
