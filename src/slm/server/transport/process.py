"""What a server process sets for itself: no dumps of its memory, and an interpreter for a loop."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from typing import Final

_PR_SET_DUMPABLE: Final = 4

COLLECT_AFTER: Final = (10_000, 5, 3)
"""How many new objects make the cyclic collector look at the youngest, and so on (`gc`).

Each stream that opens is a hundred objects that last: with Python's 700 the collector took half of
the time of accepting it. What closed streams leave behind for it is then some ten megabytes.
"""


SWITCH_SECONDS: Final = 0.0005
"""How long a thread that decrypts keys may keep the event loop waiting for the interpreter.

With Python's 5 ms the loop lost that at each of its writes while a snapshot was being made.
"""


def tune_interpreter() -> None:
    """Have the cyclic collector look less often, and threads give way to the event loop sooner.

    Of the whole process, so only for one that is a server and nothing else, once it is started:
    what the start has made is never looked at again.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


def forbid_core_dumps() -> None:
    """Let no crash write this memory to a disk, and no other process of this user read it.

    It holds decrypted keys for moments.

    RLIMIT_CORE covers core files; on Linux PR_SET_DUMPABLE also covers a core handler behind a pipe
    and ptrace (prctl(2)). Where the platform has neither, nothing happens.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def raise_open_files() -> None:
    """Let this process open as many files as the system's hard limit allows; each stream is one.

    The usual soft limit of 1,024 is there for programs that call select(2).
    """
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_files_limit() -> int | None:
    """Return how many files this process may have open; None where there is no limit to tell."""
    with contextlib.suppress(ImportError, OSError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return None if soft == resource.RLIM_INFINITY else soft
    return None
