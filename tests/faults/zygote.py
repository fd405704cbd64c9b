"""Forks SLM servers from a process that has imported everything: seconds saved at each start.

Run as `python -m tests.faults.zygote`; `tests.faults.forked` talks to it over stdin and stdout.
A child runs the command `slm serve` itself, in a process of its own.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
from typing import Any

PRELOADED = (
    "alembic.command",
    "psycopg",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite.pysqlite",
    "slm.cli.app",
    "slm.cli.serve",
    "slm.server.run",
    "uvicorn.lifespan.on",
    "uvicorn.loops.asyncio",
)


def become(request: dict[str, Any]) -> None:
    """Be the server that was asked for; never returns."""
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.clear()
        os.environ.update(request["environment"])
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
