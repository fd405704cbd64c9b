"""A provider that records what it receives: a real HTTP server on port 0, three protocols.

It answers as OpenAI's chat completions, Anthropic's messages and Ollama's chat do, at once, and
keeps for each request what a test asks about: which key came with which model, at which port.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass(frozen=True)
class Seen:
    """One request as it came in."""

    protocol: str
    key: str | None
    model: str
    body: dict[str, Any]
    headers: dict[str, str]


@dataclass
class Recorder:
    """Where the provider listens, and what came."""

    origin: str = ""
    seen: list[Seen] = field(default_factory=list)

    @property
    def openai_url(self) -> str:
        return f"{self.origin}/v1"

    def keys(self) -> set[str | None]:
        return {request.key for request in self.seen}

    async def _record(self, protocol: str, request: web.Request) -> dict[str, Any]:
        body: dict[str, Any] = await request.json()
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.seen.append(
            Seen(
                protocol,
                request.headers.get("x-api-key") or bearer,
                body["model"],
                body,
                dict(request.headers),
            )
        )
        return body

    async def openai(self, request: web.Request) -> web.Response:
        body = await self._record("openai", request)
        message = {"role": "assistant", "content": f"from {body['model']}"}
        return web.json_response(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
            }
        )

    async def anthropic(self, request: web.Request) -> web.Response:
        body = await self._record("anthropic", request)
        return web.json_response(
            {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "model": body["model"],
                "content": [{"type": "text", "text": f"from {body['model']}"}],
                "stop_reason": "end_turn",
                "stop_sequence": None,
                "usage": {"input_tokens": 1, "output_tokens": 2},
            }
        )

    async def ollama(self, request: web.Request) -> web.Response:
        body = await self._record("ollama", request)
        answer = {
            "model": body["model"],
            "created_at": "2026-01-01T00:00:00Z",
            "message": {"role": "assistant", "content": f"from {body['model']}"},
            "done": True,
            "done_reason": "stop",
            "prompt_eval_count": 1,
            "eval_count": 2,
        }
        return web.Response(text=json.dumps(answer) + "\n", content_type="application/json")


@asynccontextmanager
async def recording_provider() -> AsyncIterator[Recorder]:
    """Start a provider on a free port of this machine, and stop it."""
    recorder = Recorder()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", recorder.openai)
    app.router.add_post("/v1/messages", recorder.anthropic)
    app.router.add_post("/api/chat", recorder.ollama)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    recorder.origin = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield recorder
    finally:
        await runner.cleanup()
