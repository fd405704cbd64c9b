"""Where a provider may be reached: default endpoints, origins, and which addresses are refused.

Pure rules about URLs and IP addresses; knows no HTTP client and resolves no name.
"""

from __future__ import annotations

import functools
import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

DEFAULT_ENDPOINTS: Final[dict[str, str]] = {
    "ollama": "http://localhost:11434",
    "openai": "https://api.openai.com/v1",
    "anthropic": "https://api.anthropic.com",
}
"""The endpoint that a null `llm_endpoint` stands for (docs/protocol.md section 1)."""

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
# Anything else is read in one way here and in another there: some readers take `%2e` for a dot or
# `\` for a slash, some drop what stands before or after the brackets. So it names no place.
_HOST_AND_PORT: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]*)?")
_METADATA_NAMES: Final = frozenset({"metadata", "metadata.google.internal", "instance-data"})
# AWS, Alibaba and Oracle answer on IPv6 or outside 169.254/16 as well.
_METADATA_ADDRESSES: Final = frozenset(
    ipaddress.ip_address(text)
    for text in ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "192.0.0.192", "168.63.129.16")
)


def effective_endpoint(provider: str, endpoint: str | None) -> str | None:
    """Return the endpoint in force: the given one, else the provider's own, else None."""
    return endpoint or DEFAULT_ENDPOINTS.get(provider)


# A snapshot asks for thousands of agents, whose endpoints are few.
@functools.lru_cache(maxsize=1024)
def origin(provider: str, endpoint: str | None) -> str:
    """Return the origin a key would be sent to, as `scheme://host:port` in lower case.

    A key is bound to this text (docs/protocol.md section 3), so two spellings of one origin must
    give one text, and anything unreadable must never equal a readable one.

    Args:
        provider: `ollama`, `openai`, `anthropic`, or whatever an adopted row holds.
        endpoint: the agent's `llm_endpoint`; None means the provider's own.
    """
    url = effective_endpoint(provider, endpoint)
    if url is None:
        return f"none:{provider}"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return f"unreadable:{url}"
    scheme = parts.scheme.lower()
    if not host or scheme not in _DEFAULT_PORTS or not _is_plain(parts.netloc):
        return f"unreadable:{url}"
    host = host.rstrip(".").lower()
    address = _literal(host)
    if address is not None:
        # Not what a 6to4 or NAT64 address holds: whoever answers there need not be that host.
        address = getattr(address, "ipv4_mapped", None) or address
        host = f"[{address}]" if address.version == 6 else str(address)
    return f"{scheme}://{host}:{port or _DEFAULT_PORTS[scheme]}"


def literal_address(host: str) -> IPAddress | None:
    """Return the address that `host` spells, in any form a resolver takes, or None for a name.

    `http://2852039166/` and `http://0xA9FEA9FE/` reach 169.254.169.254 just as well.
    """
    address = _literal(host)
    return None if address is None else _unwrapped(address)


def _literal(host: str) -> IPAddress | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, UnicodeEncodeError):
            return None


def _is_plain(netloc: str) -> bool:
    """Say whether every reader of URLs takes the same host and port from it."""
    return _HOST_AND_PORT.fullmatch(netloc) is not None


def _unwrapped(address: IPAddress) -> IPAddress:
    """Return the IPv4 address inside an IPv4-mapped, NAT64 or 6to4 one, else the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.sixtofour is not None:
            return address.sixtofour
        if address in ipaddress.ip_network("64:ff9b::/96"):
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def refused_address(address: IPAddress) -> str | None:
    """Say why a request may never go to this address, or None when it may.

    Loopback and private ranges are allowed: that is where an Ollama server lives.
    """
    address = _unwrapped(address)
    if address in _METADATA_ADDRESSES:
        return "is a cloud metadata address"
    if address.is_link_local:
        return "is a link-local or cloud metadata address"
    if address.is_multicast or address.is_unspecified:
        return "is not the address of a host"
    return None


def refused_endpoint(url: str) -> str | None:
    """Say in one clause why `url` may not be an `llm_endpoint`, or None when it may.

    The clause never holds the URL, which may carry a secret by mistake.
    The rule: docs/protocol.md section 1, row `llm_endpoint`.
    """
    if len(url) > 256:
        return "is longer than 256 characters"
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        return "holds a character that no URL may hold"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "is not a URL"
    if parts.scheme.lower() not in _DEFAULT_PORTS:
        return "is not an http or https URL"
    host = (parts.hostname or "").rstrip(".").lower()
    if not host or port == 0:
        return "names no host"
    if "@" in parts.netloc:
        return "holds a user name or password; use llm_api_key"
    if "#" in url:
        return "holds a fragment"
    if not _is_plain(parts.netloc):
        return "names a host with a character that no host may hold"
    if host in _METADATA_NAMES:
        return "is a cloud metadata address"
    address = literal_address(host)
    return None if address is None else refused_address(address)


@dataclass(frozen=True)
class EndpointPolicy:
    """What a deployment allows beyond the rules that always hold.

    Attributes:
        strict: refuse what is not a public address: loopback, private and shared ranges.
        allow: hosts, addresses and networks that are let through even so; never a metadata address.
    """

    strict: bool = False
    allow: tuple[str, ...] = ()

    def refused(self, provider: str, endpoint: str | None) -> str | None:
        """Say in one clause why this agent's endpoint may not be saved, or None when it may.

        A name is not resolved here; `refused_address` judges what it resolved to, when it is used.

        Args:
            provider: the agent's `llm_provider`.
            endpoint: its `llm_endpoint`; None means the provider's own.
        """
        url = effective_endpoint(provider, endpoint)
        if not self.strict or url is None:
            return None
        try:
            host = (urlsplit(url).hostname or "").rstrip(".").lower()
        except ValueError:
            return "is not a URL"
        if host in self.allow:
            return None
        if host == "localhost" or host.endswith(".localhost"):
            return "is on this machine, which SLM_ENDPOINTS=strict refuses"
        address = literal_address(host)
        return None if address is None else self.refused_address(address)

    def refused_address(self, address: IPAddress, host: str = "") -> str | None:
        """Say why a request may not go to this address, or None when it may.

        Args:
            address: where the request would go.
            host: the name that resolved to it.
        """
        always = refused_address(address)
        if always is not None or not self.strict:
            return always
        address = _unwrapped(address)
        if address.is_global or host.rstrip(".").lower() in self.allow or self._allows(address):
            return None
        return "is not a public address, which SLM_ENDPOINTS=strict refuses"

    def _allows(self, address: IPAddress) -> bool:
        for text in self.allow:
            try:
                network = ipaddress.ip_network(text)
            except ValueError:
                continue
            if network.version == address.version and address in network:
                return True
        return False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> EndpointPolicy:
        """Return what SLM_ENDPOINTS and SLM_ENDPOINT_ALLOW say.

        Raises:
            ValueError: one of them makes no sense.
        """
        mode = environment.get("SLM_ENDPOINTS", "").strip().lower()
        if mode not in ("", "open", "strict"):
            raise ValueError("SLM_ENDPOINTS is neither open nor strict")
        return cls(mode == "strict", parse_allowed(environment.get("SLM_ENDPOINT_ALLOW", "")))


def parse_allowed(text: str) -> tuple[str, ...]:
    """Return the hosts, addresses and networks of a list separated by commas.

    Raises:
        ValueError: one has a slash and is no network.
    """
    places = [part.strip().rstrip(".").lower() for part in text.split(",") if part.strip()]
    for place in places:
        if "/" in place:
            ipaddress.ip_network(place)
    return tuple(place.strip("[]") for place in places)
