"""Calling language models with the config that the SLM has for an agent now.

Knows the client; knows nothing of the server. No provider SDK is imported before it is used.
"""

from slm.llm.interface import LLMInterface, LLMStream
from slm.llm.providers.base import StreamChunk, ToolCall, ToolCallDelta, Usage
from slm.llm.results import ChatResult, Overrides
from slm.llm.retry import RetrySettings
from slm.llm.transport import TransportSettings

__all__ = [
    "ChatResult",
    "LLMInterface",
    "LLMStream",
    "Overrides",
    "RetrySettings",
    "StreamChunk",
    "ToolCall",
    "ToolCallDelta",
    "TransportSettings",
    "Usage",
]
