"""For tests of code that uses the SDK: a client without an SLM, a network or a thread.

The chain, the cache and the errors are real; only the source of the values differs. Knows nothing
about the server.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from slm.client.cache.cache import AgentConfigCache
from slm.client.cache.keys_in_use import InUse, KeysInUse
from slm.client.client import SLMClient
from slm.client.config import ResolvedConfig
from slm.client.resolution.chain import Chain
from slm.client.resolution.explain import explained
from slm.client.runtime.callbacks import OnChange, Validator
from slm.client.status import ClientStatus
from slm.errors import ConfigurationError, SLMError
from slm.protocol import AgentDeleted, Explanation
from slm.schemas import LLMConfigWithKey

__all__ = ["FakeSLMClient"]

_EPOCH: Final = "0000000000000000"
_DEFAULTS: Final = {"llm_provider": "ollama", "llm_model": "mistral:7b-instruct"}
_SETTABLE: Final = frozenset(LLMConfigWithKey.model_fields) - {
    *("agent_id", "revision", "has_api_key", "api_key_revision")
}
_CONFIG: Final = TypeAdapter(LLMConfigWithKey)

_log = logging.getLogger("slm.client")


class FakeSLMClient(SLMClient):
    """`SLMClient` for tests: the same methods, with agents that the test sets.

    Example:
        >>> from slm.testing import FakeSLMClient
        >>> client = FakeSLMClient({"billing": {"llm_model": "gpt-4.1", "llm_provider": "openai"}})
        >>> client.resolve_now("billing").llm_model
        'gpt-4.1'

    It is live from the start; `disconnect` simulates an unreachable SLM. When `set_agent` returns,
    the change is in use and plain callbacks have been called. Coroutine callbacks run in the event
    loop in which the change is made or, without one, to completion.

    Args:
        agents: the fields of each agent, by name; the agent `default` always exists.
        strict: as for `SLMClient`.
    """

    def __init__(
        self, agents: Mapping[str, Mapping[str, Any]] | None = None, *, strict: bool = False
    ) -> None:
        self._agents: dict[str, dict[str, Any]] = {}
        self._cache = AgentConfigCache()
        self._ready = self._cache.ready
        self._liveness = self._cache.liveness
        self._cache.refused = self._refusal
        self._cache.begin(_EPOCH, 0)
        self._cache.position.synced = True
        self._chain = Chain(self._cache, 0.0, strict=strict)
        self._callbacks: list[OnChange] = []
        self._validators: list[Validator] = []
        self._tasks: set[asyncio.Future[Any]] = set()
        self._keys = KeysInUse()
        self._status = ClientStatus.LIVE
        self._error: str | None = None
        self._cache.liveness.set(True)
        self.set_agent("default", is_default=True)
        for agent_id, fields in (agents or {}).items():
            self.set_agent(agent_id, **fields)

    # --- called by a test ---

    def set_agent(self, agent_id: str, **fields: Any) -> int:
        """Create or change an agent, as an operator does; return the change's revision.

        Args:
            agent_id: the agent.
            **fields: what differs: `llm_provider`, `llm_model`, `llm_endpoint`, `llm_api_key`,
            `llm_timeout`, `llm_temperature`, `llm_max_tokens`, `llm_options`, `is_active`,
            `is_default`. A new agent has ollama's defaults for the rest.

        Raises:
            ConfigurationError: there is no such field, or a value has the wrong type.
        """
        unknown = sorted(fields.keys() - _SETTABLE)
        if unknown:
            raise ConfigurationError(f"an agent has no field {unknown[0]!r}")
        revision = self._cache.position.revision + 1
        row = self._agents.get(agent_id, dict(_DEFAULTS)) | fields
        if "llm_api_key" in fields:
            row["api_key_revision"] = None if row["llm_api_key"] is None else revision
        row["has_api_key"] = row.get("llm_api_key") is not None
        config = _parsed(row | {"agent_id": agent_id, "revision": revision})
        self._agents[agent_id] = row
        if config.is_default:
            for other, held in self._agents.items():
                held["is_default"] = other == agent_id
        self._cache.position.advance(revision)
        if self._cache.apply_fetched(config):
            self._tell(agent_id)
        return revision

    def delete_agent(self, agent_id: str) -> int:
        """Delete an agent, as an operator does; return the change's revision."""
        revision = self._cache.position.revision + 1
        self._agents.pop(agent_id, None)
        self._cache.position.advance(revision)
        gone = AgentDeleted(type="agent_deleted", agent_id=agent_id, revision=revision)
        if self._cache.apply_change(gone):
            self._tell(agent_id)
        return revision

    def disconnect(self, error: str = "the SLM did not answer") -> None:
        """Simulate an unreachable SLM: known configurations are still served, but not as live."""
        self._cache.liveness.set(False)
        self._status, self._error = ClientStatus.DISCONNECTED, error

    def reconnect(self) -> None:
        """Become live again."""
        self._cache.liveness.set(True)
        self._status, self._error = ClientStatus.LIVE, None

    # --- called by the code under test ---

    async def connect(self) -> None:
        """Become live, unless it was disconnected."""
        self.connect_now()

    def connect_now(self) -> None:
        """Become live, unless it was disconnected."""
        if self._status is ClientStatus.CLOSED:
            self.reconnect()

    async def close(self) -> None:
        """Close; known configurations can still be read."""
        self.close_now()

    def close_now(self) -> None:
        """Close; known configurations can still be read."""
        self._cache.liveness.set(False)
        self._status = ClientStatus.CLOSED

    @property
    def status(self) -> ClientStatus:
        """How the client is connected."""
        return self._status

    @property
    def last_error(self) -> str | None:
        """The argument of `disconnect`; None if nothing is wrong."""
        return self._error

    async def explain(self, agent_id: str) -> Explanation:
        """Do what `SLMClient.explain` does."""
        return self.explain_now(agent_id)

    def explain_now(self, agent_id: str) -> Explanation:
        """Do what `SLMClient.explain_now` does."""
        answer: ResolvedConfig | SLMError
        try:
            answer = self._answered_now(agent_id)
        except SLMError as problem:
            answer = problem
        return explained(self._cache, agent_id, answer, self._status, self._error)

    def on_change(self, callback: OnChange) -> Callable[[], None]:
        """Call `callback(agent_id, config)` after each change; the result removes it again."""
        self._callbacks.append(callback)

        def unsubscribe() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return unsubscribe

    def register_validator(self, validator: Validator) -> Callable[[], None]:
        """Call `validator(config)` before a change is used; returns a function that removes it."""
        self._validators.append(validator)

        def unregister() -> None:
            if validator in self._validators:
                self._validators.remove(validator)

        return unregister

    def in_use(self, config: ResolvedConfig) -> InUse:
        """Return a context manager that marks the config's key as in use."""
        return InUse(self._keys, config, self._cache.key_revision, lambda: None)

    # --- internals ---

    async def _answered(self, agent_id: str | None) -> ResolvedConfig:
        return self._answered_now(agent_id)

    def _answered_now(self, agent_id: str | None) -> ResolvedConfig:
        return self._chain.answer_in_place(agent_id)

    def _refusal(self, config: ResolvedConfig) -> str | None:
        for validator in tuple(self._validators):
            try:
                reason = validator(config)
            except Exception:
                _log.exception("a validator failed; its config is used")
                continue
            if isinstance(reason, str) and reason:
                return reason
        return None

    def _tell(self, agent_id: str) -> None:
        known = self._cache.find(agent_id)
        config = known.in_force if known is not None else None
        for callback in tuple(self._callbacks):
            try:
                told = callback(agent_id, config)
                if inspect.isawaitable(told):
                    self._run(told)
            except Exception:
                _log.exception("an on_change callback failed")

    def _run(self, told: Any) -> None:
        async def finish() -> None:
            try:
                await told
            except Exception:
                _log.exception("an on_change callback failed")

        try:
            task = asyncio.get_running_loop().create_task(finish())
        except RuntimeError:
            asyncio.run(finish())
        else:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


def _parsed(row: dict[str, Any]) -> LLMConfigWithKey:
    wrong: list[str] = []
    try:
        return _CONFIG.validate_python(row)
    except ValidationError as error:
        wrong = [str(each["loc"][-1]) for each in error.errors(include_input=False)]
    # Outside the handler: the validation error contains the values, and one may be a key.
    raise ConfigurationError(f"{wrong[0]} is not a value of its type")
