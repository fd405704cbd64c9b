"""A PostgreSQL in a folder of its own; knows no client."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path

from benchmarks.harness import postgres_programs
from benchmarks.peers.base import Program, free_port


class PostgresServer:
    """A PostgreSQL of its own in a folder; as root it runs as `nobody`, for it refuses root."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()

    async def start(self) -> None:
        folder, root = self._folder, os.geteuid() == 0
        folder.mkdir(parents=True, exist_ok=True)
        user = postgres_programs.USER if root else None
        if root:
            shutil.chown(folder, postgres_programs.USER)
        data = folder / "data"
        programs = await asyncio.to_thread(postgres_programs.reachable, folder)
        command = [str(programs / "initdb"), "-D", str(data), "-A", "trust", "-U", "bench"]
        command += ["--no-sync", "--locale=C.UTF-8", "-E", "UTF8"]
        result = await asyncio.to_thread(
            subprocess.run, command, user=user, capture_output=True, text=True, cwd=folder
        )
        if result.returncode:
            raise RuntimeError(f"initdb: {result.stderr[-500:]}")
        options = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(folder),
            "max_connections": "700",
            "shared_buffers": "256MB",
        }
        command = [str(programs / "postgres"), "-D", str(data), "-p", str(self.port)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        self._program = Program(command, folder, unprivileged=True)
        self._program.start()
        await self._program.wait_port(self.port)

    async def stop(self) -> None:
        if hasattr(self, "_program"):
            await asyncio.to_thread(self._program.stop)
