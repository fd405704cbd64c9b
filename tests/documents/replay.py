"""Play a document as its reader would: save its files, type its commands, compare what is printed.

A `python` block whose first line is `# NAME.py` is a file. A `console` block is a terminal: after
`$ ` a command, below it what it prints. What no two runs have in common (times, process ids, ports)
is not compared, and `…` stands for any text.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from queue import Empty, Queue
from types import TracebackType

from tests.documents.blocks import Block

SERVES = ("slm serve", "slm watch", "uvicorn ", "flask ", "celery ")
"""Commands that go on until they are stopped, once they have printed what is shown of it."""

_SECONDS = 60.0
_ENDED = "(it ended, or prints no more)"
_SAME = (
    (re.compile(r"\b\d+(\.\d+)? (ms|s)\b"), r"N \2"),
    (re.compile(r"/[0-9a-f]{12}\b"), "/INSTANCE"),
    (re.compile(r"\b[\w.-]+:\d+(?=  )"), "HOST:PID"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"), "TIME"),
    (re.compile(r"[ \t]+"), " "),
    (re.compile(r" $", re.MULTILINE), ""),
)


class Replay:
    """A folder and its terminals.

    Args:
        folder: where the reader is.
        environ: variables beside the usual ones.
        replaced: what stands for what in the document, such as a free port for the usual one.
    """

    def __init__(
        self, folder: Path, environ: Mapping[str, str], replaced: Mapping[str, str]
    ) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLM_", "AUTOBOT_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environ = clean | {"PATH": path, "COLUMNS": "100", "PYTHONUNBUFFERED": "1", **environ}
        self._folder = folder
        self._replaced = replaced
        self._running: dict[str, tuple[subprocess.Popen[str], Queue[str]]] = {}

    def __enter__(self) -> Replay:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for command in list(self._running):
            self.stop(command)

    def play(self, blocks: Iterable[Block]) -> None:
        """Do what the blocks say, in order."""
        for block in blocks:
            where = f"{block.page}:{block.line}"
            for command in block.stops:
                self.stop(command)
            if block.language == "python":
                name = re.match(r"# (\w+\.py)\n", block.text)
                assert name is not None, f"{where}: the first line names no file"
                (self._folder / name[1]).write_text(self._here(block.text))
            else:
                self._type(block.text, where)

    def stop(self, command: str) -> None:
        """Press Ctrl-C in the terminal of the command that begins so."""
        (full,) = [each for each in self._running if command in each]
        process, _ = self._running.pop(full)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)
        assert process.stdout is not None
        process.stdout.close()

    def _type(self, text: str, where: str) -> None:
        for entry in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, shown = re.match(r"((?:.*\\\n)*.*)\n?((?:.*\n?)*)", entry).groups()  # type: ignore[union-attr]
            if any(f" {serves}" in f" {command}" for serves in SERVES):
                self._serve(command, shown.splitlines(), where)
                continue
            done = subprocess.run(
                ["bash", "-c", self._here(command)],
                cwd=self._folder,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=_SECONDS,
            )
            printed = self._there(done.stdout)
            assert matches(shown, printed), f"{where}: $ {command}\n{printed}\ninstead of\n{shown}"

    def _serve(self, command: str, shown: list[str], where: str) -> None:
        process = subprocess.Popen(
            ["bash", "-c", f"exec env {self._here(command)}"],
            cwd=self._folder,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        lines: Queue[str] = Queue()
        threading.Thread(target=_pass_on, args=(process, lines), daemon=True).start()
        self._running[command] = process, lines
        printed = ""
        for wanted in shown:
            line = None
            while line is None or not matches(wanted, self._there(line)):
                try:
                    line = lines.get(timeout=_SECONDS)
                except Empty:
                    line = _ENDED
                printed += line
                assert line != _ENDED, f"{where}: {wanted!r} is not in\n{printed}"

    def _here(self, text: str) -> str:
        for there, here in self._replaced.items():
            text = text.replace(there, here)
        return text

    def _there(self, text: str) -> str:
        for there, here in self._replaced.items():
            text = text.replace(here, there)
        return text


def matches(shown: str, printed: str) -> bool:
    """Say whether a command printed what the document shows."""
    for pattern, same in _SAME:
        shown, printed = pattern.sub(same, shown), pattern.sub(same, printed)
    pattern_of_it = ".*".join(re.escape(part.strip()) for part in shown.strip().split("…"))
    return re.fullmatch(pattern_of_it, printed.strip(), re.DOTALL) is not None


def _pass_on(process: subprocess.Popen[str], lines: Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(_ENDED)
