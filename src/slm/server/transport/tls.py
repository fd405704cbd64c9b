"""The server's TLS: its certificate, reloadable while serving, and client certificates.

Reads certificate files and holds the only context; knows no socket and no route.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from slm.common.files import NotTrusted, check_given
from slm.errors import StartupError

logger = logging.getLogger(__name__)


class ServerTls:
    """A server's TLS context.

    Args:
        cert: the certificate chain in PEM.
        key: the private key in PEM.
        client_ca: CA certificates in PEM; clients must present a certificate signed by one (mTLS).
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        self._cert = cert
        self._key = key
        self._client_ca = client_ca
        self._context: ssl.SSLContext | None = None

    def context(self) -> ssl.SSLContext:
        """Return the context, creating it on the first call.

        Raises:
            StartupError: a file cannot be used; the message names it.
        """
        if self._context is None:
            self._context = self._made()
        return self._context

    def reload(self) -> None:
        """Read the files again; new connections get the new certificate.

        If a file cannot be used, the old certificate stays and the log says why. A new client CA is
        trusted in addition to the earlier ones; removing one requires a restart.
        """
        context = self.context()
        try:
            # Try in a separate context first: a half-applied change would leave the server
            # unusable.
            self._made()
            self._load(context)
        except StartupError as error:
            logger.error("TLS was not reloaded: %s", error)
        else:
            logger.info("TLS was reloaded from %s", self._cert)

    def _made(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._load(context)
        if self._client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _load(self, context: ssl.SSLContext) -> None:
        for path in filter(None, (self._cert, self._key, self._client_ca)):
            try:
                check_given(path)
            except NotTrusted as error:
                raise StartupError(f"A TLS file cannot be used: {error}.") from None
            except OSError as error:
                raise StartupError(
                    f"The TLS file {path} cannot be used: {_reason(error, 'it is no file')}."
                ) from None
        try:
            # With an empty password, OpenSSL does not prompt for one on the terminal.
            context.load_cert_chain(self._cert, self._key, password="")  # nosec B106
        except OSError as error:
            raise StartupError(
                f"The TLS certificate {self._cert} with the key {self._key} cannot be used:"
                f" {_reason(error, 'they do not belong together, or are not PEM')}."
            ) from None
        if self._client_ca is None:
            return
        try:
            context.load_verify_locations(self._client_ca)
        except OSError as error:
            raise StartupError(
                f"The client CA {self._client_ca} cannot be used:"
                f" {_reason(error, 'it holds no certificate')}."
            ) from None


def _reason(error: OSError, otherwise: str) -> str:
    # ssl.SSLError is an OSError with OpenSSL's text.
    return otherwise if isinstance(error, ssl.SSLError) else (error.strerror or otherwise)
