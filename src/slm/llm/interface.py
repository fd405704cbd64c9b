"""LLMInterface: takes an agent's name and messages, returns its current model's answer.

Resolves the agent, selects the provider, calls, retries, reports. Knows no provider's protocol and
keeps no config: each call resolves again, and keeps the config it started with.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, Unpack

from slm.client.config import ResolvedConfig
from slm.errors import ConfigurationError, LLMError, LLMProviderMissing
from slm.llm import spans
from slm.llm.call import Call, check_overrides, context_of, where_from
from slm.llm.providers.base import Accumulator, Message, Provider, StreamChunk
from slm.llm.results import ChatResult, Overrides
from slm.llm.retry import RetrySettings
from slm.llm.synchronous import LLMStreamNow, Waiter
from slm.llm.transport import Connections, TransportSettings
from slm.llm.validator import PROVIDERS, Check, unknown_provider

if TYPE_CHECKING:
    from slm.client.blocking import BlockingSLMClient

_log = logging.getLogger("slm.llm")


class Resolver(Protocol):
    """What LLMInterface needs from a client; `slm.SLMClient` is one."""

    async def resolve(self, agent_id: str) -> ResolvedConfig:
        """Return the agent's current config."""


class LLMInterface:
    """Calls language models with the configuration that an agent has at that moment.

    Each call resolves its agent: a call in flight finishes with the configuration that it started
    with, the next one uses the new one. Can be used from any number of threads, event loops and
    tasks; synchronous code has `chat_now` and `stream_now`.

    Args:
        client: the source of configurations, an `SLMClient` or a `BlockingSLMClient`.
        retry: how failed calls are retried.
        transport: proxy, certificates, headers and limits of the connections to providers.
    """

    def __init__(
        self,
        client: Resolver | BlockingSLMClient,
        *,
        retry: RetrySettings | None = None,
        transport: TransportSettings | None = None,
    ) -> None:
        # A BlockingSLMClient is detected by this alone; importing it would import aiohttp.
        resolver: Any = getattr(client, "_asynchronous", client)
        self._client: Resolver = resolver
        self._retry = retry or RetrySettings()
        transport = transport or TransportSettings()
        self._connections = Connections(transport)
        self._providers: dict[str, Provider] = {}
        # An SLMClient has both; other resolvers need not.
        self._in_use: Callable[[ResolvedConfig], AbstractContextManager[None]] = getattr(
            resolver, "in_use", _not_counted
        )
        self._waiter = Waiter(self._connections.aclose)
        register = getattr(resolver, "register_validator", None)
        self._unregister: Callable[[], None] = (
            register(Check(transport.endpoints)) if register is not None else _nothing
        )

    async def chat(
        self, agent_id: str, messages: Sequence[Message], **overrides: Unpack[Overrides]
    ) -> ChatResult:
        """Return the model's answer.

        Args:
            agent_id: the agent; resolved by the chain in docs/protocol.md section 5.
            messages: dicts with `role` (system, user, assistant, tool) and `content`, in OpenAI's
                format; translated for the other providers, including tool calls.
            **overrides: what this call sets differently; see `Overrides`.

        Raises:
            LLMError: the call failed; its subclass says how (see `slm.errors`).
            AgentKeyUnavailable: the agent's key is unavailable.
            ConfigurationError: an override or a message is invalid.
        """
        check_overrides(messages, overrides)
        config = await self._client.resolve(agent_id)
        # A call holds its key until it ends, including retries.
        with self._in_use(config):
            call = await self._begin(config, messages, overrides)
            span = spans.begin(call)
            try:
                result = await self._chat(call)
            except BaseException as error:
                spans.end(span, error)
                raise
            spans.end(span, result)
            return result

    def chat_now(
        self, agent_id: str, messages: Sequence[Message], **overrides: Unpack[Overrides]
    ) -> ChatResult:
        """Do what `chat` does, in synchronous code; callable from any thread."""
        return self._waiter.wait(lambda: self.chat(agent_id, messages, **overrides))

    async def _chat(self, call: Call) -> ChatResult:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + call.timeout_seconds
        tries = 0
        while True:
            tries += 1
            outcome = await _answer(call, deadline)
            if isinstance(outcome, ChatResult):
                _log_answer(call, outcome)
                return outcome
            pause = self._retry.pause(outcome, tries, deadline - loop.time())
            _log_failure(outcome, pause)
            if pause is None:
                raise outcome
            await asyncio.sleep(pause)

    def stream(
        self, agent_id: str, messages: Sequence[Message], **overrides: Unpack[Overrides]
    ) -> LLMStream:
        """Stream the model's answer: returns an asynchronous iterator of `StreamChunk`.

        Arguments and errors are those of `chat`; nothing is sent before the first chunk is
        requested. After the first chunk, nothing is retried.
        """
        check_overrides(messages, overrides)
        state = _StreamState()
        return LLMStream(self._streamed(state, agent_id, messages, overrides), state)

    def stream_now(
        self, agent_id: str, messages: Sequence[Message], **overrides: Unpack[Overrides]
    ) -> LLMStreamNow:
        """Do what `stream` does, in synchronous code: an iterator; callable from any thread."""
        return LLMStreamNow(self.stream(agent_id, messages, **overrides), self._waiter)

    async def close(self) -> None:
        """Close the connections of the running event loop and those of synchronous calls.

        Other loops close their own. The client stops using this interface to validate configs.
        """
        self._unregister()
        await self._connections.aclose()
        await self._waiter.close()

    def close_now(self) -> None:
        """Do what `close` does, in synchronous code."""
        self._unregister()
        self._waiter.close_now()

    async def __aenter__(self) -> LLMInterface:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def __enter__(self) -> LLMInterface:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close_now()

    async def _begin(
        self, config: ResolvedConfig, messages: Sequence[Message], overrides: Overrides
    ) -> Call:
        provider = self._providers.get(config.llm_provider)
        if provider is None:
            provider = await self._load(config)
        return Call(provider, config, messages, overrides)

    async def _load(self, config: ResolvedConfig) -> Provider:
        name = config.llm_provider
        context = context_of(config, config.llm_model)
        if name not in PROVIDERS:
            raise LLMProviderMissing(unknown_provider(), **context)
        # In a thread, because loading the system's certificates takes 20 to 40 ms.
        provider = await asyncio.to_thread(self._make, name)
        return self._providers.setdefault(name, provider)

    def _make(self, name: str) -> Provider:
        module_name, class_name = PROVIDERS[name]
        provider: Provider = getattr(importlib.import_module(module_name), class_name)(
            self._connections
        )
        self._connections.prepare()
        return provider

    async def _streamed(
        self,
        state: _StreamState,
        agent_id: str,
        messages: Sequence[Message],
        overrides: Overrides,
    ) -> AsyncGenerator[StreamChunk, None]:
        config = await self._client.resolve(agent_id)
        with self._in_use(config):
            call = await self._begin(config, messages, overrides)
            span = spans.begin(call)
            outcome: Exception | None = None
            try:
                async with contextlib.aclosing(self._tried_stream(state, call)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            except Exception as error:
                outcome = error
                raise
            finally:
                spans.end(span, outcome or state.result)
                # The error must not be reachable from its own frame.
                outcome = None

    async def _tried_stream(
        self, state: _StreamState, call: Call
    ) -> AsyncGenerator[StreamChunk, None]:
        loop = asyncio.get_running_loop()
        first_token = loop.time() + call.timeout_seconds
        tries = 0
        while True:
            tries += 1
            pieces = call.provider.stream(call.request)
            deadline = first_token
            received = state.received
            try:
                while isinstance(outcome := await _next(call, pieces, deadline), StreamChunk):
                    received.add(outcome)
                    yield outcome
                    deadline = loop.time() + call.timeout_seconds
            finally:
                # Exceptions while closing are the SDK's, and add nothing.
                with contextlib.suppress(Exception):
                    await pieces.aclose()
            if received.ended:
                state.result = call.result(received.completion())
                _log_answer(call, state.result)
                return
            if received.started:
                broken = call.broken(received.text, outcome)
                _log_failure(broken, None)
                raise broken
            error = outcome or call.broken("")
            pause = self._retry.pause(error, tries, first_token - loop.time())
            _log_failure(error, pause)
            if pause is None:
                raise error
            await asyncio.sleep(pause)


class LLMStream:
    """A streamed answer: iterate over it for the chunks, then read its `result`.

    Closes its connection when it ends. If you stop early, the connection is closed once the stream
    is garbage-collected, or at once with `async with llm.stream(…) as stream` or `aclose`.
    """

    def __init__(self, chunks: AsyncGenerator[StreamChunk, None], state: _StreamState) -> None:
        self._chunks = chunks
        self._state = state

    @property
    def text(self) -> str:
        """The text so far."""
        return self._state.received.text

    @property
    def result(self) -> ChatResult:
        """The complete answer, and the configuration that produced it.

        Raises:
            ConfigurationError: the stream has not been read to its end.
        """
        if self._state.result is None:
            raise ConfigurationError("the stream has a result only after its last chunk")
        return self._state.result

    def __aiter__(self) -> LLMStream:
        return self

    async def __anext__(self) -> StreamChunk:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        """Close the stream and its connection."""
        await self._chunks.aclose()

    async def __aenter__(self) -> LLMStream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


def _nothing() -> None:
    """Do nothing: the client has no validators."""


def _not_counted(_: ResolvedConfig) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


def _log_answer(call: Call, result: ChatResult) -> None:
    if _log.isEnabledFor(logging.DEBUG):
        where = f"{result.provider}/{result.model}"
        _log.debug("[%s] %s answered (%s)", where_from(call.config), where, result.finish_reason)


def _log_failure(error: LLMError, pause: float | None) -> None:
    """Log a failure; its text includes provider, model, agent, step and revision."""
    if pause is None:
        _log.debug("%s", error)
    else:
        _log.info("%s; trying again in %.1f s", error, pause)


class _StreamState:
    """Shared by a stream and its generator, separate from both so that they form no cycle."""

    def __init__(self) -> None:
        self.received = Accumulator()
        self.result: ChatResult | None = None


async def _answer(call: Call, deadline: float) -> ChatResult | LLMError:
    """Try once; return an error instead of raising it, so that it has no `__context__`."""
    limit = asyncio.timeout_at(deadline)
    try:
        async with limit:
            return call.result(await call.provider.chat(call.request))
    except Exception as error:
        failed = error
    except BaseException as error:
        raise _without_way_back(error)  # noqa: B904 - it is the same one
    try:
        return call.failure(failed, timed_out=limit.expired())
    finally:
        del failed


async def _next(
    call: Call, pieces: AsyncGenerator[StreamChunk, None], deadline: float
) -> StreamChunk | LLMError | None:
    """Return the next chunk, None at the end, or an error; raises nothing from the SDK."""
    limit = asyncio.timeout_at(deadline)
    try:
        async with limit:
            return await anext(pieces, None)
    except Exception as error:
        failed = error
    except BaseException as error:
        raise _without_way_back(error)  # noqa: B904 - it is the same one
    try:
        return call.failure(failed, timed_out=limit.expired())
    finally:
        del failed


def _without_way_back(error: BaseException) -> BaseException:
    """Return a cancellation without the SDK's frames, which have the key in variables."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)
