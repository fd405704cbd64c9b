"""SqliteFile: holds a SQLite file for this process alone, and notices when it disappears.

Knows paths, locks and inodes; runs no statement. The reasons are in
docs/decisions/0028-a-reader-beside-the-writer.md.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from pathlib import Path
from typing import Final

from slm.errors import DatabaseUnavailable, StartupError
from slm.server.db.errors import DatabaseHeld

try:
    import fcntl
except ImportError:  # pragma: no cover - where there are no POSIX locks
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_SHARED_FIRST: Final = 0x40000002
_SHARED_SIZE: Final = 510
"""The bytes that every SQLite process locks before it reads (https://sqlite.org/lockingv3.html)."""

_HEADER: Final = 100
"""The bytes of SQLite's header (https://sqlite.org/fileformat2.html)."""

_held: set[tuple[int, int]] = set()
"""The files of this process, by device and inode: a process is not kept out by its own locks."""

_held_lock: Final = threading.Lock()


class SqliteFile:
    """One file that this process holds from `hold` until `release`.

    Args:
        path: the database file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._wal = f"{path}-wal"
        self._identity: tuple[int, int] | None = None
        self._wal_identity: tuple[int, int] | None = None
        self._descriptor: int | None = None
        self._is_gone = False
        self._noted: tuple[int, bytes, int] | None = None
        self._is_changed = False

    def make(self) -> None:
        """Create the file with mode 0600 if it is missing; SQLite gives its WAL the same mode.

        Raises:
            DatabaseHeld: this process has it open.
            StartupError: it cannot be opened for writing.
        """
        with _held_lock:
            # Before it is opened: closing it would drop every lock that this process has on it.
            if _identity_of(self._path) in _held:
                raise DatabaseHeld.of(str(self._path))
            try:
                flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC
                self._descriptor = os.open(self._path, flags, 0o600)
            except IsADirectoryError:
                raise StartupError(f"{self._path} is a folder, not a SQLite database.") from None
            except FileNotFoundError:
                raise StartupError(f"The folder of {self._path} does not exist.") from None
            except OSError as error:
                raise StartupError(
                    f"{self._path} cannot be opened for writing: {error.strerror or error}."
                ) from None
            self._identity = _identity(os.fstat(self._descriptor))
            _held.add(self._identity)

    def hold(self, seconds: float) -> None:
        """Keep every other process out, even from reading; call it once SQLite has read the file.

        SQLite's own lock on these bytes also belongs to this process, and stays as long as the
        connection is in WAL mode.

        Args:
            seconds: how long to wait for another process that is reading.

        Raises:
            DatabaseHeld: another process holds it.
        """
        if fcntl is None or self._descriptor is None:
            return
        deadline = time.monotonic() + seconds
        while True:
            try:
                kind = fcntl.LOCK_EX | fcntl.LOCK_NB
                fcntl.lockf(self._descriptor, kind, _SHARED_SIZE, _SHARED_FIRST)
            except OSError:
                if time.monotonic() > deadline:
                    raise DatabaseHeld.of(str(self._path)) from None
                time.sleep(random.uniform(0.01, 0.05))  # noqa: S311 - jitter # nosec B311
            else:
                return

    def check(self) -> None:
        """Check that the open file is still the one at the path; costs two calls of `stat`.

        Raises:
            DatabaseUnavailable: the file or its WAL was removed or replaced.
        """
        wal = _identity_of(self._wal)
        if self._wal_identity is None:
            # Before the first write there may be none.
            self._wal_identity = wal
        if _identity_of(self._path) != self._identity or wal != self._wal_identity:
            self._tell_gone()
            raise DatabaseUnavailable(
                "The database file was removed or replaced while the server has it open: put it"
                " back, or restart the server with the file that is to be used."
            )
        self._is_gone = False

    def note(self) -> None:
        """Record the file's state after a transaction of ours: nobody else writes to it."""
        if hasattr(os, "pread"):
            self._noted = self._content()

    def check_content(self) -> None:
        """Check that nobody wrote to the file or truncated it since `note`.

        Do not call it while another of our threads may be writing.

        Raises:
            DatabaseUnavailable: somebody did: what is written now might be lost with the file.
        """
        if self._noted is None:
            return
        now = self._content()
        # A WAL that grew means a commit; one that shrank has lost some.
        if now[:2] == self._noted[:2] and now[2] >= self._noted[2]:
            self._is_changed = False
            return
        if not self._is_changed:
            self._is_changed = True
            logger.error(
                "%s was overwritten or cut by another program while the server has it open."
                " Nothing is written any more. Stop the server and restore a backup (slm db"
                " restore); what the server knew last is still in GET /api/agents.",
                self._path,
            )
        raise DatabaseUnavailable(
            "The database file was overwritten or cut by another program while the server has it"
            " open: stop the server and restore a backup."
        )

    def _content(self) -> tuple[int, bytes, int]:
        """Return the file's size, SQLite's header in it, and the size of the WAL."""
        if self._descriptor is None:
            return 0, b"", 0
        try:
            wal = os.stat(self._wal).st_size  # noqa: PTH116
        except OSError:
            wal = 0
        return os.fstat(self._descriptor).st_size, os.pread(self._descriptor, _HEADER, 0), wal

    def _tell_gone(self) -> None:
        if not self._is_gone:
            self._is_gone = True
            logger.error(
                "%s was removed or replaced under the server (with its -wal, where it has one)."
                " Nothing is written any more. Move the same files back and it goes on by itself;"
                " with another file in their place, restart the server.",
                self._path,
            )

    def release(self) -> None:
        """Release the file; call it after its last connection was closed."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        identity, self._identity = self._identity, None
        if identity is not None:
            with _held_lock:
                _held.discard(identity)


def _identity_of(path: str | Path) -> tuple[int, int] | None:
    """Return the identity of what is at a path; None if it is missing or inaccessible."""
    try:
        # Runs twice per transaction, and a Path costs more than the call.
        return _identity(os.stat(path))  # noqa: PTH116
    except OSError:
        return None


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
