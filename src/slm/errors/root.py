"""The root of all errors of this package, and startup errors. Knows no other module."""

from __future__ import annotations

from typing import ClassVar


class SLMError(Exception):
    """The root of all errors of this package.

    Attributes:
        code: a stable kebab-case name of the kind of error; safe to match on.
    """

    code: ClassVar[str] = "slm-error"


class StartupError(SLMError):
    """The server or a command refuses to start; the message says why and what to do."""

    code = "startup"


class ConfigurationError(SLMError):
    """A setting or an argument of this package is invalid; the message says which."""

    code = "configuration"
