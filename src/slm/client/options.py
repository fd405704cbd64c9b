"""The options of a client: its arguments, with environment variables as defaults.

An argument always overrides its variable. Reads variables and files; opens no connection.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from slm.client.cache.snapshot_file import SnapshotFile
from slm.client.cache.state_folder import default_cache_file
from slm.client.runtime.log import quiet_logger
from slm.client.transport.addresses import is_insecure, usable_urls
from slm.client.transport.credentials import TokenSource
from slm.client.transport.proxies import usable_proxies
from slm.client.transport.site import Site
from slm.client.transport.tls import ClientCert, TlsFiles
from slm.common.environment import flag, tidied, variable
from slm.errors import ConfigurationError

_log = quiet_logger("slm.client")


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """The checked options of a client.

    Attributes:
        site: where its SLM is.
        file: the snapshot file, or None.
        name: the backend's name; None for the host's name.
        insecure: whether one of the SLM's addresses is plain http to another machine.
    """

    site: Site
    file: SnapshotFile | None
    name: str | None
    insecure: bool

    def log_decisions(self) -> None:
        """Log, at each start, the chosen options that make the client less secure."""
        if self.insecure:
            _log.warning(
                "the SLM at %s is followed over plain http, as allow_insecure says: whoever is on "
                "the way can read the token and the API keys",
                self.site,
            )


def read_options(
    slm_url: str | Sequence[str] | None,
    token: str | SecretStr | None,
    token_file: str | os.PathLike[str] | None,
    *,
    cache_file: str | os.PathLike[str] | bool | None,
    cache_key: str | SecretStr | None,
    ca_file: str | os.PathLike[str] | None,
    client_cert: ClientCert | None,
    name: str | None,
    proxy: str | SecretStr | None,
    trust_env: bool,
    allow_insecure: bool | None,
) -> ClientOptions:
    """Read the options from the arguments of `SLMClient` and the environment.

    Raises:
        ConfigurationError: one of them is invalid, or the address or the token is missing.
    """
    allowed = flag("SLM_ALLOW_INSECURE") if allow_insecure is None else allow_insecure
    urls = usable_urls(slm_url, allow_insecure=allowed)
    tls = usable_tls(ca_file, client_cert)
    site = Site(
        urls,
        TokenSource(token, token_file),
        tls,
        usable_proxies(proxy, trust_env, urls, allow_insecure=allowed),
    )
    name = name if name is not None else variable("SLM_NAME")
    return ClientOptions(
        site=site,
        file=_snapshot_file(cache_file, cache_key, site, name),
        name=name,
        insecure=any(map(is_insecure, urls)),
    )


def usable_tls(
    ca_file: str | os.PathLike[str] | None = None, client_cert: ClientCert | None = None
) -> TlsFiles:
    """Return the TLS files named by the arguments or SLM_CA_FILE and SLM_CLIENT_CERT/_KEY.

    Raises:
        ConfigurationError: one of them cannot be used; raised here rather than at the first
            connection.
    """
    ca_file = ca_file if ca_file is not None else variable("SLM_CA_FILE")
    if client_cert is None:
        cert, key = variable("SLM_CLIENT_CERT"), variable("SLM_CLIENT_KEY")
        if key is not None and cert is None:
            raise ConfigurationError("SLM_CLIENT_KEY is set, but not SLM_CLIENT_CERT")
        client_cert = cert if cert is None or key is None else (cert, key)
    files = TlsFiles(Path(ca_file) if ca_file is not None else None, client_cert)
    files.context()
    return files


def cache_file_from_environment() -> str | bool | None:
    """Return the value of SLM_CACHE_FILE: a path, False for `off`, True for `on`, or None."""
    named = variable("SLM_CACHE_FILE")
    return {"off": False, "on": True}.get((named or "").lower(), named)


def _snapshot_file(
    given: str | os.PathLike[str] | bool | None,
    key: str | SecretStr | None,
    site: Site,
    name: str | None,
) -> SnapshotFile | None:
    given = given if given is not None else cache_file_from_environment()
    if given is None or given is False:
        return None
    if key is None:
        key = variable("SLM_CACHE_KEY")
    elif isinstance(key, SecretStr):
        key = key.get_secret_value()
    key = None if key is None else tidied(key)
    path: str | os.PathLike[str] | None = (
        default_cache_file(site.urls, site.token.identity, name or socket.gethostname(), key)
        if given is True
        else given
    )
    return None if path is None else SnapshotFile(path, key)
