"""Copies a SQLite database while it is in use, and restores such a copy.

Restoring starts a new epoch, so that no client continues from a position that was never reached
there (docs/protocol.md section 2).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from sqlalchemy import URL, Connection, inspect, select, text

from slm.errors import InvalidRequest, ProblemError, StartupError
from slm.server.db import state
from slm.server.db.database import Database
from slm.server.db.errors import DatabaseHeld
from slm.server.db.tables import AGENTS, ENCRYPTION_KEYS
from slm.server.encryption.secret_files import (
    create_private,
    make_data_dir,
    sync_directory,
    sync_file,
)
from slm.server.encryption.vault import fingerprint
from slm.server.lifecycle.startup import is_ours, keys_at_hand
from slm.server.settings import Settings

_BESIDE = ("-wal", "-journal", "-shm")


async def backup(database: Database, path: Path) -> None:
    """Write a consistent copy of the database to a new file with mode 0600, while the server runs.

    The copy contains the tokens' digests and encrypted API keys, but not the encryption key.

    Raises:
        InvalidRequest: the file exists or cannot be written, or the database is not SQLite.
        InsufficientStorage: the disk is full; no file is left behind.
    """
    if database.dialect != "sqlite":
        raise InvalidRequest("This backup is for SQLite; use pg_dump for PostgreSQL.")
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        _refuse_existing(path)
        create_private(unfinished).close()
        try:
            await database.copy_into(unfinished)
            await asyncio.to_thread(sync_file, unfinished)
            # A link fails if the name was taken meanwhile; a rename would replace the file.
            os.link(unfinished, path, follow_symlinks=False)
        finally:
            _remove(unfinished)
        sync_directory(path.parent)
    except FileExistsError:
        raise InvalidRequest(f"{path} is there already; a backup never replaces a file.") from None
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror or error}.") from None


async def restore(settings: Settings, path: Path, *, create: bool = False) -> list[str]:
    """Replace the database by a backup, with a new epoch; the server must be stopped.

    The previous database is kept next to it as `….before-restore-<n>`.

    Args:
        settings: where the database is.
        path: the backup.
        create: whether to continue if there is no database yet.

    Returns:
        What was done, and what needs the operator's attention.

    Raises:
        StartupError: the server is running, there is no database and `create` is not set, or the
            file is not an SLM database of a known version.
    """
    target = Database(settings.url, lock_timeout_seconds=settings.lock_timeout_seconds)
    place = target.path
    if place is None:
        raise StartupError("This restore is for a SQLite file; use pg_restore for PostgreSQL.")
    if not create and not place.exists():
        raise StartupError(
            f"There is no database at {place}: name the server's data directory with --data (or its"
            " file with --database-url), or add --create to restore into an empty place."
        )
    make_data_dir(settings.data_dir)
    copy = place.with_name(f".{place.name}.{secrets.token_hex(8)}")
    try:
        _copy(path, copy)
        notes = await _renew(copy, path, settings)
        async with _locked(target) as is_whole:
            kept = _keep(place, is_whole)
            copy.replace(place)
            sync_directory(place.parent)
    except OSError as error:
        raise StartupError(f"{path} cannot be restored: {error.strerror or error}.") from None
    finally:
        _remove(copy)
    if kept is not None:
        notes.insert(0, f"The database that was there is kept as {kept}.")
    return [f"Restored {place} from {path}, with a new epoch.", *notes]


def _copy(source: Path, to: Path) -> None:
    """Copy a database file, with the WAL if it was not closed, readable only by us."""
    for beside in ("", "-wal"):
        part = Path(f"{source}{beside}")
        if beside and not part.exists():
            continue
        with part.open("rb") as reader, create_private(Path(f"{to}{beside}")) as writer:
            shutil.copyfileobj(reader, writer)


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise FileExistsError


def _remove(path: Path) -> None:
    for beside in ("", *_BESIDE):
        Path(f"{path}{beside}").unlink(missing_ok=True)


async def _renew(copy: Path, source: Path, settings: Settings) -> list[str]:
    """Check that the copy is intact and ours, and give it a new epoch."""

    def work(connection: Connection) -> list[str]:
        if connection.execute(text("PRAGMA quick_check")).scalar_one() != "ok":
            raise StartupError(f"{source} is damaged; nothing was changed.")
        if not is_ours(connection, str(source)) or not inspect(connection).has_table("state"):
            raise StartupError(f"{source} is not a database of SLM; nothing was changed.")
        state.begin_epoch(connection)
        return _key_note(connection, settings)

    database = Database(URL.create("sqlite", database=str(copy)))
    try:
        await database.open()
        return await database.run(work)
    except StartupError as error:
        raise StartupError(str(error).replace(str(copy), str(source))) from None
    except ProblemError:
        raise StartupError(f"{source} is damaged; nothing was changed.") from None
    finally:
        await database.close()
        sync_file(copy)


def _key_note(connection: Connection, settings: Settings) -> list[str]:
    active = connection.execute(
        select(ENCRYPTION_KEYS.c.fingerprint).where(ENCRYPTION_KEYS.c.is_active)
    ).scalar_one_or_none()
    given = {fingerprint(key.get_secret_value()) for key in keys_at_hand(settings)}
    encrypted = select(AGENTS.c.id).where(AGENTS.c.llm_api_key_encrypted != "").limit(1)
    if active is None or active in given or connection.execute(encrypted).first() is None:
        return []
    return [
        f"Its API keys need the encryption key with the fingerprint {active}, which is not the one"
        " at hand: put it into the data directory or SLM_ENCRYPTION_KEYS before the next start."
    ]


@contextlib.asynccontextmanager
async def _locked(target: Database) -> AsyncIterator[bool]:
    """Hold the existing database, so that no server opens it; yield whether it could be opened.

    Nothing holds a damaged or missing one.
    """
    place = target.path
    try:
        if place is None or not place.exists():
            yield False
            return
        try:
            await target.open()
            # Out of WAL mode the file alone is the database, and closing it writes nothing more.
            await target.leave_wal()
        except DatabaseHeld:
            raise StartupError(
                f"A server holds {place}: stop it before a restore; nothing was changed."
            ) from None
        except (StartupError, ProblemError):
            yield False
        else:
            yield True
    finally:
        await target.close()


def _keep(place: Path, is_whole: bool) -> Path | None:
    """Give the existing database a second name, and move away the files next to it."""
    if not place.exists():
        return None
    number = 1
    while (kept := place.with_name(f"{place.name}.before-restore-{number}")).exists():
        number += 1
    # A link, so that the name always exists: a server starting now would create a new database.
    os.link(place, kept)
    for beside in () if is_whole else _BESIDE:
        # They belong to a database that cannot be opened; SQLite would take them for the new one's.
        with contextlib.suppress(FileNotFoundError):
            Path(f"{place}{beside}").rename(f"{kept}{beside}")
    return kept
