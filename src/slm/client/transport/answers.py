"""Turns unexpected responses into errors of `slm.errors`, with a sentence.

Distinguishes the SLM's own responses from those of an intermediary. Sends nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import urlsplit

import aiohttp
from pydantic import BaseModel, ConfigDict, ValidationError

from slm.common.retries import retry_after_seconds
from slm.common.scrub import one_line
from slm.errors import (
    BadRequest,
    Forbidden,
    InternalError,
    InvalidRequest,
    NotFound,
    ProblemError,
    SLMError,
    SLMUnavailable,
    TLSError,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    problem_classes,
)

_PROBLEMS = problem_classes()
_BY_STATUS: dict[int, type[ProblemError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    429: TooManyRequests,
    503: Unavailable,
}
UPGRADE: Final = "a WebSocket upgrade"
"""What a handshake requests, as named in an error."""

_HINTS: Final = {
    200: "something other than the SLM answers there",
    400: "it may not forward the Upgrade and Connection headers",
    404: "it has no such path, or does not forward the Upgrade and Connection headers",
    426: "it may not forward the Upgrade and Connection headers",
    502: "it does not reach the SLM",
    504: "it does not reach the SLM",
}
_NO_TLS: Final = (
    "WRONG_VERSION_NUMBER",
    "RECORD_LAYER_FAILURE",
    "UNKNOWN_PROTOCOL",
    "HTTP_REQUEST",
)


class NobodyListens(SLMUnavailable):
    """The SLM's host refused the connection: no server runs, so a retry burdens none."""


class UpgradeFailed(SLMUnavailable):
    """Something between the client and the SLM blocks WebSockets."""


class Redirected(aiohttp.ClientError):
    """A redirect, which is never followed: it would send the token elsewhere.

    Attributes:
        status: the 3xx status.
        target: the scheme and host of the redirect's target, if it names one.
    """

    def __init__(self, status: int, location: str) -> None:
        super().__init__()
        self.status = status
        try:
            parts = urlsplit(location)
            self.target = f"{parts.scheme}://{parts.hostname}" if parts.hostname else ""
        except ValueError:
            self.target = ""


class AskedServer:
    """The server that a request went to, as named in errors.

    Args:
        url: the SLM's address.
        proxy: host and port of the proxy, if there is one.
    """

    def __init__(self, url: str, proxy: str | None) -> None:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host = f"[{host}]" if ":" in host else host
        self.name = f"{host}:{port or (443 if parts.scheme == 'https' else 80)}"
        self.secure = parts.scheme == "https"
        self.proxy = proxy

    def answered_by(self, headers: Mapping[str, str]) -> str:
        """Name the sender of this response; the SLM adds its epoch to each of its own."""
        if is_ours(headers):
            return f"the SLM at {self.name}"
        # Without TLS, the proxy can also answer in the name of the SLM.
        where = self.name if self.secure or self.proxy is None else self.proxy
        kind = one_line(headers.get("Server", ""), 40)
        return f"the proxy at {where}" + (f" ({kind})" if kind else "")


def is_ours(headers: Mapping[str, str]) -> bool:
    """Return whether a response is the SLM's own rather than an intermediary's."""
    return "SLM-Epoch" in headers


def problem(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    repeated: Callable[[str], str],
    place: AskedServer,
    what: str,
) -> SLMError:
    """Return the error for a response other than success.

    Args:
        status: its status.
        headers: its headers.
        body: its body, as far as it is known.
        repeated: makes the peer's text safe to repeat.
        place: the server that was asked.
        what: what was requested.
    """
    code, detail = "", ""
    with contextlib.suppress(ValidationError):
        told = _Problem.model_validate_json(body)
        code, detail = told.code, told.detail
    known = _PROBLEMS.get(code)
    detail = repeated(detail) or (
        f"HTTP {status}" if known else _without_words(status, headers, repeated, place, what)
    )
    if what == UPGRADE and status not in (401, 403, 429, 503):
        return UpgradeFailed(detail)
    cls = known if known is not None and known.status == status else _BY_STATUS.get(status)
    if cls is None:
        cls = InternalError if status >= 500 else BadRequest
    if issubclass(cls, InvalidRequest):
        return cls(detail)
    return cls(detail, retry_after_seconds=retry_after_seconds(headers))


def _without_words(
    status: int,
    headers: Mapping[str, str],
    repeated: Callable[[str], str],
    place: AskedServer,
    what: str,
) -> str:
    """Return a sentence for a response without an explanation in its body."""
    who = repeated(place.answered_by(headers))
    if not is_ours(headers):
        hint = _HINTS.get(status) if what == UPGRADE or status in (502, 504) else None
        return f"{who} answered {status} to {what}" + (f": {hint}" if hint else "")
    if status == 401:
        return (
            f"{who} does not accept the token: it is wrong, expired or revoked (HTTP 401); "
            "`slm tokens create` makes a new one"
        )
    if status == 403:
        return f"the token's scopes do not allow it at {place.name} (HTTP 403)"
    if status == 404 and what == UPGRADE:
        return (
            f"the proxy before {place.name} dropped a WebSocket upgrade (the SLM answered 404): "
            "it must forward the Upgrade and Connection headers"
        )
    return f"{who} answered {status} to {what}"


