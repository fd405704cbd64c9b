"""Plain HTTP and WebSocket clients for the tests of the server; they know nothing of the SDK."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from multidict import CIMultiDictProxy

from tests.support.servers import InLoopServer, reads_keys

PROBLEM = "application/problem+json"


@dataclass(frozen=True)
class Answer:
    """One HTTP answer, read to its end."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def revision(self) -> int:
        """What SLM-Revision names."""
        return int(self.headers["SLM-Revision"])

    @property
    def code(self) -> str:
        """The stable name of the problem; fails when the answer is none."""
        assert self.headers["Content-Type"] == PROBLEM, (self.status, self.body)
        problem = self.json
        assert problem["status"] == self.status
        assert problem.keys() >= {"type", "title", "status", "detail", "code"}
        return str(problem["code"])


@dataclass
class Api:
    """Calls a server with one token, or reads keys with another one."""

    server: InLoopServer
    session: aiohttp.ClientSession
    token: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    key_token: str | None = None

    def auth(self, path: str = "") -> dict[str, str]:
        """The headers of every request."""
        shown = self.key_token if self.key_token and reads_keys(path) else self.token
        token = {} if shown is None else {"Authorization": f"Bearer {shown}"}
        return token | self.headers

    async def call(self, method: str, path: str, **options: Any) -> Answer:
        """Send a request and read its answer."""
        headers = self.auth(path if method == "GET" else "") | options.pop("headers", {})
        url = self.server.url + path
        async with self.session.request(method, url, headers=headers, **options) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    async def get(self, path: str, **options: Any) -> Answer:
        """GET."""
        return await self.call("GET", path, **options)

    async def create(self, agent_id: str, **fields: Any) -> Answer:
        """Create an agent that works without a key, unless told otherwise."""
        body = {"agent_id": agent_id, "name": agent_id, "llm_provider": "ollama", "llm_model": "m"}
        return await self.call("POST", "/api/agents", json=body | fields)

    async def put(
        self, agent_id: str, headers: dict[str, str] | None = None, /, **sent: Any
    ) -> Answer:
        """Change an agent."""
        return await self.call("PUT", f"/api/agents/{agent_id}", json=sent, headers=headers or {})

    async def delete(self, agent_id: str, **options: Any) -> Answer:
        """Delete an agent."""
        return await self.call("DELETE", f"/api/agents/{agent_id}", **options)

    @contextlib.asynccontextmanager
    async def socket(self, **options: Any) -> AsyncIterator[Socket]:
        """Open a WebSocket; it is not subscribed yet."""
        headers = self.auth() | options.pop("headers", {})
        url = self.server.url + options.pop("path", "/ws")
        async with self.session.ws_connect(url, headers=headers, **options) as ws:
            yield Socket(ws)

    @contextlib.asynccontextmanager
    async def stream(self, **wanted: Any) -> AsyncIterator[Socket]:
        """Open a WebSocket and subscribe; `subscribed` is its first frame."""
        async with self.socket() as socket:
            await socket.send(subscribe="agent_config", **wanted)
            yield socket


class Socket:
    """A WebSocket that reads frames with a time limit."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws

    async def send(self, **message: Any) -> None:
        """Send one JSON message."""
        await self.ws.send_str(json.dumps(message))

    async def frame(self, timeout: float = 10.0) -> dict[str, Any]:
        """Return the next frame, heartbeats included."""
        frame = json.loads(await self.ws.receive_str(timeout=timeout))
        assert isinstance(frame, dict)
        return frame

    async def next(self, timeout: float = 10.0) -> dict[str, Any]:
        """Return the next frame that is no heartbeat."""
        async with asyncio.timeout(timeout):
            while (frame := await self.frame(timeout))["type"] == "heartbeat":
                pass
        return frame

    async def until(self, revision: int, timeout: float = 10.0) -> list[dict[str, Any]]:
        """Return the frames up to the change of `revision`, heartbeats left out."""
        frames: list[dict[str, Any]] = []
        async with asyncio.timeout(timeout):
            while not frames or frames[-1].get("revision", 0) < revision:
                frames.append(await self.next(timeout))
        return frames

    async def close_code(self, timeout: float = 10.0) -> int | None:
        """Read on until the server closes, and return its code."""
        async with asyncio.timeout(timeout):
            while (await self.ws.receive()).type is aiohttp.WSMsgType.TEXT:
                pass
        return self.ws.close_code


async def raw_exchange(url: str, sent: bytes, timeout: float = 10.0) -> bytes:
    """Send bytes as they are, and return everything until the server closes."""
    host, _, port = url.partition("://")[2].partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(sent)
        async with asyncio.timeout(timeout):
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            return await _read_all(reader)
    finally:
        writer.close()


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while chunk := await reader.read(65536):
            received += chunk
    return bytes(received)
