"""What an adapter makes of an exception: which of our errors, and the facts kept of it.

Knows HTTP's statuses and what lies below an SDK; each SDK's own exceptions are read in its adapter.
"""

from __future__ import annotations

import email.utils
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from slm.errors import (
    LLMAuthError,
    LLMBadRequest,
    LLMBadResponse,
    LLMEndpointRefused,
    LLMError,
    LLMRateLimited,
    LLMUnavailable,
)
from slm.llm.transport import AddressRefused

_MAX_WAIT_SECONDS: Final = 365 * 86400.0


@dataclass(frozen=True, slots=True)
class Failure:
    """What an adapter makes of an exception: which error, and the facts that may be kept of it."""

    kind: type[LLMError]
    detail: str
    status: int | None = None
    retry_after_seconds: float | None = None


class Unsupported(Exception):
    """The request asks for something that the provider's protocol has no word for."""


def status_of(code: object) -> int | None:
    """Return the HTTP status that an error's own `code` stands for, where it is one."""
    if isinstance(code, str) and len(code) == 3 and code.isascii() and code.isdecimal():
        code = int(code)
    return code if isinstance(code, int) and 400 <= code < 600 else None


def by_status(status: int) -> type[LLMError]:
    """Return the error that an HTTP status stands for (RFC 9110; 529 is Anthropic's overload)."""
    if status == 429:
        return LLMRateLimited
    if status in (401, 403):
        return LLMAuthError
    if status in (408, 409, 425) or status >= 500:
        return LLMUnavailable
    if 400 <= status < 500:
        return LLMBadRequest
    return LLMBadResponse


def status_failure(status: int, text: str, headers: Mapping[str, str]) -> Failure:
    """Return the failure for an answer with an HTTP status other than success."""
    if 300 <= status < 400:
        text = "the endpoint answers with a redirect, and redirects are never followed"
    return Failure(by_status(status), text, status, retry_after_seconds(headers))


def connection_failure(error: BaseException) -> Failure:
    """Return the failure for an exception from below the SDK, or one the SDK made of such."""
    for cause in causes(error):
        if isinstance(cause, AddressRefused):
            return Failure(LLMEndpointRefused, str(cause))
        if isinstance(cause, Unsupported):
            return Failure(LLMBadRequest, str(cause))
    # The innermost says most, such as which check of a certificate failed.
    reason = [str(cause) for cause in causes(error) if str(cause)][-1:]
    return Failure(LLMUnavailable, ": ".join(["no connection, or it broke", *reason]))


_OF_NO_PROTOCOL: Final = (
    *(ValueError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, AssertionError, RecursionError),
)


def other_failure(error: Exception) -> Failure:
    """Return the failure for an exception of no SDK's own: what came was not of the protocol."""
    if isinstance(error, Unsupported):
        return Failure(LLMBadRequest, str(error))
    if isinstance(error, UnicodeEncodeError) or _unsendable(error):
        return Failure(LLMBadRequest, "the request holds a value that JSON cannot carry")
    if isinstance(error, OSError | AddressRefused):
        return connection_failure(error)
    if isinstance(error, _OF_NO_PROTOCOL):
        return Failure(LLMBadResponse, "the answer is not of the provider's protocol")
    return Failure(LLMError, "failed in a way that is not known")


def _unsendable(error: Exception) -> bool:
    """Whether this is what the JSON encoder, which runs inside the SDK, raises."""
    if isinstance(error, TypeError | ValueError):
        return "JSON serializable" in str(error) or "JSON compliant" in str(error)
    return False


def causes(error: BaseException) -> Iterable[BaseException]:
    """Yield the exception and what it came from."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Return how long the answer asks to be left alone (RFC 9110 section 10.2.3).

    None where it does not say so, or in no way that makes sense; a year at most.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return _wait(milliseconds / 1000)
    text = headers.get("retry-after")
    seconds = _number(text)
    if seconds is None and text is not None:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except Exception:  # ValueError is the usual one; years and zones overflow in several ways
            seconds = None
    return None if seconds is None else _wait(seconds)


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return None if math.isnan(number) else number


def _wait(seconds: float) -> float:
    return min(max(0.0, seconds), _MAX_WAIT_SECONDS)
