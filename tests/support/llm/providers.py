"""Providers under test control: the three protocols on real sockets, every byte the test's own.

`Dialect` knows how each provider words an answer; `RecordingServer` writes what a test tells it to
and keeps what it received. Where a fault is of the wire itself, no mock library can make it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import SecretStr

from slm.client.config import ResolvedConfig, Step

CANARY = 'sk-canary-7f3a"9\\e2b-do-not-leak'
"""A key as a test uses it, with characters that JSON and repr quote."""


@dataclass
class Configs:
    """What LLMInterface needs of a client; a test changes `current` as an operator would."""

    current: ResolvedConfig
    asked: int = 0

    async def resolve(self, agent_id: str) -> ResolvedConfig:
        self.asked += 1
        return replace(self.current, agent_id=agent_id)


@dataclass(frozen=True)
class Received:
    """One request as it came over the wire; header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    raw: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.raw.partition(b"\r\n\r\n")[2])


class Answer:
    """The connection to write an answer to; closed after it unless `keep_alive` is set."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.keep_alive = False

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def whole(
        self,
        body: bytes,
        *,
        status: int = 200,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send a whole HTTP answer."""
        lines = [f"HTTP/1.1 {status} Whatever", f"content-type: {content_type}"]
        lines += [
            f"content-length: {len(body)}",
            *(f"{k}: {v}" for k, v in (headers or {}).items()),
        ]
        await self.send("\r\n".join([*lines, "", ""]).encode() + body)

    async def begin(self, content_type: str) -> None:
        """Begin a chunked answer."""
        head = f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ntransfer-encoding: chunked\r\n"
        await self.send(head.encode() + b"\r\n")

    async def begin_until_close(self, content_type: str) -> None:
        """Begin an answer that ends where the connection does, so a cut looks like its end."""
        head = f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\nconnection: close\r\n"
        await self.send(head.encode() + b"\r\n")

    async def piece(self, data: bytes) -> None:
        """Send one piece of a chunked answer."""
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def end(self) -> None:
        """End a chunked answer."""
        await self.send(b"0\r\n\r\n")


Handler = Callable[[Received, Answer], Awaitable[None]]


class RecordingServer:
    """An HTTP/1.1 server of a few lines that records each request and answers as it is told.

    Attributes:
        url: `http://127.0.0.1:PORT`.
        received: every request so far.
        handler: what answers; when it returns, the connection is closed where it stands.
        connections: how many were opened.
    """

    def __init__(self, handler: Handler | None = None) -> None:
        self.handler = handler
        self.received: list[Received] = []
        self.connections = 0
        self.url = ""
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self, host: str = "127.0.0.1") -> AsyncIterator[RecordingServer]:
        server = await asyncio.start_server(self._serve, host, 0)
        self.url = f"http://{host}:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while True:
                request = await self._read(reader)
                self.received.append(request)
                assert self.handler is not None
                answer = Answer(writer)
                await self.handler(request, answer)
                if not answer.keep_alive:
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> Received:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines if line)
        }
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        method, path, _ = first.split(" ", 2)
        return Received(method, path, headers, head + body)


