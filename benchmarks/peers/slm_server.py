"""The SLM itself: PUT over HTTP, watched by the SDK's `on_change`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from benchmarks.harness.slm_server import BenchServer
from benchmarks.peers.base import Peer, Record, Watcher
from slm import SLMClient
from slm.client.config import ResolvedConfig

AGENT = "agent-00007"


class SlmPeer(Peer):
    label = "SLM, SQLite"
    durability = "synchronous=FULL: fsync before the answer; a watcher that was away catches up"

    async def start(self) -> None:
        self._server = BenchServer(agents=10)
        await self._server.__aenter__()
        token = self._server.backend_token.read_text().strip()
        self.address = {"url": self._server.url, "token": token}

    async def write(self, sequence: int) -> int:
        return await self._server.put(AGENT, llm_max_tokens=sequence)

    async def commit_times(self) -> dict[int, int]:
        return await self._server.commit_times()

    async def stop(self) -> None:
        await self._server.__aexit__(None, None, None)

    @classmethod
    def watcher(cls) -> Watcher:
        return _Watcher()


class _Watcher(Watcher):
    async def watch(
        self, address: dict[str, Any], ready: Callable[[], None], record: Record
    ) -> None:
        client = SLMClient(address["url"], address["token"], start_timeout=60)
        await client.connect()

        def changed(_: str, config: ResolvedConfig | None) -> None:
            if config is not None and config.revision is not None:
                record(config.revision)

        client.on_change(changed)
        ready()
        await asyncio.Future()
