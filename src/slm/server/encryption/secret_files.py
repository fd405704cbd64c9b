"""The data directory, and the secret files in it: written whole, once, and private.

`slm.common.files` decides which files and folders may be used at all. Does not know what the
secrets are for.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import BinaryIO

from slm.common import files
from slm.common.environment import decoded
from slm.errors import StartupError


def make_data_dir(path: Path) -> None:
    """Create the data directory, for our account only, if it is missing.

    Raises:
        StartupError: it cannot be created or written to, or another account can change it.
    """
    try:
        files.make_folder(path)
    except files.NotTrusted as error:
        raise StartupError(f"The data directory cannot be used: {error}.") from None
    except OSError as error:
        if isinstance(error, NotADirectoryError) and path.exists():
            raise StartupError(f"The data directory {path} is not a folder.") from None
        raise StartupError(
            f"The data directory {path} cannot be made: {error.strerror or error}."
        ) from None
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise StartupError(f"The data directory {path} cannot be read and written by this user.")


def check_database_file(path: Path) -> None:
    """Refuse a SQLite file if another account owns or can write it or the files next to it.

    Raises:
        StartupError: it, its journal or its folder belongs to another account or can be written by
            one.
    """
    try:
        try:
            files.check_own_folder(path.parent)
        except FileNotFoundError:
            return  # Opening it raises the better error.
        for beside in ("", "-wal", "-journal", "-shm"):
            part = Path(f"{path}{beside}")
            if os.path.lexists(part):
                files.check_own_file(part)
    except files.NotTrusted as error:
        raise StartupError(f"The database cannot be used: {error}.") from None
    except OSError as error:
        raise StartupError(f"{path} cannot be opened: {error.strerror or error}.") from None


def create_private(path: Path) -> BinaryIO:
    """Create and open a file with mode 0600; FileExistsError if a file or link is there."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600), "wb")


def write_private(path: Path, content: str) -> None:
    """Write a new file with mode 0600, whole or not at all; never replaces an existing one.

    Raises:
        StartupError: it cannot be written, or exists already.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        file = create_private(unfinished)
        try:
            with file:
                file.write(content.encode("ascii"))
                file.flush()
                os.fsync(file.fileno())
            # A link fails if the name is taken; a rename would replace what is there.
            os.link(unfinished, path, follow_symlinks=False)
        finally:
            unfinished.unlink()
        sync_directory(path.parent)
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error.strerror or error}.") from None


def replace_private(path: Path, content: str) -> None:
    """Replace a file by one with mode 0600; never writes half of it.

    Raises:
        StartupError: it cannot be written; the old file is unchanged.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        try:
            with create_private(unfinished) as file:
                file.write(content.encode("ascii"))
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        sync_directory(path.parent)
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error.strerror or error}.") from None


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power failure."""
    sync_file(path)


def sync_file(path: Path) -> None:
    """Make what was written to a file survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_private(path: Path, notes: list[str]) -> str | None:
    """Return a secret file's text without surrounding white space, or None if there is no file.

    Raises:
        StartupError: it cannot be read, or another account can change it.
    """
    try:
        content, mode = files.read_own(path)
        text = decoded(content)
    except FileNotFoundError:
        return None
    except files.NotTrusted as error:
        raise StartupError(f"A secret cannot be used: {error}.") from None
    except UnicodeDecodeError:
        raise StartupError(f"{path} cannot be used: it is not text.") from None
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror or error}.") from None
    if mode & 0o077:
        notes.append(f"{path} can be read by other users; chmod 600 it.")
    return text
