"""The result of a resolution: one agent's complete configuration, frozen, with its origin.

Knows no clock except the monotonic one, and not where values come from.
"""

from __future__ import annotations

import copy
import enum
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from pydantic import SecretStr


class Step(enum.StrEnum):
    """Which step of the chain answered (docs/protocol.md section 5)."""

    AGENT = "agent"
    DEFAULT = "default"
    ENVIRONMENT = "environment"
    HARDCODED = "hardcoded"


class SecretText(str):
    """A string that holds a secret, and whose repr is `***`.

    The dict that `get_agent_config` returns has the key as a usable string; printing or logging the
    dict does not show it.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


class Options(dict[str, Any]):
    """The options of a config: a dict that must not be modified, since many share it."""

    __slots__ = ()

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("the options of a config are not to be changed; copy them with dict(…)")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResolvedConfig:
    """One agent's configuration, as `SLMClient.resolve` returns it.

    Attributes:
        agent_id: the agent that was asked for.
        step: which step of the chain answered.
        llm_provider: `ollama`, `openai` or `anthropic`.
        llm_endpoint: the base URL; None means the provider's own.
        llm_model: the model's name.
        llm_api_key: the key, or None.
        llm_timeout: seconds for a whole call; for a stream, until the first token and between
            tokens.
        llm_temperature: 0 to 2; None: no temperature is sent.
        llm_max_tokens: the most tokens to generate; None: the provider's default.
        llm_options: further parameters of the provider, passed on unchanged; read-only.
        revision: the revision of this configuration; None if it is not from the SLM.
        api_key_revision: the revision at which the key was set; None without a key.
        source_agent_id: the agent whose configuration this is: `agent_id`, or the default agent.
        passed_over: why earlier steps did not answer, in one sentence; None with step `agent`.
    """

    agent_id: str
    step: Step
    llm_provider: str
    llm_model: str
    llm_endpoint: str | None = None
    llm_api_key: SecretStr | None = None
    llm_timeout: int = 30
    llm_temperature: float | None = None
    llm_max_tokens: int | None = None
    llm_options: Mapping[str, Any] = field(default_factory=dict)
    revision: int | None = None
    api_key_revision: int | None = None
    source_agent_id: str | None = None
    passed_over: str | None = None
    _freshness: Callable[[], tuple[float, bool]] | None = field(default=None, repr=False)
    # Built on first use: copying a dict costs a third of building one.
    _fields: dict[str, Any] | None = field(default=None, init=False, repr=False)

    @property
    def age(self) -> float:
        """Seconds since this was last known to be the current value; 0 while live."""
        return 0.0 if self._freshness is None else self._freshness()[0]

    @property
    def stale(self) -> bool:
        """Whether the SLM may have a newer value, or a newer API key is still to come."""
        return False if self._freshness is None else self._freshness()[1]

    def as_dict(self) -> dict[str, Any]:
        """Return the llm_* fields, with `llm_api_key`, as a new dict that you may change."""
        made = self._fields
        if made is None:
            key = self.llm_api_key
            made = {
                "llm_provider": self.llm_provider,
                "llm_endpoint": self.llm_endpoint,
                "llm_model": self.llm_model,
                "llm_api_key": None if key is None else SecretText(key.get_secret_value()),
                "llm_timeout": self.llm_timeout,
                "llm_temperature": self.llm_temperature,
                "llm_max_tokens": self.llm_max_tokens,
                "llm_options": dict(self.llm_options),
            }
            object.__setattr__(self, "_fields", made)
        fresh = made.copy()
        options = made["llm_options"]
        fresh["llm_options"] = copy.deepcopy(options) if options else {}
        return fresh

    def __copy__(self) -> ResolvedConfig:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ResolvedConfig:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the key, which must not end up in a queue or cache; stale from then on."""
        values = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.init and each.name != "llm_api_key"
        }
        values["llm_options"] = copy.deepcopy(dict(self.llm_options))
        values["_freshness"] = _Unpickled(time.time() - self.age)
        return _rebuilt, (values,)

    def answering(self, agent_id: str, passed_over: str | None = None) -> ResolvedConfig:
        """Return this config as the default agent's answer for another agent, with the reason."""
        return ResolvedConfig(
            agent_id=agent_id,
            step=Step.DEFAULT,
            llm_provider=self.llm_provider,
            llm_model=self.llm_model,
            llm_endpoint=self.llm_endpoint,
            llm_api_key=self.llm_api_key,
            llm_timeout=self.llm_timeout,
            llm_temperature=self.llm_temperature,
            llm_max_tokens=self.llm_max_tokens,
            llm_options=self.llm_options,
            revision=self.revision,
            api_key_revision=self.api_key_revision,
            source_agent_id=self.source_agent_id,
            passed_over=passed_over,
            _freshness=self._freshness,
        )


@dataclass(frozen=True, slots=True)
class _Unpickled:
    """The freshness of an unpickled config, which is not notified of changes."""

    confirmed_at: float

    def __call__(self) -> tuple[float, bool]:
        # By the wall clock, because it may come from another machine.
        return max(0.0, time.time() - self.confirmed_at), True


def _rebuilt(values: dict[str, Any]) -> ResolvedConfig:
    return ResolvedConfig(**values)
