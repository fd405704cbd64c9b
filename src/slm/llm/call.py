"""One call: turns a config, messages and overrides into a request, and exceptions into our errors.

Knows no transport and resolves no agent. Nothing here outlives the call.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from slm.client.config import ResolvedConfig
from slm.common.scrub import MAX_TEXT, one_line, scrubbed
from slm.endpoints import canonical_url, effective_endpoint, origin
from slm.errors import (
    ConfigurationError,
    LLMAuthError,
    LLMBadResponse,
    LLMEndpointRefused,
    LLMError,
    LLMStreamBroken,
    LLMTimeout,
    LLMUnavailable,
)
from slm.llm.providers.base import ChatRequest, Completion, Message, Provider
from slm.llm.providers.failures import Failure
from slm.llm.results import ChatResult, Overrides, result_of
from slm.llm.validator import refused_address

_logger = logging.getLogger(__name__)

MAX_DETAIL: Final = 500
_MAX_TIMEOUT_SECONDS: Final = 30 * 86400

# In llm_options, these would change the kind of request or send it, or its key, elsewhere; the
# interface sets those in the first line, the rest are SDK arguments.
_RESERVED: Final = frozenset(
    [
        *("model", "messages", "stream", "system", "prompt", "input"),
        *("api_key", "auth_token", "authorization", "base_url", "endpoint", "host", "credentials"),
        *("headers", "extra_headers", "default_headers", "extra_query", "default_query"),
        *("extra_body", "http_client", "transport", "proxy", "proxies", "timeout", "max_retries"),
    ]
)
_KEY: Final = re.compile(r"[\x21-\x7e]+")


class Call:
    """What one call needs, from the config it started with.

    Raises:
        ConfigurationError: an override is unknown or invalid.
        LLMEndpointRefused: the endpoint is of a forbidden kind.
        LLMAuthError: the key contains a character that no header can carry.
    """

    def __init__(
        self,
        provider: Provider,
        config: ResolvedConfig,
        messages: Sequence[Message],
        overrides: Overrides,
    ) -> None:
        self.provider = provider
        self.config = config
        self.model = overrides.get("model", config.llm_model)
        # Others can write to the SLM's database; the number may be too large for any clock.
        timeout = overrides.get("timeout", config.llm_timeout)
        self.timeout_seconds = float(min(max(timeout, 0), _MAX_TIMEOUT_SECONDS))
        self._stale = config.stale
        self.request = self._request(messages, overrides)

    def result(self, completion: Completion) -> ChatResult:
        """Return the result, with the config that produced it."""
        return result_of(completion, self.config, self.model, self._stale)

    def failure(self, error: Exception, *, timed_out: bool = False) -> LLMError:
        """Return our error for an adapter's exception; raises nothing, whatever the provider sent.

        Must be raised outside the `except` block, so that it has no `__context__`: the HTTP
        library's exception exposes the key, as `exc.request_info.headers`.
        """
        if timed_out:
            detail = f"no answer within llm_timeout ({self.timeout_seconds:g} s)"
            return self._error(Failure(LLMTimeout, detail))
        return self._error(self._explained(error), type(error).__name__)

    def _explained(self, error: Exception) -> Failure:
        # The adapter extracts the provider's text, of any type and length.
        with contextlib.suppress(Exception):
            failure = self.provider.explain(error)
            if failure.kind is LLMUnavailable and failure.status is None:
                # No one answered, so the endpoint is what to check.
                place = origin(self.config.llm_provider, self.config.llm_endpoint)
                return replace(failure, detail=f"{failure.detail} (endpoint {place})")
            return failure
        return Failure(LLMBadResponse, "the provider's error is not of its own protocol")

    def broken(self, text: str, error: LLMError | None = None) -> LLMError:
        """Return the error for a stream that started and then ended too soon."""
        if isinstance(error, LLMTimeout):
            return error
        detail = "the stream ended before the provider said that it was finished"
        return LLMStreamBroken(
            detail if error is None else f"the stream broke: {error.detail}",
            partial=self._without_key(text),
            **context_of(self.config, self.model),
            status=error and error.status,
            provider_error=error and error.provider_error,
            retry_after_seconds=error and error.retry_after_seconds,
        )

    def _error(self, failure: Failure, provider_error: str | None = None) -> LLMError:
        status = failure.status
        return failure.kind(
            self._scrubbed(failure.detail),
            **context_of(self.config, self.model),
            status=status if isinstance(status, int) and 100 <= status < 600 else None,
            provider_error=provider_error,
            retry_after_seconds=failure.retry_after_seconds,
        )

    def _scrubbed(self, text: object) -> str:
        """Return the provider's text on one line, without the key, which some of them echo."""
        if not isinstance(text, str):
            text = "the provider's error has no text"
        return one_line(self._without_key(text[:MAX_TEXT]), MAX_DETAIL)

    def _without_key(self, text: str) -> str:
        key = self.config.llm_api_key
        if key is not None:
            text = scrubbed(text, key.get_secret_value())
        for secret in self._other_secrets():
            text = scrubbed(text, secret)
        return text

    def _other_secrets(self) -> list[str]:
        endpoint = canonical_url(self.config.llm_provider, self.config.llm_endpoint)
        return [] if endpoint is None else self.provider.secrets(endpoint)

    def _request(self, messages: Sequence[Message], overrides: Overrides) -> ChatRequest:
        config = self.config
        reason = refused_address(effective_endpoint(config.llm_provider, config.llm_endpoint) or "")
        endpoint = canonical_url(config.llm_provider, config.llm_endpoint)
        if reason is not None or endpoint is None:
            raise self._error(
                Failure(LLMEndpointRefused, f"the endpoint {reason or 'names no host'}")
            )
        key = config.llm_api_key
        if key is not None and not _KEY.fullmatch(key.get_secret_value()):
            if key.get_secret_value():
                detail = "the API key holds a character that no header can carry"
                raise self._error(Failure(LLMAuthError, detail))
            key = None
        options = _options(config, overrides.get("options"))
        return ChatRequest(
            endpoint=endpoint,
            key=key,
            model=self.model,
            messages=messages,
            temperature=_temperature(config, overrides, options),
            max_tokens=_max_tokens(config, overrides, options),
            tools=overrides.get("tools") or (),
            tool_choice=overrides.get("tool_choice"),
            response_format=overrides.get("response_format"),
            options=options,
        )


