"""Closes the streams of tokens that were revoked or have expired.

The feed brings the tokens up to date on every replica; this looks at who is still inside. Knows no
database and no HTTP (docs/protocol.md section 4, point 9).
"""

from __future__ import annotations

import asyncio
from typing import Final

from slm.server.auth import TokenTable
from slm.server.hub import Hub
from slm.server.supervisor import Supervisor

LOOK_EVERY_SECONDS: Final = 0.25
"""With the feed's poll of a second, a revoked token is out well within two."""


class Doorkeeper:
    """Looks at every open stream's token again and again.

    By the clock and not by the feed alone: a token also expires while the database is away.
    """

    def __init__(self, tokens: TokenTable, hub: Hub, supervisor: Supervisor | None = None) -> None:
        self._tokens = tokens
        self._hub = hub
        self._task = (supervisor or Supervisor()).task("doorkeeper", self._keep_looking)

    async def start(self) -> None:
        """Begin to look."""
        self._task.start()

    async def stop(self) -> None:
        """Stop looking."""
        await self._task.stop()

    def look(self) -> None:
        """Close each stream whose token does not count any more (1008)."""
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

    async def _keep_looking(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(LOOK_EVERY_SECONDS)
