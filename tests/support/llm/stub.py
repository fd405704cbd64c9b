"""A stub of one provider for the recipes: an OpenAI-compatible server on a port of its own.

Each test says how its provider answers, in the shapes that its documentation shows.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from pydantic import SecretStr

from slm.client.config import ResolvedConfig, Step
from slm.llm import ChatResult, LLMInterface, RetrySettings
from tests.support.llm.providers import Configs

KEY = "sk-recipe-canary"
ASK = [{"role": "user", "content": "Hello?"}]

Answer = web.StreamResponse | dict[str, Any] | str | tuple[int, Any]
"""A whole response, a JSON object, the text of an event stream, or a status with either."""
Handler = Callable[["Request"], Awaitable[Answer] | Answer]


@dataclass(frozen=True)
class Request:
    """What came in."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def key(self) -> str | None:
        """The bearer token."""
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None

    @property
    def streamed(self) -> bool:
        """Whether a stream is asked for."""
        return self.body.get("stream") is True


@dataclass
class Stub:
    """The stub, and how to ask through it.

    Attributes:
        origin: where it listens.
        seen: what came in, in order.
    """

    origin: str = ""
    seen: list[Request] = field(default_factory=list)

    async def ask(
        self,
        path: str,
        *,
        streamed: bool = False,
        messages: list[dict[str, Any]] | None = None,
        provider: str = "openai",
        key: str | None = KEY,
        retries: int = 0,
        **config: Any,
    ) -> ChatResult:
        """Ask an agent whose endpoint is `path` here, as its operator would have set it."""
        fields: dict[str, Any] = {"llm_model": "m", "llm_timeout": 10} | config
        resolved = ResolvedConfig(
            agent_id="a",
            step=Step.AGENT,
            llm_provider=provider,
            llm_endpoint=self.origin + path,
            llm_api_key=None if key is None else SecretStr(key),
            revision=7,
            **fields,
        )
        quick = RetrySettings(max_retries=retries, backoff_seconds=0.01)
        async with LLMInterface(Configs(resolved), retry=quick) as llm:
            if not streamed:
                return await llm.chat("a", messages or ASK)
            stream = llm.stream("a", messages or ASK)
            async for _ in stream:
                pass
            return stream.result


@contextlib.asynccontextmanager
async def stub(handler: Handler) -> AsyncIterator[Stub]:
    """Run a provider that answers as `handler` says."""
    running = Stub()

    async def answer(request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        came = Request(request.raw_path, headers, json.loads(await request.read() or b"{}"))
        running.seen.append(came)
        told = handler(came)
        if not isinstance(told, web.StreamResponse | dict | str | tuple):
            told = await told
        status, told = told if isinstance(told, tuple) else (200, told)
        if isinstance(told, web.StreamResponse):
            return told
        if isinstance(told, str):
            return web.Response(text=told, status=status, content_type="text/event-stream")
        return web.json_response(told, status=status)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    running.origin = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield running
    finally:
        await runner.cleanup()


def whole(text: str = "Hi", /, **message: Any) -> dict[str, Any]:
    """Return a chat completion as OpenAI words it."""
    said = {"role": "assistant", "content": text} | message
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": said, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> str:
    """Return one event of a stream; without a delta, one without choices."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    event = {"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": choices} | more
    return f"data: {json.dumps(event)}\n\n"


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
DONE = "data: [DONE]\n\n"
