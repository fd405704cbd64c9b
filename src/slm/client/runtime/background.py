"""One daemon thread with an event loop of its own, for whatever must not wait for a user's code.

All clients of a process share one. It is started with its first user, ends with its last one, and
is made anew in a forked child. Knows nothing of what runs in it.
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
"""So long may what is left in the loop take to end."""


class Reply(Generic[_T]):
    """What a coroutine in the background will return; a thread or another loop waits for it."""

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
        """Wait in a thread; what interrupts the wait ends the work too."""
        gate = native.Gate()
        if self._when_done(gate.open):
            try:
                gate.wait()
            except BaseException:
                self._abandon()
                raise
        return self._outcome()

    async def waited(self) -> _T:
        """Wait in whatever event loop this is; cancelling the wait ends the work too."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def arrived() -> None:
            if not future.done():
                future.set_result(None)

        def open_() -> None:
            with contextlib.suppress(RuntimeError):  # it was closed without waiting for us
                loop.call_soon_threadsafe(arrived)

        if self._when_done(open_):
            try:
                await future
            except BaseException:
                self._abandon()
                raise
        return self._outcome()

    def _when_done(self, then: Callable[[], None]) -> bool:
        """Call back once it is done; return whether it is not done yet."""
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
        """Begin; `done` is called at the end, after whoever waits was told."""
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
    """A thread and its loop, for as long as anybody uses them.

    Args:
        name: the thread's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = native.new_rlock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread_id = 0
        # Who uses it: holders by their numbers, and what is to be answered.
        self._users: set[object] = set()
        _all.add(self)

    @property
    def is_here(self) -> bool:
        """Whether the caller runs in this very thread, where waiting for it would never end."""
        return self.is_running and self._thread_id == native.thread_id()

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop, while anybody uses it."""
        return self._loop

    @property
    def is_running(self) -> bool:
        """Whether anybody uses it; nobody can once the interpreter ends its daemon threads."""
        return self._loop is not None and not sys.is_finalizing()

    def hold(self, who: int) -> asyncio.AbstractEventLoop:
        """Keep the thread there, and return its loop; who holds it already counts once.

        Args:
            who: a number of `new_holder`.

        Raises:
            SLMUnavailable: there is no thread, and none can be started.
        """
        if self.is_here:
            # Whoever asks is running, so it is there. The lock is not waited for in this thread:
            # a signal's handler may wait for this thread while its own holds the lock.
            self._users.add(who)
            assert self._loop is not None  # noqa: S101 - for the type checker
            return self._loop
        return self._used_by(who)

    def let_go(self, who: int) -> None:
        """Hold it no longer; the last one ends the thread."""
        self._users.discard(who)
        loop = self._loop
        if loop is not None and self.is_here:
            self._end_if_unused(loop)
        elif loop is not None:
            with self._lock:
                self._stop_if_unused(loop)

    def _used_by(self, user: object) -> asyncio.AbstractEventLoop:
        with self._lock:
            # In this order, since a signal's handler may let go of something in between.
            self._users.add(user)
            try:
                return self._started()
            except BaseException:
                self._users.discard(user)
                raise

    def _end_if_unused(self, loop: asyncio.AbstractEventLoop) -> None:
        """End the thread with its last user; in this thread, and so without waiting for a lock."""
        if not self._lock.acquire(blocking=False):
            loop.call_later(_AGAIN_SECONDS, self._end_if_unused, loop)
            return
        try:
            self._stop_if_unused(loop)
        finally:
            self._lock.release()

    def _stop_if_unused(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is loop and not self._users:  # else it is of before a fork, or was ended
            self._loop, self._thread_id = None, 0
            _soon(loop, loop.stop)

    def start(
        self,
        work: Callable[[], Coroutine[Any, Any, _T]],
        context: contextvars.Context | None = None,
    ) -> Reply[_T]:
        """Begin to run a coroutine there; from any thread.

        Args:
            work: makes it.
            context: what it runs in; by default an empty one, since a request's spans and variables
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
            except (OSError, RuntimeError) as error:  # no descriptor, or no thread, is left
                self._drop_loop()
                why = str(error)
            except BaseException:
                self._drop_loop()  # interrupted: it may run already
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
                # Such as a SystemExit in a log handler of the application's.
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
        """Start anew in a child: its parent's thread is not there, and may have held the lock.

        Nothing of the loop is closed or collected: closing a socket that two processes share could
        say goodbye in the other's name, or take it out of the other's selector.
        """
        if self._loop is not None:
            _abandoned.append(self._loop)
        self._lock = native.new_rlock()
        self._loop, self._users, self._thread_id = None, set(), 0


async def _wind_up() -> None:
    """End what is still there: tasks of libraries, and whoever came while the loop stopped."""
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
    # Not by the policy: that of a GUI or of a framework may make loops for one thread alone.
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
    """Return a number that nobody else has."""
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