class Dialect:
    """How one provider words things; the same test then runs on all three."""

    def __init__(self, provider: str) -> None:
        self.provider = provider
        self.stream_type = "application/x-ndjson" if provider == "ollama" else "text/event-stream"

    def __repr__(self) -> str:
        return self.provider

    def endpoint(self, url: str) -> str:
        return f"{url}/v1" if self.provider == "openai" else url

    @property
    def path(self) -> str:
        paths = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}
        return paths.get(self.provider, "/api/chat")

    def config(self, url: str, **fields: Any) -> ResolvedConfig:
        """Return a config that leads to a server at `url`, with the canary as its key."""
        given: dict[str, Any] = {
            "agent_id": "code-assistant",
            "source_agent_id": "code-assistant",
            "step": Step.AGENT,
            "llm_provider": self.provider,
            "llm_endpoint": self.endpoint(url),
            "llm_model": "model-1",
            "llm_api_key": SecretStr(CANARY),
            "llm_timeout": 20,
            "revision": 43,
        }
        return ResolvedConfig(**(given | fields))

    def answer(
        self, text: str = "Hello there", tool: tuple[str, dict[str, Any]] | None = None
    ) -> bytes:
        """Return the body of a whole answer that took 11 tokens in and 7 out."""
        return json.dumps(self._answer(text, tool)).encode()

    def _answer(self, text: str, tool: tuple[str, dict[str, Any]] | None) -> dict[str, Any]:
        if self.provider == "openai":
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if tool:
                function = {"name": tool[0], "arguments": json.dumps(tool[1])}
                message["tool_calls"] = [{"id": "call-1", "type": "function", "function": function}]
            finish = "tool_calls" if tool else "stop"
            return {
                "id": "x",
                "object": "chat.completion",
                "created": 1,
                "model": "model-1",
                "choices": [{"index": 0, "message": message, "finish_reason": finish}],
                "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
            }
        if self.provider == "anthropic":
            content: list[dict[str, Any]] = [{"type": "text", "text": text}]
            if tool:
                content.append(
                    {"type": "tool_use", "id": "call-1", "name": tool[0], "input": tool[1]}
                )
            return {
                "id": "x",
                "type": "message",
                "role": "assistant",
                "model": "model-1",
                "content": content,
                "stop_reason": "tool_use" if tool else "end_turn",
                "stop_sequence": None,
                "usage": {"input_tokens": 11, "output_tokens": 7},
            }
        message = {"role": "assistant", "content": text}
        if tool:
            message["tool_calls"] = [{"function": {"name": tool[0], "arguments": tool[1]}}]
        return {
            "model": "model-1",
            "created_at": "2026-11-22T00:00:00Z",
            "message": message,
            "done": True,
            "done_reason": "stop",
            "prompt_eval_count": 11,
            "eval_count": 7,
        }

    def opening(self) -> list[bytes]:
        """Return what a stream begins with before its first token."""
        if self.provider == "openai":
            return [self._chunk({"role": "assistant", "content": ""})]
        if self.provider == "anthropic":
            message = self._answer("", None) | {"content": [], "stop_reason": None}
            message["usage"] = {"input_tokens": 11, "output_tokens": 0}
            return [
                self._event("message_start", message=message),
                self._event(
                    "content_block_start", index=0, content_block={"type": "text", "text": ""}
                ),
                self._event("ping"),
            ]
        return []

    def token(self, text: str) -> bytes:
        """Return one token of a stream."""
        if self.provider == "openai":
            return self._chunk({"content": text})
        if self.provider == "anthropic":
            delta = {"type": "text_delta", "text": text}
            return self._event("content_block_delta", index=0, delta=delta)
        return self._line(message={"role": "assistant", "content": text}, done=False)

    def tool_pieces(self, name: str, arguments: str) -> list[bytes]:
        """Return the pieces of a streamed tool call, cut up as each provider does."""
        half = len(arguments) // 2
        if self.provider == "openai":
            return [
                self._tool_chunk(id="call-1", function={"name": name, "arguments": ""}),
                self._tool_chunk(function={"arguments": arguments[:half]}),
                self._tool_chunk(function={"arguments": arguments[half:]}),
            ]
        if self.provider == "anthropic":
            block = {"type": "tool_use", "id": "call-1", "name": name, "input": {}}
            return [
                self._event("content_block_start", index=1, content_block=block),
                *(
                    self._event(
                        "content_block_delta",
                        index=1,
                        delta={"type": "input_json_delta", "partial_json": part},
                    )
                    for part in ("", arguments[:half], arguments[half:])
                ),
                self._event("content_block_stop", index=1),
            ]
        call = {"function": {"name": name, "arguments": json.loads(arguments)}}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        return [self._line(message=message, done=False)]

    def closing(self, *, tool: bool = False) -> list[bytes]:
        """Return how a stream says that it is finished."""
        if self.provider == "openai":
            usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
            return [
                self._chunk({}, finish_reason="tool_calls" if tool else "stop"),
                self._sse(self._completion_chunk([], usage=usage)),
                b"data: [DONE]\n\n",
            ]
        if self.provider == "anthropic":
            delta = {"stop_reason": "tool_use" if tool else "end_turn", "stop_sequence": None}
            return [
                self._event("content_block_stop", index=0),
                self._event("message_delta", delta=delta, usage={"output_tokens": 7}),
                self._event("message_stop"),
            ]
        counts = {"prompt_eval_count": 11, "eval_count": 7}
        message = {"role": "assistant", "content": ""}
        return [self._line(message=message, done=True, done_reason="stop", **counts)]

    def error(self, text: str) -> bytes:
        """Return the body of an error."""
        if self.provider == "openai":
            return json.dumps({"error": {"message": text, "type": "some", "code": None}}).encode()
        if self.provider == "anthropic":
            error = {"type": "some_error", "message": text}
            return json.dumps({"type": "error", "error": error}).encode()
        return json.dumps({"error": text}).encode()

    def error_in_stream(self, text: str) -> bytes:
        """Return a piece of a stream that says that the rest will not come."""
        if self.provider == "openai":
            return self._sse({"error": {"message": text, "type": "server_error", "code": 503}})
        if self.provider == "anthropic":
            return self._event("error", error={"type": "overloaded_error", "message": text})
        return json.dumps({"error": text}).encode() + b"\n"

    def malformed(self) -> bytes:
        """Return a piece that is not of the protocol."""
        if self.provider == "openai":
            return b'data: {"choices": [{"del\n\n'
        if self.provider == "anthropic":
            return b'event: content_block_delta\ndata: {"type": "content_bl\n\n'
        return b'{"message": {"role": "assis\n'

    def keep_alive(self) -> bytes:
        """Return a piece that says only that the server is there."""
        if self.provider == "openai":
            return b": ping\n\n"
        if self.provider == "anthropic":
            return self._event("ping")
        return self._line(message={"role": "assistant", "content": ""}, done=False)

    def _sse(self, data: Any) -> bytes:
        return b"data: " + json.dumps(data).encode() + b"\n\n"

    def _event(self, kind: str, **data: Any) -> bytes:
        return f"event: {kind}\n".encode() + self._sse({"type": kind} | data)

    def _line(self, **data: Any) -> bytes:
        head = {"model": "model-1", "created_at": "2026-11-22T00:00:00Z"}
        return json.dumps(head | data).encode() + b"\n"

    def _completion_chunk(self, choices: Sequence[Any], **more: Any) -> dict[str, Any]:
        head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "model-1"}
        return head | {"choices": list(choices)} | more

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return self._sse(self._completion_chunk([choice]))

    def _tool_chunk(self, **call: Any) -> bytes:
        return self._chunk({"tool_calls": [{"index": 0, "type": "function"} | call]})


DIALECTS = [Dialect("openai"), Dialect("anthropic"), Dialect("ollama")]


def answering(dialect: Dialect, text: str = "Hello there", **more: Any) -> Handler:
    """Return a handler that answers everything well: whole, or streamed word by word."""

    async def handler(request: Received, answer: Answer) -> None:
        # Ollama streams unless told otherwise, the others when told.
        if not request.body.get("stream"):
            await answer.whole(dialect.answer(text, **more))
            answer.keep_alive = True
            return
        await answer.begin(dialect.stream_type)
        tokens = [dialect.token(word) for word in text.split(" ")]
        for piece in [*dialect.opening(), *tokens, *dialect.closing()]:
            await answer.piece(piece)
        await answer.end()
        answer.keep_alive = True

    return handler


def failing(dialect: Dialect, status: int, text: str, **headers: str) -> Handler:
    """Return a handler that answers everything with this HTTP status."""

    async def handler(request: Received, answer: Answer) -> None:
        spelled = {name.replace("_", "-"): value for name, value in headers.items()}
        await answer.whole(dialect.error(text), status=status, headers=spelled)

    return handler
