"""Native threads, locks and queues, even where gevent has replaced them with its own.

gevent's monkey-patching turns threads into greenlets of one thread, so a loop that blocks for a
while delays all of them. Imports gevent only if the application has patched with it.
"""

from __future__ import annotations

import concurrent.futures
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any


def _original(module: str, name: str) -> Any:
    patching = sys.modules.get("gevent.monkey")
    if patching is not None:
        return patching.get_original(module, name)
    return getattr(import_module(module), name)


def is_patched() -> bool:
    """Return whether gevent has replaced this process's threads."""
    patching = sys.modules.get("gevent.monkey")
    return patching is not None and bool(patching.is_module_patched("threading"))


def new_lock() -> threading.Lock:
    """Return a lock that blocks threads rather than greenlets."""
    lock: threading.Lock = _original("_thread", "allocate_lock")()
    return lock


def new_rlock() -> Any:
    """Return a reentrant lock for state that can be accessed from anywhere.

    The garbage collector and signal handlers may call the client at any point, even while their own
    thread holds the lock.
    """
    return _original("_thread", "RLock")()


def new_queue() -> Any:
    """Return an unbounded queue between threads, a `queue.SimpleQueue`."""
    return _original("_queue", "SimpleQueue")()


def thread_id() -> int:
    """Return the id of the current thread."""
    number: int = _original("_thread", "get_ident")()
    return number


def new_selector() -> Any:
    """Return the selector for a loop in a native thread."""
    return _original("selectors", "DefaultSelector")()


def sleep(seconds: float) -> None:
    """Block this thread."""
    _original("time", "sleep")(seconds)


def start_thread(work: Callable[[], None], name: str) -> None:
    """Run `work` in a daemon thread, which does not keep the process alive."""
    if is_patched():
        _original("_thread", "start_new_thread")(work, ())
        return
    threading.Thread(target=work, name=name, daemon=True).start()


class Threads(concurrent.futures.ThreadPoolExecutor):
    """An executor with one native thread per job; the standard one would use greenlets."""

    def submit(
        self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> concurrent.futures.Future[Any]:
        """Run the job in its own thread."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn(*args, **kwargs))
                except BaseException as error:
                    future.set_exception(error)

        start_thread(work, "slm-worker")
        return future


class Gate:
    """Opens once; a thread or greenlet waits for it."""

    def __init__(self) -> None:
        self._lock: threading.Lock | None = None
        self._watcher: Any = None
        if is_patched():
            gevent = import_module("gevent.hub")
            hub = gevent.get_hub()
            self._waiter: Any = gevent.Waiter(hub)
            # Started here, because opening it before it is started would be missed.
            self._watcher = hub.loop.async_()
            self._watcher.start(self._waiter.switch, None)
        else:
            self._lock = new_lock()
            self._lock.acquire()

    def open(self) -> None:
        """Release the waiter; callable once, from any thread."""
        if self._lock is not None:
            self._lock.release()
        else:
            self._watcher.send()

    def wait(self) -> None:
        """Wait until it is open; only once, by the thread that created it."""
        if self._lock is not None:
            self._lock.acquire()
            return
        try:
            self._waiter.get()
        finally:
            self._watcher.stop()
            self._watcher.close()
