"""Keeps the table of tokens up to date whatever happens to the feed.

The feed normally reads the tokens too. If it does not do so in time (a broken catalog, a slow load
of everything), this reads only the tokens. Knows no HTTP and no agent.
"""

from __future__ import annotations

import asyncio
import logging
import time

from sqlalchemy import Connection, select

from slm.errors import ProblemError
from slm.server.db.column_types import require_state
from slm.server.db.database import Database
from slm.server.db.tables import STATE
from slm.server.security.token_table import TokenTable, read_tokens
from slm.server.tasks.supervisor import Supervisor

logger = logging.getLogger(__name__)


class TokenWatch:
    """Reads the database's tokens once nobody has for a poll interval.

    Args:
        database: only read.
        tokens: the table that requests are checked against.
        poll_interval_seconds: how old the table may get before this reads.
        supervisor: keeps the watch alive.
    """

    def __init__(
        self,
        database: Database,
        tokens: TokenTable,
        poll_interval_seconds: float,
        supervisor: Supervisor | None = None,
    ) -> None:
        self._database = database
        self._tokens = tokens
        self._poll_interval_seconds = poll_interval_seconds
        self._task = (supervisor or Supervisor()).task("token-watch", self._watch)

    async def start(self) -> None:
        """Start watching."""
        self._task.start()

    async def stop(self) -> None:
        """Stop watching."""
        await self._task.stop()

    async def poll(self) -> None:
        """Read the tokens if they have changed, and apply them.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        asked_at, known = time.monotonic(), self._tokens.version

        def read(connection: Connection) -> tuple[int, TokenTable | None]:
            version = connection.execute(select(STATE.c.tokens_version)).scalar_one()
            require_state(version)
            return version, None if version == known else read_tokens(connection, version)

        version, found = await self._database.read(read)
        if found is not None:
            self._tokens.take(found, asked_at, known)
        self._tokens.confirm(version, asked_at)

    async def _watch(self) -> None:
        interval = self._poll_interval_seconds
        while True:
            await asyncio.sleep(interval / 4)
            # A healthy feed reads as often, so there is nothing to do.
            if self._tokens.age_seconds < interval * 1.25:
                continue
            try:
                await self.poll()
            except ProblemError as error:
                logger.debug("the tokens cannot be read now: %s", error.code)
            except Exception as error:
                # Only the class: a driver's message may contain what was read.
                logger.error("the watch of the tokens failed with %s", type(error).__name__)
