"""The whole error tree: every error that SLM raises, each with a stable code.

Import errors from here. Knows nothing of HTTP libraries, databases or provider SDKs.
"""

# isort: skip_file
from __future__ import annotations

from slm.errors.client import (
    AgentKeyUnavailable as AgentKeyUnavailable,
    AgentUnknown as AgentUnknown,
    NotJSON as NotJSON,
    ProtocolError as ProtocolError,
    SLMUnavailable as SLMUnavailable,
    TLSError as TLSError,
    UnclearAnswer as UnclearAnswer,
)
from slm.errors.llm import (
    LLMAuthError as LLMAuthError,
    LLMBadRequest as LLMBadRequest,
    LLMBadResponse as LLMBadResponse,
    LLMEndpointRefused as LLMEndpointRefused,
    LLMError as LLMError,
    LLMProviderMissing as LLMProviderMissing,
    LLMQuotaExhausted as LLMQuotaExhausted,
    LLMRateLimited as LLMRateLimited,
    LLMStreamBroken as LLMStreamBroken,
    LLMTimeout as LLMTimeout,
    LLMUnavailable as LLMUnavailable,
)
from slm.errors.problems import (
    AgentExists as AgentExists,
    AgentInactive as AgentInactive,
    AgentIsDefault as AgentIsDefault,
    AgentNotFound as AgentNotFound,
    BackendNotFound as BackendNotFound,
    BackendSilent as BackendSilent,
    BackendUnclear as BackendUnclear,
    BadRequest as BadRequest,
    Behind as Behind,
    Conflict as Conflict,
    ContentTooLarge as ContentTooLarge,
    DatabaseUnavailable as DatabaseUnavailable,
    EncryptionKeyMissing as EncryptionKeyMissing,
    Forbidden as Forbidden,
    InsufficientStorage as InsufficientStorage,
    InternalError as InternalError,
    InvalidRequest as InvalidRequest,
    KeysNotReady as KeysNotReady,
    KeyUndecryptable as KeyUndecryptable,
    MethodNotAllowed as MethodNotAllowed,
    NotFound as NotFound,
    OutcomeUnknown as OutcomeUnknown,
    Overloaded as Overloaded,
    PreconditionFailed as PreconditionFailed,
    ProblemError as ProblemError,
    RevisionNotFound as RevisionNotFound,
    TlsRequired as TlsRequired,
    TokenNotFound as TokenNotFound,
    TooManyRequests as TooManyRequests,
    Unauthorized as Unauthorized,
    Unavailable as Unavailable,
    UnsupportedMediaType as UnsupportedMediaType,
    problem_classes as problem_classes,
)
from slm.errors.root import (
    ConfigurationError as ConfigurationError,
    SLMError as SLMError,
    StartupError as StartupError,
)
