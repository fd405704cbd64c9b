"""Where an SLM is and how it is reached: addresses, token, TLS files, proxy. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from slm.client.transport.credentials import TokenSource
from slm.client.transport.proxies import Proxies
from slm.client.transport.tls import TlsFiles


@dataclass(frozen=True)
class Site:
    """One SLM, at one or more addresses.

    Attributes:
        urls: its addresses, `http(s)://host[:port][/path]`, in the order in which they are tried.
        token: the token for it.
        tls: a private CA and our own certificate, if any.
        proxies: the proxy to it, if there is one.
    """

    urls: tuple[str, ...]
    token: TokenSource
    tls: TlsFiles = field(default_factory=TlsFiles)
    proxies: Proxies = field(default_factory=Proxies)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of all credentials."""
        return (*self.token.files, *map(Path, self.tls.paths))

    def __str__(self) -> str:
        return " or ".join(self.urls)
