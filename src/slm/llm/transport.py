"""HTTP to the providers: one connection pool per event loop, with every address checked.

Follows no redirect, keeps no cookie, uses nothing from the environment unless asked. Knows nothing
about provider protocols or agents.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import ipaddress
import os
import re
import socket
import ssl
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from slm.common.environment import variable
from slm.endpoints import EndpointPolicy, literal_address, origin
from slm.errors import ConfigurationError
from slm.llm.answer import Answer

_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE: Final = re.compile(r"[\x20-\x7e]*")
_SECRET_NAME: Final = re.compile(r"key|token|secret|auth|cookie|passw|signature|credential")
# The limit for one response header; content security policies exceed aiohttp's 8 KiB.
_MAX_HEADER_BYTES: Final = 65536
_STALE_TRIES: Final = 5
_LARGE_BYTES: Final = 2**20

KEY_MARK: Final = "{key}"
"""Placeholder for the agent's key in a header of `TransportSettings.headers`."""


class AddressRefused(Exception):
    """A request would go somewhere that it may not go; nothing was sent."""


def _policy_of_environment() -> EndpointPolicy:
    try:
        return EndpointPolicy.from_environment(os.environ)
    except ValueError as error:
        raise ConfigurationError(f"SLM_ENDPOINTS or SLM_ENDPOINT_ALLOW: {error}") from None


def _proxy_of_environment() -> str | None:
    return variable("SLM_PROVIDER_PROXY")


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportSettings:
    """How connections to providers are made and kept.

    Attributes:
        ca_file: certificates of a private CA, trusted in addition to the system's.
        proxy: an HTTP proxy for all requests, such as `http://user:pw@proxy:3128`; by default
            SLM_PROVIDER_PROXY. The proxy then resolves the providers' names.
        trust_env: also use HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY if `proxy` is not set.
            Ignored by default, because they decide where keys and prompts are sent.
        headers: more headers, by origin: `{"https://gateway.example": {"X-Team": "billing"}}`.
            `{key}` in a value stands for the agent's key, which is then sent in no other header:
            `{"https://x.azure-api.net": {"api-key": "{key}"}}`. A value of None removes a header
            that would otherwise be sent.
        max_connections: the maximum number of open connections per event loop.
        keepalive_seconds: how long an idle connection is kept.
        address_seconds: how long to try one address of a name before trying the next in parallel.
        max_answer_bytes: the maximum size of a response, decompressed.
        endpoints: the addresses that requests may go to; by default those allowed by SLM_ENDPOINTS
            and SLM_ENDPOINT_ALLOW in this process's environment.

    Raises:
        ConfigurationError: the proxy or a header is invalid.
    """

    ca_file: str | None = None
    proxy: str | None = field(default_factory=_proxy_of_environment, repr=False)
    trust_env: bool = False
    headers: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict, repr=False)
    max_connections: int = 1000
    keepalive_seconds: float = 30.0
    address_seconds: float = 2.0
    max_answer_bytes: int = 64 * 2**20
    endpoints: EndpointPolicy = field(default_factory=_policy_of_environment)

    def __post_init__(self) -> None:
        if self.proxy and not _is_proxy(self.proxy):
            raise ConfigurationError(
                "proxy (or SLM_PROVIDER_PROXY) must be a URL such as http://proxy.example:3128"
            )
        for place, named in self.headers.items():
            if not origin("", place).startswith("http"):
                raise ConfigurationError(f"headers: {place!r} is no origin such as https://host")
            for name, value in named.items():
                if not _HEADER_NAME.fullmatch(name):
                    raise ConfigurationError(f"headers: {name!r} is no name of a header")
                if value is not None and not _HEADER_VALUE.fullmatch(value):
                    raise ConfigurationError(f"headers: {name} holds what no header can carry")


