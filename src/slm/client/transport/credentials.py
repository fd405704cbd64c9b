"""The client's credentials: its token and its certificate, reloaded when their files change.

Knows files and their content; opens no connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import ssl
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from slm.client.runtime.log import quiet_logger
from slm.client.transport.tls import TlsFiles
from slm.common.environment import decoded, tidied, variable
from slm.common.files import NotTrusted, read_given
from slm.common.scrub import MAX_TEXT, one_line, scrubbed
from slm.errors import ConfigurationError

LOOK_SECONDS: Final = 1.0
"""How often, at most, a file is checked while its content is rejected."""

_log = quiet_logger("slm.client")

Signature = tuple[object, ...]
"""Values that change when a file is written or replaced."""


def signature_of(paths: Sequence[str | os.PathLike[str]]) -> Signature:
    """Return what distinguishes these files from earlier versions; None for a missing one."""
    found: list[object] = []
    for path in paths:
        try:
            status = Path(path).stat()
        except (OSError, ValueError):
            found.append(None)
        else:
            found.append((status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(found)


class TokenSource:
    """The current bearer token; if it comes from a file, the file is read each time.

    Args:
        token: the token itself; else `token_file`, SLM_TOKEN or SLM_TOKEN_FILE, in this order.
        token_file: a file that holds it, so that it can be replaced while the backend runs.

    Raises:
        ConfigurationError: there is none, the file cannot be read, or the token is malformed.
    """

    def __init__(
        self, token: str | SecretStr | None = None, token_file: str | os.PathLike[str] | None = None
    ) -> None:
        where = "the token"
        if token is None and token_file is None:
            token, where = variable("SLM_TOKEN"), "SLM_TOKEN"
            token_file = variable("SLM_TOKEN_FILE")
        self._file = Path(token_file) if token is None and token_file is not None else None
        if self._file is not None:
            self._token = self._read(self._file)
        elif token is not None:
            text = token.get_secret_value() if isinstance(token, SecretStr) else token
            self._token = usable_token(text, where)
        else:
            raise ConfigurationError(
                "no token for the SLM: give token= or token_file=, or set SLM_TOKEN or "
                "SLM_TOKEN_FILE"
            )

    @property
    def files(self) -> tuple[Path, ...]:
        """The token's file, if any."""
        return () if self._file is None else (self._file,)

    @property
    def identity(self) -> str:
        """What distinguishes this token: its file, which stays the same, or else a hash of it."""
        if self._file is not None:
            return f"file {self._file.absolute()}"
        return hashlib.sha256(self._token.get_secret_value().encode()).hexdigest()[:16]

    def headers(self) -> dict[str, str]:
        """Return the Authorization header for the next request."""
        if self._file is not None:
            # A file that is being replaced may be missing or empty for a moment.
            with contextlib.suppress(ConfigurationError):
                self._token = self._read(self._file)
        return {"Authorization": f"Bearer {self._token.get_secret_value()}"}

    def repeated(self, text: str) -> str:
        """Return a server's text as one line for an error or a log, without the token."""
        return one_line(scrubbed(text[:MAX_TEXT], self._token.get_secret_value()))

    @staticmethod
    def _read(path: Path) -> SecretStr:
        return usable_token(text_of(path, "the token file"), f"the token file {path}")


def text_of(path: str | os.PathLike[str], what: str) -> str:
    """Return the text of a small file named by the operator, tidied.

    Raises:
        ConfigurationError: it cannot be read or is not text; the message names the file.
    """
    try:
        return decoded(read_given(path))
    except NotTrusted as error:
        reason = f"{what} cannot be used: {error}"
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or "it is not text"
        reason = f"{what} {os.fspath(path)!s} cannot be read: {said}"
    # Outside the handler: a UnicodeDecodeError contains the file's content.
    raise ConfigurationError(reason)


def usable_token(text: str, where: str) -> SecretStr:
    """Return the token in the text, without surrounding characters.

    Raises:
        ConfigurationError: it cannot be a token; the message does not repeat it.
    """
    text = tidied(text)
    for scheme in ("Bearer ", "bearer "):
        text = text.removeprefix(scheme).strip()
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise ConfigurationError(f"{where} holds no token: one word of printable ASCII is expected")
    if text[0] in "\"'`" or text[-1] in "\"'`":
        raise ConfigurationError(f"{where} has a quote at one end only: write the token alone")
    return SecretStr(text)


class TlsContext:
    """The current TLS context, recreated when one of its files was written or replaced.

    While a certificate and key are being replaced, they match only once both are written; until
    then the previous context stays in use.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._signature = signature_of(files.paths)
        self._context = files.context()
        self._complained: Signature | None = None

    def current(self) -> ssl.SSLContext | bool:
        """Return the context for the next connection."""
        paths = self._files.paths
        if not paths:
            return self._context
        signature = signature_of(paths)
        if signature != self._signature:
            try:
                self._context = self._files.context()
                self._signature = signature
                _log.info("the TLS files were replaced and are in use now")
            except ConfigurationError as error:
                if self._complained != signature:
                    self._complained = signature
                    _log.warning("replaced TLS files are not used yet: %s", error)
        return self._context


class Watch:
    """Waits for a time, or until one of several files was written or replaced.

    Args:
        paths: the files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._seen = signature_of(self._paths)

    def note(self) -> None:
        """Record the files' current state: what is rejected from now on was read from them."""
        self._seen = signature_of(self._paths)

    async def wait(self, seconds: float) -> bool:
        """Wait; return True if it ended early because a file changed since the last `note`."""
        if not self._paths:
            await asyncio.sleep(seconds)
            return False
        until = time.monotonic() + seconds
        while True:
            if signature_of(self._paths) != self._seen:
                return True
            left = until - time.monotonic()
            if left <= 0:
                return False
            await asyncio.sleep(min(left, LOOK_SECONDS))
