"""Which server and token a command uses: from options, environment, or a data directory.

Knows where to look, and nothing about the requests.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import typer
from pydantic import SecretStr

from slm.client.transport.addresses import ROUTES
from slm.client.transport.proxies import Proxies, usable_proxies
from slm.client.transport.tls import ClientCert
from slm.common.environment import decoded, flag, is_service_link, listed, tidied, variable
from slm.common.files import NotTrusted, read_given, read_own
from slm.errors import ConfigurationError

_CONNECT_SECONDS: Final = 2.0
DEFAULT_URL: Final = "http://127.0.0.1:8760"
URL_FILE: Final = "server.url"
"""Written to the data directory by `slm serve` while it runs."""

ADMIN_FILE: Final = "admin.token"
BACKEND_FILE: Final = "backend.token"
"""The tokens that the first start writes to the data directory."""

_PANEL: Final = "Which server"


def _path(text: str | Path) -> Path:
    """Return the path in an option or its variable; a variable may be quoted."""
    return Path(tidied(str(text)))


Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="The server's address; several, separated by commas, are tried in turn. "
        f"\\[env var: SLM_URL; else the data directory's {URL_FILE}, else {DEFAULT_URL}]",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        metavar="FILE",
        help="A file that holds the token. \\[env var: SLM_TOKEN, SLM_TOKEN_FILE; else the data "
        "directory's admin.token, for slm ask its backend.token]",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
CaFile = Annotated[
    Path | None,
    typer.Option(
        "--ca-file",
        metavar="FILE",
        envvar="SLM_CA_FILE",
        parser=_path,
        help="Certificates of a private CA, in PEM.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
DataDir = Annotated[
    Path,
    typer.Option(
        "--data",
        metavar="DIR",
        envvar="SLM_DATA_DIR",
        parser=_path,
        help="The data directory of a server on this machine.",
        rich_help_panel=_PANEL,
    ),
]
DEFAULT_DATA_DIR: Final = Path("slm-data")


@dataclass(frozen=True)
class Target:
    """A server and the token for it.

    Attributes:
        url: `http(s)://host:port`, without a trailing slash.
        token: the bearer token.
        ca_file: certificates of a private CA, or None for the system's.
        found: where URL and token were found, for messages.
        client_cert: our own certificate, for a server that asks for one.
        proxies: the proxy to the server, if there is one.
    """

    url: str
    token: SecretStr
    ca_file: Path | None
    found: str
    client_cert: ClientCert | None = None
    proxies: Proxies = field(default_factory=Proxies)

    @property
    def is_private(self) -> bool:
        """Whether no one on the network can read the traffic: TLS, or this same machine.

        Or whether the user declared the network safe with SLM_ALLOW_INSECURE.
        """
        if self.url.startswith("https://") or is_loopback(self.url):
            return True
        return flag("SLM_ALLOW_INSECURE")


def find(
    url: Url = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    data: DataDir = DEFAULT_DATA_DIR,
    *,
    own_token: str = ADMIN_FILE,
) -> Target:
    """Return the server named by the options, the environment or the data directory.

    The data directory's own token is only sent to a server on this machine, never to an address
    from elsewhere.

    Args:
        url: the server's address.
        token_file: a file that holds the token.
        ca_file: certificates of a private CA.
        data: the data directory of a server on this machine.
        own_token: the data directory's token to use if no other is given.

    Raises:
        ConfigurationError: the address is invalid, or there is no token.
    """
    address, url_source = _find_url(url, data)
    token, token_source = _find_token(token_file, data / own_token, address)
    found = f"{url_source}; token: {token_source}"
    proxies = usable_proxies(None, False, (address,), allow_insecure=flag("SLM_ALLOW_INSECURE"))
    return Target(address, SecretStr(token), ca_file, found, _client_cert(), proxies)


def at_a_server(
    command: Callable[..., None], *, unless: str | None = None, own_token: str = ADMIN_FILE
) -> Callable[..., None]:
    """Replace a command's `target` argument with the options that name a server.

    Args:
        command: called with the `Target` that `find` returns for those options.
        unless: an argument of the command; if it is given, `target` is None.
        own_token: the data directory's token to use if no other is given.
    """
    options = dict(inspect.signature(find, eval_str=True).parameters)
    del options["own_token"]
    own = inspect.signature(command, eval_str=True).parameters
    shown = [*(each for each in own.values() if each.name != "target"), *options.values()]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        named = {name: given.pop(name) for name in options}
        offline = unless is not None and bool(given[unless])
        command(target=None if offline else find(**named, own_token=own_token), **given)

    # typer reads both.
    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in shown}
    return run


def _client_cert() -> ClientCert | None:
    """Return the files in SLM_CLIENT_CERT and SLM_CLIENT_KEY; both may be the same."""
    cert, key = variable("SLM_CLIENT_CERT"), variable("SLM_CLIENT_KEY")
    return (cert, key) if cert and key else cert or None


def is_loopback(url: str) -> bool:
    """Return whether the URL's host is this machine: a loopback address or `localhost`."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _find_url(given: str | None, data_dir: Path) -> tuple[str, str]:
    if given is not None:
        return _first_of(given, "--url"), "--url"
    if (named := variable("SLM_URL")) and not is_service_link(named):
        return _first_of(named, "SLM_URL"), "SLM_URL"
    file = data_dir / URL_FILE
    try:
        text = decoded(read_own(file)[0])
    except NotTrusted as error:
        raise ConfigurationError(
            f"{error}; the address in {file} is not used, since a token is sent to it: name the"
            " server with --url or SLM_URL"
        ) from None
    except (OSError, UnicodeDecodeError):
        return DEFAULT_URL, "the default"
    return _checked_url(text, str(file)), str(file)


