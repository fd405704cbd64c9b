"""A snapshot as the SDK receives it: the fields of the schemas, in a third of the memory.

A pydantic model carries two dicts of bookkeeping; ten thousand of them at once would enlarge a
backend's heap permanently. Values only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, SecretStr


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedAgent:
    """One row of GET /api/snapshot; see `LLMConfigWithKey`."""

    agent_id: str
    revision: int
    llm_provider: str
    llm_endpoint: str | None = None
    llm_model: str
    llm_timeout: int = 30
    llm_temperature: float | None = None
    llm_max_tokens: int | None = None
    llm_options: dict[str, Any] = field(default_factory=dict)
    is_default: bool = False
    is_active: bool = True
    has_api_key: bool = False
    api_key_revision: int | None = None
    llm_api_key: SecretStr | None = None
    key_error: str | None = None


class ReceivedSnapshot(BaseModel):
    """The response of GET /api/snapshot; see `Snapshot`."""

    model_config = ConfigDict(
        extra="ignore", hide_input_in_errors=True, frozen=True, defer_build=True
    )

    revision: int
    epoch: str
    change_id: str | None = None
    agents: list[ReceivedAgent]
