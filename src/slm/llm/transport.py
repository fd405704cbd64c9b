"""HTTP clients for the provider SDKs: one set an event loop, each bound to one origin.

Addresses are checked, no redirect is followed. Knows nothing of providers' protocols or agents.
Neither HTTP library is imported before it is used: openai and anthropic stand on httpx2, ollama on
httpx.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import ssl
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from slm.endpoints import EndpointPolicy, origin
from slm.errors import ConfigurationError

if TYPE_CHECKING:
    import http.cookiejar

    import httpx
    import httpx2

T = TypeVar("T")

_MAX_SDK_CLIENTS: Final = 256


class AddressRefused(Exception):
    """A request would go to a place that it may not go to; nothing was sent."""


def _policy_of_environment() -> EndpointPolicy:
    try:
        return EndpointPolicy.from_environment(os.environ)
    except ValueError as error:
        raise ConfigurationError(f"SLM_ENDPOINTS or SLM_ENDPOINT_ALLOW: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportSettings:
    """How connections to providers are made and kept.

    Attributes:
        ca_file: certificates of a private CA, trusted beside the system's.
        max_connections: at once, of one event loop.
        keepalive_seconds: how long an idle connection is kept.
        address_seconds: for one address of a name, before the next one is tried.
        endpoints: which addresses requests may go to; by default what SLM_ENDPOINTS and
            SLM_ENDPOINT_ALLOW say in this process's environment.
    """

    ca_file: str | None = None
    max_connections: int = 1000
    keepalive_seconds: float = 30.0
    address_seconds: float = 2.0
    endpoints: EndpointPolicy = field(default_factory=_policy_of_environment)


class Connections:
    """The HTTP clients of each event loop, and the SDK clients built on them.

    Closed by `aclose` for the loop it is called in; a loop that ends by itself closes its own, as
    `asyncio.run` does with every asynchronous generator that is still open.
    """

    def __init__(self, settings: TransportSettings) -> None:
        self._settings = settings
        self._loops: dict[asyncio.AbstractEventLoop, LoopConnections] = {}
        self._ssl_context: ssl.SSLContext | None = None

    async def current(self) -> LoopConnections:
        """Return those of the running loop."""
        loop = asyncio.get_running_loop()
        found = self._loops.get(loop)
        if found is None:
            for other in list(self._loops):
                if other.is_closed():
                    self._loops.pop(other, None)
            found = self._loops[loop] = LoopConnections(self._settings, self.prepare())
            await found.open()
        return found

    async def aclose(self) -> None:
        """Close the connections of the running loop."""
        found = self._loops.pop(asyncio.get_running_loop(), None)
        if found is not None:
            await found.aclose()

    def prepare(self) -> ssl.SSLContext:
        """Return the TLS context, made once: reading the system's certificates takes 20 to 40 ms.

        Raises:
            ConfigurationError: `ca_file` cannot be read.
        """
        if self._ssl_context is None:
            context = ssl.create_default_context()
            if self._settings.ca_file is not None:
                try:
                    context.load_verify_locations(self._settings.ca_file)
                except OSError as error:
                    raise ConfigurationError(f"ca_file cannot be read: {error}") from None
            self._ssl_context = context
        return self._ssl_context


class LoopConnections:
    """One event loop's HTTP clients; made by `Connections`."""

    def __init__(self, settings: TransportSettings, context: ssl.SSLContext) -> None:
        self._settings = settings
        self._context = context
        self._httpx2: httpx2.AsyncHTTPTransport | None = None
        self._httpx: httpx.AsyncHTTPTransport | None = None
        self._sdk_clients: OrderedDict[tuple[str, str, str], Any] = OrderedDict()
        self._closer = self._close_at_the_end()

    async def open(self) -> None:
        """Start what closes the connections when the loop ends."""
        await anext(self._closer)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._closer.aclose()

    def sdk_client(self, provider: str, endpoint: str, key: str, build: Callable[[], T]) -> T:
        """Return the SDK's client for this endpoint and this key, built once.

        A changed key or endpoint is another client, so no key can meet an endpoint not its own.
        """
        name = (provider, endpoint, key)
        client = self._sdk_clients.get(name)
        if client is None:
            client = self._sdk_clients[name] = build()
            if len(self._sdk_clients) > _MAX_SDK_CLIENTS:
                self._sdk_clients.popitem(last=False)
        else:
            self._sdk_clients.move_to_end(name)
        found: T = client
        return found

    def httpx2_client(self, endpoint: str) -> httpx2.AsyncClient:
        """Return a client for openai or anthropic that sends to the endpoint's origin alone."""
        import httpx2

        if self._httpx2 is None:
            import httpcore2

            self._httpx2 = httpx2.AsyncHTTPTransport(verify=self._context, trust_env=False)
            self._httpx2._pool = self._pool(httpcore2)
        bound: Any = BoundTransport(self._httpx2, origin("", endpoint))
        return httpx2.AsyncClient(
            transport=bound,
            follow_redirects=False,
            trust_env=False,
            timeout=None,  # the interface has a deadline of its own
            cookies=no_cookies(),
        )

    def httpx_transport(self, endpoint: str) -> httpx.AsyncBaseTransport:
        """Return a transport for ollama that sends to the endpoint's origin alone."""
        if self._httpx is None:
            import httpcore
            import httpx

            self._httpx = httpx.AsyncHTTPTransport(verify=self._context, trust_env=False)
            self._httpx._pool = self._pool(httpcore)
        bound: Any = BoundTransport(self._httpx, origin("", endpoint))
        return bound  # type: ignore[no-any-return]

    def _pool(self, core: Any) -> Any:
        """Return a connection pool that checks addresses; `core` is httpcore or httpcore2."""
        return core.AsyncConnectionPool(
            ssl_context=self._context,
            max_connections=self._settings.max_connections,
            max_keepalive_connections=self._settings.max_connections,
            keepalive_expiry=self._settings.keepalive_seconds,
            network_backend=CheckedBackend(
                core, self._settings.address_seconds, self._settings.endpoints
            ),
        )

    async def _close_at_the_end(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._sdk_clients.clear()
            if self._httpx2 is not None:
                await self._httpx2.aclose()
            if self._httpx is not None:
                await self._httpx.aclose()


class BoundTransport:
    """Passes on requests to one origin, and refuses any other before a byte is sent.

    What it compares is what the pool below connects to: the URL as the SDK and its HTTP library
    read it. So no disagreement of theirs with `slm.endpoints`, and no redirect, takes a key
    elsewhere. Connections are shared by all, so closing one of these closes none.
    """

    def __init__(self, inner: Any, bound_to: str) -> None:
        self._inner = inner
        self._bound_to = bound_to

    async def handle_async_request(self, request: Any) -> Any:
        """Send the request.

        Raises:
            AddressRefused: it would go to another origin.
        """
        if _destination(request.url) != self._bound_to:
            raise AddressRefused("the request would go to another place than the endpoint's origin")
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        """Do nothing."""

    async def __aenter__(self) -> BoundTransport:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


def _destination(url: Any) -> str:
    """Return where httpx or httpx2 would connect to, as `slm.endpoints.origin` words it."""
    scheme, host = url.raw_scheme.decode("ascii"), url.raw_host.decode("ascii")
    port = url.port or {"http": 80, "https": 443}.get(scheme)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class CheckedBackend:
    """A network backend that looks a name up itself and connects only to allowed addresses.

    The look-up and the connection are one step here, so a name that resolves differently the
    second time gains nothing (docs/protocol.md section 1, row `llm_endpoint`).
    """

    def __init__(self, core: Any, address_seconds: float, policy: EndpointPolicy) -> None:
        self._core = core
        self._policy = policy
        self._inner = core.AnyIOBackend()
        self._address_seconds = address_seconds

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> Any:
        """Connect to the first address of `host` that answers.

        Raises:
            AddressRefused: one of the addresses is of a kind that no request may go to.
        """
        addresses = await self._addresses(host, port)
        for address in addresses[:-1]:
            with contextlib.suppress(self._core.ConnectError, self._core.ConnectTimeout):
                return await self._inner.connect_tcp(
                    address, port, self._address_seconds, local_address, socket_options
                )
        return await self._inner.connect_tcp(
            addresses[-1], port, timeout, local_address, socket_options
        )

    async def connect_unix_socket(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: an endpoint is an http or https URL."""
        raise AddressRefused("is a socket of this machine")

    async def sleep(self, seconds: float) -> None:
        """Wait, between attempts of the pool."""
        await asyncio.sleep(seconds)

    async def _addresses(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise self._core.ConnectError("the endpoint's name cannot be resolved") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            parsed = ipaddress.ip_address(address.partition("%")[0])
            reason = self._policy.refused_address(parsed, host)
            if reason is not None:
                raise AddressRefused(f"the endpoint's name resolves to an address that {reason}")
        return addresses


def no_cookies() -> http.cookiejar.CookieJar:
    """Return a jar that keeps nothing: one provider's cookie must not go along with another key."""
    # Imported here: an interface that has called nobody yet starts faster without it.
    import http.cookiejar

    return http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
