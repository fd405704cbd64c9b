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

from pydantic import ValidationError
from sqlalchemy import Connection, func, select

from slm import protocol
from slm.errors import BackendNotFound, BackendSilent, InvalidRequest, ProblemError
from slm.protocol import Explain, Explained, Explanation
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
        """Return the connected backend of this name: whole, its first part, or how it begins.

        Raises:
            BackendNotFound: none is connected under it.
            InvalidRequest: it is the name of several.
        """
        backends = [each for each in self._fleet.backends() if each.connected]
        for found in (
            [each for each in backends if each.name == name],
            [each for each in backends if each.client.name == name],
            [each for each in backends if each.name.startswith(name)],
        ):
            if len(found) == 1:
                return found[0]
            if found:
                raise InvalidRequest(f"{len(found)} backends are called so: {_named(found)}.")
        if not backends:
            raise BackendNotFound("No backend is connected.")
        raise BackendNotFound(f"No connected backend is called so; there is {_named(backends)}.")

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
                f"{backend.name} did not answer within {ANSWER_SECONDS:g} s; it hangs, or its SDK"
                " is older than this question."
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

        One message's pieces are of one transaction, so nothing comes between them.
        """
        place, _, piece = payload.partition(" ")
        number, _, count = place.partition("/")
        if number == "1":
            self._pieces = []
        self._pieces.append(piece)
        if number != count:
            # Whoever may connect to the database can send pieces that never end.
            del self._pieces[:-MAX_PIECES]
            return
        try:
            told = json.loads("".join(self._pieces))
            if told.get("replica") == self._fleet.replica:
                if len(self._tasks) >= MAX_ANSWERS:
                    return
                task = asyncio.create_task(self._answer_for(told), name="slm-explain")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            elif (asked := self._asked.get(told.get("answer", ""))) is not None:
                report = Explanation.model_validate(told["report"])
                if asked[0] is None and not asked[1].done():
                    asked[1].set_result(report)
        except (ValueError, ValidationError, KeyError, AttributeError, TypeError, RecursionError):
            logger.warning("a notification about an explanation cannot be read")

    async def _answer_for(self, told: dict[str, Any]) -> None:
        """Ask a backend of ours for another replica."""
        try:
            backend = next((b for b in self._fleet.backends() if b.id == told["backend"]), None)
            if backend is None or self._fleet.subscriber(backend.id) is None:
                return
            report = await self.ask(backend, told["agent_id"])
            await self._notify({"answer": told["ask"], "report": report.model_dump(mode="json")})
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


def _named(backends: list[Backend]) -> str:
    names = [each.name for each in backends[:_MAX_NAMED]]
    if len(backends) > _MAX_NAMED:
        names.append(f"and {len(backends) - _MAX_NAMED} more")
    return ", ".join(names)
