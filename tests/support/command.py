"""Runs the real command `slm` as a person or a script does, and looks at all it says."""

from __future__ import annotations

import json
import os
import pty
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.forked import forked
from tests.support.servers import eventually

CANARY = "sk-canary-7c21"
"""An API key; where a command shows it, the command is broken."""

TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Done:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, as JSON."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line that says why it failed."""
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")


def environment(
    data: Path | None = None, env: Mapping[str, str] | None = None, **extra: str
) -> dict[str, str]:
    """Return the environment of a command: nothing of ours but what is named."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLM_", "AUTOBOT_LLM_"))}
    clean |= {"SLM_DATA_DIR": str(data)} if data is not None else {}
    return clean | dict(env or {}) | extra


async def slm(
    *arguments: str,
    data: Path | None = None,
    stdin: str | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    **variables: str,
) -> Done:
    """Run `slm` to its end.

    Args:
        *arguments: what follows `slm`.
        data: the data directory of the server it speaks to.
        stdin: what it reads; nothing by default, and not a terminal.
        cwd: where it runs.
        env: further environment variables.
        **variables: the same.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, out, err = (Path(folder, name) for name in ("stdin", "stdout", "stderr"))
        given.write_bytes((stdin or "").encode())
        process = forked(
            arguments,
            environment(data, env, **variables),
            stdin=str(given),
            stdout=str(out),
            stderr=str(err),
            cwd=cwd,
        )
        try:
            await eventually(lambda: process.poll() is not None, TIMEOUT_SECONDS)
        finally:
            process.kill()
            code = process.wait()
        charset = (env or {}).get("PYTHONIOENCODING", "utf-8").partition(":")[0]
        said = (path.read_bytes().decode(charset) for path in (out, err))
        return checked(Done(code, *said))


def checked(done: Done) -> Done:
    """Return what a command did, if it kept what every command must keep."""
    assert "Traceback" not in done.err, done.err
    assert "unexpected" not in done.err, done.err
    assert CANARY not in done.out
    assert CANARY not in done.err
    return done


def slm_at_a_terminal(
    *arguments: str,
    data: Path,
    answers: Mapping[str, str | Callable[[], object]],
    columns: int = 100,
    env: Mapping[str, str] | None = None,
) -> Done:
    """Run `slm` at a terminal and answer its prompts; blocks, so wrap it in `asyncio.to_thread`.

    Args:
        *arguments: what follows `slm`.
        data: the data directory of the server it speaks to.
        answers: what to type when a text is shown, or what to call then.
        columns: how wide the terminal is.
        env: further environment variables.
    """
    around = environment(data, env, COLUMNS=str(columns), TERM="xterm-256color")
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, [sys.executable, "-m", "slm", *arguments], around)
    shown = ""
    waiting = dict(answers)
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # EIO: how Linux says that the other side has gone
            break
        if not piece:
            break
        shown += piece.decode(errors="replace")
        for text, answer in list(waiting.items()):
            if text in shown:
                del waiting[text]
                if callable(answer):
                    answer()
                else:
                    os.write(terminal, f"{answer}\n".encode())
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    return checked(Done(os.waitstatus_to_exitcode(status), shown, ""))
