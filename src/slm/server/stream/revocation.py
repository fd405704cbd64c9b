"""Ends the streams and waiting requests of tokens that were revoked or have expired.

The token table is kept up to date elsewhere; this checks the tokens that are in use. Knows no
database and no HTTP (docs/protocol.md section 4).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from slm.errors import Unauthorized
from slm.server.security.token_table import GONE, Caller, TokenTable
from slm.server.stream.hub import Hub
from slm.server.tasks.supervisor import Supervisor

LOOK_EVERY_SECONDS: Final = 0.25
"""With the feed's one-second poll, a revoked token is removed well within two seconds."""


class Doorkeeper:
    """Checks the token of every open stream and of every request that may wait.

    It checks whenever the set of tokens changes, and also by the clock, because a token can expire
    while the database is unavailable.
    """

    def __init__(self, tokens: TokenTable, hub: Hub, supervisor: Supervisor | None = None) -> None:
        self._tokens = tokens
        self._hub = hub
        self._inside: dict[int, set[asyncio.Timeout]] = {}
        self._task = (supervisor or Supervisor()).task("doorkeeper", self._keep_looking)
        tokens.on_replaced.append(self.evaluate)

    async def start(self) -> None:
        """Start checking."""
        self._task.start()

    async def stop(self) -> None:
        """Stop checking."""
        await self._task.stop()

    @contextlib.asynccontextmanager
    async def while_it_counts(self, caller: Caller) -> AsyncIterator[None]:
        """Run the block while the token is valid; cancel whatever it awaits once the token is not.

        Raises:
            Unauthorized: the token is no longer valid, or stops being valid before the block ends.
        """
        inside = self._inside.setdefault(caller.token_id, set())
        limit = asyncio.timeout(None)
        inside.add(limit)
        try:
            async with limit:
                yield
        except TimeoutError:
            if limit.expired():
                raise Unauthorized(GONE) from None
            raise
        finally:
            inside.discard(limit)
            if not inside:
                self._inside.pop(caller.token_id, None)
        self._tokens.require(caller)

    def evaluate(self) -> None:
        """Close each stream and cancel each wait that belongs to a token that is no longer valid.

        If the server can no longer tell which tokens are valid, it closes all streams (1013).
        """
        outdated = self._tokens.is_outdated
        gone: dict[int, str | None] = {}
        for subscriber in self._hub.subscribers():
            token_id = subscriber.token_id
            if token_id is None:
                continue
            if token_id not in gone:
                gone[token_id] = self._tokens.why_gone(token_id)
            reason = gone[token_id]
            if reason is not None:
                self._hub.expel(subscriber, reason)
            elif outdated:
                self._hub.expel(subscriber, "the database is away", 1013)
        for token_id, inside in list(self._inside.items()):
            if self._tokens.why_gone(token_id) is not None:
                now = asyncio.get_running_loop().time()
                for limit in inside:
                    limit.reschedule(now)
                # Only once: a wait that is already ending must not be cancelled again.
                inside.clear()

    async def _keep_looking(self) -> None:
        while True:
            self.evaluate()
            await asyncio.sleep(LOOK_EVERY_SECONDS)
