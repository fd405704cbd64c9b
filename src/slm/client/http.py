"""The client's connection to one SLM: its address, its token, the GETs and the handshake.

An answer becomes a schema, a status an error of `slm.errors`. Knows no cache and tries nothing
twice. No proxy or netrc of the environment is used, no redirect followed, TLS always verified.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Awaitable, Callable, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp
from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError
from yarl import URL

from slm.client.direct import DirectWebSocket
from slm.client.received import ReceivedSnapshot
from slm.client.retry import NobodyListens
from slm.client.timings import Timings
from slm.client.tls import TlsFiles
from slm.endpoints import literal_address
from slm.errors import (
    BadRequest,
    ConfigurationError,
    Forbidden,
    InternalError,
    InvalidRequest,
    NotFound,
    ProblemError,
    ProtocolError,
    SLMError,
    SLMUnavailable,
    TLSError,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    problem_classes,
)
from slm.files import NotTrusted, read_given
from slm.schemas import Agent, LLMConfigWithKey
from slm.scrub import MAX_TEXT, one_line, scrubbed

_T = TypeVar("_T")
_M = TypeVar("_M", bound=BaseModel)

MAX_ANSWER_BYTES: Final = 1024 * 1024
"""The largest answer about one agent, and the largest error."""

MAX_SNAPSHOT_BYTES: Final = 256 * 1024 * 1024
"""The largest snapshot: that of 100,000 agents has about a third of it."""

_PROBLEMS = problem_classes()
_BY_STATUS: dict[int, type[ProblemError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    429: TooManyRequests,
    503: Unavailable,
}
_SCHEMES = {"http": "http", "ws": "http", "https": "https", "wss": "https"}


class EpochChanged(SLMError):
    """The answer comes from another life of the database than the one that was asked about."""

    code = "epoch-changed"


def normalised_url(slm_url: str) -> str:
    """Return `http(s)://host[:port][/path]` for an http(s) or ws(s) URL of an SLM.

    Plain http is for loopback alone: the token and the keys would be there for all to read, and
    the SLM hands out no key that way (docs/protocol.md section 3).

    Raises:
        ConfigurationError: it is not such a URL; the message does not repeat it.
    """
    try:
        parts = urlsplit(slm_url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    scheme = _SCHEMES.get(parts.scheme.lower())
    if scheme is None or not host:
        raise ConfigurationError("slm_url must be an http, https, ws or wss URL with a host")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigurationError(
            "slm_url may hold neither a user name, nor a password, nor a query; give the token as "
            "token= or SLM_TOKEN"
        )
    if scheme == "http" and not _is_loopback(host):
        raise ConfigurationError(
            "slm_url must be https (or wss) unless the SLM is on this machine: over plain http the "
            "token and the API keys could be read on the way"
        )
    return str(URL(f"{scheme}://{parts.netloc}{parts.path}")).rstrip("/")


def _is_loopback(host: str) -> bool:
    if host.rstrip(".").lower() == "localhost":
        return True
    address = literal_address(host)
    return address is not None and address.is_loopback


class TokenSource:
    """The bearer token of the moment; one that comes from a file is read anew each time.

    Args:
        token: the token itself; else `token_file`, SLM_TOKEN or SLM_TOKEN_FILE, in this order.
        token_file: a file that holds it, so that it can be replaced while the backend runs.

    Raises:
        ConfigurationError: there is none, the file cannot be read, or it is no possible token.
    """

    def __init__(
        self, token: str | SecretStr | None = None, token_file: str | os.PathLike[str] | None = None
    ) -> None:
        if token is None and token_file is None:
            token = os.environ.get("SLM_TOKEN") or None
            token_file = os.environ.get("SLM_TOKEN_FILE") or None
        self._file = Path(token_file) if token is None and token_file is not None else None
        if self._file is not None:
            self._token = self._read(self._file)
        elif token is not None:
            text = token.get_secret_value() if isinstance(token, SecretStr) else token
            self._token = _usable_token(text, "the token")
        else:
            raise ConfigurationError(
                "no token for the SLM: give token= or token_file=, or set SLM_TOKEN or "
                "SLM_TOKEN_FILE"
            )

    def headers(self) -> dict[str, str]:
        """Return the Authorization header of the next request."""
        if self._file is not None:
            # A file that is being replaced may be gone or empty for a moment.
            with contextlib.suppress(ConfigurationError):
                self._token = self._read(self._file)
        return {"Authorization": f"Bearer {self._token.get_secret_value()}"}

    def repeated(self, text: str) -> str:
        """Return a server's words as one line for an error or a log, without the token."""
        return one_line(scrubbed(text[:MAX_TEXT], self._token.get_secret_value()))

    @staticmethod
    def _read(path: Path) -> SecretStr:
        try:
            text = read_given(path).decode()
        except NotTrusted as error:
            raise ConfigurationError(f"the token file cannot be used: {error}") from None
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ConfigurationError(f"the token file {path} cannot be read: {reason}") from None
        return _usable_token(text, f"the token file {path}")


