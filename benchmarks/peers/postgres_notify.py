"""PostgreSQL: UPDATE and pg_notify in one transaction, watched by LISTEN through asyncpg."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg

from benchmarks.peers import postgres_programs
from benchmarks.peers.base import Peer, Program, Record, Watcher, body, free_port, sequence_of

CHANNEL = "agent_config"


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


class PostgresPeer(Peer):
    label = "PostgreSQL NOTIFY"
    durability = "fsync before the answer; a watcher that was away misses changes"

    async def start(self) -> None:
        self._server = PostgresServer(self.folder)
        await self._server.start()
        self.address = {"port": self._server.port}
        self._connection = await _connect(self.address)
        await self._connection.execute("CREATE TABLE agents (id text PRIMARY KEY, body text)")
        await self._connection.execute("INSERT INTO agents VALUES ('agent-00007', '')")

    async def write(self, sequence: int) -> int:
        change = body(sequence).decode()
        async with self._connection.transaction():
            await self._connection.execute(
                "UPDATE agents SET body = $1 WHERE id = 'agent-00007'", change
            )
            await self._connection.execute("SELECT pg_notify($1, $2)", CHANNEL, change)
        return sequence

    async def stop(self) -> None:
        if hasattr(self, "_connection"):
            await self._connection.close()
        if hasattr(self, "_server"):
            await self._server.stop()

    @classmethod
    def watcher(cls) -> Watcher:
        return _Watcher()


class _Watcher(Watcher):
    async def watch(
        self, address: dict[str, Any], ready: Callable[[], None], record: Record
    ) -> None:
        connection = await _connect(address)

        def heard(_connection: Any, _pid: int, _channel: str, payload: str) -> None:
            record(sequence_of(payload))

        await connection.add_listener(CHANNEL, heard)
        ready()
        await asyncio.Future()


async def _connect(address: dict[str, Any]) -> asyncpg.Connection:
    for _ in range(100):
        try:
            return await asyncpg.connect(
                host="127.0.0.1", port=address["port"], user="bench", database="postgres"
            )
        except asyncpg.CannotConnectNowError:
            await asyncio.sleep(0.1)
    raise RuntimeError("PostgreSQL does not come up")
