"""What every peer has: start, write one change, watch for changes, stop."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.harness.errors import Missing

Record = Callable[[int], None]
"""Called by a watcher with the sequence number of the change that it just got."""

# What a change frame of the SLM carries, so that all send the same.
_CONFIG = {
    "type": "agent_config_changed",
    "agent_id": "agent-00007",
    "config": {
        "llm_provider": "openai",
        "llm_endpoint": "https://gateway.example.com/v1",
        "llm_model": "gpt-6-luna",
        "llm_timeout": 30,
        "llm_temperature": 0.7,
        "llm_max_tokens": 4096,
        "llm_options": {"top_p": 0.95, "seed": 7},
        "is_default": False,
        "is_active": True,
        "has_api_key": False,
        "api_key_revision": None,
    },
}
_BASE = 10_000_000  # every sequence number has eight digits
_TAIL = json.dumps(_CONFIG, separators=(",", ":"))[1:]


def body(sequence: int) -> bytes:
    """Return a change of the usual size that names its sequence number."""
    return f'{{"revision":{_BASE + sequence},{_TAIL}'.encode()


def sequence_of(change: bytes | str) -> int:
    """Return the sequence number of a change that `body` made."""
    return int(change[12:20]) - _BASE


class Watcher(ABC):
    """One watching client; lives in the watchers' process."""

    @abstractmethod
    async def watch(
        self, address: dict[str, Any], ready: Callable[[], None], record: Record
    ) -> None:
        """Watch for ever: call `ready` when changes from now on arrive, `record` for each."""


class Peer(ABC):
    """One system under measurement, started in a folder of its own.

    Attributes:
        label: what the tables call it.
        durability: when a write is answered, what is on the disk.
        address: what a watcher needs to connect; plain JSON.
    """

    label: ClassVar[str]
    durability: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address: dict[str, Any] = {}

    @abstractmethod
    async def start(self) -> None:
        """Start the server and connect the writer.

        Raises:
            Missing: it, or its client, is not installed.
        """

    @abstractmethod
    async def write(self, sequence: int) -> int:
        """Make one change; return when it was answered the number that watchers will name."""

    @abstractmethod
    async def stop(self) -> None:
        """Stop everything that `start` started."""

    async def commit_times(self) -> dict[int, int]:
        """Return when each change was committed, in ns, where the server can tell."""
        return {}

    @classmethod
    @abstractmethod
    def watcher(cls) -> Watcher:
        """Return one watching client."""


class Program:
    """A server program on loopback, as an unprivileged user where we are root.

    Args:
        command: the program and its arguments.
        folder: its data; its output goes to `log` there.
        unprivileged: run it as `nobody`, for programs that refuse root.
    """

    def __init__(self, command: list[str], folder: Path, *, unprivileged: bool = False) -> None:
        self._command = command
        self._folder = folder
        self._user = "nobody" if unprivileged and os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, env: dict[str, str] | None = None) -> None:
        """Start it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                user=self._user,
                env=None if env is None else os.environ | env,
            )

    async def wait_port(self, port: int, seconds: float = 30) -> None:
        """Wait until it listens.

        Raises:
            RuntimeError: it ended, or does not listen in time.
        """
        assert self._process is not None
        for _ in range(int(seconds / 0.05)):
            if self._process.poll() is not None:
                break
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return
        tail = (self._folder / "log").read_text(errors="replace")[-500:]
        raise RuntimeError(f"{self._command[0]} does not listen: {tail}")

    def stop(self) -> None:
        """End it, this process alone, and wait."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def program(name: str, how: str) -> str:
    """Return the path of an installed program.

    Raises:
        Missing: it is not installed; says how to.
    """
    path = shutil.which(name)
    if path is None:
        raise Missing(f"{name} ({how})")
    return path
