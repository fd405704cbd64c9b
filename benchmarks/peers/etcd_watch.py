"""etcd: Put, watched by the gRPC Watch stream; one channel a watcher."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from aetcd.rpc import rpc_pb2, rpc_pb2_grpc

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

KEY = b"agent-00007"


class EtcdPeer(Peer):
    label = "etcd watch"
    durability = "fsync before the answer"

    async def start(self) -> None:
        port, peer_port = free_port(), free_port()
        client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
        command = [program("etcd", "apt-get install etcd-server"), "--data-dir"]
        command += [str(self.folder / "data"), "--listen-client-urls", client]
        command += ["--advertise-client-urls", client, "--listen-peer-urls", peer]
        command += ["--initial-advertise-peer-urls", peer]
        command += ["--initial-cluster", f"default={peer}"]
        self._program = Program(command, self.folder)
        self._program.start()
        await self._program.wait_port(port)
        self.address = {"port": port}
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self._stub = rpc_pb2_grpc.KVStub(self._channel)
        await self._stub.Put(rpc_pb2.PutRequest(key=KEY, value=body(0)), wait_for_ready=True)

    async def write(self, sequence: int) -> int:
        await self._stub.Put(rpc_pb2.PutRequest(key=KEY, value=body(sequence)))
        return sequence

    async def stop(self) -> None:
        if hasattr(self, "_channel"):
            await self._channel.close()
        if hasattr(self, "_program"):
            await asyncio.to_thread(self._program.stop)

    @classmethod
    def watcher(cls) -> Watcher:
        return _Watcher()


class _Watcher(Watcher):
    async def watch(
        self, address: dict[str, Any], ready: Callable[[], None], record: Record
    ) -> None:
        # Without the option all channels of a process would share one connection.
        options = [("grpc.use_local_subchannel_pool", 1)]
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{address['port']}", options=options)
        stream = rpc_pb2_grpc.WatchStub(channel).Watch(_watch_key())
        async for answer in stream:
            if answer.created:
                ready()
            for event in answer.events:
                record(sequence_of(event.kv.value))


async def _watch_key() -> AsyncIterator[Any]:
    create = rpc_pb2.WatchCreateRequest(key=KEY)
    yield rpc_pb2.WatchRequest(create_request=create)
    await asyncio.Future()
