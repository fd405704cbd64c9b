"""Detects before the first call that a config cannot work: unknown provider, forbidden URL.

`LLMInterface` registers it with the client, which then keeps the last good config and informs the
SLM. Knows no provider's protocol.
"""

from __future__ import annotations

import functools
from typing import Final

from slm.client.config import ResolvedConfig
from slm.client.runtime.callbacks import InlineValidator
from slm.endpoints import EndpointPolicy, effective_endpoint, refused_endpoint

PROVIDERS: Final = {
    "ollama": ("slm.llm.providers.ollama", "OllamaProvider"),
    "openai": ("slm.llm.providers.openai", "OpenAIProvider"),
    "anthropic": ("slm.llm.providers.anthropic", "AnthropicProvider"),
}
"""By provider name: our module and its class."""


@functools.lru_cache(maxsize=1024)
def refused_address(url: str) -> str | None:
    """Return why no call may be made to a stored `url`, or None if it may."""
    return refused_endpoint(url, stored=True)


class Check(InlineValidator):
    """What `LLMInterface` registers; validators with equal policies are equal and run once.

    Args:
        policy: what this backend allows; the SLM may allow more.
    """

    def __init__(self, policy: EndpointPolicy) -> None:
        self._policy = policy

    def __call__(self, config: ResolvedConfig) -> str | None:
        """Return why no call can be made with this config, or None."""
        return reason_against(config, self._policy)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Check) and other._policy == self._policy

    def __hash__(self) -> int:
        return hash(type(self))


def reason_against(config: ResolvedConfig, policy: EndpointPolicy) -> str | None:
    """Return why no call can be made with this config, or None.

    Args:
        config: the config that would come into use.
        policy: what this backend allows; the SLM may allow more.
    """
    name = config.llm_provider
    if name not in PROVIDERS:
        return unknown_provider()
    endpoint = effective_endpoint(name, config.llm_endpoint) or ""
    refused = refused_address(endpoint) or policy.refused(name, config.llm_endpoint)
    return None if refused is None else f"the endpoint {refused}"


def unknown_provider() -> str:
    """Return the sentence about an unknown provider."""
    return f"unknown provider; known are {', '.join(sorted(PROVIDERS))}"
