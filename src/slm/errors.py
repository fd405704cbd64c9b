"""The whole error tree: every error that SLM raises, each with a stable code.

Knows nothing of HTTP libraries, databases or provider SDKs. The server turns a `ProblemError` into
RFC 9457 `application/problem+json` at its edge; the client turns such an answer back into the same
class, so both sides speak of one thing by one name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar


class SLMError(Exception):
    """The root of all errors of this package.

    Attributes:
        code: a stable kebab-case name of the kind of error; safe to match on.
    """

    code: ClassVar[str] = "slm-error"


# --- what the server refuses, and what the client hears of it (docs/protocol.md section 3) ---


class ProblemError(SLMError):
    """An answer of the server other than success, as RFC 9457 has it.

    Attributes:
        status: the HTTP status code.
        title: the kind of problem, in a few words; the same for each occurrence.
        detail: what happened this time and what to do; never holds a secret or the input itself.
        retry_after_seconds: how long the server asked to be left alone, where it did.
    """

    code: ClassVar[str] = "problem"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "The request failed"

    def __init__(self, detail: str = "", *, retry_after_seconds: float | None = None) -> None:
        super().__init__(detail or self.title)
        self.detail = detail or self.title
        self.retry_after_seconds = retry_after_seconds


class BadRequest(ProblemError):
    """The request cannot be read as HTTP or its parameters make no sense."""

    code, status, title = "bad-request", 400, "The request cannot be read"


class Unauthorized(ProblemError):
    """No token, or one that the server does not know, that has expired or was revoked."""

    code, status, title = "unauthorized", 401, "A valid token is needed"


class Forbidden(ProblemError):
    """The token is known, but its scopes do not cover this."""

    code, status, title = "forbidden", 403, "The token does not allow this"


class TlsRequired(ProblemError):
    """A key was asked for over a connection that is neither TLS nor loopback."""

    code, status, title = "tls-required", 403, "Keys are served over TLS only"


class NotFound(ProblemError):
    """The path names nothing."""

    code, status, title = "not-found", 404, "Nothing here"


class MethodNotAllowed(ProblemError):
    """The path is right, the method is not."""

    code, status, title = "method-not-allowed", 405, "The method is not allowed here"


class AgentNotFound(ProblemError):
    """There is no agent of this agent_id, or the token cannot see it."""

    code, status, title = "agent-not-found", 404, "No such agent"


class BackendNotFound(ProblemError):
    """No backend of this name is connected."""

    code, status, title = "backend-not-found", 404, "No such backend is connected"


class BackendSilent(ProblemError):
    """The backend was asked and did not answer in time, or closed its connection instead."""

    code, status, title = "backend-silent", 504, "The backend does not answer"


class BackendUnclear(ProblemError):
    """The backend answered with what cannot be read; the text says what is wrong with it."""

    code, status, title = "backend-unclear", 502, "The backend's answer cannot be read"


class TokenNotFound(ProblemError):
    """There is no token of this number."""

    code, status, title = "token-not-found", 404, "No such token"


class AgentInactive(ProblemError):
    """The agent exists but is switched off; a client goes on to the default agent."""

    code, status, title = "agent-inactive", 404, "The agent is inactive"


class RevisionNotFound(ProblemError):
    """The history holds nothing at this revision: it never was, or was compacted away."""

    code, status, title = "revision-not-found", 404, "Nothing in the history there"


class AgentExists(ProblemError):
    """An agent of this agent_id is there already."""

    code, status, title = "agent-exists", 409, "The agent exists already"


class AgentIsDefault(ProblemError):
    """The default agent can be neither deleted, deactivated nor simply un-defaulted."""

    code, status, title = "agent-is-default", 409, "The agent is the default"


class Conflict(ProblemError):
    """What is there now does not allow this; the detail says what to do first."""

    code, status, title = "conflict", 409, "This cannot be done as things are"


class KeyUndecryptable(ProblemError):
    """The stored key does not decrypt, or was encrypted for another agent, provider or origin."""

    code, status, title = "key-undecryptable", 409, "The stored key cannot be used"


class KeysNotReady(ProblemError):
    """A rotation would leave a live replica without the key, or there is no key to go on to."""

    code, status, title = "keys-not-ready", 409, "The encryption keys are not ready for this"


class PreconditionFailed(ProblemError):
    """If-Match names a revision that is not the agent's current one."""

    code, status, title = "precondition-failed", 412, "The agent has changed meanwhile"


class ContentTooLarge(ProblemError):
    """The body is over the limit."""

    code, status, title = "content-too-large", 413, "The body is too large"


class UnsupportedMediaType(ProblemError):
    """The body is not JSON."""

    code, status, title = "unsupported-media-type", 415, "The body must be application/json"


