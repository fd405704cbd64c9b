"""The addresses of one SLM: which are valid, which is in use, and when the next one is tried.

Pure rules; opens no connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

from yarl import URL

from slm.common.environment import is_service_link, listed, tidied, variable
from slm.endpoints import literal_address
from slm.errors import ConfigurationError

MAX_ADDRESSES: Final = 16
"""More than this is a mistake, not a deployment."""

ROUTES: Final = ("/api", "/api/agents", "/api/snapshot", "/ws", "/readyz", "/healthz", "/metrics")
"""Characters that are often copied with an address but don't belong to it."""

_SCHEMES: Final = {"http": "http", "ws": "http", "https": "https", "wss": "https"}


def normalised_url(slm_url: str, *, allow_insecure: bool = False) -> str:
    """Return `http(s)://host[:port][/path]` for an http(s) or ws(s) URL of an SLM.

    Plain http is for loopback only, unless explicitly allowed: anyone on the network could read the
    token and the keys, and the SLM sends no key that way (docs/protocol.md section 3).

    Raises:
        ConfigurationError: it is not such a URL; the message does not repeat it.
    """
    slm_url = tidied(slm_url)
    if is_service_link(slm_url):
        raise ConfigurationError(
            "slm_url is what Kubernetes sets for a Service (tcp://…), which says nothing of TLS; "
            "write https:// and the Service's name, such as https://slm:8760"
        )
    try:
        parts = urlsplit(slm_url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    scheme = _SCHEMES.get(parts.scheme.lower())
    if scheme is None or not host or port == 0 or not slm_url.isprintable() or " " in slm_url:
        raise ConfigurationError(
            "slm_url must be an http, https, ws or wss URL with a host, such as "
            "https://slm.example:8760; several are separated by commas"
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigurationError(
            "slm_url may hold neither a user name, nor a password, nor a query; give the token as "
            "token= or SLM_TOKEN"
        )
    if parts.path.rstrip("/").endswith(ROUTES):
        raise ConfigurationError(
            "slm_url ends with a route of the API, such as /api or /ws: it is the address of the "
            "server alone, such as https://slm.example:8760"
        )
    if scheme == "http" and not allow_insecure and not is_loopback(host):
        raise ConfigurationError(
            "slm_url must be https (or wss) unless the SLM is on this machine: over plain http the "
            "token and the API keys could be read on the way. Where something else encrypts them, "
            "such as a mesh, say so with allow_insecure=True or SLM_ALLOW_INSECURE=1"
        )
    try:
        return str(URL(f"{scheme}://{parts.netloc}{parts.path}")).rstrip("/")
    except ValueError:  # yarl's errors quote the host
        pass
    raise ConfigurationError("slm_url names a host that is not a valid one")


def usable_urls(
    given: str | Sequence[str] | None, *, allow_insecure: bool = False
) -> tuple[str, ...]:
    """Return the addresses in the order in which they are tried, without duplicates.

    Args:
        given: one address, several separated by commas, or a list; None for SLM_URL.
        allow_insecure: whether plain http to another machine is allowed.

    Raises:
        ConfigurationError: there is none, or one of them is invalid.
    """
    if given is None:
        given = variable("SLM_URL") or ""
        if not given:
            raise ConfigurationError(_no_url())
    texts = listed(given) if isinstance(given, str) else [*given]
    # An empty one gets an error about itself rather than "no address".
    urls = [normalised_url(text, allow_insecure=allow_insecure) for text in texts or [""]]
    if len(urls) > MAX_ADDRESSES:
        raise ConfigurationError(f"slm_url names more than {MAX_ADDRESSES} addresses")
    return tuple(dict.fromkeys(urls))


def _no_url() -> str:
    if variable("SLM_SERVICE_HOST") is not None:
        # Not used automatically: anyone who may create a Service in a namespace would get the
        # token.
        port = variable("SLM_SERVICE_PORT") or "8760"
        port = port if port.isdecimal() else "8760"
        return (
            "no address for the SLM: there is a Kubernetes Service named slm beside us, so set "
            f"SLM_URL=https://slm:{port}, or give slm_url="
        )
    return "no address for the SLM: give slm_url= or set SLM_URL, such as https://slm.example:8760"


def is_loopback(host: str) -> bool:
    """Return whether this host is this machine: a loopback address or `localhost`."""
    if host.rstrip(".").lower() == "localhost":
        return True
    address = literal_address(host)
    return address is not None and address.is_loopback


def is_insecure(url: str) -> bool:
    """Return whether traffic to this address can be read on the network."""
    return url.startswith("http://") and not is_loopback(urlsplit(url).hostname or "")


class Addresses:
    """The addresses of one SLM, one of which is in use; the others are tried in turn.

    Attributes:
        current: the address in use.
        untried: whether it has not failed yet since the last one worked or all had failed.
        patient: whether it gets the full timeout: there is no other, or none has answered.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = tuple(urls)
        self._left = 0
        self.current = self._urls[0]
        self.untried = False
        self.patient = not self.several

    @property
    def several(self) -> bool:
        """Whether there is another address."""
        return len(self._urls) > 1

    @property
    def others(self) -> tuple[str, ...]:
        """The addresses that are not in use, starting with the next one."""
        at = self._urls.index(self.current)
        return self._urls[at + 1 :] + self._urls[:at]

    def arrived(self) -> None:
        """Note that the current address works."""
        self._left, self.untried, self.patient = 0, False, not self.several

    def leave(self, url: str) -> bool:
        """Move to the next address, unless `url` was already left; return `untried`."""
        if url == self.current and self.several:
            self.current = self.others[0]
            self._left += 1
            self.untried = self._left < len(self._urls)
            if not self.untried:
                self._left, self.patient = 0, True
        return self.untried

    def go_to(self, url: str) -> None:
        """Use this one of the other addresses from now on."""
        self.arrived()
        self.current, self.untried = url, True
