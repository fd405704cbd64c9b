"""A backend that knows docs/protocol.md alone: it records every frame, reconnects and resumes.

It shares no code with the SDK, so that a mistake made on both sides of the wire is still seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any

import aiohttp

from tests.support.faults import recording
from tests.support.faults.history import CHANGES, Connection, Frame, violations

_numbers = itertools.count(1)


class Subscriber:
    """Records, reconnects with `since`, and keeps what a backend would believe.

    Args:
        http: the session to use; shared by many.
        url: where to connect, or a function asked before each connection.
        token: its bearer token.
        name: how a violation names it.
        heartbeat_seconds: the server's heartbeat; after two without a frame it reconnects.
        backoff_seconds: up to how long it waits before it reconnects (full jitter).
        believes: whether it fetches snapshots and keeps `agents`.

    Attributes:
        connections: every connection it had, with every frame.
        closes: how each connection ended: the close code, or the error's name.
        agents: by agent_id, the config it believes in.
        behind: what the last heartbeat said.
        refused: the HTTP status of every refused handshake.
        arrivals: by revision, the monotonic time at which its frame came.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        url: str | Callable[[], str],
        token: str,
        *,
        name: str = "",
        heartbeat_seconds: float = 2.0,
        backoff_seconds: float = 0.1,
        believes: bool = True,
    ) -> None:
        self.name = name or f"subscriber-{next(_numbers)}"
        self.connections: list[Connection] = []
        self.closes: list[int | str | None] = []
        self.agents: dict[str, dict[str, Any]] = {}
        self.behind = False
        self.refused: list[int] = []
        self.arrivals: dict[int, float] = {}
        self.epoch: str | None = None
        self.revision = 0
        self.change_id: str | None = None
        self._http = http
        self._url = url if callable(url) else lambda: url
        self._headers = {"Authorization": f"Bearer {token}"}
        self._heartbeat_seconds = heartbeat_seconds
        self._backoff_seconds = backoff_seconds
        self._believes = believes
        self._known: dict[str, int] = {}
        self._snapshot_needed = believes
        self._ws: aiohttp.ClientWebSocketResponse | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Subscriber:
        self._tasks.append(asyncio.create_task(self._run()))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def frames(self) -> list[Frame]:
        """Every frame of every connection."""
        return [frame for connection in self.connections for frame in connection.frames]

    @property
    def changes(self) -> list[Frame]:
        """Every change it was told of."""
        return [frame for frame in self.frames if frame["type"] in CHANGES]

    @property
    def connected(self) -> bool:
        """Whether it is subscribed now."""
        return self._ws is not None and bool(self.connections[-1].frames)

    def reached(self, revision: int) -> bool:
        """Say whether it is subscribed, was told all up to `revision`, and believes it."""
        return self.connected and self.revision >= revision and not self._snapshot_needed

    def cut(self) -> None:
        """Cut its connection without a word, as a lost network does."""
        if self._ws is not None:
            transport = self._ws._conn.transport if self._ws._conn is not None else None
            if transport is not None:
                transport.abort()

    def violations(self, **expected: Any) -> list[str]:
        """Return what the history checker finds (`history.violations`)."""
        return violations(self.connections, **expected)

    async def _run(self) -> None:
        while True:
            connection = Connection(f"{self.name} connection {len(self.connections)}")
            if self.epoch is not None:
                connection.since, connection.epoch = self.revision, self.epoch
                connection.change_id = self.change_id
            try:
                await self._connect(connection)
            except aiohttp.WSServerHandshakeError as error:
                self.refused.append(error.status)
                self.closes.append(error.status)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                self.closes.append(type(error).__name__)
            finally:
                self._ws = None
            await asyncio.sleep(random.uniform(0, self._backoff_seconds))

    async def _connect(self, connection: Connection) -> None:
        url = self._url()
        async with asyncio.timeout(2.5 * self._heartbeat_seconds):
            ws = await self._http.ws_connect(f"{url}/ws", headers=self._headers, compress=0)
        try:
            self.connections.append(connection)
            ask: dict[str, Any] = {"subscribe": "agent_config"}
            ask["client"] = {"name": "subscriber", "instance": self.name}
            if connection.since is not None:
                ask |= {"since": connection.since, "epoch": connection.epoch}
            if connection.change_id is not None:
                ask["change_id"] = connection.change_id
            await ws.send_str(json.dumps(ask))
            self._ws = ws
            while True:
                message = await ws.receive(timeout=2.5 * self._heartbeat_seconds)
                if message.type is not aiohttp.WSMsgType.TEXT:
                    break
                self._take(connection, recording.now.frame(message.data), url)
        finally:
            self.closes.append(ws.close_code)
            self._ws = None
            # Without waiting for the other side: it may be dead.
            if ws._conn is not None and ws._conn.transport is not None:
                ws._conn.transport.abort()
            with contextlib.suppress(Exception):
                await ws.close()

    def _take(self, connection: Connection, frame: Frame, url: str) -> None:
        connection.frames.append(frame)
        kind = frame["type"]
        if kind in ("subscribed", "resync"):
            if kind == "resync" or frame["epoch"] != self.epoch:
                if frame["epoch"] != self.epoch:
                    self._known.clear()
                self._snapshot_needed = self._believes
            self.epoch, self.revision = frame["epoch"], frame["revision"]
            self.change_id = frame.get("change_id")
            if self._snapshot_needed:
                self._tasks = [task for task in self._tasks if not task.done()]
                self._tasks.append(asyncio.create_task(self._snapshot(url, connection)))
        elif kind == "heartbeat":
            self.behind = frame["behind"]
        elif kind in CHANGES:
            self.revision, self.change_id = frame["revision"], frame.get("change_id")
            self.arrivals.setdefault(self.revision, time.monotonic())
            self._apply(frame["agent_id"], frame["revision"], frame.get("config"))

    def _apply(self, agent_id: str, revision: int, config: dict[str, Any] | None) -> None:
        if revision <= self._known.get(agent_id, -1):
            return
        self._known[agent_id] = revision
        if config is None:
            self.agents.pop(agent_id, None)
        else:
            self.agents[agent_id] = config

    async def _snapshot(self, url: str, connection: Connection) -> None:
        while connection is self.connections[-1] and self._snapshot_needed:
            revision, epoch = self.revision, self.epoch
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with self._http.get(
                    f"{url}/api/snapshot?min_revision={revision}",
                    headers=self._headers,
                    timeout=aiohttp.ClientTimeout(total=5),
                ) as answer:
                    body = await answer.json() if answer.status == 200 else None
                if body is not None and body["epoch"] == epoch == self.epoch:
                    self._adopt(body)
                    return
            await asyncio.sleep(random.uniform(0, self._backoff_seconds))

    def _adopt(self, snapshot: dict[str, Any]) -> None:
        revision = snapshot["revision"]
        there = {agent["agent_id"]: agent for agent in snapshot["agents"]}
        for agent_id in self.agents.keys() - there.keys():
            if self._known.get(agent_id, -1) <= revision:
                del self.agents[agent_id]
        for agent_id, agent in there.items():
            config = {name: agent[name] for name in CONFIG_FIELDS}
            self._apply(agent_id, agent["revision"], config)
            # A restored database may name a lower revision than was known in another life.
        self._snapshot_needed = False


