"""Where a client's cache file is if no path is given: in the account's state directory.

Each server, token, client name and cache key has its own file. Opens none of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from slm.client.runtime.log import quiet_logger
from slm.common.environment import variable
from slm.common.files import NotTrusted, make_folder

MAX_FILES: Final = 64
"""How many cache files the folder may hold; the one written longest ago is removed first."""

_log = quiet_logger("slm.client")


def default_cache_file(
    urls: Sequence[str], token_identity: str, name: str, cache_key: str | None
) -> Path | None:
    """Return this client's cache file in the state directory, creating its folder.

    Returns None, and logs why, if the account has no directory that it can write and no one else
    can: in a container without a home directory, or with a read-only one.

    Args:
        urls: the addresses of the SLM.
        token_identity: distinguishes this token from others, but is not the token.
        name: the client's name.
        cache_key: the key that encrypts the file, if any.
    """
    try:
        folder = _state_directory() / "slm"
        make_folder(folder)
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise NotTrusted(f"{folder} cannot be written")
    except (NotTrusted, OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        _log.warning(
            "no cache file is kept (%s): a start without the SLM will not have the last "
            "configuration; give cache_file or SLM_CACHE_FILE a path, or turn it off with "
            "SLM_CACHE_FILE=off",
            why,
        )
        return None
    sealed_with = cache_key and hashlib.sha256(cache_key.encode()).hexdigest()
    what = json.dumps([sorted(urls), token_identity, name, sealed_with])
    digest = hashlib.sha256(what.encode()).hexdigest()[:16]
    path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[:64].lstrip('.')}-{digest}.json"
    _make_room(folder, path)
    return path


def _state_directory() -> Path:
    """Return $XDG_STATE_HOME, or ~/.local/state if that is not an absolute path."""
    named = variable("XDG_STATE_HOME")
    if named is not None and Path(named).is_absolute():
        return Path(named)
    home = Path("~").expanduser()
    if not home.is_absolute():
        raise RuntimeError("this account has no home directory")
    return home / ".local" / "state"


def _make_room(folder: Path, ours: Path) -> None:
    """Remove the oldest files, so that clients with ever-changing names do not fill the disk."""
    written: list[tuple[float, Path]] = []
    with contextlib.suppress(OSError):
        for path in folder.glob("*-????????????????.json"):
            if path != ours:
                with contextlib.suppress(OSError):
                    written.append((path.stat().st_mtime, path))
    for _, path in sorted(written)[: max(0, len(written) + 1 - MAX_FILES)]:
        with contextlib.suppress(OSError):
            path.unlink()
