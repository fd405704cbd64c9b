"""One daemon thread with its own event loop, for work that must not wait for user code.

All clients of a process share it. It starts with its first user, ends with its last one, and is
recreated in a forked child. Does not know what runs in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import os
import sys
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, Final, Generic, TypeVar

from slm.client.runtime import native
from slm.client.runtime.log import quiet_logger
from slm.errors import SLMUnavailable

_T = TypeVar("_T")
_log = quiet_logger("slm.client")

_PAUSE_SECONDS: Final = 0.1

_AGAIN_SECONDS: Final = 0.001

_END_SECONDS: Final = 2.0
"""How long remaining work in the loop may take to end."""


class Reply(Generic[_T]):
    """The future result of a background coroutine; a thread or another loop waits for it."""

    def __init__(self) -> None:
        self._lock = native.new_lock()
        self._then: list[Callable[[], None]] = []
        self._done = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._task: asyncio.Task[_T] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unwanted = False

    def wait(self) -> _T:
        """Wait in a thread; interrupting the wait also cancels the work."""
        gate = native.Gate()
        if self._when_done(gate.open):
            try:
                gate.wait()
            except BaseException:
                self._abandon()
                raise
        return self._outcome()

    async def waited(self) -> _T:
        """Wait in the current event loop; cancelling the wait also cancels the work."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def arrived() -> None:
            if not future.done():
                future.set_result(None)

        def open_() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed without waiting for us
                loop.call_soon_threadsafe(arrived)

        if self._when_done(open_):
            try:
                await future
            except BaseException:
                self._abandon()
                raise
        return self._outcome()

    def _when_done(self, then: Callable[[], None]) -> bool:
        """Register a callback for the end; return False if it is done already."""
        with self._lock:
            if self._done:
                return False
            self._then.append(then)
            return True

    def _outcome(self) -> _T:
        error, self._error = self._error, None
        if isinstance(error, asyncio.CancelledError):
            error = SLMUnavailable("the client's thread ended meanwhile")
        if error is not None:
            try:
                raise error
            finally:
                del error  # it refers to this frame
        value: _T = self._value
        return value

    def _abandon(self) -> None:
        self._unwanted = True
        loop = self._loop
        if loop is not None:
            _soon(loop, self._cancel)

    # --- in the background ---

    def run(self, work: Callable[[], Coroutine[Any, Any, _T]], done: Callable[[], None]) -> None:
        """Start; `done` is called at the end, after the waiter was notified."""
        if self._unwanted:
            done()
            return

        def ended(task: asyncio.Task[_T]) -> None:
            self._task = None
            if task.cancelled():
                self._finish(None, asyncio.CancelledError())
            else:
                self._finish(None if task.exception() else task.result(), task.exception())
            done()

        self._task = asyncio.get_running_loop().create_task(work())
        self._task.add_done_callback(ended)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _finish(self, value: Any, error: BaseException | None) -> None:
        with self._lock:
            self._done = True
            self._value, self._error = value, error
            then, self._then = self._then, []
        for each in then:
            each()


