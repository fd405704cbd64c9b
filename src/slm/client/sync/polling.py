"""What the client does when it cannot follow normally: poll, or switch to another server.

Decides when to send requests; `http` sends them and `synchroniser` handles the results.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final

from slm.client.cache.cache import AgentConfigCache
from slm.client.timings import Timings
from slm.client.transport.http import Connection
from slm.errors import SLMError, SLMUnavailable

_SPREAD: Final = (0.75, 1.25)
"""So that a thousand backends behind one proxy do not poll at the same moment."""


class Poller:
    """Polls for changes every few seconds while something blocks WebSockets.

    Starts after a handshake that was blocked on the way, and continues as long as it gets
    responses. One request asks whether anything changed; a snapshot is fetched only if so.

    Args:
        connection: sends the requests.
        cache: what is known.
        timings: how often to poll.
        take_all: fetches a snapshot of this revision or later, and returns once it is applied.
        answered: called after each poll that found the cache up to date.
        refused: called with the SLM's error response.

    Attributes:
        works: whether the last poll was answered and no stream is up.
    """

    def __init__(
        self,
        connection: Connection,
        cache: AgentConfigCache,
        timings: Timings,
        take_all: Callable[[int], Awaitable[object]],
        answered: Callable[[], None],
        refused: Callable[[SLMError], None],
    ) -> None:
        self._connection = connection
        self._cache = cache
        self._interval = timings.poll_interval_seconds
        self._take_all = take_all
        self._answered = answered
        self._refused = refused
        self._wanted = asyncio.Event()
        self.works = False

    def begin(self) -> None:
        """Start polling, until a poll is not answered."""
        self._wanted.set()

    def end(self) -> None:
        """Stop polling, because a stream is up."""
        self._wanted.clear()
        self.works = False

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            await self._wanted.wait()
            if self._cache.position.synced:
                await asyncio.sleep(self._interval * random.uniform(*_SPREAD))  # noqa: S311 # nosec
            if self._wanted.is_set():
                await self._poll()

    async def _poll(self) -> None:
        position = self._cache.position
        try:
            since = position.revision if position.synced else 0
            news = await self._connection.get_news(since=since)
        except SLMError as error:
            self.end()
            self._refused(error)
            return
        other = news.epoch != position.epoch
        if other or not position.synced or news.changes:
            await self._take_all(0 if other else news.revision)
        elif news.revision < position.revision:
            return  # a replica that is behind confirms nothing
        if self._wanted.is_set() and position.synced:
            self.works = True
            self._answered()


async def leave_for_a_better_one(
    connection: Connection,
    timings: Timings,
    stuck: Callable[[], str | None],
    leave: Callable[[SLMError], Awaitable[None]],
) -> None:
    """Switch to another address while the current server cannot bring this client up to date.

    Only to one that reports it is ready: if all have lost a shared database, nobody switches.

    Args:
        connection: the addresses, and how to ask them.
        timings: how often to check.
        stuck: returns why this client is not live although its stream is up; None if all is well.
        leave: closes the stream; the next one goes to the new address.
    """
    before = None
    while True:
        await asyncio.sleep(timings.poll_interval_seconds * random.uniform(*_SPREAD))  # noqa: S311 # nosec
        why = stuck()
        if why is not None and why == before and (url := await connection.find_ready()) is not None:
            left = connection.addresses.current
            connection.addresses.go_to(url)
            await leave(SLMUnavailable(f"{left} {why}; going on at {url}"))
        before = why
