"""Where an SLM is and how it is reached: addresses, token, TLS files, proxy. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from slm.client.transport.credentials import TokenSource
from slm.client.transport.proxies import Proxies
from slm.client.transport.tls import TlsFiles


@dataclass(frozen=True)
class Site:
    """One SLM, at one address or several.

    Attributes:
        urls: its addresses, `http(s)://host[:port][/path]`, in the order in which they are tried.
        token: what it is shown.
        tls: a private CA and a certificate of our own, where there are any.
        proxies: the proxy on the way, if there is one.
    """

    urls: tuple[str, ...]
    token: TokenSource
    tls: TlsFiles = field(default_factory=TlsFiles)
    proxies: Proxies = field(default_factory=Proxies)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that what is shown to the SLM comes from."""
        return (*self.token.files, *map(Path, self.tls.paths))

    def __str__(self) -> str:
        return " or ".join(self.urls)
