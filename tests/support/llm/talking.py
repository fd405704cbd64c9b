"""A provider that says what a test gives it, word for word, and an interface that listens."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from slm.errors import LLMError
from slm.llm import ChatResult, LLMInterface, TransportSettings
from tests.llm.conftest import ASK, QUICK_RETRY
from tests.support.llm.providers import Answer, Configs, Dialect, Handler, Received, RecordingServer

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


class Talk:
    """One agent at one provider.

    Attributes:
        server: what was asked.
        llm: the interface.
        configs: what the agent's config is.
    """

    def __init__(self, server: RecordingServer, llm: LLMInterface, configs: Configs) -> None:
        self.server = server
        self.llm = llm
        self.configs = configs

    @property
    def bodies(self) -> list[Any]:
        return [request.body for request in self.server.received]

    async def ask(self, messages: Any = ASK, *, streamed: bool = False, **more: Any) -> ChatResult:
        if not streamed:
            return await self.llm.chat("a", messages, **more)
        stream = self.llm.stream("a", messages, **more)
        async for _ in stream:
            pass
        return stream.result

    async def fails(self, *, streamed: bool = False, **more: Any) -> LLMError:
        try:
            result = await self.ask(streamed=streamed, **more)
        except LLMError as error:
            return error
        raise AssertionError(f"answered: {result}")


@contextlib.asynccontextmanager
async def talking(
    provider: str,
    handler: Handler,
    *,
    transport: TransportSettings | None = None,
    path: str = "",
    **config: Any,
) -> AsyncIterator[Talk]:
    """Yield a talk with a provider of this dialect; no temperature is set unless asked for."""
    dialect = Dialect(provider)
    config = {"llm_temperature": None} | config
    async with RecordingServer(handler).running() as server:
        if path:
            config["llm_endpoint"] = server.url + path
        configs = Configs(dialect.config(server.url, **config))
        async with LLMInterface(configs, retry=QUICK_RETRY, transport=transport) as llm:
            yield Talk(server, llm, configs)


def says(
    value: Any, *, status: int = 200, kind: str = "application/json", **headers: str
) -> Handler:
    """Return a handler that answers everything with one body: JSON, text or bytes."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    data = value.encode() if isinstance(value, str) else data

    async def handler(request: Received, answer: Answer) -> None:
        spelled = {name.replace("_", "-"): text for name, text in headers.items()}
        await answer.whole(data, status=status, content_type=kind, headers=spelled)

    return handler


def sse(*events: Any, done: bool = False) -> bytes:
    """Return server-sent events: text and bytes as they are, anything else as `data: JSON`."""
    parts = []
    for event in events:
        if isinstance(event, bytes):
            parts.append(event)
        else:
            text = event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n"
            parts.append(text.encode())
    return b"".join(parts) + (b"data: [DONE]\n\n" if done else b"")


def streams(data: bytes, *, kind: str = "text/event-stream") -> Handler:
    """Return a handler that answers everything with these bytes, and ends properly."""

    async def handler(request: Received, answer: Answer) -> None:
        await answer.begin(kind)
        await answer.piece(data)
        await answer.end()

    return handler


def either(whole: Handler, streamed: Handler) -> Handler:
    """Return a handler that streams where a stream is asked for."""

    async def handler(request: Received, answer: Answer) -> None:
        await (streamed if request.body.get("stream") else whole)(request, answer)

    return handler


def by_body(choose: Callable[[Any], Handler]) -> Handler:
    """Return a handler that decides by what it is asked."""

    async def handler(request: Received, answer: Answer) -> None:
        await choose(request.body)(request, answer)

    return handler


# --- OpenAI's words ---


def chunk(delta: Any = ..., finish: Any = None, **more: Any) -> dict[str, Any]:
    """Return a chunk of a stream; without a delta it has none."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
    if delta is not ...:
        choice["delta"] = delta
    return {"id": "x", "object": "chat.completion.chunk", "choices": [choice]} | more


def completion(content: Any = "Hello", finish: Any = "stop", **message: Any) -> dict[str, Any]:
    """Return a whole answer."""
    said = {"role": "assistant", "content": content} | message
    return {"object": "chat.completion", "choices": [{"message": said, "finish_reason": finish}]}


def call(identity: Any = ..., name: Any = ..., arguments: Any = ..., index: Any = ...) -> Any:
    """Return a piece of a tool call with the members that are given."""
    function = {"name": name, "arguments": arguments}
    piece = {
        "index": index,
        "id": identity,
        "function": {key: value for key, value in function.items() if value is not ...},
    }
    return {key: value for key, value in piece.items() if value is not ...}


def refusal(message: str, param: str | None = None, status: int = 400) -> Handler:
    """Return a handler that refuses as OpenAI does."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    return says({"error": error}, status=status)


# --- Anthropic's words ---


def event(kind: str, **more: Any) -> str:
    """Return one event."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | more)}\n\n"


def block(index: Any, kind: str, *pieces: dict[str, Any], **more: Any) -> str:
    """Return the events of one block."""
    start = event("content_block_start", index=index, content_block={"type": kind} | more)
    deltas = [event("content_block_delta", index=index, delta=piece) for piece in pieces]
    return "".join([start, *deltas, event("content_block_stop", index=index)])


def message(*content: Any, stop: Any = "end_turn", **more: Any) -> dict[str, Any]:
    """Return a whole answer of Anthropic's."""
    whole = {"id": "m", "type": "message", "role": "assistant", "content": list(content)}
    return whole | {"stop_reason": stop, "usage": {"input_tokens": 1, "output_tokens": 1}} | more
