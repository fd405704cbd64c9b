"""A reverse proxy in front of an SLM that can refuse one kind of request, for tests.

What `tests/faults/network.py` does to bytes, this does to requests: "the key fetch fails while the
stream goes on" cannot be said in terms of connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

_HOP_BY_HOP = {"host", "connection", "transfer-encoding", "content-length", "content-encoding"}
_CODES = {404: "agent-not-found", 409: "key-undecryptable"}


@dataclass
class Gateway:
    """Where it listens, what passed, and the rule that refuses.

    Attributes:
        refuse: given a path, `/ws` too, the status to answer it with, or None to let it through.
        passed: the path of every HTTP request that came, refused ones too.
        frames: every text frame the SLM sent.
    """

    upstream: str
    url: str = ""
    refuse: Callable[[str], int | None] = lambda _path: None
    passed: list[str] = field(default_factory=list)
    frames: list[str] = field(default_factory=list)
    _session: aiohttp.ClientSession | None = None
    _streams: set[web.WebSocketResponse] = field(default_factory=set)

    async def cut(self) -> None:
        """Close every stream."""
        for stream in list(self._streams):
            await stream.close(code=aiohttp.WSCloseCode.SERVICE_RESTART)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        assert self._session is not None
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP}
        status = self.refuse(request.path)
        if request.path != "/ws":
            self.passed.append(request.path)
        if status is not None:
            problem = {"status": status, "code": _CODES.get(status, "unavailable")}
            return web.json_response(problem, status=status)
        if request.path == "/ws":
            return await self._stream(request, headers["Authorization"])
        async with self._session.request(
            request.method,
            self.upstream + request.path_qs,
            headers=headers,
            data=await request.read(),
        ) as answer:
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP_BY_HOP}
            return web.Response(status=answer.status, headers=kept, body=await answer.read())

    async def _stream(self, request: web.Request, authorization: str) -> web.WebSocketResponse:
        assert self._session is not None
        down = web.WebSocketResponse(compress=False)
        await down.prepare(request)
        self._streams.add(down)
        async with self._session.ws_connect(
            self.upstream + "/ws", headers={"Authorization": authorization}, compress=0
        ) as up:

            async def to_client() -> None:
                async for message in up:
                    self.frames.append(message.data)
                    await down.send_str(message.data)

            async def to_server() -> None:
                async for message in down:
                    await up.send_str(message.data)

            pumps = [asyncio.create_task(to_client()), asyncio.create_task(to_server())]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        self._streams.discard(down)
        await down.close()
        return down


@asynccontextmanager
async def gateway(upstream: str) -> AsyncIterator[Gateway]:
    """Start a gateway before `upstream` on a free port of this machine, and stop it."""
    gate = Gateway(upstream)
    app = web.Application(client_max_size=16 * 1024 * 1024)
    app.router.add_route("*", "/{path:.*}", gate.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    async with aiohttp.ClientSession() as gate._session:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        gate.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield gate
        finally:
            await runner.cleanup()
