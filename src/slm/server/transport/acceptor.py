"""Accepts connections as fast as the server can handle them, and no faster.

Replaces asyncio's accept loop, which never pauses and, without free descriptors, logs an error for
each slot of its backlog. Knows no protocol (docs/decisions/0026-accepting-pauses.md).
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Final

from slm.server.transport.connections import Connections

AT_ONCE: Final = 64
"""How many are accepted per turn of the event loop, and after each pause."""

PAUSE_SECONDS: Final = 0.1
"""The maximum length of a pause; it also delays plain HTTP."""

LOG_EVERY_SECONDS: Final = 1.0

TLS_AT_ONCE: Final = 100
"""How many TLS handshakes may start within one pause; each takes about a millisecond of work."""

_NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

logger = logging.getLogger(__name__)


class Acceptor:
    """Accepts connections from one listening socket.

    Args:
        listener: bound and listening; closed by `close`.
        factory: creates a connection's protocol.
        connections: the table that limits how many there may be.
        is_busy: whether too many streams are being opened.
        tls: the TLS context, if TLS is used.
        handshake_seconds: how long a TLS handshake, and a TLS shutdown, may take.
    """

    def __init__(
        self,
        listener: socket.socket,
        factory: Callable[[], asyncio.Protocol],
        connections: Connections,
        *,
        is_busy: Callable[[], bool] = lambda: False,
        tls: ssl.SSLContext | None = None,
        handshake_seconds: float = 5.0,
    ) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._factory = factory
        self._connections = connections
        self._is_busy = is_busy
        self._tls = tls
        self._handshake_seconds = handshake_seconds
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._let_in_anyway = 0
        self._closed = False
        self._logged_at = -LOG_EVERY_SECONDS
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Stop accepting."""
        if not self._closed:
            self._closed = True
            if self._pause is None:
                self._loop.remove_reader(self._listener)
            else:
                self._pause.cancel()
            self._listener.close()
            for task in list(self._connections.arriving):
                task.cancel()

    def get_on(self) -> None:
        """End the pause, if any, because the server is less busy."""
        if self._pause is not None and not self._closed and not self._busy():
            self._pause.cancel()
            self._end_pause()

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            if self._let_in_anyway:
                self._let_in_anyway -= 1
            elif self._busy():
                self._begin_pause()
                return
            if not self._connections.can_take_one_more:
                self._begin_pause()
                return
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._cannot_accept(error)
                return
            accepted.setblocking(False)
            task = self._loop.create_task(self._open(accepted), name="slm-accept")
            self._connections.arriving[task] = self._loop.time()
            task.add_done_callback(self._arrived)
            self._connections.make_room()

    async def _open(self, accepted: socket.socket) -> None:
        tls = {}
        if self._tls is not None:
            tls = {
                "ssl": self._tls,
                "ssl_handshake_timeout": self._handshake_seconds,
                "ssl_shutdown_timeout": self._handshake_seconds,
            }
        try:
            await self._loop.connect_accepted_socket(self._factory, accepted, **tls)  # type: ignore[arg-type]
        except OSError as error:
            # For example no TLS, or none in time: the peer's fault, not worth a log line.
            logger.debug("a connection was not established: %s", type(error).__name__)
            accepted.close()
        except asyncio.CancelledError:
            accepted.close()
            raise

    def _arrived(self, task: asyncio.Task[None]) -> None:
        self._connections.arriving.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a connection could not be set up: %s", type(error).__name__)

    def _busy(self) -> bool:
        if self._is_busy():
            return True
        if self._tls is None:
            return False
        recent = self._loop.time() - PAUSE_SECONDS
        newest_first = reversed(self._connections.arriving.values())
        young = itertools.takewhile(lambda began: began > recent, newest_first)
        return sum(1 for _ in itertools.islice(young, TLS_AT_ONCE)) == TLS_AT_ONCE

    def _begin_pause(self) -> None:
        self._loop.remove_reader(self._listener)
        self._pause = self._loop.call_later(PAUSE_SECONDS, self._end_pause, AT_ONCE)

    def _end_pause(self, let_in_anyway: int = 0) -> None:
        self._pause = None
        self._let_in_anyway = let_in_anyway
        self._loop.add_reader(self._listener, self._accept)

    def _cannot_accept(self, error: OSError) -> None:
        now = self._loop.time()
        if now - self._logged_at >= LOG_EVERY_SECONDS:
            self._logged_at = now
            logger.error("no connection can be accepted: %s", error.strerror)
        if error.errno in _NO_ROOM:
            self._connections.close_one()
        self._begin_pause()
