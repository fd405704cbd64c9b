"""The command line's REST client: one call, and its response or error.

Knows paths and problems; knows neither options nor how a response is displayed.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO, Final, TypeVar
from urllib.parse import quote

import aiohttp
from pydantic import BaseModel, ValidationError
from yarl import URL

from slm.cli.target import Target
from slm.client.transport.tls import TlsFiles
from slm.errors import (
    AgentNotFound,
    InvalidRequest,
    PreconditionFailed,
    ProblemError,
    SLMUnavailable,
    problem_classes,
)
from slm.schemas import Agent, AgentList

_M = TypeVar("_M", bound=BaseModel)
_PIECE_BYTES: Final = 256 * 1024

OnBytes = Callable[[int, int | None], None]


@dataclass(frozen=True)
class ApiAnswer:
    """A successful response of the server.

    Attributes:
        data: the JSON object; empty for 204.
        revision: the value of `SLM-Revision`.
        epoch: the value of `SLM-Epoch`.
    """

    data: dict[str, Any]
    revision: int
    epoch: str


class Api:
    """A server's REST API, used in an `async with` block."""

    def __init__(self, target: Target, *, timeout_seconds: float = 30.0) -> None:
        self.target = target
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Api:
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self.target.token.get_secret_value()}"},
            connector=aiohttp.TCPConnector(ssl=tls_context(self.target)),
            proxy=self.target.proxies.full_url(self.target.url),
            timeout=self._timeout,
            trust_env=False,  # the environment's proxy would get token and keys
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        """The session, with token and TLS, for anything other than one request and response."""
        assert self._session is not None, "used outside its block"  # noqa: S101
        return self._session

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str | int] | None = None,
        if_match: int | str | None = None,
    ) -> ApiAnswer:
        """Send one request.

        Args:
            method: the HTTP method.
            path: from the root, already percent-encoded.
            body: sent as JSON.
            params: the query.
            if_match: the revision that the agent must have, or its ETag, which also contains the
                epoch (RFC 9110, If-Match).

        Raises:
            ProblemError: the server's error, with its class and text.
            SLMUnavailable: nothing answers there, or not as an SLM does.
        """
        headers = {} if if_match is None else {"If-Match": f'"{if_match}"'}
        try:
            async with self.session.request(
                method,
                URL(self.target.url + path, encoded=True),
                json=body,
                params=params,
                headers=headers,
                allow_redirects=False,
            ) as answer:
                text = await answer.text()
                status, revision = answer.status, answer.headers.get("SLM-Revision", "")
                epoch = answer.headers.get("SLM-Epoch", "")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise unreachable(self.target, error) from None
        data = _json_object(text) if text else {}
        if status >= 300:
            raise _problem(self.target, status, data)
        if data is None or not revision.isdecimal():
            raise SLMUnavailable(
                f"something answers at {self.target.url}, but it is not an SLM: the answer is not "
                "JSON or has no SLM-Revision header, which a proxy must forward"
            )
        return ApiAnswer(data, int(revision), epoch)

    async def download(self, method: str, path: str, to: BinaryIO, on_bytes: OnBytes) -> None:
        """Send one request and write its response, whatever it contains, to a file.

        Args:
            method: the HTTP method.
            path: from the root.
            to: the file, open for writing.
            on_bytes: called for each piece with its size and the total size.

        Raises:
            ProblemError: the server's error.
            SLMUnavailable: nothing answers there, or the response was cut short.
        """
        # Copying a large database may take any time; only silence is a failure.
        patient = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=300)
        try:
            async with self.session.request(
                method, self.target.url + path, allow_redirects=False, timeout=patient
            ) as answer:
                if answer.status >= 300:
                    raise _problem(self.target, answer.status, _json_object(await answer.text()))
                async for piece in answer.content.iter_chunked(_PIECE_BYTES):
                    to.write(piece)
                    on_bytes(len(piece), answer.content_length)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise unreachable(self.target, error) from None

    async def agent(self, agent_id: str) -> Agent:
        """Return the agent with exactly this id; arguments and errors: `agent_and_version`."""
        return (await self.agent_and_version(agent_id))[0]

    async def agent_and_version(self, agent_id: str) -> tuple[Agent, str]:
        """Return the agent with exactly this id, and the If-Match value for it.

        Uses the list, because the path /api/agents/default returns whichever agent is the default.

        Raises:
            AgentNotFound: there is none, or the token cannot see it.
        """
        listed = await self.call("GET", "/api/agents", params={"agent_id": agent_id})
        agents = parsed(AgentList, listed)
        for agent in agents.agents:
            if agent.agent_id == agent_id:
                return agent, f"{agents.epoch}-{agent.revision}"
        raise AgentNotFound(
            f"there is no agent {agent_id!r} at {self.target.url} that this token may see; "
            "`slm agents list` shows those that are there"
        )