def _is_proxy(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


class Connections:
    """The connections of each event loop.

    `aclose` closes those of the running loop; a loop that ends closes its own, because
    `asyncio.run` closes every open asynchronous generator.
    """

    def __init__(self, settings: TransportSettings) -> None:
        self.settings = settings
        self._headers = {
            origin("", place): dict(named) for place, named in settings.headers.items()
        }
        self._loops: dict[asyncio.AbstractEventLoop, LoopConnections] = {}
        self._ssl_context: ssl.SSLContext | None = None

    @contextlib.asynccontextmanager
    async def post(
        self,
        url: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        bound_to: str,
        secret: str | None,
    ) -> AsyncIterator[Answer]:
        """Send a request and yield the response once its head has arrived.

        Args:
            url: the URL.
            body: JSON.
            headers: those of the protocol; the settings' headers override them.
            bound_to: the origin that the key is bound to, as formatted by `slm.endpoints`.
            secret: the value for `{key}`.

        Raises:
            AddressRefused: it would go to another origin, or to a forbidden kind of address.
        """
        loop = await self.current()
        sent = self._all_headers(bound_to, headers, secret)
        for left in reversed(range(_STALE_TRIES)):
            try:
                response = await loop.post(url, body, sent, bound_to)
                break
            except aiohttp.ClientConnectionResetError:
                # The server had just closed an idle connection, and nothing was sent on it.
                if not left:
                    raise
                await asyncio.sleep(0)
        async with response:
            yield Answer(response, self.settings.max_answer_bytes)

    async def current(self) -> LoopConnections:
        """Return the connections of the running loop."""
        loop = asyncio.get_running_loop()
        found = self._loops.get(loop)
        if found is None:
            for other in list(self._loops):
                if other.is_closed():
                    self._loops.pop(other, None)
            found = self._loops[loop] = LoopConnections(self.settings, self.prepare())
            await found.open()
        return found

    async def aclose(self) -> None:
        """Close the connections of the running loop."""
        found = self._loops.pop(asyncio.get_running_loop(), None)
        if found is not None:
            await found.aclose()

    def prepare(self) -> ssl.SSLContext:
        """Return the TLS context, created once: loading the system certificates takes 20-40 ms.

        Raises:
            ConfigurationError: `ca_file` cannot be read.
        """
        if self._ssl_context is None:
            context = ssl.create_default_context()
            if self.settings.ca_file is not None:
                try:
                    context.load_verify_locations(self.settings.ca_file)
                except OSError as error:
                    raise ConfigurationError(f"ca_file cannot be read: {error}") from None
            self._ssl_context = context
        return self._ssl_context

    def secrets(self, place: str) -> list[str]:
        """Return the secrets in the headers for an origin: an error may echo them."""
        named = self._headers.get(place, {}).items()
        return [value for name, value in named if value and _SECRET_NAME.search(name.lower())]

    def _all_headers(
        self, place: str, headers: Mapping[str, str], secret: str | None
    ) -> dict[str, str]:
        ours = self._headers.get(place)
        if not ours:
            return dict(headers)
        elsewhere = any(value and KEY_MARK in value for value in ours.values())
        kept = {
            name: value
            for name, value in headers.items()
            if name.lower() not in {name.lower() for name in ours}
            and not (elsewhere and secret and secret in value)
        }
        for name, value in ours.items():
            # Without a key, a header meant to carry it is omitted.
            if value is not None and not (KEY_MARK in value and secret is None):
                kept[name] = value.replace(KEY_MARK, secret or "")
        return kept


class LoopConnections:
    """One event loop's connections; created by `Connections`."""

    def __init__(self, settings: TransportSettings, context: ssl.SSLContext) -> None:
        self._settings = settings
        self._context = context
        self._direct: aiohttp.ClientSession | None = None
        self._proxied: aiohttp.ClientSession | None = None
        self._closer = self._close_at_the_end()

    async def open(self) -> None:
        """Start the generator that closes the connections when the loop ends."""
        await anext(self._closer)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._closer.aclose()

    def post(self, url: str, body: bytes, headers: Mapping[str, str], bound_to: str) -> Any:
        """Return one request, to be awaited.

        Raises:
            AddressRefused: the URL has another origin, or contains a forbidden address.
        """
        target = URL(url, encoded=True)
        # Compare exactly what will be connected to: the URL as the HTTP library parses it.
        if _destination(target) != bound_to:
            raise AddressRefused("the request would go to another place than the endpoint's origin")
        proxy = self._settings.proxy or (_proxy_of(target) if self._settings.trust_env else None)
        self._check_literal(target.host or "")
        session = self._session(proxied=proxy is not None)
        # Send large bodies, such as images, in pieces so that the loop can run other tasks.
        data = body if len(body) < _LARGE_BYTES else io.BytesIO(body)
        return session.post(target, data=data, headers=headers, proxy=proxy, allow_redirects=False)

    def _check_literal(self, host: str) -> None:
        # Names are judged by what they resolve to; addresses are not resolved.
        address = literal_address(host)
        if address is not None:
            reason = self._settings.endpoints.refused_address(address, host)
            if reason is not None:
                raise AddressRefused(f"the endpoint's address {reason}")

    def _session(self, *, proxied: bool) -> aiohttp.ClientSession:
        found = self._proxied if proxied else self._direct
        if found is None:
            # The operator chose the proxy's address; the proxy resolves the providers' names.
            resolver = None if proxied else CheckedResolver(self._settings.endpoints)
            found = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    ssl=self._context,
                    resolver=resolver,
                    # Lookup and connection are one step, so a name that resolves differently the
                    # second time gains nothing (docs/protocol.md section 1, row `llm_endpoint`).
                    use_dns_cache=False,
                    limit=self._settings.max_connections,
                    keepalive_timeout=self._settings.keepalive_seconds,
                    happy_eyeballs_delay=self._settings.address_seconds,
                ),
                # The interface has its own deadline.
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
                cookie_jar=aiohttp.DummyCookieJar(),
                # Decompressed in `Answer`, where it is limited.
                auto_decompress=False,
                trust_env=False,
                max_line_size=_MAX_HEADER_BYTES,
                max_field_size=_MAX_HEADER_BYTES,
            )
            if proxied:
                self._proxied = found
            else:
                self._direct = found
        return found

    async def _close_at_the_end(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            for session in (self._direct, self._proxied):
                if session is not None:
                    await session.close()


def _proxy_of(url: URL) -> str | None:
    if url.host is None or urllib.request.proxy_bypass(url.host):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy:
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if not _is_proxy(proxy):
        # Connecting directly instead is not what the person who set it wanted.
        raise AddressRefused("the environment names a proxy that is not an HTTP proxy")
    return proxy


def _destination(url: URL) -> str:
    """Return where the HTTP library would connect to, as `slm.endpoints.origin` formats it."""
    host = url.host or ""
    return (
        f"{url.scheme}://[{host}]:{url.port}"
        if ":" in host
        else f"{url.scheme}://{host}:{url.port}"
    )


class CheckedResolver(AbstractResolver):
    """Resolves a name and rejects it if any of its addresses is forbidden."""

    def __init__(self, policy: EndpointPolicy) -> None:
        self._policy = policy

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the addresses of `host`.

        Raises:
            AddressRefused: one of the addresses is of a forbidden kind.
        """
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise OSError("the endpoint's name cannot be resolved") from None
        results: dict[str, ResolveResult] = {}
        for kind, _, protocol, _, place in found:
            text = str(place[0])
            address = ipaddress.ip_address(text.partition("%")[0])
            reason = self._policy.refused_address(address, host)
            if reason is not None:
                raise AddressRefused(f"the endpoint's name resolves to an address that {reason}")
            results[text] = ResolveResult(
                hostname=host,
                host=text,
                port=port,
                family=kind,
                proto=protocol,
                flags=socket.AI_NUMERICHOST,
            )
        return list(results.values())

    async def close(self) -> None:
        """Do nothing."""
