"""The SDK: everything a backend needs to follow an SLM. Knows nothing of the server."""

from slm.client.blocking import BlockingSLMClient
from slm.client.cache import AgentConfigCache
from slm.client.client import SLMClient
from slm.client.config import ResolvedConfig, SecretText, Step
from slm.client.hooks import OnChange
from slm.client.retry import ClientStatus
from slm.client.timings import Timings

__all__ = [
    "AgentConfigCache",
    "BlockingSLMClient",
    "ClientStatus",
    "OnChange",
    "ResolvedConfig",
    "SLMClient",
    "SecretText",
    "Step",
    "Timings",
]
