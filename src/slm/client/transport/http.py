"""The client's connection to one SLM: GET requests and the handshake, at the current address.

A response becomes a schema, anything else an error (`answers`). Knows no cache. Proxies from the
environment are used only if asked for, netrc never; redirects are not followed; TLS is always
verified.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

import aiohttp
from pydantic import BaseModel, ConfigDict, ValidationError
from yarl import URL

from slm.client.cache.snapshot import ReceivedSnapshot
from slm.client.timings import Timings
from slm.client.transport.addresses import Addresses, normalised_url
from slm.client.transport.answers import (
    UPGRADE,
    AskedServer,
    Redirected,
    UpgradeFailed,
    failure_of,
    is_ours,
    problem,
)
from slm.client.transport.credentials import TlsContext, TokenSource
from slm.client.transport.site import Site
from slm.client.transport.websocket import DirectWebSocket
from slm.errors import ProtocolError, SLMError, SLMUnavailable
from slm.schemas import Agent, LLMConfigWithKey

__all__ = ["Connection", "EpochChanged", "TokenSource", "normalised_url"]

_T = TypeVar("_T")
_M = TypeVar("_M", bound=BaseModel)

MAX_ANSWER_BYTES: Final = 1024 * 1024
"""The largest response about one agent, and the largest error."""

MAX_SNAPSHOT_BYTES: Final = 256 * 1024 * 1024
"""The largest snapshot; that of 100,000 agents is about a third of it."""


class EpochChanged(SLMError):
    """The response belongs to a different epoch of the database than requested."""

    code = "epoch-changed"


class News(BaseModel):
    """The SLM's position, from a page of changes; the changes themselves are ignored."""

    model_config = ConfigDict(defer_build=True)

    changes: list[Any]
    revision: int
    epoch: str


