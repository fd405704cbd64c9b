"""How a request arrived: whether a key may be sent back on its connection, and its Origin.

Looks only at the ASGI scope; knows no token and no agent (docs/protocol.md section 3).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection

from slm.errors import TlsRequired
from slm.server.settings import Network, Settings

_DEFAULT_PORTS: Final = {"http": 80, "ws": 80, "https": 443, "wss": 443}
_SECURE: Final = frozenset({"https", "wss"})


def require_private(connection: HTTPConnection, settings: Settings) -> None:
    """Refuse a request if a key may not travel on its connection.

    A connection is private if it uses TLS, or if the peer is on loopback and no proxy forwarded
    the request. Forwarding headers are believed only from a proxy that the operator named. Plain
    http is private if every hop is in a network that the operator trusts.

    Raises:
        TlsRequired: the connection is not private.
    """
    if is_private(connection, settings.trusted_proxies):
        return
    if not _all_hops_among(connection, settings.trusted_networks):
        raise TlsRequired(
            "Use https, or ask from the server's own machine without a proxy. Behind a proxy that"
            " ends TLS, or in a mesh that encrypts by itself, the server needs SLM_TRUSTED_PROXIES"
            " or SLM_TRUSTED_NETWORKS."
        )


def is_private(connection: HTTPConnection, trusted_proxies: Sequence[Network]) -> bool:
    """Return whether a key may travel on the connection that this request came over."""
    address = _address(connection)
    headers = connection.headers
    forwarded = _is_forwarded(headers)
    if forwarded and address is not None and _is_among(address, trusted_proxies):
        return _forwarded_over_tls(headers)
    if connection.scope["scheme"] in _SECURE:
        return True
    return address is not None and address.is_loopback and not forwarded


def _all_hops_among(connection: HTTPConnection, networks: Sequence[Network]) -> bool:
    """Return whether the peer and everyone it says it forwards for are in these networks.

    Anyone on such a network could leave out a hop, but could also read what is sent there.
    """
    address = _address(connection)
    if not networks or address is None or not _is_among(address, networks):
        return False
    headers = connection.headers
    told = [part for value in headers.getlist("x-forwarded-for") for part in value.split(",")]
    for value in headers.getlist("forwarded"):
        for hop in value.split(","):
            told += [v for n, v in map(_pair, hop.split(";")) if n == "for"]
    hops = [_parsed(_without_port(text.strip())) for text in told]
    return all(hop is not None and _is_among(hop, networks) for hop in hops)


def client_address(connection: HTTPConnection, trusted_proxies: Sequence[Network]) -> str | None:
    """Return the address that a request came from, for limits and the audit.

    X-Forwarded-For is believed only from a proxy that the operator named. The result is the last
    address in it that is not such a proxy: anyone may have written the ones before.
    """
    address = _address(connection)
    if address is None or not _is_among(address, trusted_proxies):
        return None if address is None else str(address)
    told = ",".join(connection.headers.getlist("x-forwarded-for")).split(",")
    for text in reversed(told):
        hop = _parsed(text.strip())
        if hop is None:
            break
        address = hop
        if not _is_among(hop, trusted_proxies):
            break
    return str(address)


def has_foreign_origin(connection: HTTPConnection) -> bool:
    """Return whether a browser sent this from a page of another site."""
    origins = connection.headers.getlist("origin")
    if not origins:
        return False
    host = connection.headers.get("host", "")
    scheme = "https" if connection.scope["scheme"] in _SECURE else "http"
    return len(origins) > 1 or _place(origins[0]) != _place(f"{scheme}://{host}")


def _place(url: str) -> tuple[str, int] | None:
    """Return host and port; None, which equals nothing, if the text names none."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    default = _DEFAULT_PORTS.get(parts.scheme)
    if not host or default is None:
        return None
    return host, port or default


def _address(connection: HTTPConnection) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    return None if connection.client is None else _parsed(connection.client.host)


def _parsed(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        # A zone index may be text of any length, and identifies nothing on this machine.
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _is_among(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, networks: Iterable[Network]
) -> bool:
    return any(address.version == net.version and address in net for net in networks)


def _is_forwarded(headers: Headers) -> bool:
    return any(name == "forwarded" or name.startswith("x-forwarded-") for name in headers)


def _forwarded_over_tls(headers: Headers) -> bool:
    """Return whether the trusted proxy reports TLS for every hop; no report means no."""
    schemes = [
        part.strip().lower()
        for value in headers.getlist("x-forwarded-proto")
        for part in value.split(",")
    ]
    for value in headers.getlist("forwarded"):
        for hop in value.split(","):
            pairs = dict(_pair(part) for part in hop.split(";"))
            schemes.append(pairs.get("proto", ""))
    return bool(schemes) and all(scheme in _SECURE for scheme in schemes)


def _without_port(text: str) -> str:
    """Return the address of `10.0.0.7:4711`, `[::1]:4711` or `[::1]` (RFC 7239 section 6)."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


def _pair(part: str) -> tuple[str, str]:
    name, _, value = part.partition("=")
    return name.strip().lower(), value.strip().strip('"').lower()
