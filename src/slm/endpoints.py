"""Where a provider may be reached: default endpoints, canonical URLs and origins.

Pure rules about URLs; knows no HTTP client and resolves no name. `slm.common.addresses` has the
forbidden addresses.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from slm.common.addresses import (
    METADATA_NAMES,
    IPAddress,
    held_addresses,
    is_public,
    literal_address,
    refused_address,
)
from slm.common.environment import listed, variable

__all__ = [
    "DEFAULT_ENDPOINTS",
    "EndpointPolicy",
    "canonical_url",
    "effective_endpoint",
    "literal_address",
    "origin",
    "parse_allowed",
    "refused_address",
    "refused_endpoint",
]

DEFAULT_ENDPOINTS: Final[dict[str, str]] = {
    "ollama": "http://localhost:11434",
    "openai": "https://api.openai.com/v1",
    "anthropic": "https://api.anthropic.com",
}
"""The endpoint used if `llm_endpoint` is null (docs/protocol.md section 1)."""

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
# Parsers disagree about anything else: some treat `%2e` as a dot or `\` as a slash, some drop text
# before or after the brackets. It is therefore not a valid location.
_HOST_AND_PORT: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]*)?")
# Providers' own routes, which are added to an endpoint. Not `/models` alone, because an Azure base
# URL contains it.
_ROUTES: Final = (
    "/v1/models",
    *("/chat/completions", "/completions", "/responses", "/v1/messages"),
    *("/api/chat", "/api/generate"),
)
# What a provider's routes start with, although its documentation shows it as part of the host; for
# ollama, also the root of OpenAI's protocol, which this provider does not use.
_ROOTS: Final[dict[str, tuple[str, ...]]] = {"anthropic": ("/v1",), "ollama": ("/api", "/v1")}
# Browsers read such a name as an IPv4 address (WHATWG URL, "ends in a number"), resolvers don't.
_ENDS_IN_A_NUMBER: Final = re.compile(r"(.*\.)?([0-9]+|0[xX][0-9A-Fa-f]*)")


def effective_endpoint(provider: str, endpoint: str | None) -> str | None:
    """Return the endpoint in use: the given one, else the provider's own, else None."""
    return endpoint or DEFAULT_ENDPOINTS.get(provider)


