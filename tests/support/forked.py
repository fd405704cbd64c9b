"""The command `slm` as a process whose start costs a fork, not an interpreter and its imports."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class _Zygote:
    """The one process of this test run that commands are forked from; started when first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any]) -> Any:
        with self._lock:
            if self._process is None:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tests.support.zygote"],
                    cwd=Path(__file__).parents[2],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                atexit.register(self._end, self._process)
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            assert answer, "the process that commands are forked from has ended; see stderr"
            return json.loads(answer)

    @staticmethod
    def _end(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(10)


_zygote = _Zygote()


class Forked:
    """The part of `subprocess.Popen` that a test needs, for a process forked by another."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _zygote.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 30) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"process {self.pid} has not ended"
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def forked(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    stdin: str = os.devnull,
    stdout: str,
    stderr: str,
    cwd: Path | None = None,
) -> Forked:
    """Start `slm` with these arguments and this environment alone.

    Args:
        arguments: what follows `slm`.
        environment: its whole environment. What the interpreter itself reads as it starts
            (`PYTHON…`, `LC_ALL`) has no effect, but for PYTHONIOENCODING.
        stdin: the file that it reads.
        stdout: the file that it appends to.
        stderr: the same; may be the same file.
        cwd: where it runs; None: where the tests do.
    """
    request = {
        "arguments": list(arguments),
        "environment": dict(environment),
        "stdin": stdin,
        "stdout": stdout,
        "stderr": stderr,
        "cwd": str(cwd or Path.cwd()),
    }
    return Forked(_zygote.ask(request))