def _usable_token(text: str, where: str) -> SecretStr:
    text = text.strip()
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise ConfigurationError(f"{where} holds no token: one word of printable ASCII is expected")
    return SecretStr(text)


class Connection:
    """One HTTP session to one SLM, for the GETs and the stream; bound to the loop it is made in."""

    def __init__(self, base_url: str, token: TokenSource, tls: TlsFiles, timings: Timings) -> None:
        self._base_url = base_url
        self._token = token
        self._timings = timings
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls.context(), limit=16),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),  # each request below has its own
            middlewares=(_refuse_redirects,),
            ws_response_class=DirectWebSocket,
            trust_env=False,
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    def repeated(self, text: str) -> str:
        """Return the SLM's words as one line for an error or a log, without the token."""
        return self._token.repeated(text)

    async def get_llm(
        self, agent_id: str, *, min_revision: int, epoch: str | None
    ) -> LLMConfigWithKey:
        """Return one agent's config with its key.

        Args:
            agent_id: the agent; taken literally.
            min_revision: the answer must not be older than this.
            epoch: which `min_revision` belongs to; None: not known yet.

        Raises:
            EpochChanged: the SLM's database is in another life by now.
            ProblemError: what the SLM answered instead.
            SLMUnavailable: no answer, or none that can be used.
        """
        path = f"/api/agents/{quote(agent_id, safe='')}/llm"
        agent = await self._get(path, LLMConfigWithKey, epoch, min_revision)
        if agent.agent_id != agent_id:
            raise ProtocolError(f"asked for agent {agent_id!r}, the SLM answered another one")
        return agent

    async def get_default(self, *, epoch: str | None) -> Agent:
        """Return the default agent, without its key."""
        return await self._get("/api/agents/default", Agent, epoch)

    async def get_snapshot(self, *, min_revision: int) -> ReceivedSnapshot:
        """Return every agent's config with its key, at `min_revision` or later."""
        return await self._get(
            "/api/snapshot",
            ReceivedSnapshot,
            None,
            min_revision,
            timeout=self._timings.snapshot_timeout_seconds,
            max_bytes=MAX_SNAPSHOT_BYTES,
        )

    async def open_stream(self) -> DirectWebSocket:
        """Return the WebSocket, open and not yet subscribed."""
        timings = self._timings
        handshake = self._session.ws_connect(
            URL(self._base_url + "/ws", encoded=True),
            headers=self._token.headers(),
            autoping=False,  # the stream pings, and answers
            timeout=aiohttp.ClientWSTimeout(ws_close=timings.close_timeout_seconds),
            # Compression costs the SLM 2 to 4 times the CPU and 40 KiB a connection.
            compress=0,
        )
        ws = await _translated(handshake, "the stream", timings.request_timeout_seconds)
        assert isinstance(ws, DirectWebSocket)  # noqa: S101 - for the type checker
        return ws

    async def _get(
        self,
        path: str,
        model: type[_M],
        epoch: str | None,
        min_revision: int | None = None,
        timeout: float | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> _M:
        query = "" if min_revision is None else f"?min_revision={min_revision}"
        url = URL(self._base_url + path + query, encoded=True)
        status, headers, body = await _translated(
            self._read(url, max_bytes), path, timeout or self._timings.request_timeout_seconds
        )
        told = headers.get("SLM-Epoch")
        if epoch is not None and told is not None and told != epoch:
            raise EpochChanged("the SLM's database has another epoch")
        failure: SLMError
        if status == 200:
            with contextlib.suppress(ValidationError):
                return model.model_validate_json(body)
            failure = ProtocolError(f"the SLM's answer to {path} is not of the contract's shape")
        else:
            failure = _problem(status, headers, body, self.repeated)
        # The body may hold keys. The validation error knows it, so this is outside the handler; and
        # a crash reporter sends the variables of each frame along.
        del body
        raise failure

    async def _read(self, url: URL, max_bytes: int) -> tuple[int, Mapping[str, str], bytes]:
        async with self._session.get(url, headers=self._token.headers()) as answer:
            pieces, size = [], 0
            # Counted as it is decompressed: a few bytes on the wire may stand for gigabytes.
            async for piece in answer.content.iter_any():
                pieces.append(piece)
                size += len(piece)
                if size > max_bytes:
                    answer.close()
                    raise SLMUnavailable(f"the SLM's answer is larger than {max_bytes} bytes")
            return answer.status, answer.headers, b"".join(pieces)


async def _refuse_redirects(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Let no redirect be followed, in the handshake either: it would take the token elsewhere."""
    answer = await handler(request)
    if 300 <= answer.status < 400:
        status = answer.status
        answer.close()
        raise _Redirected(status)
    return answer


class _Redirected(aiohttp.ClientError):
    def __init__(self, status: int) -> None:
        super().__init__(f"it answered with a redirect ({status}), which is never followed")


async def _translated(call: Awaitable[_T], what: str, timeout: float) -> _T:
    """Turn the HTTP library's exceptions into ours: theirs know the request, and so the token."""
    try:
        async with asyncio.timeout(timeout):
            return await call
    except Exception as error:
        failed = error
    except BaseException as error:
        # A cancellation, without the library's frames, whose variables hold the token.
        error.__context__ = error.__cause__ = None
        raise error.with_traceback(None)  # noqa: B904 - it is the same one
    # Outside the handler, so that the original is not carried along as its context.
    try:
        failure = _failure_of(failed, what, timeout)
    finally:
        del failed
    raise failure


def _failure_of(error: Exception, what: str, timeout: float) -> SLMError:
    if isinstance(error, SLMError):
        return error.with_traceback(None)
    if isinstance(error, aiohttp.WSServerHandshakeError):
        return _problem(error.status, error.headers or {}, b"")
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
        return TLSError(f"the SLM's certificate was not accepted: {_tls_reason(error)}")
    if isinstance(error, TimeoutError):
        return SLMUnavailable(f"no answer to {what} within {timeout:g} s")
    if isinstance(error, aiohttp.ClientResponseError):
        return SLMUnavailable(f"the SLM broke HTTP: {type(error).__name__}")
    if isinstance(error, aiohttp.ClientError | OSError):
        said = one_line(str(error)) or type(error).__name__
        refused = getattr(error, "errno", None) == errno.ECONNREFUSED
        return (NobodyListens if refused else SLMUnavailable)(f"the SLM did not answer: {said}")
    # Whatever else an answer makes the library raise, the client must go on.
    return SLMUnavailable(f"the SLM's answer cannot be read: {type(error).__name__}")


def _tls_reason(error: Exception) -> str:
    cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
    return getattr(cause, "verify_message", None) or getattr(cause, "reason", None) or str(cause)


def _problem(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    repeated: Callable[[str], str] = one_line,
) -> SLMError:
    """Return the error that an answer other than success stands for."""
    code, detail = "", ""
    with contextlib.suppress(ValidationError):
        told = _Problem.model_validate_json(body)
        code, detail = told.code, told.detail
    cls = _PROBLEMS.get(code)
    if cls is None or cls.status != status:
        cls = _BY_STATUS.get(status)
    detail = repeated(detail) or f"HTTP {status}"
    if cls is None:
        cls = InternalError if status >= 500 else BadRequest
    if issubclass(cls, InvalidRequest):
        return cls(detail)
    return cls(detail, retry_after_seconds=_retry_after(headers))


class _Problem(BaseModel):
    model_config = ConfigDict(defer_build=True)

    code: str = ""
    detail: str = ""


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return Retry-After in seconds; a date counts from the answer's own Date, not our clock."""
    text = headers.get("Retry-After", "").strip()
    if text.isdecimal() and text.isascii():
        return float(text[:9])
    try:
        until = parsedate_to_datetime(text)
        return max(0.0, (until - parsedate_to_datetime(headers.get("Date", ""))).total_seconds())
    except Exception:  # ValueError is the usual one; years and zones overflow in several ways
        return None
