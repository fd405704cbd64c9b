"""Copies a SQLite database in small steps, from one consistent view, without blocking writers.

Knows two files and no table. Each step reads a megabyte, and the copy is flushed to disk bit by
bit: otherwise the fsync of the next commit would wait for hundreds of megabytes.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_STEP_PAGES: Final = 256
_STEPS_A_SYNC: Final = 8
_PAUSE_SECONDS: Final = 0.001


def copy_in_steps(
    source: sqlite3.Connection, path: Path, go_on: Callable[[], None] = lambda: None
) -> None:
    """Write a copy into an empty file and make it durable.

    Args:
        source: reads the database; nobody else uses it meanwhile.
        path: the file, which exists.
        go_on: called after each step; if it raises, the copy ends.

    Raises:
        sqlite3.Error: the database cannot be read or the copy cannot be written.
        OSError: the copy cannot be made durable.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    steps = 0

    def pause(*_: int) -> None:
        nonlocal steps
        steps += 1
        go_on()
        if steps % _STEPS_A_SYNC == 0:
            os.fsync(descriptor)
        time.sleep(_PAUSE_SECONDS)

    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as target:
            # An interrupted copy is thrown away, and we sync it ourselves.
            for pragma in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE"):
                target.execute(f"PRAGMA {pragma}").fetchall()
            # One view from here to the end: otherwise a write in between would restart the copy.
            source.execute("BEGIN")
            try:
                source.execute("SELECT count(*) FROM sqlite_master").fetchall()
                source.backup(target, pages=_STEP_PAGES, progress=pause)
            finally:
                source.execute("ROLLBACK")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
