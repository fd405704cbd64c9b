"""What a server process does about its own memory, which holds decrypted keys for moments."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from typing import Final

_PR_SET_DUMPABLE: Final = 4


def forbid_core_dumps() -> None:
    """Let no crash write this memory to a disk, and no other process of this user read it.

    RLIMIT_CORE covers core files; on Linux PR_SET_DUMPABLE also covers a core handler behind a pipe
    and ptrace (prctl(2)). Where the platform has neither, nothing happens.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
