"""BlockingSLMClient: the same client with the method names that synchronous code expects.

A thin wrapper around the `…_now` methods of `SLMClient`. Safe to use from any number of threads,
and directly after a fork.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slm.client.cache.keys_in_use import InUse
from slm.client.client import SLMClient
from slm.client.config import ResolvedConfig
from slm.client.runtime.callbacks import OnChange, Validator
from slm.client.status import ClientStatus
from slm.protocol import Explanation


class BlockingSLMClient:
    """`SLMClient` without await; every argument is the same.

    Attributes:
        client: the client itself, for asynchronous code and for `LLMInterface`.

    Example:
        >>> with BlockingSLMClient("https://slm.internal") as slm:
        ...     config = slm.get_agent_config("code-assistant")
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.client = self._asynchronous = SLMClient(*args, **options)

    def connect(self) -> None:
        """Start following the SLM, as `SLMClient.connect` does; also happens on first use."""
        self.client.connect_now()

    def close(self) -> None:
        """Stop following the SLM; the last known configurations can still be read."""
        self.client.close_now()

    def __enter__(self) -> BlockingSLMClient:
        self.client.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def status(self) -> ClientStatus:
        """How the client is connected."""
        return self.client.status

    @property
    def last_error(self) -> str | None:
        """What failed last, in one sentence without secrets; None if nothing is wrong."""
        return self.client.last_error

    @property
    def revision(self) -> int:
        """Every change up to this revision was received; 0 before the first contact."""
        return self.client.revision

    def resolve(self, agent_id: str) -> ResolvedConfig:
        """Return the agent's configuration; see `SLMClient.resolve`."""
        return self.client.resolve_now(agent_id)

    def get_agent_config(self, agent_id: str) -> dict[str, Any]:
        """Return the agent's llm_* fields; see `SLMClient.get_agent_config`."""
        return self.client.get_agent_config_now(agent_id)

    def get_default_agent_config(self) -> dict[str, Any]:
        """Return the default agent's llm_* fields; see `SLMClient.get_default_agent_config`."""
        return self.client.get_default_agent_config_now()

    def explain(self, agent_id: str) -> Explanation:
        """Explain how this agent is resolved now; see `SLMClient.explain`."""
        return self.client.explain_now(agent_id)

    def peek(self, agent_id: str) -> ResolvedConfig | None:
        """Return the agent's own config if it is cached and live; see `SLMClient.peek`."""
        return self.client.peek(agent_id)

    def on_change(self, callback: OnChange) -> Callable[[], None]:
        """Call the callback after each change; see `SLMClient.on_change`."""
        return self.client.on_change(callback)

    def register_validator(self, validator: Validator) -> Callable[[], None]:
        """Call the validator before a config is used; see `SLMClient.register_validator`."""
        return self.client.register_validator(validator)

    def in_use(self, config: ResolvedConfig) -> InUse:
        """Mark the config's key as in use during a `with` block; see `SLMClient.in_use`."""
        return self.client.in_use(config)
