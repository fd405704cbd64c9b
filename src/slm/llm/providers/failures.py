"""What a provider's error means: which of our errors, with the provider's own text.

Knows HTTP statuses and the formats of providers' errors; nothing about the request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from slm.common.retries import retry_after_seconds
from slm.errors import (
    LLMAuthError,
    LLMBadRequest,
    LLMBadResponse,
    LLMEndpointRefused,
    LLMError,
    LLMQuotaExhausted,
    LLMRateLimited,
    LLMUnavailable,
)
from slm.llm.answer import AnswerUnreadable
from slm.llm.providers.wire import NotOfTheProtocol
from slm.llm.providers.words import Words, calls_itself_error, words_of
from slm.llm.transport import AddressRefused

# An error inside a 200 or a stream has no status of its own; its code tells what it would be.
_STATUS_OF_CODE: Final = {
    **dict.fromkeys(("invalid_request_error", "invalid_argument", "failed_precondition"), 400),
    **dict.fromkeys(("bad_request", "badrequesterror", "validation_error"), 400),
    **dict.fromkeys(("unsupported_parameter", "unsupported_value", "content_filter"), 400),
    **dict.fromkeys(("context_length_exceeded", "string_above_max_length"), 400),
    **dict.fromkeys(("authentication_error", "invalid_api_key", "unauthenticated"), 401),
    **dict.fromkeys(("api_key_invalid", "unauthorized", "authenticationerror"), 401),
    **dict.fromkeys(("billing_error", "insufficient_quota", "insufficient_balance"), 402),
    **dict.fromkeys(("insufficient_credits", "quota_exhausted", "billing_hard_limit_reached"), 402),
    **dict.fromkeys(("permission_error", "permission_denied", "forbidden"), 403),
    **dict.fromkeys(("not_found_error", "not_found", "model_not_found", "notfounderror"), 404),
    **dict.fromkeys(("request_too_large", "request_too_large_error"), 413),
    **dict.fromkeys(("rate_limit_error", "rate_limit_exceeded", "resource_exhausted"), 429),
    **dict.fromkeys(("rate_limit", "ratelimiterror", "too_many_requests", "throttled"), 429),
    **dict.fromkeys(("throttlingexception", "tokens", "requests"), 429),
    **dict.fromkeys(("api_error", "server_error", "internal", "internal_error"), 500),
    **dict.fromkeys(("internal_server_error", "internalservererror"), 500),
    **dict.fromkeys(("unavailable", "service_unavailable", "serviceunavailable"), 503),
    **dict.fromkeys(("timeout_error", "deadline_exceeded"), 504),
    **dict.fromkeys(("overloaded_error", "overloaded", "engine_overloaded"), 529),
}
_BY_WORDS: Final = (
    (402, re.compile(r"insufficient[ _](quota|balance|credit|fund)|credit balance is too low"
                     r"|out of credits|requires? more credits|payment required"
                     r"|arrears|exceeded your current quota|余额不足|欠费")),
    (429, re.compile(r"rate.?limit|too many requests|throttl|slow down")),
    (529, re.compile(r"over ?load|at capacity|over capacity|server is busy|try again later")),
    (401, re.compile(r"(invalid|incorrect|missing|wrong|no) (api.?key|credential|x-api-key|bearer)"
                     r"|unauthori[sz]ed|api key not valid|authentication")),
    (404, re.compile(r"unexpected endpoint|model .{0,80}not (found|exist)|no such model"
                     r"|does not exist|unknown model|page not found")),
    (400, re.compile(r"bad request|invalid request|context (length|window)|maximum context"
                     r"|(unsupported|unrecogni[sz]ed|unknown) (parameter|argument|value|field)"
                     r"|not permitted|does not support|is not supported")),
)  # fmt: skip
# These suggest that a quota recovers by itself, as Gemini's do each minute.
_COMES_BACK: Final = re.compile(r"retry in|try again in|per (minute|second|day)|retrydelay")


@dataclass(frozen=True, slots=True)
class Failure:
    """How an adapter interprets an exception: which error, and the facts that may be kept."""

    kind: type[LLMError]
    detail: str
    status: int | None = None
    retry_after_seconds: float | None = None


class Unsupported(Exception):
    """The request asks for something that the provider's protocol cannot express."""