class Background:
    """A thread and its event loop, alive as long as they have users.

    Args:
        name: the thread's name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = native.new_rlock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread_id = 0
        # The users: holders by number, and pending replies.
        self._users: set[object] = set()
        _all.add(self)

    @property
    def is_here(self) -> bool:
        """Whether the caller runs in this very thread, where waiting for it would never end."""
        return self.is_running and self._thread_id == native.thread_id()

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop, while it has users."""
        return self._loop

    @property
    def is_running(self) -> bool:
        """Whether it has users; always False once the interpreter ends its daemon threads."""
        return self._loop is not None and not sys.is_finalizing()

    def hold(self, who: int) -> asyncio.AbstractEventLoop:
        """Keep the thread alive and return its loop; a holder counts only once.

        Args:
            who: a number from `new_holder`.

        Raises:
            SLMUnavailable: there is no thread, and none can be started.
        """
        if self.is_here:
            # The caller is running in it, so it exists. This thread does not wait for the lock: a
            # signal handler may wait for this thread while the handler's thread holds the lock.
            self._users.add(who)
            assert self._loop is not None  # noqa: S101 - for the type checker
            return self._loop
        return self._used_by(who)

    def let_go(self, who: int) -> None:
        """Release the hold; the last one ends the thread."""
        self._users.discard(who)
        loop = self._loop
        if loop is not None and self.is_here:
            self._end_if_unused(loop)
        elif loop is not None:
            with self._lock:
                self._stop_if_unused(loop)

    def _used_by(self, user: object) -> asyncio.AbstractEventLoop:
        with self._lock:
            # In this order, since a signal handler may release something in between.
            self._users.add(user)
            try:
                return self._started()
            except BaseException:
                self._users.discard(user)
                raise

    def _end_if_unused(self, loop: asyncio.AbstractEventLoop) -> None:
        """End the thread with its last user; runs in this thread, so it waits for no lock."""
        if not self._lock.acquire(blocking=False):
            loop.call_later(_AGAIN_SECONDS, self._end_if_unused, loop)
            return
        try:
            self._stop_if_unused(loop)
        finally:
            self._lock.release()

    def _stop_if_unused(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is loop and not self._users:  # else from before a fork, or ended
            self._loop, self._thread_id = None, 0
            _soon(loop, loop.stop)

    def start(
        self,
        work: Callable[[], Coroutine[Any, Any, _T]],
        context: contextvars.Context | None = None,
    ) -> Reply[_T]:
        """Start a coroutine in the background; callable from any thread.

        Args:
            work: creates it.
            context: its context; by default an empty one, since a request's spans and variables
                must not live on there.

        Raises:
            SLMUnavailable: there is no thread, and none can be started.
        """
        reply: Reply[_T] = Reply()

        def done() -> None:
            self._users.discard(reply)
            self._end_if_unused(loop)

        with self._lock:
            loop = reply._loop = self._used_by(reply)
            loop.call_soon_threadsafe(
                reply.run, work, done, context=context or contextvars.Context()
            )
        return reply

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._loop is not None and not sys.is_finalizing():
            return self._loop
        why = "the interpreter is ending"
        if not sys.is_finalizing():
            try:
                loop = self._loop = _new_loop()
                native.start_thread(lambda: self._serve(loop), self._name)
            except (OSError, RuntimeError) as error:  # out of descriptors or threads
                self._drop_loop()
                why = str(error)
            except BaseException:
                self._drop_loop()  # interrupted: it may be running already
                raise
            else:
                return loop
        raise SLMUnavailable(f"the client's thread cannot be started: {why}")

    def _drop_loop(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            _soon(loop, loop.stop)

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is loop:
            self._thread_id = native.thread_id()
        while True:
            try:
                loop.run_forever()
                break
            except BaseException:
                # For example a SystemExit in one of the application's log handlers.
                with contextlib.suppress(BaseException):
                    _log.exception("the client's thread goes on")
                native.sleep(_PAUSE_SECONDS)
        try:
            loop.run_until_complete(_wind_up())
        except Exception:
            _log.exception("the client's thread did not end well")
        finally:
            loop.close()

    def _forget(self) -> None:
        """Reset in a child: its parent's thread is not there, and may have held the lock.

        Nothing of the loop is closed or collected: closing a socket that two processes share could
        end the other's connection, or remove it from the other's selector.
        """
        if self._loop is not None:
            _abandoned.append(self._loop)
        self._lock = native.new_rlock()
        self._loop, self._users, self._thread_id = None, set(), 0


async def _wind_up() -> None:
    """End what is left: libraries' tasks, and callers that arrived while the loop was stopping."""
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    if rest:
        _, late = await asyncio.wait(rest, timeout=_END_SECONDS)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=_END_SECONDS)
    loop = asyncio.get_running_loop()
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()


def _new_loop() -> asyncio.AbstractEventLoop:
    # Not through the policy: one from a GUI or framework may create loops for one thread only.
    if native.is_patched():
        loop = asyncio.SelectorEventLoop(native.new_selector())
        loop.set_default_executor(native.Threads())
        return loop
    if sys.platform == "win32":
        return asyncio.ProactorEventLoop()
    return asyncio.SelectorEventLoop()


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):  # it has ended
        loop.call_soon_threadsafe(call)


_numbers = itertools.count()


def new_holder() -> int:
    """Return a unique number."""
    return next(_numbers)


_all: weakref.WeakSet[Background] = weakref.WeakSet()
_abandoned: list[asyncio.AbstractEventLoop] = []


def _after_fork_in_child() -> None:
    for background in list(_all):
        background._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)

following: Final = Background("slm-client")
"""Where all clients of this process follow their SLMs."""