def handshake_failure(
    error: aiohttp.WSServerHandshakeError, repeated: Callable[[str], str], place: AskedServer
) -> SLMError:
    """Return the error for a handshake with a response that is not a WebSocket's."""
    headers: Mapping[str, str] = error.headers or {}
    if error.status == 101:
        who = repeated(place.answered_by(headers))
        said = one_line(error.message).lower()
        return UpgradeFailed(f"{who} answered {UPGRADE} in a wrong way ({said})")
    return problem(error.status, headers, b"", repeated, place, UPGRADE)


def failure_of(
    error: Exception, what: str, timeout: float, place: AskedServer, repeated: Callable[[str], str]
) -> SLMError:
    """Return our error for an exception of the HTTP library, which contains the request.

    Args:
        error: the exception.
        what: what was requested.
        timeout: the time limit in seconds.
        place: the server that was asked.
        repeated: makes the peer's text safe to repeat.
    """
    if isinstance(error, SLMError):
        return error.with_traceback(None)
    if isinstance(error, aiohttp.WSServerHandshakeError):
        return handshake_failure(error, repeated, place)
    kind = UpgradeFailed if what == UPGRADE else SLMUnavailable
    if isinstance(error, Redirected):
        to = f" to {repeated(error.target)}" if error.target else ""
        return kind(
            f"{place.name} answered {what} with a redirect ({error.status}){to}, which is never "
            "followed"
        )
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return _proxy_refused(error.status, place)
    if isinstance(error, aiohttp.ClientProxyConnectionError):
        return SLMUnavailable(f"the proxy {place.proxy} cannot be reached: {_os_reason(error)}")
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
        return _tls_failure(error, place)
    if isinstance(error, TimeoutError):
        return kind(f"no answer to {what} from {place.name} within {timeout:g} s")
    if isinstance(error, aiohttp.ServerDisconnectedError):
        hint = "" if place.secure else "; if it speaks TLS, write https://"
        return kind(f"{place.name} closed the connection without an answer to {what}{hint}")
    if isinstance(error, aiohttp.ClientResponseError):
        if not place.secure:
            return SLMUnavailable(
                f"{place.name} does not answer in HTTP: if it speaks TLS, write https://"
            )
        return SLMUnavailable(f"{place.name} broke HTTP: {type(error).__name__}")
    if isinstance(error, aiohttp.ClientConnectorError):
        refused = error.errno == errno.ECONNREFUSED
        return (NobodyListens if refused else SLMUnavailable)(
            f"no SLM at {place.name}: {_connect_reason(error.os_error)}; check that it is running "
            "and that its address is right"
        )
    if isinstance(error, aiohttp.ClientError | OSError):
        said = one_line(str(error)) or type(error).__name__
        refused = getattr(error, "errno", None) == errno.ECONNREFUSED
        return (NobodyListens if refused else SLMUnavailable)(f"the SLM did not answer: {said}")
    # Whatever else a response makes the library raise, the client must continue.
    return SLMUnavailable(f"the SLM's answer cannot be read: {type(error).__name__}")


def _proxy_refused(status: int, place: AskedServer) -> SLMError:
    hint = {
        403: ": it does not allow this destination",
        407: ": it asks for a user name and password, or refuses these",
        502: ": it does not reach it",
        503: ": it does not reach it",
        504: ": it does not reach it",
    }.get(status, "")
    return SLMUnavailable(
        f"the proxy {place.proxy} answered {status} to a tunnel to {place.name}{hint}"
    )


def _tls_failure(error: Exception, place: AskedServer) -> SLMError:
    cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
    reason = getattr(cause, "verify_message", None) or getattr(cause, "reason", None) or str(cause)
    if isinstance(reason, str) and reason.upper().replace(" ", "_") in _NO_TLS:
        return TLSError(f"{place.name} does not speak TLS: it may be plain http there")
    return TLSError(f"the certificate of {place.name} was not accepted: {one_line(str(reason))}")


def _os_reason(error: aiohttp.ClientProxyConnectionError) -> str:
    return one_line(error.os_error.strerror or type(error.os_error).__name__)


def _connect_reason(error: OSError) -> str:
    """Return why a connection failed, without the library's details of its attempts."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()
    return one_line(error.strerror or str(error)) or type(error).__name__


class _Problem(BaseModel):
    model_config = ConfigDict(defer_build=True)

    code: str = ""
    detail: str = ""
