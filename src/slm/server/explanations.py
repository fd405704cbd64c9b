"""Explanations: asks a backend over its stream how it would resolve an agent, and waits.

A backend of another replica is asked by way of that replica; question and answer are NOTIFYs of
PostgreSQL. No key is in either (docs/protocol.md section 4).
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from typing import Any, Final

from pydantic import BaseModel, TypeAdapter
from sqlalchemy import Connection, func, select

from slm import protocol
from slm.errors import BackendNotFound, BackendSilent, ProblemError
from slm.protocol import Explain, Explained, Explanation, Name, ShortText, Text
from slm.server.backends import Backend
from slm.server.database import Database
from slm.server.fleet import Fleet
from slm.server.frames import Frames
from slm.server.hub import Hub, Subscriber

logger = logging.getLogger(__name__)

CHANNEL: Final = "slm_explain"
ANSWER_SECONDS: Final = 5.0
_PIECE: Final = 7900
"""What PostgreSQL takes in a NOTIFY, in bytes, less a few for a piece's number."""

MAX_PIECES: Final = 100
"""Of one message, some 800 kB: a report is bounded by what a frame of a backend may hold."""

MAX_ANSWERS: Final = 100
"""How many questions of other replicas are under way at once; more are not heard."""

_MAX_NAMED: Final = 5


class _Ask(BaseModel):
    """A question of another replica, about a backend of the one it names."""

    ask: Name
    replica: ShortText
    backend: Text
    agent_id: Text


class _Answer(BaseModel):
    """The answer to one, by its id."""

    answer: Name
    report: Explanation


_TOLD: Final = TypeAdapter[_Ask | _Answer](_Ask | _Answer)


class Explanations:
    """Questions under way."""

    def __init__(self, database: Database, fleet: Fleet, hub: Hub) -> None:
        self._database = database
        self._fleet = fleet
        self._hub = hub
        self._asked: dict[str, tuple[Subscriber | None, asyncio.Future[Explanation]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pieces: list[str] = []

    def find(self, name: str) -> Backend:
        """Return the connected backend that is shown under this name, the whole of it.

        Raises:
            BackendNotFound: none is; the text names those that it may have meant.
        """
        names = {
            self._fleet.name_of(each): each for each in self._fleet.backends() if each.connected
        }
        if name in names:
            return names[name]
        if not names:
            raise BackendNotFound("No backend is connected.")
        meant = [each for each in names if each.startswith(name)] or list(names)
        raise BackendNotFound(f"No connected backend has this name; connected: {_named(meant)}.")

    async def ask(self, backend: Backend, agent_id: str) -> Explanation:
        """Return what the backend says about an agent.

        Raises:
            BackendSilent: it did not answer in time; an older SDK does not know the question.
            DatabaseUnavailable: it is at another replica, which cannot be asked now.
        """
        subscriber = self._fleet.subscriber(backend.id)
        question = secrets.token_hex(8)
        answer: asyncio.Future[Explanation] = asyncio.get_running_loop().create_future()
        self._asked[question] = (subscriber, answer)
        try:
            if subscriber is not None:
                self._send(subscriber, question, agent_id)
            else:
                await self._notify(
                    {
                        "ask": question,
                        "replica": backend.replica,
                        "backend": backend.id,
                        "agent_id": agent_id,
                    }
                )
            async with asyncio.timeout(ANSWER_SECONDS):
                return await answer
        except TimeoutError:
            raise BackendSilent(
                f"{self._fleet.name_of(backend)} did not answer within {ANSWER_SECONDS:g} s;"
                " it hangs, or its SDK is older than this question."
            ) from None
        finally:
            del self._asked[question]

    def answered(self, subscriber: Subscriber, said: Explained) -> None:
        """Take a backend's answer; one that was not asked for says nothing."""
        asked = self._asked.get(said.explained)
        if asked is not None and asked[0] is subscriber and not asked[1].done():
            asked[1].set_result(said.report)

    def hear(self, payload: str) -> None:
        """Take a piece of what another replica asks or answers; the last one makes it whole.

        One message's pieces are of one transaction, so nothing comes between them. Anybody who
        may connect to the database can send one: what makes no sense is left out.
        """
        place, _, piece = payload.partition(" ")
        number, _, count = place.partition("/")
        if number == "1":
            self._pieces = []
        if number != str(len(self._pieces) + 1) or len(self._pieces) >= MAX_PIECES:
            # Whoever may connect to the database can send pieces that never end.
            self._pieces = []
            return
        self._pieces.append(piece)
        if number != count:
            return
        pieces, self._pieces = self._pieces, []
        try:
            told = _TOLD.validate_json("".join(pieces))
        except ValueError:
            logger.warning("a notification about an explanation cannot be read")
            return
        if isinstance(told, _Answer):
            asked = self._asked.get(told.answer)
            if asked is not None and asked[0] is None and not asked[1].done():
                asked[1].set_result(told.report)
        elif told.replica == self._fleet.replica and len(self._tasks) < MAX_ANSWERS:
            task = asyncio.create_task(self._answer_for(told), name="slm-explain")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer_for(self, told: _Ask) -> None:
        """Ask a backend of ours for another replica."""
        try:
            backend = next((b for b in self._fleet.own() if b.id == told.backend), None)
            if backend is None or self._fleet.subscriber(backend.id) is None:
                return
            report = await self.ask(backend, told.agent_id)
            await self._notify({"answer": told.ask, "report": report.model_dump(mode="json")})
        except ProblemError as error:
            logger.debug("not now: %s", error.code)
        except Exception as error:
            # The question was anybody's notification; its text is not logged.
            logger.warning("a question of another server failed with %s", type(error).__name__)

    def _send(self, subscriber: Subscriber, question: str, agent_id: str) -> None:
        text = protocol.encode(Explain(id=question, agent_id=agent_id))
        self._hub.send(subscriber, Frames((text,), subscriber.position))

    async def _notify(self, message: dict[str, Any]) -> None:
        text = json.dumps(message)  # ASCII alone: a character is a byte
        starts = range(0, len(text), _PIECE)

        def notify(connection: Connection) -> None:
            for number, start in enumerate(starts, 1):
                payload = f"{number}/{len(starts)} {text[start : start + _PIECE]}"
                connection.execute(select(func.pg_notify(CHANNEL, payload)))

        await self._database.run(notify)


def _named(names: list[str]) -> str:
    named = names[:_MAX_NAMED]
    if len(names) > _MAX_NAMED:
        named.append(f"and {len(names) - _MAX_NAMED} more")
    return ", ".join(named)
