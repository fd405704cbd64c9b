"""How a call to a language model can fail. Keeps no exception of an HTTP library."""

from __future__ import annotations

from typing import Any, ClassVar

from slm.errors.root import SLMError


class LLMError(SLMError):
    """A call to a language model failed.

    Carries what an operator needs to identify the configuration in use. The HTTP library's
    exception is not kept, because it exposes the key.

    Attributes:
        agent_id: the agent the call was made for.
        provider: `ollama`, `openai` or `anthropic`.
        model: the model that was asked for.
        revision: the revision of the config the call started with; None if it was not from the SLM.
        step: which step of the chain answered (`agent`, `default`, `environment`, `hardcoded`).
        status: the provider's HTTP status, if there was one.
        provider_error: the class name of the exception that ended the call.
        retry_after_seconds: how long the provider asked to wait, if it did.
        passed_over: why earlier steps of the chain did not answer, if a later one did.
    """

    code: ClassVar[str] = "llm-error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        detail: str,
        *,
        agent_id: str = "",
        provider: str = "",
        model: str = "",
        revision: int | None = None,
        step: str = "",
        status: int | None = None,
        provider_error: str | None = None,
        retry_after_seconds: float | None = None,
        passed_over: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.passed_over = passed_over
        self.agent_id = agent_id
        self.provider = provider
        self.model = model
        self.revision = revision
        self.step = step
        self.status = status
        self.provider_error = provider_error
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        where = f"{self.provider}/{self.model}" if self.provider else "llm"
        config = f", agent {self.agent_id}" if self.agent_id else ""
        if self.step:
            config += f", step {self.step}"
        if self.revision is not None:
            config += f", revision {self.revision}"
        status = f" HTTP {self.status}:" if self.status else ""
        # Why this config was used comes first: it may make the failure itself irrelevant.
        first = f"{self.passed_over}: " if self.passed_over else ""
        return f"{first}[{where}{config}]{status} {self.detail}"


class LLMTimeout(LLMError):
    """The provider did not answer within llm_timeout."""

    code, retryable = "llm-timeout", False


class LLMRateLimited(LLMError):
    """The provider asks to slow down; `retry_after_seconds` if it said for how long."""

    code, retryable = "llm-rate-limited", True


class LLMQuotaExhausted(LLMRateLimited):
    """The provider account has no credit left; retrying does not help, a person must act."""

    code, retryable = "llm-quota-exhausted", False


class LLMAuthError(LLMError):
    """The provider rejects the key."""

    code = "llm-auth"


class LLMBadRequest(LLMError):
    """The provider rejects the request itself: its messages, options or model."""

    code = "llm-bad-request"


class LLMUnavailable(LLMError):
    """The provider cannot be reached or reports that it cannot serve now."""

    code, retryable = "llm-unavailable", True


class LLMBadResponse(LLMError):
    """The provider's response violates its own protocol."""

    code = "llm-bad-response"


class LLMStreamBroken(LLMError):
    """The stream ended before the provider said that it was finished.

    Attributes:
        partial: the text received until then.
    """

    code = "llm-stream-broken"

    def __init__(self, detail: str, *, partial: str = "", **fields: Any) -> None:
        super().__init__(detail, **fields)
        self.partial = partial


class LLMEndpointRefused(LLMError):
    """The endpoint is of a kind that no request may go to (see `slm.endpoints`)."""

    code = "llm-endpoint-refused"


class LLMProviderMissing(LLMError):
    """The provider is unknown here; the message lists the known ones."""

    code = "llm-provider-missing"
