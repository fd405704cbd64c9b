"""What the client does where following as usual is not possible: poll, or go to another server.

Decides when to ask; what is asked is `http`'s, and what comes of it `sync`'s.
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
"""A thousand backends behind one proxy do not ask in one moment."""


class Poller:
    """Asks for changes every few seconds while something lets no WebSocket through.

    It begins after a handshake that failed on the way, and goes on for as long as it is answered.
    One request asks whether anything changed; only then is a snapshot taken.

    Args:
        connection: whom to ask.
        cache: what is known.
        timings: how often.
        take_all: takes a snapshot of this revision or later, and returns once it is here.
        answered: called after each look that found what is known to be the newest.
        refused: called with what the SLM answered instead.

    Attributes:
        works: whether the last look was answered, and no stream is up.
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
        """Look from now on, until a look is not answered."""
        self._wanted.set()

    def end(self) -> None:
        """Look no more: a stream is up."""
        self._wanted.clear()
        self.works = False

    async def run(self) -> None:
        """Go on until cancelled."""
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
            return  # a replica that is behind: what it says confirms nothing
        if self._wanted.is_set() and position.synced:
            self.works = True
            self._answered()


async def leave_for_a_better_one(
    connection: Connection,
    timings: Timings,
    stuck: Callable[[], str | None],
    leave: Callable[[SLMError], Awaitable[None]],
) -> None:
    """Go to another address while the server in use cannot bring this client up to date.

    Only to one that says it is ready: where all have lost one database, nobody moves.

    Args:
        connection: the addresses, and how to ask there.
        timings: how often to look.
        stuck: says why this client is not live though its stream is up; None: all is well.
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