class Refused(Exception):
    """The provider answered with an error, whatever the status.

    Attributes:
        status: the response's status; for an error inside a 200 or a stream, the equivalent one.
        words: the content of the error.
        failure: the corresponding error of ours.
    """

    def __init__(self, status: int, words: Words, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.status = status
        self.words = words
        self.failure = failure


def refused(
    status: int, body: Any, headers: Mapping[str, str], place: str, *, in_answer: bool = False
) -> Refused:
    """Return the meaning of an error response.

    Args:
        status: the response's HTTP status.
        body: its JSON, or its text.
        headers: the response's headers.
        place: the requested path without its query; it reveals an endpoint with an extra segment.
        in_answer: the error came in a response with status 200, or in the middle of a stream.
    """
    words = words_of(body)
    if 300 <= status < 400:
        words = Words("the endpoint answers with a redirect, and redirects are never followed")
    elif in_answer:
        said = _status_said(words)
        if said is None and not calls_itself_error(body):
            text = f"the answer is not of the provider's protocol: {words.text}"
            return Refused(status, words, Failure(LLMBadResponse, text))
        status = said or 500
    kind = _kind(status, words)
    wait = retry_after_seconds(headers)
    text = words.text or "the answer says no more"
    if status in (404, 405, 501) or not words.text:
        text = f"POST {place}: {text}"
    wait = words.wait_seconds if wait is None else wait
    return Refused(status, words, Failure(kind, text, status, wait))


def not_an_answer(body: bytes, place: str) -> Failure:
    """Return the failure for a response with status 200 that is HTML, text or something else."""
    # JSON without a reason may be an actual answer, which must not be logged.
    text = words_of(body.decode("utf-8", "replace"), dumped=False).text
    said = f": {text}" if text else ""
    return Failure(
        LLMBadResponse,
        f"the answer to POST {place} is not of the provider's protocol{said}",
    )


def _kind(status: int, words: Words) -> type[LLMError]:
    said = _status_by_code(words)
    if status in (402, 429) or said == 402:
        # An exhausted balance is not a rate limit: the next attempt would fail as well.
        text = words.text.lower()
        paid = said == 402 or (_BY_WORDS[0][1].search(text) and not _COMES_BACK.search(text))
        if status == 402 or (paid and words.wait_seconds is None):
            return LLMQuotaExhausted
    if status in (400, 403, 500) and said in (401, 402, 429, 529):
        return by_status(said)
    if status == 400 and _BY_WORDS[0][1].search(words.text.lower()):
        return LLMQuotaExhausted
    return by_status(status)


def _status_said(words: Words) -> int | None:
    """Return the HTTP status that an error without one implies, if its text says so."""
    for code in words.codes:
        status = status_of(code)
        if status is not None:
            return status
    status = _status_by_code(words)
    if status is not None:
        return status
    text = words.text.lower()
    return next((status for status, pattern in _BY_WORDS if pattern.search(text)), None)


def _status_by_code(words: Words) -> int | None:
    found = [_STATUS_OF_CODE[code] for code in words.codes if code in _STATUS_OF_CODE]
    # "insufficient_quota" comes with "rate_limit_error", and "api_key_invalid" with
    # "invalid_argument"; the more specific one wins.
    if 402 in found:
        return 402
    telling = [status for status in found if status not in (400, 500)]
    return next(iter([*telling, *found]), None)


def status_of(code: object) -> int | None:
    """Return the HTTP status that an error's own `code` is or implies, if any."""
    if isinstance(code, str) and len(code) == 3 and code.isascii() and code.isdecimal():
        code = int(code)
    return code if isinstance(code, int) and 400 <= code < 600 else None


def by_status(status: int) -> type[LLMError]:
    """Return the error for an HTTP status (RFC 9110; 529 is Anthropic's overload)."""
    if status == 402:
        return LLMQuotaExhausted
    if status == 429:
        return LLMRateLimited
    if status in (401, 403):
        return LLMAuthError
    if status in (408, 409, 425) or status >= 500:
        return LLMUnavailable
    if 400 <= status < 500:
        return LLMBadRequest
    return LLMBadResponse


def connection_failure(error: BaseException) -> Failure:
    """Return the failure for an exception from below the protocol."""
    for cause in causes(error):
        if isinstance(cause, AddressRefused):
            return Failure(LLMEndpointRefused, str(cause))
        if isinstance(cause, Unsupported):
            return Failure(LLMBadRequest, str(cause))
        if isinstance(cause, aiohttp.ClientHttpProxyError):
            # Its text would contain the proxy's URL, which may include a password.
            return Failure(LLMUnavailable, f"the proxy refuses the request with {cause.status}")
        if isinstance(cause, aiohttp.ClientResponseError):
            return Failure(LLMUnavailable, "no connection, or it broke: the answer is no HTTP")
    # The innermost is the most informative, such as which certificate check failed.
    reason = [str(cause) for cause in causes(error) if str(cause)][-1:]
    return Failure(LLMUnavailable, ": ".join(["no connection, or it broke", *reason]))


OF_NO_PROTOCOL: Final = (
    *(ValueError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, AssertionError, RecursionError),
)


def failure_of(error: Exception) -> Failure:
    """Return the failure for any exception that can end a call."""
    if isinstance(error, Refused):
        return error.failure
    if isinstance(error, Unsupported):
        return Failure(LLMBadRequest, str(error))
    if isinstance(error, AnswerUnreadable):
        return Failure(LLMBadResponse, str(error))
    if isinstance(error, NotOfTheProtocol):
        said = words_of(error.text).text
        return Failure(LLMBadResponse, f"{error}: {said}" if said else str(error))
    if isinstance(error, OSError | AddressRefused | aiohttp.ClientError):
        return connection_failure(error)
    if isinstance(error, OF_NO_PROTOCOL):
        return Failure(LLMBadResponse, "the answer is not of the provider's protocol")
    return Failure(LLMError, "failed in a way that is not known")


def causes(error: BaseException) -> Iterable[BaseException]:
    """Yield the exception and its causes."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        below = None if current.__suppress_context__ else current.__context__
        current = current.__cause__ or below
