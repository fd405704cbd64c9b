"""Plain HTTP and a plain WebSocket against a server under test, with one token or another."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.support.servers import InLoopServer, ServerProcess, reads_keys


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any
    headers: Mapping[str, str] = field(repr=False)

    @property
    def code(self) -> str:
        code: str = self.body["code"]
        return code


@dataclass
class Caller:
    """Asks one server with one token.

    Attributes:
        url: the server's.
        token: what goes into Authorization; None sends none.
        seen: every body and header that came back, as text.
        key_token: what goes there instead where keys are read, if that is another one.
    """

    url: str
    token: str | None
    session: aiohttp.ClientSession
    seen: list[str] = field(default_factory=list, repr=False)
    key_token: str | None = None

    async def __call__(self, method: str, path: str, json_: Any = None, **more: Any) -> Answer:
        headers = dict(more.pop("headers", {}))
        keys = self.key_token is not None and method == "GET" and reads_keys(path)
        if token := self.key_token if keys else self.token:
            headers["Authorization"] = f"Bearer {token}"
        async with self.session.request(
            method, self.url + path, json=json_, headers=headers, **more
        ) as answer:
            text = (await answer.read()).decode(errors="replace")
            self.seen.append(f"{dict(answer.headers)} {text}")
            body = json.loads(text) if "json" in answer.headers.get("Content-Type", "") else text
            return Answer(answer.status, body, answer.headers)

    def as_(self, token: str | None) -> Caller:
        """The same server, asked with another token."""
        return Caller(self.url, token, self.session, self.seen)

    @contextlib.asynccontextmanager
    async def stream(self, **subscribe: Any) -> AsyncIterator[Stream]:
        """Open /ws, subscribe, and yield the stream after its `subscribed`."""
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        async with self.session.ws_connect(
            self.url + "/ws", headers=headers, compress=0, autoclose=True
        ) as socket:
            await socket.send_json({"subscribe": "agent_config", **subscribe})
            stream = Stream(socket, self.seen)
            assert (await stream.next())["type"] == "subscribed"
            yield stream


@dataclass
class Stream:
    """One subscription; `frames` has every message but heartbeats."""

    socket: aiohttp.ClientWebSocketResponse
    seen: list[str]

    async def next(self, *, timeout: float = 5.0) -> dict[str, Any]:
        """The next message, heartbeats too."""
        text = await self.socket.receive_str(timeout=timeout)
        self.seen.append(text)
        message: dict[str, Any] = json.loads(text)
        return message

    async def upto(self, revision: int) -> list[dict[str, Any]]:
        """Every message up to the one that names this revision or a later one."""
        messages: list[dict[str, Any]] = []
        while not messages or messages[-1].get("revision", -1) < revision:
            messages.append(await self.next())
        return messages

    async def closed(self, *, timeout: float = 5.0) -> int:
        """Read on until the server closes; return its code."""
        async with asyncio.timeout(timeout):
            while True:
                message = await self.socket.receive()
                if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED):
                    assert self.socket.close_code is not None
                    return self.socket.close_code


@contextlib.asynccontextmanager
async def admin(server: InLoopServer | ServerProcess) -> AsyncIterator[Caller]:
    """Ask this server with its first two tokens, which may do everything between them."""
    async with aiohttp.ClientSession() as session:
        yield Caller(server.url, server.admin_token, session, key_token=server.backend_token)


def agent(agent_id: str, **fields: Any) -> dict[str, Any]:
    """The body of a POST that makes an agent."""
    return {
        "agent_id": agent_id,
        "name": agent_id,
        "llm_provider": "openai",
        "llm_model": "m",
    } | fields


async def make_token(
    ask: Caller, name: str, *scopes: str, agents: list[str] | None = None, **fields: Any
) -> Caller:
    """Make a token over HTTP and return a caller that has it."""
    body = {"name": name, "scopes": list(scopes), **fields}
    if agents is not None:
        body["agents"] = agents
    made = await ask("POST", "/api/admin/tokens", body)
    assert made.status == 201, made
    return ask.as_(made.body["token"])
