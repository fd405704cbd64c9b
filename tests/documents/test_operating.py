"""docs/operating.md, played at a terminal: each command prints what the page shows."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.documents.blocks import ROOT, blocks
from tests.documents.test_tutorial import free_ports

PAGE = (ROOT / "docs" / "operating.md").read_text()
NAMES = ("billing", "search", "support")
COLUMNS = 100
PATIENCE_SECONDS = 30.0
ASKED_AGAIN = ("slm fleet", "slm agents key-status", "slm explain", "curl -s -H", "slm agents diff")
"""What is only read, and shows what has just happened a moment later."""

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
_MASKS = (
    (re.compile(r"^.*━.*\n", re.MULTILINE), ""),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+Z?)?"), "TIME"),
    (re.compile(r"(\w+_ms\"): ?[\d.]+"), r"\1: N"),
    (re.compile(r"\b\d+(\.\d+)? (ms|s)\b"), r"N \2"),
    # What a provider that has no key for us says depends on the network.
    (re.compile(r"(step agent, revision \d+\]).*", re.DOTALL), r"\1"),
    (re.compile(r"\s+"), " "),
)


def normal(text: str) -> str:
    """Return what is the same in every run."""
    for pattern, same in _MASKS:
        text = pattern.sub(same, text)
    return text.strip()


class Site:
    """The directory of the page's reader, with a server and three backends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (port,) = free_ports(1)
        self.replaced = {"127.0.0.1:8760": f"127.0.0.1:{port}"}
        (folder / "bin").mkdir()
        program = folder / "bin" / "slm"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m slm "$@"\n')
        program.chmod(0o755)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLM_", "AUTOBOT_"))}
        self.environ = clean | {
            "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
            "TERM": "dumb",
            "SLM_PORT": port,
            "XDG_STATE_HOME": str(folder / "state"),
        }
        for name in ("key", "first", "second"):
            (folder / name).write_text(f"sk-operating-{name}")
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str, *command: str, ready: str = "") -> None:
        """Start a process, and wait for the line that says that it is ready."""
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environ | {"SLM_TOKEN_FILE": "slm-data/backend.token"}
            if name != "slm serve"
            else self.environ,
            stdout=subprocess.PIPE if ready else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.processes[name] = process
        if ready:
            assert process.stdout is not None
            assert any(line.startswith(ready) for line in process.stdout), "it did not start"

    def stop(self, name: str) -> None:
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.terminate()
        process.wait(20)
        if process.stdout is not None:
            process.stdout.close()

    def serve(self) -> None:
        self.start("slm serve", "slm", "serve", ready="SLM ready at ")

    def backends(self) -> None:
        """Start the page's program under three names; that of `search` has a validator."""
        code = self.here(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0])
        wait = "await asyncio.Event().wait()"
        assert wait in code
        refuses = (
            "client.register_validator(lambda config: 'anthropic is not approved here'"
            f" if config.llm_provider == 'anthropic' else None)\n        {wait}"
        )
        for name in NAMES:
            program = self.folder / f"{name}.py"
            program.write_text(code.replace(wait, refuses) if name == "search" else code)
            self.start(name, sys.executable, str(program), name)

    def learn_names(self) -> None:
        """Find out what stands for the page's process ids and instances."""
        for name in NAMES:
            found = re.search(rf"({name}/[0-9a-f]{{12}}) +backend +(vm:(\d+))", PAGE)
            assert found is not None
            process = self.processes[name]
            host = f"{socket.gethostname()}:{process.pid}"
            self.replaced |= {found[1]: self._instance(name), found[2]: host}
            self.replaced |= {f"STOP {found[3]}": f"STOP {process.pid}"}
            self.replaced |= {f"CONT {found[3]}": f"CONT {process.pid}"}

    def _instance(self, name: str) -> str:
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            rows = json.loads(self.run("slm fleet --json")[0])["backends"]
            for row in rows:
                if row["backend"].startswith(f"{name}/"):
                    return str(row["backend"])
        raise AssertionError(f"{name} is not connected")

    def here(self, text: str) -> str:
        """Return the page's text with what is another one in this run."""
        for there, here in self.replaced.items():
            text = text.replace(there, here)
        return text

    def run(self, command: str) -> tuple[str, int]:
        """Type a command at a terminal; return what it shows, and the exit code."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # a terminal ends with EIO
            while more := os.read(ours, 65536):
                shown += more
        os.close(ours)
        return _ESCAPES.sub("", shown.decode()), process.wait(60)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    try:
        site.serve()
        site.backends()
        site.learn_names()
        yield site
    finally:
        for name in list(site.processes):
            site.stop(name)


@pytest.mark.documents
@pytest.mark.timeout(300)
def test_the_operators_page_prints_what_it_shows(site: Site) -> None:
    """A change, a receipt, a refusal, an explanation, a rollback, a revoked key: in this order."""
    code = 0
    for block in blocks("docs/operating.md", "console"):
        for name in block.stops:
            site.stop(name)
            if name == "slm serve":
                site.serve()
        for entry in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, expected = entry.partition("\n")
            wanted = normal(site.here(expected))
            if command == "echo $?":
                assert str(code) == wanted, f"line {block.line}"
                continue
            until = time.monotonic() + PATIENCE_SECONDS
            while True:
                shown, code = site.run(site.here(command))
                if normal(shown) == wanted or time.monotonic() > until:
                    break
                if not command.startswith(ASKED_AGAIN):
                    break
            assert normal(shown) == wanted, f"{block.line}: $ {command}\n{shown}"
            if "claude-sonnet-5-5 --api-key-stdin" in command:
                moment = re.search(r'--at "([^"]+)"', PAGE)
                assert moment is not None
                now = datetime.now(UTC).astimezone().isoformat(timespec="milliseconds")
                site.replaced[moment[1]] = now