class Connection:
    """One HTTP session to one SLM, for GET requests and the stream; bound to its event loop.

    Attributes:
        addresses: the SLM's addresses, one of which is in use.
        streaming: whether a stream is up; GET requests then use its address.
        upgrade_refused: whether the last handshake was blocked on the way, rather than by the SLM
            itself, so that HTTP may still work.
    """

    def __init__(self, site: Site, timings: Timings) -> None:
        self._site = site
        self._timings = timings
        self.addresses = Addresses(site.urls)
        self.streaming = False
        self.upgrade_refused = False
        self._tls = TlsContext(site.tls)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=16),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),  # each request below has its own
            middlewares=(_refuse_redirects,),
            ws_response_class=DirectWebSocket,
            trust_env=False,
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of all credentials."""
        return self._site.files

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    def repeated(self, text: str) -> str:
        """Return the SLM's text as one line for an error or a log, without the token."""
        return self._site.token.repeated(text)

    async def get_llm(
        self, agent_id: str, *, min_revision: int, epoch: str | None
    ) -> LLMConfigWithKey:
        """Return one agent's config with its key.

        Args:
            agent_id: the agent; used literally.
            min_revision: the response must not be older than this.
            epoch: the epoch of `min_revision`; None if not known yet.

        Raises:
            EpochChanged: the SLM's database has a different epoch by now.
            ProblemError: the SLM's error response.
            SLMUnavailable: there was no response, or no usable one.
        """
        path = f"/api/agents/{quote(agent_id, safe='')}/llm?min_revision={min_revision}"
        agent = await self._get(path, LLMConfigWithKey, epoch)
        if agent.agent_id != agent_id:
            raise ProtocolError(f"asked for agent {agent_id!r}, the SLM answered another one")
        return agent

    async def get_default(self, *, epoch: str | None) -> Agent:
        """Return the default agent, without its key."""
        return await self._get("/api/agents/default", Agent, epoch)

    async def get_snapshot(self, *, min_revision: int) -> ReceivedSnapshot:
        """Return every agent's config with its key, at `min_revision` or later."""
        return await self._get(
            f"/api/snapshot?min_revision={min_revision}",
            ReceivedSnapshot,
            None,
            timeout=self._timings.snapshot_timeout_seconds,
            max_bytes=MAX_SNAPSHOT_BYTES,
        )

    async def get_news(self, *, since: int) -> News:
        """Return the SLM's position, and whether anything the token may see has changed."""
        return await self._get(f"/api/changes?since={since}&limit=1", News, None)

    async def find_ready(self) -> str | None:
        """Return one of the other addresses with a server that is ready, or None.

        Does not send the token.
        """
        for url in self.addresses.others:
            with contextlib.suppress(SLMError):
                status, _, _ = await self._translated(
                    self._read(url, "/readyz", {}, MAX_ANSWER_BYTES),
                    url,
                    "/readyz",
                    self._timings.next_address_seconds,
                )
                if status == 200:
                    return url
        return None

    async def open_stream(self) -> DirectWebSocket:
        """Return the WebSocket, open but not yet subscribed."""
        timings, url = self._timings, self.addresses.current
        self.upgrade_refused = False
        timeout = timings.request_timeout_seconds
        if not self.addresses.patient:
            timeout = min(timeout, timings.next_address_seconds)
        try:
            ws = await self._translated(self._handshake(url), url, UPGRADE, timeout)
        except UpgradeFailed:
            self.upgrade_refused = True
            raise
        assert isinstance(ws, DirectWebSocket)  # noqa: S101 - for the type checker
        return ws

    async def _handshake(self, url: str) -> aiohttp.ClientWebSocketResponse:
        try:
            ws: aiohttp.ClientWebSocketResponse = await self._session.ws_connect(
                URL(url + "/ws", encoded=True),
                autoping=False,  # the stream sends pings and pongs
                timeout=aiohttp.ClientWSTimeout(ws_close=self._timings.close_timeout_seconds),
                # Compression costs the SLM 2 to 4 times the CPU and 40 KiB per connection.
                compress=0,
                ssl=self._tls.current(),
                **self._site.proxies.options(url, self._site.token.headers()),
            )
            return ws
        except aiohttp.WSServerHandshakeError as error:
            self.upgrade_refused = not is_ours(error.headers or {})
            raise

    async def _get(
        self,
        path: str,
        model: type[_M],
        epoch: str | None,
        timeout: float | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> _M:
        """Send a request to the current server, or without a stream to the first that responds."""
        while True:
            url = self.addresses.current
            try:
                return await self._get_from(url, path, model, epoch, timeout, max_bytes)
            except SLMUnavailable:
                if self.streaming or not self.addresses.several or not self.addresses.leave(url):
                    raise

    async def _get_from(
        self,
        url: str,
        path: str,
        model: type[_M],
        epoch: str | None,
        timeout: float | None,
        max_bytes: int,
    ) -> _M:
        shown = path.partition("?")[0]
        status, headers, body = await self._translated(
            self._read(url, path, self._site.token.headers(), max_bytes),
            url,
            shown,
            timeout or self._timings.request_timeout_seconds,
        )
        told = headers.get("SLM-Epoch")
        if epoch is not None and told is not None and told != epoch:
            raise EpochChanged("the SLM's database has another epoch")
        failure: SLMError
        if status == 200:
            with contextlib.suppress(ValidationError):
                return model.model_validate_json(body)
            failure = ProtocolError(f"the SLM's answer to {shown} is not of the contract's shape")
        else:
            failure = problem(status, headers, body, self.repeated, self._place(url), shown)
        # The body may contain keys, and so does the validation error, so this is outside the
        # handler; crash reporters also send the variables of each frame.
        del body
        raise failure

    async def _read(
        self, base: str, path: str, shown: dict[str, str], max_bytes: int
    ) -> tuple[int, Mapping[str, str], bytes]:
        url = URL(base + path, encoded=True)
        options = self._site.proxies.options(base, shown)
        async with self._session.get(url, ssl=self._tls.current(), **options) as answer:
            pieces, size = [], 0
            # Counted after decompression: a few bytes on the wire may become gigabytes.
            async for piece in answer.content.iter_any():
                pieces.append(piece)
                size += len(piece)
                if size > max_bytes:
                    answer.close()
                    raise SLMUnavailable(f"the SLM's answer is larger than {max_bytes} bytes")
            return answer.status, answer.headers, b"".join(pieces)

    def _place(self, url: str) -> AskedServer:
        way = None
        with contextlib.suppress(SLMError):
            way = self._site.proxies.on_the_way_to(url)
        return AskedServer(url, None if way is None else way.place)

    async def _translated(self, call: Awaitable[_T], url: str, what: str, timeout: float) -> _T:
        """Translate the HTTP library's exceptions, which contain the request and its token."""
        try:
            async with asyncio.timeout(timeout):
                return await call
        except Exception as error:
            failed = error
        except BaseException as error:
            # A cancellation without the library's frames, whose variables contain the token.
            error.__context__ = error.__cause__ = None
            raise error.with_traceback(None)  # noqa: B904 - it is the same one
        # Outside the handler, so that the original is not attached as context.
        try:
            failure = failure_of(failed, what, timeout, self._place(url), self.repeated)
        finally:
            del failed
        raise failure


async def _refuse_redirects(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Reject redirects, in the handshake too: following one would send the token elsewhere."""
    answer = await handler(request)
    if 300 <= answer.status < 400:
        status, location = answer.status, answer.headers.get("Location", "")
        answer.close()
        raise Redirected(status, location)
    return answer
