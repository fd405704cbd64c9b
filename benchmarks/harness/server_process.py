"""The server under measurement, with a side door.

Run as `python -m benchmarks.harness.server_process ARGUMENTS`.

It is the server that `slm serve` runs, unchanged. The side door, a Unix socket, tells what cannot
be seen from outside: when a transaction's commit returned, how much memory there is, and how long
the same sockets take when a C loop, or the naive loop, writes the same frame to them.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import OPEN

from benchmarks import native
from benchmarks.harness import machine
from slm.server.agents.changes import Written
from slm.server.serve import SLMServer
from slm.server.settings import Settings
from slm.server.stream.encoding import encode_change
from slm.server.transport.process import tune_interpreter
from slm.server.transport.ws_frames import text_frames


class SideDoor:
    """What the bench asks the server's process; one JSON line each way."""

    def __init__(self, server: SLMServer) -> None:
        self._server = server
        self._commits: dict[int, int] = {}
        server.services.registry.committed = self._committed

    def _committed(self, written: Written) -> None:
        """In the database's thread: note when the commit of a write returned."""
        self._commits[written.revision] = time.monotonic_ns()
        self._server.services.feed.committed(written)

    async def serve(self, path: Path) -> None:
        """Answer until the process ends."""
        await asyncio.start_unix_server(self._answer, path)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            answer = await getattr(self, f"do_{line.decode().strip()}")()
            writer.write(json.dumps(answer).encode() + b"\n")

    async def do_memory(self) -> dict[str, int]:
        gc.collect()
        live = self._server.services.hub.live_count()
        return {"rss_bytes": machine.rss_bytes(os.getpid()), "live": live}

    async def do_acks(self) -> dict[str, int]:
        """Tell how many live streams acked the newest change, and the fewest acks of a backend."""
        fleet = self._server.services.fleet
        backends = fleet.backends()
        acked = sum(each.connected and each.applied == fleet.head for each in backends)
        return {"acked": acked, "fewest": min((each.acks.count for each in backends), default=0)}

    async def do_commits(self) -> dict[int, int]:
        commits, self._commits = self._commits, {}
        return commits

    async def do_cpu(self) -> float:
        return time.process_time()

    async def do_floor(self) -> dict[str, int]:
        """Send the last change's frame to every subscriber's socket from a loop in C."""
        frame = text_frames([await self._last_change()])
        descriptors = [sink.transport.get_extra_info("socket").fileno() for sink in self._sinks()]
        sockets = (ctypes.c_int * len(descriptors))(*descriptors)
        send_to_all = native.floor_library().send_to_all
        begin = time.monotonic_ns()
        refused = send_to_all(sockets, len(sockets), frame, len(frame))
        return {"begin": begin, "end": time.monotonic_ns(), "refused": refused}

    async def do_naive(self) -> dict[str, int]:
        """Send the same text with `await send_text` to one after the other, as most would."""
        text = await self._last_change()
        protocols = [self._plain(sink.transport) for sink in self._sinks()]
        begin = time.monotonic_ns()
        for protocol in protocols:
            await protocol.send({"type": "websocket.send", "text": text})
        return {"begin": begin, "end": time.monotonic_ns(), "refused": 0}

    def _plain(self, transport: Any) -> WebSocketsSansIOProtocol:
        """Return uvicorn's own protocol object, as it would be for this open connection."""
        serving: Any = self._server._server
        protocol = WebSocketsSansIOProtocol(serving.config, serving.server_state, {})
        protocol.transport = transport
        protocol.handshake_complete = True
        protocol.conn.state = OPEN
        return protocol

    async def _last_change(self) -> str:
        """Return the text of the last change's frame."""
        feed = self._server.services.feed
        page = await feed.read(feed.position - 1, 1, upto=feed.position)
        return encode_change(page.changes[0])

    def _sinks(self) -> list[Any]:
        return [subscriber.sink for subscriber in self._server.services.hub._live]


async def main(data_dir: Path, side_door: Path, settings: dict[str, Any]) -> None:
    server = SLMServer(Settings(port=0, data_dir=data_dir, **settings))
    url = await server.start()
    tune_interpreter()
    await SideDoor(server).serve(side_door)
    print(f"READY {url}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    await server.stop()


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])))
