"""Receives PostgreSQL's NOTIFY and wakes the feed; a notification only says "look at the table".

Knows a channel and a number, no change and no agent. What it misses, the feed finds by polling.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Mapping
from typing import Any, Final

from sqlalchemy.engine import URL

from slm.server.db.cancellation import shut_down
from slm.server.tasks.supervisor import FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS, Supervisor

logger = logging.getLogger(__name__)

CHANNEL: Final = "slm_changes"
"""Notifies of a commit that others should look at; the payload is the new revision, or empty."""

CHECK_SECONDS: Final = 15.0
"""How often the listener checks that the database is still there."""

ANSWER_SECONDS: Final = 5.0
"""How long the database has to answer that check."""

_BIGINT_DIGITS: Final = 19


class ChangeListener:
    """One connection that listens, reconnected whenever it is lost.

    Args:
        url: the database's URL.
        wake: called with the revision that a notification names, or with None if one may have been
            missed: after each connect, and for a payload that is not a number.
        others: what to call with the payload of a notification on another channel.

    Attributes:
        connections: how many times it has started to listen.
        listening: whether it is listening now.
    """

    def __init__(
        self,
        url: URL,
        wake: Callable[[int | None], None],
        others: Mapping[str, Callable[[str], None]] | None = None,
        supervisor: Supervisor | None = None,
    ) -> None:
        self.connections = 0
        self.listening = False
        self._url = url
        self._wake = wake
        self._others = others or {}
        self._refused: set[tuple[str, str]] = set()
        self._following = (supervisor or Supervisor()).task("listener", self._run, needed=False)

    async def start(self) -> None:
        """Start to listen in the background; an unreachable database is tried again."""
        self._following.start()

    async def stop(self) -> None:
        """Stop listening."""
        await self._following.stop()

    async def _run(self) -> None:
        import psycopg

        # What SQLAlchemy would connect with, so that every option of the URL applies here too.
        _, given = self._url.get_dialect()().create_connect_args(self._url)
        options: dict[str, Any] = dict(given) | {
            "autocommit": True,
            "client_encoding": "utf8",
            "connect_timeout": 5,
            # A listener only waits: without these it would never notice that a peer vanished.
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "application_name": "slm-listener",
        }
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            connections = self.connections
            try:
                await self._listen(psycopg.AsyncConnection, options)
            except (psycopg.Error, OSError) as error:
                if self.listening or connections == self.connections == 0:
                    # Only the class: libpq's message may contain the connection string.
                    logger.warning(
                        "not listening to the database (%s); the feed polls", type(error).__name__
                    )
            finally:
                self.listening = False
            if self.connections > connections:
                backoff = FIRST_BACKOFF_SECONDS
            await asyncio.sleep(random.uniform(0, backoff))  # noqa: S311 - jitter, no secret # nosec B311
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

    async def _listen(self, connector: Any, options: dict[str, Any]) -> None:
        connection = await connector.connect(**options)
        try:
            for channel in (CHANNEL, *self._others):
                await connection.execute(f"LISTEN {channel}")
            self.connections += 1
            self.listening = True
            if self.connections > 1:
                logger.info("listening to the database again")
            # Only now: this look finds a change committed before the LISTEN; a later one sends a
            # notification.
            self._wake(None)
            while True:
                async for note in connection.notifies(timeout=CHECK_SECONDS):
                    self._hear(note.channel, note.payload)
                # A relay in between may keep the connection alive and pass nothing on.
                loop = asyncio.get_running_loop()
                silent = loop.call_later(ANSWER_SECONDS, shut_down, connection)
                try:
                    await connection.execute("SELECT 1")
                finally:
                    silent.cancel()
        finally:
            # A broken connection may raise when closed, and has nothing more to say.
            with contextlib.suppress(Exception):
                await connection.close()

    def _hear(self, channel: str, payload: str) -> None:
        """Handle one notification. Anyone who can connect can send one: none ends the listening."""
        try:
            if channel in self._others:
                self._others[channel](payload)
            else:
                self._wake(_revision(payload))
        except Exception as error:
            cause = (channel, type(error).__name__)
            if cause not in self._refused:
                # Log each cause once: anyone who can send one can send a million.
                self._refused.add(cause)
                logger.error("a notification on %s failed with %s; it is ignored", *cause)


def _revision(payload: str) -> int | None:
    """Return the revision in a payload; None if it is not a PostgreSQL bigint."""
    if not (payload.isascii() and payload.isdigit() and len(payload) <= _BIGINT_DIGITS):
        return None
    return int(payload)