def _first_of(text: str, source: str) -> str:
    """Return the address; of several, the first that accepts connections."""
    urls = [_checked_url(part, source) for part in listed(text) or [text]]
    for url in urls if len(urls) > 1 and variable("SLM_PROXY") is None else ():
        parts = urlsplit(url)
        place = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        with contextlib.suppress(OSError), socket.create_connection(place, _CONNECT_SECONDS):
            return url
    return urls[0]


def _checked_url(text: str, source: str) -> str:
    url = tidied(text).rstrip("/")
    for websocket, http in (("ws://", "http://"), ("wss://", "https://")):
        if url.startswith(websocket):
            url = http + url.removeprefix(websocket)
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or "@" in url or "?" in url or "#" in url:
        # Not shown: it may contain a password.
        raise ConfigurationError(f"{source} is not an address like https://slm.example:8760")
    for route in ROUTES:
        if url.endswith(route):
            raise ConfigurationError(
                f"{source} ends with {route}, which belongs to the routes of the API: it is the"
                f" address of the server alone, such as {parts.scheme}://{parts.netloc}"
            )
    return url


def _find_token(given: Path | None, file: Path, url: str) -> tuple[str, str]:
    if given is not None:
        return read_token(given), str(given)
    if token := variable("SLM_TOKEN"):
        return _checked_token(token, "SLM_TOKEN"), "SLM_TOKEN"
    if named := variable("SLM_TOKEN_FILE"):
        return read_token(Path(named)), named
    if is_loopback(url) and file.exists():
        return _own_token(file), str(file)
    raise ConfigurationError(
        f"no token for {url}: name a file with --token-file or SLM_TOKEN_FILE, or set SLM_TOKEN "
        f"(a server writes {file.name} into its data directory; none is in {file.parent})"
    )


def _own_token(file: Path) -> str:
    """Return a data directory's token, unless another account could have put it there."""
    try:
        read_own(file)
    except NotTrusted as error:
        raise ConfigurationError(
            f"{error}; the token in {file} is not used: name one with --token-file or SLM_TOKEN"
        ) from None
    except OSError:
        pass  # reading it raises the better error
    return read_token(file)


def read_token(file: Path) -> str:
    """Return the token in a file.

    Raises:
        ConfigurationError: the file cannot be read or is empty.
    """
    try:
        token = decoded(read_given(file))
    except NotTrusted as error:
        raise ConfigurationError(f"the token file cannot be used: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigurationError(f"the token file {file} cannot be read: {reason}") from None
    if not token:
        raise ConfigurationError(f"the token file {file} is empty")
    return _checked_token(token, f"the token file {file}")


def _checked_token(token: str, source: str) -> str:
    """Reject a token that no header can carry; our tokens are one word."""
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigurationError(
            f"{source} holds more than a token: it is one word that begins with slm_"
        )
    return token
