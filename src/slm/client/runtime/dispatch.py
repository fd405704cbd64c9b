"""The process's single thread for plain callbacks and validators that users register.

They run one after another, in the order in which they became due, separate from everything a client
does itself. Exceptions are logged. Knows no client and no loop.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, Final

from slm.client.runtime import native
from slm.client.runtime.log import quiet_logger

_log = quiet_logger("slm.client")


class Dispatcher:
    """A daemon thread, started with the first job and ended with the last client.

    The caller bounds the queue: `callbacks` merges the changes that a slow callback cannot follow.
    """

    def __init__(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self._lock = native.new_rlock()
        self._jobs: Any = native.new_queue()
        self._running = False
        self._thread_id = 0
        self._clients = 0

    @property
    def is_here(self) -> bool:
        """Whether the caller is a callback or validator running in this thread."""
        return self._thread_id == native.thread_id()

    def enter(self) -> None:
        """Add a client that follows its SLM."""
        with self._lock:
            self._clients += 1

    def leave(self) -> None:
        """Remove a client; after the last one, the thread finishes the queue and ends."""
        with self._lock:
            self._clients -= 1
            if self._clients <= 0 and self._running:
                self._clients = 0
                self._jobs.put(None)

    def put(self, job: Callable[[], object]) -> None:
        """Queue a job after all others; callable from any thread."""
        with self._lock:
            self._jobs.put(job)
            if not self._running:
                self._running = True
                try:
                    native.start_thread(self._serve, "slm-callbacks")
                except RuntimeError as error:  # no more threads can be started
                    self._running = False
                    _log.error("callbacks wait for a thread of theirs: %s", error)

    def _serve(self) -> None:
        jobs = self._jobs
        self._thread_id = native.thread_id()
        while True:
            job = jobs.get()
            if job is None:
                with self._lock:
                    if self._clients <= 0 and jobs.empty():
                        self._running, self._thread_id = False, 0
                        return
                continue
            try:
                job()
            except BaseException:
                with contextlib.suppress(BaseException):
                    _log.exception("a callback failed")
            finally:
                del job  # don't keep its config and callback alive until the next change


callbacks: Final = Dispatcher()
"""Where the callbacks of all clients of this process run."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=callbacks._start_anew)
