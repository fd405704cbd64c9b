"""An SLM that says what a test wants it to say, for what a right one never does.

It answers the snapshot and one agent from `agents`, and each stream by the next script.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSCloseCode, web

EPOCH = "scripted"

Script = Callable[["Peer"], Awaitable[None]]


def config(model: str, **fields: Any) -> dict[str, Any]:
    """Return a `config` of a change frame."""
    return {
        "llm_provider": "ollama",
        "llm_endpoint": None,
        "llm_model": model,
        "llm_timeout": 30,
        "llm_temperature": 0.7,
        "llm_max_tokens": None,
        "llm_options": {},
        "is_default": False,
        "is_active": True,
        "has_api_key": False,
        "api_key_revision": None,
    } | fields


def changed(agent_id: str, revision: int, model: str, **fields: Any) -> dict[str, Any]:
    """Return a change frame."""
    return {
        "type": "agent_config_changed",
        "agent_id": agent_id,
        "revision": revision,
        "config": config(model, **fields),
    }


def deleted(agent_id: str, revision: int) -> dict[str, Any]:
    """Return the frame of a deletion."""
    return {"type": "agent_deleted", "agent_id": agent_id, "revision": revision}


@dataclass
class Peer:
    """One stream: what the client asked for, and how to talk to it."""

    ws: web.WebSocketResponse
    asked: dict[str, Any]

    async def say(self, *frames: dict[str, Any] | str | bytes) -> None:
        """Send each frame, as it is if it is text or bytes."""
        for frame in frames:
            if isinstance(frame, bytes):
                await self.ws.send_bytes(frame)
            else:
                await self.ws.send_str(frame if isinstance(frame, str) else json.dumps(frame))

    async def subscribed(
        self, revision: int | None = None, epoch: str = EPOCH, heartbeat: float = 0.5
    ) -> None:
        """Say `subscribed`, by default at what was asked for."""
        revision = self.asked.get("since", 0) if revision is None else revision
        frame = {"type": "subscribed", "channel": "agent_config", "heartbeat": heartbeat}
        await self.say(frame | {"revision": revision, "epoch": epoch})

    async def live(self, revision: int) -> None:
        """Send heartbeats until the client goes."""
        while not self.ws.closed:
            await self.say({"type": "heartbeat", "revision": revision, "behind": False})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await self.ws.receive()


@dataclass
class ScriptedSLM:
    """What it answers, and what it was asked.

    Attributes:
        revision: of the snapshot.
        epoch: of every answer over HTTP.
        agents: by agent_id, revision and config of each agent of the snapshot.
        scripts: what the next streams are told; the last one serves all that follow.
        refuse: given the number of the handshake, an answer instead of the upgrade, or None.
        autoping: whether pings are answered; a script sees them otherwise.
        handshakes: the monotonic time of each handshake.
        subscriptions: what each stream asked for.
        snapshots: how many snapshots were fetched.
        asked: the path and query of each GET.
    """

    url: str = ""
    revision: int = 1
    epoch: str = EPOCH
    agents: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)
    scripts: list[Script] = field(default_factory=list)
    refuse: Callable[[int], web.Response | None] = lambda _: None
    autoping: bool = True
    handshakes: list[float] = field(default_factory=list)
    subscriptions: list[dict[str, Any]] = field(default_factory=list)
    snapshots: int = 0
    asked: list[str] = field(default_factory=list)

    def _with_key(self, agent_id: str) -> dict[str, Any]:
        revision, fields = self.agents[agent_id]
        return {"llm_api_key": None} | fields | {"agent_id": agent_id, "revision": revision}

    def _headers(self) -> dict[str, str]:
        return {"SLM-Revision": str(self.revision), "SLM-Epoch": self.epoch}

    async def snapshot(self, request: web.Request) -> web.Response:
        self.snapshots += 1
        self.asked.append(request.path_qs)
        said = {"revision": self.revision, "epoch": self.epoch}
        agents = [self._with_key(agent_id) for agent_id in self.agents]
        return web.json_response(said | {"agents": agents}, headers=self._headers())

    async def llm(self, request: web.Request) -> web.Response:
        self.asked.append(request.path_qs)
        agent_id = request.match_info["agent_id"]
        if agent_id not in self.agents:
            problem = {"code": "agent-not-found", "status": 404}
            return web.json_response(problem, status=404, headers=self._headers())
        return web.json_response(self._with_key(agent_id), headers=self._headers())

    async def stream(self, request: web.Request) -> web.StreamResponse:
        number = len(self.handshakes)
        self.handshakes.append(time.monotonic())
        refusal = self.refuse(number)
        if refusal is not None:
            return refusal
        ws = web.WebSocketResponse(compress=False, timeout=0.1, autoping=self.autoping)
        await ws.prepare(request)
        peer = Peer(ws, json.loads(await ws.receive_str()))
        script = self.scripts[min(len(self.subscriptions), len(self.scripts) - 1)]
        self.subscriptions.append(peer.asked)
        with contextlib.suppress(ConnectionError, TypeError):
            await script(peer)
        await ws.close(code=WSCloseCode.GOING_AWAY)
        return ws


@contextlib.asynccontextmanager
async def scripted_slm(**fields: Any) -> AsyncIterator[ScriptedSLM]:
    """Run one on a free port of this machine."""
    slm = ScriptedSLM(**fields)
    app = web.Application()
    app.router.add_get("/api/snapshot", slm.snapshot)
    app.router.add_get("/api/agents/{agent_id}/llm", slm.llm)
    app.router.add_get("/ws", slm.stream)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        slm.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield slm
    finally:
        await runner.cleanup()
