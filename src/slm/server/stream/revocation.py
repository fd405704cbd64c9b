"""Ends the streams and waits of tokens that were revoked or have expired.

The table of tokens is kept up to date by others; this looks at who is still inside. Knows no
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
"""With the feed's poll of a second, a revoked token is out well within two."""


class Doorkeeper:
    """Looks at the token of every open stream and every request that may wait.

    Each time that other tokens come into force, and by the clock: a token also expires while the
    database is away.
    """

    def __init__(self, tokens: TokenTable, hub: Hub, supervisor: Supervisor | None = None) -> None:
        self._tokens = tokens
        self._hub = hub
        self._inside: dict[int, set[asyncio.Timeout]] = {}
        self._task = (supervisor or Supervisor()).task("doorkeeper", self._keep_looking)
        tokens.on_replaced.append(self.evaluate)

    async def start(self) -> None:
        """Begin to look."""
        self._task.start()

    async def stop(self) -> None:
        """Stop looking."""
        await self._task.stop()

    @contextlib.asynccontextmanager
    async def while_it_counts(self, caller: Caller) -> AsyncIterator[None]:
        """Run the block for as long as the token counts; what it waits for then is cancelled.

        Raises:
            Unauthorized: the token does not count any more, or does not by the end of the block.
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
        """Close each stream, and end each wait, whose token does not count any more.

        Once nobody can know which tokens count, all streams are closed (1013).
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
                # Each only once: one that is ending already must not be cancelled again.
                inside.clear()

    async def _keep_looking(self) -> None:
        while True:
            self.evaluate()
            await asyncio.sleep(LOOK_EVERY_SECONDS)
