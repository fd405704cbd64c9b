"""The client's TLS: always verifying, with a client certificate if configured.

Reads certificate files and creates contexts; opens no connection.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import NamedTuple

from slm.common.files import NotTrusted, check_given
from slm.errors import ConfigurationError

ClientCert = str | os.PathLike[str] | tuple[str | os.PathLike[str], str | os.PathLike[str]]
"""A PEM file with a certificate and its private key, or one file for each."""


class TlsFiles(NamedTuple):
    """The TLS files.

    Attributes:
        ca_file: certificates of a private CA, the only ones trusted; None for the system's.
        client_cert: presented to a server that asks for one (mutual TLS); None for no certificate.
    """

    ca_file: Path | None = None
    client_cert: ClientCert | None = None

    @property
    def paths(self) -> tuple[str | os.PathLike[str], ...]:
        """All files that are read."""
        cert = self.client_cert
        own = () if cert is None else cert if isinstance(cert, tuple) else (cert,)
        return own if self.ca_file is None else (self.ca_file, *own)

    def context(self) -> ssl.SSLContext | bool:
        """Return a new verifying context, so that replaced files are read again.

        Raises:
            ConfigurationError: a file cannot be read, or has the wrong content.
        """
        if self.ca_file is None and self.client_cert is None:
            return True
        if self.ca_file is not None:
            _check("ca_file", self.ca_file)
        try:
            context = ssl.create_default_context(cafile=self.ca_file and str(self.ca_file))
        except (OSError, ssl.SSLError) as error:
            reason = (
                "it holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror
            )
            raise ConfigurationError(f"ca_file {self.ca_file} cannot be used: {reason}") from None
        if self.client_cert is not None:
            self._load(context, self.client_cert)
        return context

    @staticmethod
    def _load(context: ssl.SSLContext, files: ClientCert) -> None:
        cert, key = files if isinstance(files, tuple) else (files, None)
        for path in (cert, key):
            if path is not None:
                _check("client_cert", path)
        try:
            # With an empty password, OpenSSL does not prompt for one on the terminal.
            context.load_cert_chain(cert, key, password="")  # nosec B106
        except (OSError, ssl.SSLError) as error:
            reason = (
                "certificate and private key do not belong together, or are not PEM"
                if isinstance(error, ssl.SSLError)
                else error.strerror
            )
            raise ConfigurationError(
                f"client_cert {os.fspath(cert)!s} cannot be used: {reason}"
            ) from None


def _check(argument: str, path: str | os.PathLike[str]) -> None:
    """Reject a file that another account could have put there."""
    try:
        check_given(path)
    except NotTrusted as error:
        raise ConfigurationError(f"{argument} cannot be used: {error}") from None
    except OSError as error:
        raise ConfigurationError(
            f"{argument} {os.fspath(path)!s} cannot be used: {error.strerror}"
        ) from None
