"""PostgreSQL: UPDATE and pg_notify in one transaction, watched by LISTEN through asyncpg."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import asyncpg

from benchmarks.peers.base import Peer, Record, Watcher, body, sequence_of
from benchmarks.peers.postgres_server import PostgresServer

CHANNEL = "agent_config"


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