class InvalidRequest(ProblemError):
    """The body or a parameter breaks a rule.

    Attributes:
        errors: one `{"loc": [...], "msg": "...", "type": "..."}` a broken rule; never the offending
            value nor an unknown field's name.
    """

    code, status, title = "invalid-request", 422, "The request breaks a rule"

    def __init__(self, detail: str = "", errors: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(detail)
        self.errors = list(errors)


class TooManyRequests(ProblemError):
    """A limit was reached; `retry_after_seconds` says when to come back."""

    code, status, title = "too-many-requests", 429, "Too many requests"


class InternalError(ProblemError):
    """The server is at fault; its log says more under the same time."""

    code, status, title = "internal-error", 500, "The server failed"


class Unavailable(ProblemError):
    """The server cannot serve this now; nothing was changed. Try again."""

    code, status, title = "unavailable", 503, "Not available now"


class DatabaseUnavailable(Unavailable):
    """The database does not answer, or a lock was not had in time; nothing was changed."""

    code, title = "database-unavailable", "The database does not answer"


class Overloaded(Unavailable):
    """The server has as much under way as it takes at once; nothing was begun. Come back."""

    code, title = "overloaded", "Too much at once"


class Behind(Unavailable):
    """This replica has not yet seen the revision that the client knows of."""

    code, title = "behind", "This replica is behind"


class EncryptionKeyMissing(Unavailable):
    """This replica does not have the encryption key that is in use now; another one may."""

    code, title = "encryption-key-missing", "This replica lacks the encryption key in use"


class OutcomeUnknown(Unavailable):
    """The write may or may not have been committed; read the agent before trying again."""

    code, title = "outcome-unknown", "The outcome of the write is not known"


class InsufficientStorage(ProblemError):
    """The database's disk is full; nothing was changed."""

    code, status, title = "insufficient-storage", 507, "The database is full"


# --- refusing to start ---


class StartupError(SLMError):
    """The server or a command refuses to start; the message says why and what to do."""

    code = "startup"


class ConfigurationError(SLMError):
    """A setting or an argument of this package makes no sense; the message says which."""

    code = "configuration"


# --- the client ---


class ProtocolError(SLMError):
    """A message that is not JSON or not of the contract's shape; never holds the message."""

    code = "protocol"


class UnclearAnswer(ProtocolError):
    """An answer to a question that is not of the contract's shape.

    Attributes:
        question: the id of the question, where the answer names one.
    """

    code = "unclear-answer"

    def __init__(self, message: str, question: str | None) -> None:
        super().__init__(message)
        self.question = question


class NotJSON(ProtocolError):
    """A message that is no JSON at all, which ends a stream with 1007 rather than an `error`."""

    code = "not-json"


class SLMUnavailable(SLMError):
    """The SLM did not answer, or not in a way that can be used; the cache goes on serving."""

    code = "slm-unavailable"


class TLSError(SLMUnavailable):
    """The SLM's certificate is expired, untrusted or another host's; nothing was sent."""

    code = "tls-error"


class AgentKeyUnavailable(SLMError):
    """The agent needs an API key that cannot be had now, and nothing whole is there to serve.

    Raised rather than going on with the default agent's config (docs/protocol.md section 6).

    Attributes:
        agent_id: the agent whose key is missing.
    """

    code = "agent-key-unavailable"

    def __init__(self, agent_id: str, reason: str) -> None:
        super().__init__(f"the API key of agent {agent_id!r} cannot be had: {reason}")
        self.agent_id = agent_id
        self.reason = reason


class AgentUnknown(SLMError):
    """A strict client was asked for an agent that the SLM does not have, or that is switched off.

    Attributes:
        agent_id: the agent that was asked for.
        nearest: the agent whose name is most like it, if there is one.
    """

    code = "agent-unknown"

    def __init__(self, agent_id: str, reason: str, nearest: str | None = None) -> None:
        super().__init__(reason)
        self.agent_id = agent_id
        self.nearest = nearest


# --- calling a language model ---


class LLMError(SLMError):
    """A call to a language model failed.

    Carries what an operator needs to see which configuration was at work; the HTTP library's own
    exception object is not kept, since the key can be reached through it.

    Attributes:
        agent_id: the agent the call was made for.
        provider: `ollama`, `openai` or `anthropic`.
        model: the model that was asked for.
        revision: the revision of the config the call began with; None outside the SLM's steps.
        step: which step of the chain answered (`agent`, `default`, `environment`, `hardcoded`).
        status: the provider's HTTP status, where there was one.
        provider_error: the class name of the exception that the call ended with.
        retry_after_seconds: what the provider asked for, where it did.
        passed_over: why the earlier steps of the chain did not answer, where another one did.
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
        # Why it is this config at all comes first: what failed with it may be of no interest then.
        first = f"{self.passed_over}: " if self.passed_over else ""
        return f"{first}[{where}{config}]{status} {self.detail}"


class LLMTimeout(LLMError):
    """The provider did not answer within llm_timeout."""

    code, retryable = "llm-timeout", False


class LLMRateLimited(LLMError):
    """The provider asks to slow down; `retry_after_seconds` where it said for how long."""

    code, retryable = "llm-rate-limited", True


class LLMQuotaExhausted(LLMRateLimited):
    """Nothing is left to pay the provider with; trying again does not help, a person has to act."""

    code, retryable = "llm-quota-exhausted", False


class LLMAuthError(LLMError):
    """The provider refuses the key."""

    code = "llm-auth"


class LLMBadRequest(LLMError):
    """The provider refuses the request itself: its messages, options or model."""

    code = "llm-bad-request"


class LLMUnavailable(LLMError):
    """The provider cannot be reached or answers that it cannot serve now."""

    code, retryable = "llm-unavailable", True


class LLMBadResponse(LLMError):
    """The provider answered with something that is not of its own protocol."""

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
    """The provider is unknown here; the message says which are known."""

    code = "llm-provider-missing"


def problem_classes() -> dict[str, type[ProblemError]]:
    """Return every `ProblemError` class by its code, for the client and the API's document."""
    found: dict[str, type[ProblemError]] = {}
    pending: list[type[ProblemError]] = [ProblemError]
    while pending:
        cls = pending.pop()
        found[cls.code] = cls
        pending.extend(cls.__subclasses__())
    return found
