"""Process-wide settings of a server: no memory dumps, and an interpreter tuned for the loop."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from typing import Final

_PR_SET_DUMPABLE: Final = 4

COLLECT_AFTER: Final = (10_000, 5, 3)
"""How many new objects trigger a collection of the youngest generation, and so on (`gc`).

Each opened stream creates about a hundred lasting objects: with Python's 700, the collector took
half of the time for accepting it. Garbage from closed streams then reaches about ten megabytes.
"""


SWITCH_SECONDS: Final = 0.0005
"""How long a thread that decrypts keys may keep the event loop waiting for the interpreter.

With Python's 5 ms, the loop lost that much at each write while a snapshot was being made.
"""


def tune_interpreter() -> None:
    """Make the cyclic collector run less often and threads yield to the event loop sooner.

    Affects the whole process, so only for a process that is nothing but a server, after startup:
    objects created until then are never examined again.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


def forbid_core_dumps() -> None:
    """Prevent crashes from writing memory to disk and other processes of this user from reading it.

    The memory holds decrypted keys for moments.

    RLIMIT_CORE covers core files; on Linux, PR_SET_DUMPABLE also covers core handlers behind a pipe
    and ptrace (prctl(2)). On platforms with neither, this does nothing.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def raise_open_files() -> None:
    """Raise the open-file limit to the system's hard limit; each stream needs one descriptor.

    The usual soft limit of 1,024 exists for programs that call select(2).
    """
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_files_limit() -> int | None:
    """Return how many files this process may have open; None if there is no known limit."""
    with contextlib.suppress(ImportError, OSError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return None if soft == resource.RLIM_INFINITY else soft
    return None
