"""BlockingSLMClient: the same client for synchronous code, over one event loop in a private thread.

Safe to use from any number of threads, and right after a fork: the child gets a thread and a
connection of its own with its first question, and serves what the parent knew meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, TypeVar

from slm.client.client import SLMClient
from slm.client.config import ResolvedConfig
from slm.client.hooks import OnChange
from slm.client.retry import ClientStatus
from slm.protocol import Explanation

_T = TypeVar("_T")


class BlockingSLMClient:
    """`SLMClient` without await; every argument is the same.

    Example:
        >>> with BlockingSLMClient("https://slm.internal") as slm:
        ...     config = slm.get_agent_config("code-assistant")
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._client = SLMClient(*args, **options)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        _clients.add(self)

    def connect(self) -> None:
        """Start following the SLM, as `SLMClient.connect` does; it is done at first use as well."""
        self._run(self._client.connect())

    def close(self) -> None:
        """Stop following the SLM and end the thread; what is known can still be asked for."""
        if self._loop is not None:
            self._run(self._client.close())
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def __enter__(self) -> BlockingSLMClient:
        self.connect()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def status(self) -> ClientStatus:
        """How this client stands to its SLM."""
        return self._client.status

    @property
    def last_error(self) -> str | None:
        """What failed last, as a sentence without secrets; None while all is well."""
        return self._client.last_error

    @property
    def revision(self) -> int:
        """Every change up to this revision was received; 0 before the first contact."""
        return self._client.revision

    def resolve(self, agent_id: str) -> ResolvedConfig:
        """Return the agent's configuration; see `SLMClient.resolve`."""
        config = self._client.peek(agent_id)
        return config if config is not None else self._run(self._client.resolve(agent_id))

    def get_agent_config(self, agent_id: str) -> dict[str, Any]:
        """Return the agent's llm_* fields; see `SLMClient.get_agent_config`."""
        return self.resolve(agent_id).as_dict()

    def get_default_agent_config(self) -> dict[str, Any]:
        """Return the default agent's llm_* fields; see `SLMClient.get_default_agent_config`."""
        return self._run(self._client.get_default_agent_config())

    def explain(self, agent_id: str) -> Explanation:
        """Say how this agent is resolved now; see `SLMClient.explain`."""
        return self._run(self._client.explain(agent_id))

    def on_change(self, callback: OnChange) -> Callable[[], None]:
        """Have the callback called, in the private thread, after each swap; return how to stop."""
        return self._client.on_change(callback)

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                # A daemon: a process that ends without close() is not kept from ending.
                self._thread = threading.Thread(
                    target=_serve, args=(self._loop,), name="slm-client", daemon=True
                )
                self._thread.start()
            loop = self._loop
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    def _forget_thread(self) -> None:
        """Start anew in a child: its parent's threads are not there, and one may hold the lock."""
        if self._loop is not None:
            _abandoned.append(self._loop)
        self._lock = threading.Lock()
        self._loop = self._thread = None


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()


_clients: weakref.WeakSet[BlockingSLMClient] = weakref.WeakSet()
_abandoned: list[asyncio.AbstractEventLoop] = []


def _after_fork_in_child() -> None:
    for client in list(_clients):
        client._forget_thread()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