CONFIG_FIELDS: Sequence[str] = (
    "llm_provider",
    "llm_endpoint",
    "llm_model",
    "llm_timeout",
    "llm_temperature",
    "llm_max_tokens",
    "llm_options",
    "is_default",
    "is_active",
    "has_api_key",
    "api_key_revision",
)
"""The fields of `config` in a change frame."""


@contextlib.asynccontextmanager
async def subscribers(
    count: int, url: str | Callable[[int], str], token: str, **options: Any
) -> AsyncIterator[list[Subscriber]]:
    """Run `count` subscribers for as long as the block lasts.

    Args:
        count: how many.
        url: where to, or a function of the subscriber's number.
        token: the token of all of them.
        **options: see `Subscriber`.
    """

    def where(number: int) -> Callable[[], str]:
        return (lambda: url(number)) if callable(url) else (lambda: url)

    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(connector=connector) as http,
        contextlib.AsyncExitStack() as stack,
    ):
        yield [
            await stack.enter_async_context(Subscriber(http, where(n), token, **options))
            for n in range(count)
        ]


async def heard(
    http: aiohttp.ClientSession,
    url: str,
    token: str,
    since: int | None = None,
    epoch: str | None = None,
    *,
    upto: int,
) -> Connection:
    """Subscribe once and return the connection with all frames up to a heartbeat at `upto`.

    Heartbeats come during a replay as well, and name how far it is.
    """
    connection = Connection(f"since {since}", since, epoch)
    ask: dict[str, Any] = {"subscribe": "agent_config"}
    if since is not None:
        ask |= {"since": since, "epoch": epoch}
    headers = {"Authorization": f"Bearer {token}"}
    async with asyncio.timeout(15), http.ws_connect(f"{url}/ws", headers=headers) as ws:
        await ws.send_str(json.dumps(ask))
        while True:
            frame = recording.now.frame(await ws.receive_str())
            connection.frames.append(frame)
            if frame["type"] == "heartbeat" and frame["revision"] >= upto:
                return connection
