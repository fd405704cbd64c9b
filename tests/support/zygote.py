"""Forks the command `slm` from a process that has imported everything: a second saved each time.

Run as `python -m tests.support.zygote`; `forked` talks to it over stdin and stdout. A child runs
the command itself, in a process and a session of its own.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

PRELOADED = (
    "aiohttp",
    "alembic.command",
    "psycopg",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite.pysqlite",
    *(f"slm.cli.{path.stem}" for path in (ROOT / "src/slm/cli").glob("[a-z]*.py")),
    "slm.llm",
    "slm.server.serve",
    "uvicorn.lifespan.on",
    "uvicorn.loops.asyncio",
)


def become(request: dict[str, Any]) -> None:
    """Be the command that was asked for; never returns."""
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["cwd"])
        for name, target in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT if target else os.O_RDONLY
            os.dup2(os.open(request[name], flags, 0o600), target)
        os.environ.clear()
        os.environ.update(request["environment"])
        # New ones: this process has read ahead of its own stdin, which is not the command's.
        encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
        sys.stdin = os.fdopen(0, encoding=encoding, closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding=encoding, errors=errors or None, closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding=encoding, errors="backslashreplace", closefd=False)
        sys.argv = ["slm", *request["arguments"]]
        from slm.cli import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # As at the end of any process, its threads are waited for.
        import threading

        threading._shutdown()  # type: ignore[attr-defined]
        os._exit(code)


def main() -> None:
    """Do what each line asks for, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole group
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    living: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        answer: int | None
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            living.discard(pid)
        else:
            answer = os.fork()
            if answer == 0:
                become(request)
            living.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in living:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
