"""The chain's last two steps: AUTOBOT_LLM_* from the environment, and the hardcoded values.

Knows no SLM and no cache. A value set for one provider is never sent to another: if it is unclear
which provider a value was set for, it is not used (docs/protocol.md section 5).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from pydantic import SecretStr, TypeAdapter, ValidationError

from slm.client.config import ResolvedConfig, Step
from slm.common.environment import variable
from slm.endpoints import DEFAULT_ENDPOINTS
from slm.schemas import ApiKey, Endpoint, MaxTokens, Model, Provider, Temperature, TimeoutSeconds

PREFIX: Final = "AUTOBOT_LLM_"
HARDCODED_PROVIDER: Final = "ollama"
HARDCODED_MODEL: Final = "mistral:7b-instruct"
HARDCODED_TEMPERATURE: Final = 0.7

_NAMES: Final = (
    "PROVIDER",
    "ENDPOINT",
    "MODEL",
    "API_KEY",
    "TIMEOUT",
    "TEMPERATURE",
    "MAX_TOKENS",
)
_TYPES: Final[dict[str, Any]] = {
    "PROVIDER": Provider,
    "ENDPOINT": Endpoint,
    "MODEL": Model,
    "API_KEY": ApiKey,
    "TIMEOUT": TimeoutSeconds,
    "TEMPERATURE": Temperature,
    "MAX_TOKENS": MaxTokens,
}
_NUMBERS: Final = {"TIMEOUT": int, "TEMPERATURE": float, "MAX_TOKENS": int}
_NONE: Final = "none"
"""AUTOBOT_LLM_TEMPERATURE=none: no temperature is sent."""
# Without these, the request would go somewhere other than intended.
_WHERE: Final = frozenset({"PROVIDER", "ENDPOINT", "MODEL", "API_KEY"})


class FromEnvironment(NamedTuple):
    """The result of the environment step.

    Attributes:
        config: the config, or None if the step is skipped.
        warnings: what was skipped and why; names variables, never their values.
    """

    config: ResolvedConfig | None
    warnings: tuple[str, ...] = ()


def from_environment(
    agent_id: str, environ: Mapping[str, str] | None = None, *, passed_over: str | None = None
) -> FromEnvironment:
    """Return the config in AUTOBOT_LLM_*.

    A number that does not parse is skipped on its own. If a provider, endpoint, model or key does
    not parse, or a provider other than ollama has no model, the whole step is skipped: continuing
    without the value would send the rest somewhere it was not set for. A key without a provider is
    not used, because it is unclear which provider it is for.

    Args:
        agent_id: the agent that is resolved; does not affect the result.
        environ: the environment; by default that of the process.
        passed_over: why the SLM's steps were not used.
    """
    environ = os.environ if environ is None else environ
    texts = {name: text for name in _NAMES if (text := variable(PREFIX + name, environ))}
    warnings: list[str] = []
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if name == "TEMPERATURE" and text.lower() == _NONE:
            values[name] = None
            continue
        try:
            values[name] = _adapter(name).validate_python(_NUMBERS.get(name, str)(text))
        except (ValidationError, ValueError) as error:
            warnings.append(f"{PREFIX}{name} is passed over: it {_reason(error)}")
            if name in _WHERE:
                return FromEnvironment(None, _step_passed_over(warnings))
    if "PROVIDER" not in values and values.pop("API_KEY", None) is not None:
        warnings.append(
            f"{PREFIX}API_KEY is passed over: without {PREFIX}PROVIDER nobody knows whose it is"
        )
    provider: str = values.get("PROVIDER", HARDCODED_PROVIDER)
    if provider != HARDCODED_PROVIDER and "MODEL" not in values:
        warnings.append(f"{PREFIX}MODEL is needed with {PREFIX}PROVIDER={provider}")
        return FromEnvironment(None, _step_passed_over(warnings))
    if not values:
        return FromEnvironment(None, tuple(warnings))
    config = _config(agent_id, Step.ENVIRONMENT, provider, values, passed_over)
    return FromEnvironment(config, tuple(warnings))


def hardcoded(agent_id: str, passed_over: str | None = None) -> ResolvedConfig:
    """Return the last step of the chain: ollama on this machine *(mission)*."""
    return _config(agent_id, Step.HARDCODED, HARDCODED_PROVIDER, {}, passed_over)


@functools.cache
def _adapter(name: str) -> TypeAdapter[Any]:
    # Built only when a variable is set: few backends set one, and all would start more slowly.
    return TypeAdapter(_TYPES[name])


def _reason(error: ValueError) -> str:
    """Return what is wrong with a value, without repeating the value."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"] == "value_error":
            # One of our own errors, which contains no value.
            return first["msg"].removeprefix("Value error, ")
    return "is not a valid value"


def _step_passed_over(warnings: list[str]) -> tuple[str, ...]:
    return (*warnings, f"the environment step is passed over: see {PREFIX}* above")


def _config(
    agent_id: str, step: Step, provider: str, values: Mapping[str, Any], passed_over: str | None
) -> ResolvedConfig:
    ollama = provider == HARDCODED_PROVIDER
    key: SecretStr | None = values.get("API_KEY")
    return ResolvedConfig(
        agent_id=agent_id,
        step=step,
        passed_over=passed_over,
        llm_provider=provider,
        llm_endpoint=values.get("ENDPOINT") or (DEFAULT_ENDPOINTS[provider] if ollama else None),
        llm_model=values.get("MODEL", HARDCODED_MODEL),
        llm_api_key=key,
        llm_timeout=values.get("TIMEOUT", 30),
        llm_temperature=values.get("TEMPERATURE", HARDCODED_TEMPERATURE if ollama else None),
        llm_max_tokens=values.get("MAX_TOKENS"),
    )
