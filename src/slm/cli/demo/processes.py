"""The processes of the demo: an SLM that can be stopped and started, and a backend.

Each is a child in its own session, so that Ctrl-C in the terminal reaches only the demo, which ends
them in order. Knows nothing about how the demo looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from pathlib import Path
from typing import Any, Final

from slm.errors import StartupError

_READY: Final = re.compile(r"^SLM ready at (\S+)$", re.MULTILINE)
_START_SECONDS: Final = 30.0
_END_SECONDS: Final = 15.0
_LOOK_SECONDS: Final = 0.02


class Server:
    """`slm serve` with a temporary data directory.

    Attributes:
        data_dir: its database, key and tokens.
        log_path: its output.
        url: its address; the same after every start.
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.log_path = data_dir.with_name("slm.log")
        self.url = ""
        self._process: Process | None = None

    @property
    def pid(self) -> int:
        """The process id of the last start."""
        assert self._process is not None, "never started"  # noqa: S101
        return self._process.pid

    async def start(self) -> None:
        """Start it and wait until it responds; later starts use the same port.

        Raises:
            StartupError: it exited or was too slow; the message ends with its last output.
        """
        port = self.url.rpartition(":")[2] or "0"
        said_before = self._said()
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "slm", "serve", "--host", "127.0.0.1", "--port", port),
                *("--data", str(self.data_dir)),
                stdin=DEVNULL,
                stdout=log,
                stderr=log,
                env=_clean_environment(),
                start_new_session=True,
            )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_SECONDS):
                while self._process.returncode is None:
                    if ready := _READY.search(self._said(), len(said_before)):
                        self.url = ready[1]
                        return
                    await asyncio.sleep(_LOOK_SECONDS)
        last = self._said()[len(said_before) :].strip().splitlines() or ["it said nothing"]
        raise StartupError(f"the SLM did not start: {last[-1]}")

    def _said(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    async def stop(self) -> None:
        """Stop it as an operator does, with SIGTERM."""
        await _end(self._process)


class DemoBackend:
    """The demo's backend and its reports.

    Args:
        url: the SLM's address.
        token_file: its token, in the SLM's data directory; its log is next to that directory.
    """

    def __init__(self, url: str, token_file: Path) -> None:
        self._url = url
        self._token_file = token_file
        self._log_path = token_file.parent.with_name("backend.log")
        self._process: Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._reports: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._in_force: dict[int, float] = {}
        self._news = asyncio.Condition()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None, "never started"  # noqa: S101
        return self._process.pid

    async def start(self) -> None:
        """Start it and wait until it has received its first configs from the SLM."""
        with self._log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "slm.cli.demo.backend", self._url),
                stdin=PIPE,
                stdout=PIPE,
                stderr=log,
                env=_clean_environment()
                | {
                    "SLM_TOKEN_FILE": str(self._token_file),
                    # Its cache file is also gone when the demo ends.
                    "XDG_STATE_HOME": str(self._log_path.with_name("state")),
                },
                start_new_session=True,
            )
        self._reader = asyncio.create_task(self._read(self._process))
        await self._next_report()

    async def ask(self, agent_id: str, prompt: str) -> dict[str, Any]:
        """Have it make one request; return its report.

        Raises:
            StartupError: the request failed; the message is the backend's.
        """
        assert self._process is not None and self._process.stdin is not None  # noqa: S101, PT018
        request = {"ask": agent_id, "prompt": prompt}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        report = await self._next_report()
        if report["event"] == "failed":
            raise StartupError(f"the backend's request failed: {report['error']}")
        return report

    async def in_force(self, revision: int) -> float:
        """Return when (monotonic clock) its cache had this revision or a later one."""
        async with asyncio.timeout(_START_SECONDS), self._news:
            await self._news.wait_for(lambda: max(self._in_force, default=0) >= revision)
        return min(at for known, at in self._in_force.items() if known >= revision)

    async def stop(self) -> None:
        """Stop it by closing its input, which it waits for."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        await _end(self._process, ask_first=True)
        if self._reader is not None:
            self._reader.cancel()

    async def _next_report(self) -> dict[str, Any]:
        report = await self._reports.get()
        if report["event"] == "ended":
            said = self._log_path.read_text(errors="replace").strip().splitlines()
            raise StartupError(f"the demo's backend ended: {said[-1] if said else 'silently'}")
        return report

    async def _read(self, process: Process) -> None:
        while line := await _read_line(process):
            report = json.loads(line)
            if report["event"] == "in force" and report["revision"] is not None:
                async with self._news:
                    self._in_force[report["revision"]] = report["at"]
                    self._news.notify_all()
            else:
                await self._reports.put(report)
        await self._reports.put({"event": "ended"})


def _clean_environment() -> dict[str, str]:
    """Return the environment without variables that would redirect our children."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("SLM_", "AUTOBOT_LLM_"))}


async def _read_line(process: Process) -> str:
    assert process.stdout is not None  # noqa: S101
    return (await process.stdout.readline()).decode(errors="replace").rstrip()


async def _end(process: Process | None, *, ask_first: bool = False) -> None:
    """Ensure that a child ends, in an orderly way if possible."""
    if process is None or process.returncode is not None:
        return
    try:
        async with asyncio.timeout(_END_SECONDS):
            if not ask_first:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
            await process.wait()
    except TimeoutError:
        await _kill(process)
    except asyncio.CancelledError:
        await _kill(process)
        raise


async def _kill(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
