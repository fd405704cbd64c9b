"""Group commit for key reads: requests that arrive during a transaction share the next one.

Each read needs a durable row in the audit before its response is sent, and a disk makes a few
hundred commits a second; one commit for all who wait is just as durable
(docs/decisions/0036-key-reads-share-a-commit.md). Knows neither keys nor HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection

from slm.errors import DatabaseUnavailable
from slm.server.agents.snapshots import SealedSnapshot
from slm.server.db.database import Database
from slm.server.security.agent_scope import View
from slm.server.security.audit import Who

MAX_AT_ONCE: Final = 128
"""The most reads that share a transaction, so that a write waits only a few milliseconds."""

MAX_ROWS: Final = 128
"""A transaction with this many rows for the audit accepts no more reads."""

_ANSWERS_A_TURN: Final = 8


@dataclass(eq=False)
class Asked:
    """One request for keys.

    Attributes:
        who: who is asking, for the audit; if their token was revoked by then, they get nothing.
        view: what they may see.
        agent_id: the agent; None: all of them.
        made: the snapshot that was made for this request.
        answer: the outcome.
    """

    who: Who
    view: View
    agent_id: str | None = None
    made: SealedSnapshot | None = None
    answer: asyncio.Future[Any] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Batches:
    """Runs `read` over the pending requests, one transaction at a time.

    Args:
        database: where it runs.
        read: returns an outcome for each of the first few requests, in order, for at least one; an
            exception among the outcomes is raised in its request. If `read` itself raises, all
            of them get that.
    """

    def __init__(
        self, database: Database, read: Callable[[Connection, Sequence[Asked]], list[Any]]
    ) -> None:
        self._database = database
        self._read = read
        self._waiting: deque[Asked] = deque()
        self._task: asyncio.Task[None] | None = None

    async def ask(self, asked: Asked) -> Any:
        """Return the outcome of `read` for this request, once its transaction is durable."""
        self._waiting.append(asked)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="slm-key-reads")
        return await asked.answer

    async def _run(self) -> None:
        """Run until nobody waits; whatever happens, every request gets an answer."""
        batch: list[Asked] = []
        try:
            while self._waiting:
                batch = [
                    self._waiting.popleft() for _ in range(min(MAX_AT_ONCE, len(self._waiting)))
                ]
                batch = [each for each in batch if not each.answer.done()]
                await self._together(batch)
        except BaseException:
            # The server is stopping.
            for each in (*batch, *self._waiting):
                if not each.answer.done():
                    each.answer.set_exception(DatabaseUnavailable("The server is stopping."))
            self._waiting.clear()
            raise

    async def _together(self, batch: list[Asked]) -> None:
        if not batch:
            return
        try:
            outcomes = await self._database.run(lambda connection: self._read(connection, batch))
        except Exception as error:
            outcomes = [error] * len(batch)
        self._waiting.extendleft(reversed(batch[len(outcomes) :]))
        for number, (asked, outcome) in enumerate(zip(batch, outcomes, strict=False), 1):
            if asked.answer.done():
                pass
            elif isinstance(outcome, BaseException):
                asked.answer.set_exception(outcome)
            else:
                asked.answer.set_result(outcome)
            if number % _ANSWERS_A_TURN == 0:
                # A hundred answers in one turn of the loop would hold up writes and streams.
                await asyncio.sleep(0)