def context_of(config: ResolvedConfig, model: str) -> dict[str, Any]:
    """Return what every `LLMError` reports about the config in use."""
    return {
        "agent_id": config.agent_id,
        "provider": config.llm_provider,
        "model": model,
        "revision": config.revision,
        "step": config.step.value,
        "passed_over": config.passed_over,
    }


def check_overrides(messages: Sequence[Message], overrides: Mapping[str, Any]) -> None:
    """Reject invalid overrides and messages before anything is requested.

    Raises:
        ConfigurationError: the message says what is wrong.
    """
    unknown = sorted(overrides.keys() - Overrides.__annotations__.keys())
    if unknown:
        known = ", ".join(Overrides.__annotations__)
        raise ConfigurationError(
            f"unknown override {', '.join(unknown)}; known are {known}. "
            "What the provider takes beside these goes into options={...}"
        )
    if isinstance(messages, str | Mapping) or not messages:
        raise ConfigurationError('messages must be a list of {"role": …, "content": …}')
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigurationError("each message must be a dict with a role")
        if message["role"] == "tool" and not message.get("tool_call_id"):
            raise ConfigurationError("a message of role tool must name its tool_call_id")
    timeout = overrides.get("timeout", 1)
    if not isinstance(timeout, int | float) or not timeout > 0:
        raise ConfigurationError("timeout must be a number of seconds above 0")
    if not isinstance(overrides.get("options", {}), Mapping):
        raise ConfigurationError("options must be a dict")


def _options(config: ResolvedConfig, theirs: Mapping[str, Any] | None) -> dict[str, Any]:
    options = dict(config.llm_options)
    if theirs:
        options.update(theirs)
    for name in _RESERVED & options.keys():
        del options[name]
        _warn_of_reserved(name, where_from(config))
    return options


@functools.lru_cache(maxsize=1024)
def _warn_of_reserved(name: str, whose: str) -> None:
    _logger.warning(
        "[%s] %s in llm_options is ignored: it is not an option of the model", whose, name
    )


def where_from(config: ResolvedConfig) -> str:
    """Return the agent, the step and the revision, as included in every log line."""
    text = f"agent {config.agent_id}, step {config.step.value}"
    return text if config.revision is None else f"{text}, revision {config.revision}"


def _temperature(
    config: ResolvedConfig, overrides: Overrides, options: dict[str, Any]
) -> float | None:
    from_options: float | None = options.pop("temperature", config.llm_temperature)
    return overrides.get("temperature", from_options)


def _max_tokens(
    config: ResolvedConfig, overrides: Overrides, options: dict[str, Any]
) -> int | None:
    limit: int | None = options.pop("max_tokens", config.llm_max_tokens)
    for name in ("max_completion_tokens", "num_predict"):
        if name in options:
            # The option is the provider's own name for the limit, so it is the only one sent.
            if "max_tokens" in overrides:
                options[name] = overrides["max_tokens"]
            return None
    return overrides.get("max_tokens", limit)
