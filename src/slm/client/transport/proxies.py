"""The proxy to the SLM: an explicit one, or the environment's if requested.

Knows URLs and variables; opens no connection. Never shows a proxy's password.
"""

from __future__ import annotations

import base64
import urllib.request
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr
from yarl import URL

from slm.client.transport.addresses import is_loopback
from slm.common.environment import tidied, variable
from slm.errors import ConfigurationError

_EXPECTED: Final = "an http or https URL such as http://proxy.example:3128"


@dataclass(frozen=True)
class Proxy:
    """One proxy.

    Attributes:
        url: `http(s)://host[:port]`, without credentials.
        user: the user name, if the proxy requires one.
        password: the password for it.
    """

    url: str
    user: str | None = None
    password: SecretStr = field(default_factory=lambda: SecretStr(""))

    @property
    def place(self) -> str:
        """Its host and port, for errors."""
        return urlsplit(self.url).netloc

    def options(self, url: str, headers: dict[str, str]) -> dict[str, Any]:
        """Return the options for sending a request to this address through the proxy."""
        if self.user is None:
            return {"proxy": URL(self.url), "headers": headers}
        pair = f"{self.user}:{self.password.get_secret_value()}".encode()
        shown = {"Proxy-Authorization": "Basic " + base64.b64encode(pair).decode()}
        # With a tunnel, credentials go to CONNECT; without one, the proxy reads the request itself.
        if url.startswith("https://"):
            return {"proxy": URL(self.url), "headers": headers, "proxy_headers": shown}
        return {"proxy": URL(self.url), "headers": headers | shown}


def parsed_proxy(text: str | SecretStr, what: str) -> Proxy:
    """Parse a proxy URL; user name and password in it are percent-encoded.

    Args:
        text: the URL.
        what: the argument or variable it comes from, for the error.

    Raises:
        ConfigurationError: it is not such a URL; the message does not repeat it.
    """
    text = tidied(text.get_secret_value() if isinstance(text, SecretStr) else text)
    try:
        parts = urlsplit(text)
        host, port, scheme = parts.hostname, parts.port, parts.scheme.lower()
        usable = scheme in ("http", "https") and host and port != 0 and text.isprintable()
        if usable and parts.path in ("", "/") and not parts.query and not parts.fragment:
            place = parts.netloc.rpartition("@")[2]
            url = str(URL(f"{scheme}://{place}")).rstrip("/")
            if "@" not in parts.netloc:
                return Proxy(url)
            user, password = unquote(parts.username or ""), unquote(parts.password or "")
            if ":" not in user and (user + password).isprintable():
                return Proxy(url, user, SecretStr(password))
    except ValueError:  # the error quotes the URL
        pass
    kind = " (SOCKS is not supported)" if text.lower().startswith("socks") else ""
    raise ConfigurationError(f"{what} must be {_EXPECTED}{kind}")


@dataclass(frozen=True)
class Proxies:
    """Selects the proxy for a request.

    Attributes:
        named: the explicit proxy; all requests go through it.
        trust_env: whether to use HTTP_PROXY, HTTPS_PROXY and NO_PROXY if no proxy is named.
    """

    named: Proxy | None = None
    trust_env: bool = False

    def on_the_way_to(self, url: str) -> Proxy | None:
        """Return the proxy for a request to this address, or None.

        Raises:
            ConfigurationError: the environment names an unusable one.
        """
        if self.named is not None or not self.trust_env:
            return self.named
        parts = urlsplit(url)
        host = parts.hostname or ""
        if is_loopback(host) or urllib.request.proxy_bypass(host):
            return None
        given = urllib.request.getproxies().get(parts.scheme)
        return parsed_proxy(given, f"{parts.scheme.upper()}_PROXY") if given else None

    def full_url(self, url: str) -> URL | None:
        """Return the proxy URL, with password, for a session that only uses this address."""
        way = self.on_the_way_to(url)
        if way is None or way.user is None:
            return None if way is None else URL(way.url)
        return URL(way.url).with_user(way.user).with_password(way.password.get_secret_value())

    def options(self, url: str, headers: dict[str, str]) -> dict[str, Any]:
        """Return the options for a request to this address with these headers."""
        way = self.on_the_way_to(url)
        return {"headers": headers} if way is None else way.options(url, headers)


def usable_proxies(
    proxy: str | SecretStr | None, trust_env: bool, urls: tuple[str, ...], *, allow_insecure: bool
) -> Proxies:
    """Return the proxies for the addresses.

    Args:
        proxy: the argument; None for SLM_PROXY.
        trust_env: whether to use the environment's standard proxy variables.
        urls: the SLM's addresses.
        allow_insecure: whether plain http to another machine is allowed.

    Raises:
        ConfigurationError: the proxy URL is invalid, or the proxy would see the token in plain
            text.
    """
    named = None
    if proxy is not None:
        named = parsed_proxy(proxy, "proxy")
    elif (given := variable("SLM_PROXY")) is not None:
        named = parsed_proxy(given, "SLM_PROXY")
    proxies = Proxies(named, trust_env)
    for url in urls:
        way = proxies.on_the_way_to(url)
        if way is None or allow_insecure or url.startswith("https://"):
            continue
        # A proxy forwards TLS untouched; without TLS, both it and the network can read the traffic.
        if not is_loopback(urlsplit(way.url).hostname or ""):
            raise ConfigurationError(
                f"an SLM over plain http cannot be reached through the proxy {way.place}, which "
                "would be sent the token to read: use https, or no proxy"
            )
    return proxies
