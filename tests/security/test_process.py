"""The memory of a running server, where keys stand for moments, is written to no disk."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

from tests.support.servers import ServerProcess

ASK = """
import ctypes
from slm.server.transport.process import forbid_core_dumps
forbid_core_dumps()
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))  # PR_GET_DUMPABLE
"""


async def test_a_running_server_leaves_no_core_dump(tmp_path: Path) -> None:
    """`slm serve` has a core file limit of nothing."""
    async with ServerProcess(tmp_path / "data") as server:
        assert resource.prlimit(server.process.pid, resource.RLIMIT_CORE) == (0, 0)


def test_nor_can_a_core_handler_or_another_process_read_it() -> None:
    """On Linux the process is not dumpable, which also shuts ptrace and /proc/PID/mem."""
    asked = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == "0"
