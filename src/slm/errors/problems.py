"""The server's error responses, as raised by the server and the client (docs/protocol.md 3).

Knows no web framework: the server turns a `ProblemError` into RFC 9457 `application/problem+json`
at its edge, and the client turns such a response back into the same class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from slm.errors.root import SLMError


class ProblemError(SLMError):
    """A response of the server other than success, as defined by RFC 9457.

    Attributes:
        status: the HTTP status code.
        title: the kind of problem, in a few words; the same for each occurrence.
        detail: what happened this time and what to do; never includes a secret or the input itself.
        retry_after_seconds: how long the server asked the client to wait, if it did.
    """

    code: ClassVar[str] = "problem"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "The request failed"

    def __init__(self, detail: str = "", *, retry_after_seconds: float | None = None) -> None:
        super().__init__(detail or self.title)
        self.detail = detail or self.title
        self.retry_after_seconds = retry_after_seconds


class BadRequest(ProblemError):
    """The request cannot be read as HTTP, or its parameters are invalid."""

    code, status, title = "bad-request", 400, "The request cannot be read"


class Unauthorized(ProblemError):
    """There is no token, or it is unknown, expired or revoked."""

    code, status, title = "unauthorized", 401, "A valid token is needed"


class Forbidden(ProblemError):
    """The token is valid, but its scopes do not cover this."""

    code, status, title = "forbidden", 403, "The token does not allow this"


class TlsRequired(ProblemError):
    """A key was requested over a connection that is neither TLS nor loopback."""

    code, status, title = "tls-required", 403, "Keys are served over TLS only"


class NotFound(ProblemError):
    """The path does not exist."""

    code, status, title = "not-found", 404, "Nothing here"


class MethodNotAllowed(ProblemError):
    """The path exists, but does not support the method."""

    code, status, title = "method-not-allowed", 405, "The method is not allowed here"


class AgentNotFound(ProblemError):
    """There is no agent with this agent_id, or the token cannot see it."""

    code, status, title = "agent-not-found", 404, "No such agent"


class BackendNotFound(ProblemError):
    """No backend with this name is connected."""

    code, status, title = "backend-not-found", 404, "No such backend is connected"


class BackendSilent(ProblemError):
    """The backend was asked and did not answer in time, or closed its connection."""

    code, status, title = "backend-silent", 504, "The backend does not answer"


class BackendUnclear(ProblemError):
    """The backend's answer cannot be parsed; the text says what is wrong with it."""

    code, status, title = "backend-unclear", 502, "The backend's answer cannot be read"


class TokenNotFound(ProblemError):
    """There is no token with this number."""

    code, status, title = "token-not-found", 404, "No such token"


class AgentInactive(ProblemError):
    """The agent exists but is switched off; clients use the default agent."""

    code, status, title = "agent-inactive", 404, "The agent is inactive"


class RevisionNotFound(ProblemError):
    """The history has no entry for this revision: it never existed, or was compacted away."""

    code, status, title = "revision-not-found", 404, "Nothing in the history there"


class AgentExists(ProblemError):
    """An agent with this agent_id already exists."""

    code, status, title = "agent-exists", 409, "The agent exists already"


class AgentIsDefault(ProblemError):
    """The default agent cannot be deleted, deactivated or just unset as the default."""

    code, status, title = "agent-is-default", 409, "The agent is the default"


class Conflict(ProblemError):
    """The current state does not allow this; the detail says what to do first."""

    code, status, title = "conflict", 409, "This cannot be done as things are"


class KeyUndecryptable(ProblemError):
    """The stored key does not decrypt, or was encrypted for another agent, provider or origin."""

    code, status, title = "key-undecryptable", 409, "The stored key cannot be used"


class KeysNotReady(ProblemError):
    """A rotation would leave a live replica without the key, or there is no next key."""

    code, status, title = "keys-not-ready", 409, "The encryption keys are not ready for this"


class PreconditionFailed(ProblemError):
    """If-Match names a revision that is not the agent's current one."""

    code, status, title = "precondition-failed", 412, "The agent has changed meanwhile"


class ContentTooLarge(ProblemError):
    """The body exceeds the limit."""

    code, status, title = "content-too-large", 413, "The body is too large"


class UnsupportedMediaType(ProblemError):
    """The body is not JSON."""

    code, status, title = "unsupported-media-type", 415, "The body must be application/json"


class InvalidRequest(ProblemError):
    """The body or a parameter breaks a rule.

    Attributes:
        errors: one `{"loc": [...], "msg": "...", "type": "..."}` per broken rule; never includes
            the offending value or the name of an unknown field.
    """

    code, status, title = "invalid-request", 422, "The request breaks a rule"

    def __init__(self, detail: str = "", errors: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(detail)
        self.errors = list(errors)


class TooManyRequests(ProblemError):
    """A limit was reached; `retry_after_seconds` says when to retry."""

    code, status, title = "too-many-requests", 429, "Too many requests"


class InternalError(ProblemError):
    """The server is at fault; its log has details under the same time."""

    code, status, title = "internal-error", 500, "The server failed"


class Unavailable(ProblemError):
    """The server cannot serve this now; nothing was changed. Try again."""

    code, status, title = "unavailable", 503, "Not available now"


class DatabaseUnavailable(Unavailable):
    """The database does not answer, or a lock was not acquired in time; nothing was changed."""

    code, title = "database-unavailable", "The database does not answer"


class Overloaded(Unavailable):
    """The server is at its limit of concurrent work; nothing was started. Retry later."""

    code, title = "overloaded", "Too much at once"


class Behind(Unavailable):
    """This replica has not yet seen the revision that the client knows."""

    code, title = "behind", "This replica is behind"


class EncryptionKeyMissing(Unavailable):
    """This replica lacks the encryption key that is now in use; another one may have it."""

    code, title = "encryption-key-missing", "This replica lacks the encryption key in use"


class OutcomeUnknown(Unavailable):
    """The write may or may not have been committed; read the agent before retrying."""

    code, title = "outcome-unknown", "The outcome of the write is not known"


class InsufficientStorage(ProblemError):
    """The database's disk is full; nothing was changed."""

    code, status, title = "insufficient-storage", 507, "The database is full"


def problem_classes() -> dict[str, type[ProblemError]]:
    """Return every `ProblemError` class by code, for the client and the API document."""
    found: dict[str, type[ProblemError]] = {}
    pending: list[type[ProblemError]] = [ProblemError]
    while pending:
        cls = pending.pop()
        found[cls.code] = cls
        pending.extend(cls.__subclasses__())
    return found
