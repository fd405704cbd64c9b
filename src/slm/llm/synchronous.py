"""LLMInterface for synchronous code: runs calls in one background thread and waits for them.

This thread is not the one that follows the SLM, so a large response delays no change. Does not know
what a call does.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Protocol, TypeVar

from slm.client.runtime.background import Background, new_holder
from slm.llm.providers.base import StreamChunk
from slm.llm.results import ChatResult

_T = TypeVar("_T")

_calling: Final = Background("slm-llm")
"""Where the synchronous calls of all interfaces of this process run."""


class Waiter:
    """Runs one interface's calls in the background thread, which exists while it is open.

    Args:
        close_connections: closes the connections of the loop it is awaited in.
    """

    def __init__(self, close_connections: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._close_connections = close_connections
        self._holder = new_holder()
        self._used = False
        # One that nothing refers to is closed; at exit, the thread ends with the process.
        weakref.finalize(self, _close_later, self._holder, close_connections).atexit = False

    def wait(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Run work in the background thread, in the caller's context, and wait for it."""
        self._used = True
        _calling.hold(self._holder)  # keeps it and its connections between calls
        return _calling.start(work, contextvars.copy_context()).wait()

    async def close(self) -> None:
        """Close the connections there; the last interface ends the thread."""
        if self._used and _calling.is_running:
            await _calling.start(self._close_connections).waited()
            _calling.let_go(self._holder)

    def close_now(self) -> None:
        """Do what `close` does, in synchronous code."""
        if self._used and _calling.is_running:
            _calling.start(self._close_connections).wait()
            _calling.let_go(self._holder)


def _close_later(holder: int, close_connections: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Close an unreferenced interface; called by the garbage collector, at any point.

    Takes no lock and does not wait.
    """
    loop = _calling.loop

    async def close() -> None:
        try:
            await close_connections()
        finally:
            _calling.let_go(holder)

    if loop is not None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(lambda: loop.create_task(close()))


class Stream(Protocol):
    """What is iterated over in the background: an `LLMStream`."""

    @property
    def text(self) -> str:
        """The text so far."""

    @property
    def result(self) -> ChatResult:
        """The whole answer."""

    def __anext__(self) -> Awaitable[StreamChunk]: ...

    async def aclose(self) -> None:
        """Close it."""


class LLMStreamNow:
    """A streamed answer for synchronous code; see `LLMStream`.

    If you stop early, the connection is closed once the stream is garbage-collected, or at once
    with `with llm.stream_now(…) as stream` or `close`.
    """

    def __init__(self, stream: Stream, waiter: Waiter) -> None:
        self._stream = stream
        self._waiter = waiter

    @property
    def text(self) -> str:
        """The text so far."""
        return self._stream.text

    @property
    def result(self) -> ChatResult:
        """The complete answer, and the configuration that produced it.

        Raises:
            ConfigurationError: the stream has not been read to its end.
        """
        return self._stream.result

    def __iter__(self) -> LLMStreamNow:
        return self

    def __next__(self) -> StreamChunk:
        chunk = self._waiter.wait(self._next)
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """Close the stream and its connection."""
        self._waiter.wait(self._stream.aclose)

    def __enter__(self) -> LLMStreamNow:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def _next(self) -> StreamChunk | None:
        try:
            return await self._stream.__anext__()
        except StopAsyncIteration:
            return None
