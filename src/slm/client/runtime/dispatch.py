"""The process's one thread for the plain callbacks and validators that users hang into clients.

They run one after another, in the order in which they were due, and away from everything that a
client does itself. Whatever one of them raises is logged. Knows no client and no loop.
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
    """A daemon thread, started with the first job, and ended with the last client.

    What is queued is bounded by who queues: `hooks` merges what a slow callback cannot follow.
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
        """Whether the caller is a callback or a validator, in this thread."""
        return self._thread_id == native.thread_id()

    def enter(self) -> None:
        """Count one more client that follows its SLM."""
        with self._lock:
            self._clients += 1

    def leave(self) -> None:
        """Count one fewer; after the last one the thread does what is queued, and ends."""
        with self._lock:
            self._clients -= 1
            if self._clients <= 0 and self._running:
                self._clients = 0
                self._jobs.put(None)

    def put(self, job: Callable[[], object]) -> None:
        """Have a job done after all that are queued already; from any thread."""
        with self._lock:
            self._jobs.put(job)
            if not self._running:
                self._running = True
                try:
                    native.start_thread(self._serve, "slm-callbacks")
                except RuntimeError as error:  # no more threads may be started now
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
                del job  # its config and its callback are not kept until the next change


callbacks: Final = Dispatcher()
"""Where the callbacks of all clients of this process run."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=callbacks._start_anew)
