"""Where a client's cache file is if nobody names one: in the state directory of this account.

Each server, token, client name and cache key has a file of its own. Opens none of them.
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
"""How many cache files the folder may hold; the one that was written longest ago goes first."""

_log = quiet_logger("slm.client")


def default_cache_file(
    urls: Sequence[str], token_identity: str, name: str, cache_key: str | None
) -> Path | None:
    """Return the cache file of this client in the state directory, whose folder is made.

    Returns None, and logs why, where the account has no directory that can be written and that
    nobody else can write: a container without a home, or with a read-only one.

    Args:
        urls: the addresses of the SLM.
        token_identity: what tells this token from others, and is not the token.
        name: what the client is called.
        cache_key: the key that the file is encrypted with, if any.
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
    """Return $XDG_STATE_HOME, or ~/.local/state where it is not an absolute path."""
    named = variable("XDG_STATE_HOME")
    if named is not None and Path(named).is_absolute():
        return Path(named)
    home = Path("~").expanduser()
    if not home.is_absolute():
        raise RuntimeError("this account has no home directory")
    return home / ".local" / "state"


def _make_room(folder: Path, ours: Path) -> None:
    """Remove the oldest files, so that clients with ever new names do not fill the disk."""
    written: list[tuple[float, Path]] = []
    with contextlib.suppress(OSError):
        for path in folder.glob("*-????????????????.json"):
            if path != ours:
                with contextlib.suppress(OSError):
                    written.append((path.stat().st_mtime, path))
    for _, path in sorted(written)[: max(0, len(written) + 1 - MAX_FILES)]:
        with contextlib.suppress(OSError):
            path.unlink()