# Called for thousands of agents per snapshot, which share few endpoints.
@functools.lru_cache(maxsize=1024)
def origin(provider: str, endpoint: str | None) -> str:
    """Return the origin a key would be sent to, as `scheme://host:port` in lower case.

    A key is bound to this text (docs/protocol.md section 3), so two spellings of one origin must
    give the same text, and anything unreadable must never equal a readable one.

    Args:
        provider: `ollama`, `openai`, `anthropic`, or whatever an adopted row contains.
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
    host = (host or "").rstrip(".").lower()
    if not host or scheme not in _DEFAULT_PORTS or not _is_plain(parts.netloc):
        return f"unreadable:{url}"
    # Not the address embedded in a 6to4 or NAT64 address: another host may answer there.
    address = literal_address(host)
    if address is not None:
        host = f"[{address}]" if address.version == 6 else str(address)
    return f"{scheme}://{host}:{port or _DEFAULT_PORTS[scheme]}"


@functools.lru_cache(maxsize=1024)
def canonical_url(provider: str, endpoint: str | None) -> str | None:
    """Return the only URL given to an SDK, or None if the endpoint cannot be parsed.

    It starts with `origin`, so that a key is bound to exactly the address that is connected to:
    scheme and host in lower case, addresses in their usual spelling, an explicit port, no dot at
    the end of the host. SDKs fill in missing parts differently: ollama's uses port 11434 for
    `HTTP://host`. Path and query are kept, except a trailing root that this provider's routes start
    with, such as anthropic's `/v1`.
    """
    place = origin(provider, endpoint)
    if not place.startswith(("http://", "https://")):
        return None
    parts = urlsplit(effective_endpoint(provider, endpoint) or "")
    path = parts.path
    for root in _ROOTS.get(provider, ()):
        if path.rstrip("/").endswith(root):
            path = path.rstrip("/").removesuffix(root)
            break
    return f"{place}{path or '/'}?{parts.query}" if parts.query else place + path


def _is_plain(netloc: str) -> bool:
    """Return whether every URL parser reads the same host and port."""
    return _HOST_AND_PORT.fullmatch(netloc) is not None


def refused_endpoint(url: str, *, stored: bool = False) -> str | None:
    """Return, in one clause, why `url` may not be an `llm_endpoint`, or None if it may.

    The clause never includes the URL, which may contain a secret by mistake. For the rule see
    docs/protocol.md section 1, row `llm_endpoint`.

    Args:
        url: the endpoint.
        stored: it was saved earlier; then accept what is rejected today only because it is
            ambiguous, such as a dot at the end of the host, since `canonical_url` makes it
            unambiguous.
    """
    if len(url) > 256:
        return "is longer than 256 characters"
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        return "holds a character that no URL may hold"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "is not a URL"
    if parts.scheme.lower() not in _DEFAULT_PORTS:
        return "is not an http or https URL"
    if not host.rstrip(".") or port == 0:
        return "names no host"
    if "@" in parts.netloc:
        return "holds a user name or password; use llm_api_key"
    if "#" in url:
        return "holds a fragment"
    if not _is_plain(parts.netloc):
        return "names a host with a character that no host may hold"
    if host.rstrip(".").lower() in METADATA_NAMES:
        return "is a cloud metadata address"
    address = literal_address(host.rstrip("."))
    if address is not None and (reason := refused_address(address)) is not None:
        return reason
    return None if stored else _ambiguous(host, address) or _unusable(url, parts.path)


def _ambiguous(host: str, address: IPAddress | None) -> str | None:
    if host.endswith("."):
        return "has a dot at the end of its host; leave it out"
    if address is not None:
        return None
    if _ENDS_IN_A_NUMBER.fullmatch(host):
        return "names a host that ends in a number but is not an IP address"
    if any(not 0 < len(label) < 64 for label in host.split(".")) or len(host) > 253:
        return "names a host that is not a valid DNS name"
    return None


def _unusable(url: str, path: str) -> str | None:
    """Return why no request can be sent to it, although it names a location."""
    if "?" in url:
        return "holds a query; an endpoint is the URL that paths are added to"
    if "//" in path:
        return "has two slashes in a row in its path"
    path = path.rstrip("/").lower()
    for route in _ROUTES:
        if path.endswith(route):
            return f"ends with {route}, which is added to it; leave that out"
    return None


@dataclass(frozen=True)
class EndpointPolicy:
    """A deployment's settings on top of the rules that always apply.

    Attributes:
        strict: reject all but public addresses: no loopback, private or shared ranges.
        allow: hosts, addresses and networks that are allowed nevertheless; never a metadata
            address.
    """

    strict: bool = False
    allow: tuple[str, ...] = ()

    def refused(self, provider: str, endpoint: str | None) -> str | None:
        """Return, in one clause, why this agent's endpoint may not be saved, or None if it may.

        Names are not resolved here; `refused_address` judges the resolved address when it is used.

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
        """Return why a request may not go to this address, or None if it may.

        Args:
            address: the address to connect to.
            host: the name that resolved to it.
        """
        always = refused_address(address)
        if always is not None or not self.strict:
            return always
        if host.rstrip(".").lower() in self.allow or self._allows(address):
            return None
        if is_public(address) or all(map(self._allows, held_addresses(address))):
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
        """Return the policy set by SLM_ENDPOINTS and SLM_ENDPOINT_ALLOW.

        Raises:
            ValueError: one of them is invalid.
        """
        mode = (variable("SLM_ENDPOINTS", environment) or "open").lower()
        if mode not in ("open", "strict"):
            raise ValueError("SLM_ENDPOINTS is neither open nor strict")
        return cls(mode == "strict", parse_allowed(environment.get("SLM_ENDPOINT_ALLOW", "")))


def parse_allowed(text: str) -> tuple[str, ...]:
    """Return the hosts, addresses and networks in a comma-separated list.

    Raises:
        ValueError: one has a slash and is not a network.
    """
    places = [part.rstrip(".").lower() for part in listed(text)]
    for place in places:
        if "/" in place:
            ipaddress.ip_network(place)
    return tuple(place.strip("[]") for place in places)