def call(
    target: Target, method: str, path: str, *, timeout_seconds: float = 30.0, **how: Any
) -> ApiAnswer:
    """Send a command's only request; for arguments and errors see `Api.call`."""

    async def once() -> ApiAnswer:
        async with Api(target, timeout_seconds=timeout_seconds) as api:
            return await api.call(method, path, **how)

    return asyncio.run(once())


def agent_path(agent_id: str) -> str:
    """Return the path of an agent; an adopted id may contain anything, even a slash."""
    return f"/api/agents/{quote(agent_id, safe='')}"


def parsed(model: type[_M], answer: ApiAnswer) -> _M:
    """Parse the response as the model, or raise an error that it violates the protocol."""
    try:
        return model.model_validate(answer.data)
    except ValidationError:
        raise SLMUnavailable("the server's answer is not of the shape that was expected") from None


def tls_context(target: Target) -> ssl.SSLContext | bool:
    """Return the context that verifies the server's certificate; this cannot be turned off."""
    return TlsFiles(target.ca_file, target.client_cert).context()


def unreachable(target: Target, error: BaseException) -> SLMUnavailable:
    """Return a one-sentence error for a connection that failed or broke."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        reason = f"its certificate is not accepted ({error.certificate_error}); see --ca-file"
    elif isinstance(error, aiohttp.ClientProxyConnectionError | aiohttp.ClientHttpProxyError):
        way = target.proxies.on_the_way_to(target.url)
        status = getattr(error, "status", None)
        said = f"answered {status}" if status else "cannot be reached"
        reason = f"the proxy {'' if way is None else way.place} {said}; see SLM_PROXY"
    elif isinstance(error, aiohttp.ClientConnectorError):
        reason = (
            f"{_reason(error.os_error)}; start one with `slm serve`, or name another with --url "
            "or SLM_URL"
        )
    elif isinstance(error, TimeoutError | asyncio.TimeoutError):
        reason = "no answer in time"
    else:
        reason = str(error) or type(error).__name__
    return SLMUnavailable(f"no SLM at {target.url} ({target.found}): {reason}")


def _reason(error: OSError) -> str:
    # asyncio's own text repeats the address, and for several addresses all of them.
    return os.strerror(error.errno).lower() if error.errno else str(error)


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        data = json.loads(text)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


def _problem(target: Target, status: int, data: dict[str, Any] | None) -> Exception:
    if data is None or not isinstance(data.get("code"), str):
        return SLMUnavailable(
            f"something answers HTTP {status} at {target.url}, but it is not an SLM"
        )
    cls = problem_classes().get(data["code"], ProblemError)
    detail = str(data.get("detail") or data.get("title") or f"HTTP {status}")
    if status == 401:
        detail = (
            f"the SLM at {target.url} does not accept the token ({target.found}): it is wrong, "
            "expired or revoked; name another with --token-file or SLM_TOKEN_FILE"
        )
    if issubclass(cls, PreconditionFailed):
        detail = f"nothing was changed: {detail}"
    if issubclass(cls, InvalidRequest):
        errors = [item for item in data.get("errors", []) if isinstance(item, dict)]
        return cls(_broken_rules(errors) or detail, errors)
    return cls(detail)


def _broken_rules(errors: list[dict[str, Any]]) -> str:
    """Return `llm_timeout: Input should be …; name: …` from the problem's list."""
    rules = []
    for item in errors:
        where = ".".join(str(part) for part in item.get("loc", []) if part != "body")
        message = str(item.get("msg", "")).removeprefix("Value error, ")
        rules.append(f"{where}: {message}" if where else message)
    return "; ".join(rules)
