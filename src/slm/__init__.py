"""Live LLM configuration for every agent a company runs: only the public names.

Each name is loaded on first use, so that `import slm` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slm.client.blocking import BlockingSLMClient
    from slm.client.cache.cache import AgentConfigCache
    from slm.client.client import SLMClient
    from slm.client.config import ResolvedConfig, SecretText, Step
    from slm.client.lifespan import lifespan
    from slm.client.status import ClientStatus
    from slm.client.timings import Timings
    from slm.errors import (
        AgentKeyUnavailable,
        AgentUnknown,
        ConfigurationError,
        LLMAuthError,
        LLMBadRequest,
        LLMBadResponse,
        LLMEndpointRefused,
        LLMError,
        LLMProviderMissing,
        LLMQuotaExhausted,
        LLMRateLimited,
        LLMStreamBroken,
        LLMTimeout,
        LLMUnavailable,
        SLMError,
        SLMUnavailable,
    )
    from slm.llm.interface import LLMInterface
    from slm.llm.results import ChatResult
    from slm.llm.transport import TransportSettings

__version__ = "0.1.0"

_HOMES = {
    "AgentConfigCache": "slm.client.cache.cache",
    "BlockingSLMClient": "slm.client.blocking",
    "ChatResult": "slm.llm.results",
    "ClientStatus": "slm.client.status",
    "LLMInterface": "slm.llm.interface",
    "ResolvedConfig": "slm.client.config",
    "SLMClient": "slm.client.client",
    "SecretText": "slm.client.config",
    "Step": "slm.client.config",
    "Timings": "slm.client.timings",
    "TransportSettings": "slm.llm.transport",
    "lifespan": "slm.client.lifespan",
}

__all__ = [
    "AgentConfigCache",
    "AgentKeyUnavailable",
    "AgentUnknown",
    "BlockingSLMClient",
    "ChatResult",
    "ClientStatus",
    "ConfigurationError",
    "LLMAuthError",
    "LLMBadRequest",
    "LLMBadResponse",
    "LLMEndpointRefused",
    "LLMError",
    "LLMInterface",
    "LLMProviderMissing",
    "LLMQuotaExhausted",
    "LLMRateLimited",
    "LLMStreamBroken",
    "LLMTimeout",
    "LLMUnavailable",
    "ResolvedConfig",
    "SLMClient",
    "SLMError",
    "SLMUnavailable",
    "SecretText",
    "Step",
    "Timings",
    "TransportSettings",
    "lifespan",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'slm' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES.get(name, "slm.errors")), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
