"""Redis: SET and PUBLISH in one transaction, watched by SUBSCRIBE."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import redis.asyncio as redis

from benchmarks.peers.base import (
    Peer,
    Program,
    Record,
    Watcher,
    body,
    free_port,
    program,
    sequence_of,
)

CHANNEL = "agent_config"


class RedisPeer(Peer):
    label = "Redis PUBLISH"
    durability = "append-only file, fsync once a second; a watcher that was away misses changes"

    async def start(self) -> None:
        port = free_port()
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [program("redis-server", "apt-get install redis-server"), "--port", str(port)]
        command += ["--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder)]
        command += ["--appendonly", "yes", "--appendfsync", "everysec"]
        self._program = Program(command, self.folder)
        self._program.start()
        await self._program.wait_port(port)
        self.address = {"port": port}
        self._client = redis.Redis(port=port)

    async def write(self, sequence: int) -> int:
        change = body(sequence)
        async with self._client.pipeline(transaction=True) as pipeline:
            pipeline.set("agent-00007", change)
            pipeline.publish(CHANNEL, change)
            await pipeline.execute()
        return sequence

    async def stop(self) -> None:
        if hasattr(self, "_client"):
            await self._client.aclose()
        if hasattr(self, "_program"):
            await asyncio.to_thread(self._program.stop)

    @classmethod
    def watcher(cls) -> Watcher:
        return _Watcher()


class _Watcher(Watcher):
    async def watch(
        self, address: dict[str, Any], ready: Callable[[], None], record: Record
    ) -> None:
        subscription = redis.Redis(port=address["port"]).pubsub()
        await subscription.subscribe(CHANNEL)
        async for message in subscription.listen():
            if message["type"] == "subscribe":
                ready()
            else:
                record(sequence_of(message["data"]))
