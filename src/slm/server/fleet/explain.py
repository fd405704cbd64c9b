"""Explanations: asks a backend over its stream how it would resolve an agent, and waits.

A backend of another replica is asked through that replica. Question and answer are PostgreSQL
NOTIFYs, since replicas communicate only through the database and do not know each other's
addresses. Neither contains a key (docs/protocol.md section 4).
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from typing import Any, Final, Literal

from pydantic import BaseModel, TypeAdapter
from sqlalchemy import Connection, func, select

from slm import protocol
from slm.errors import BackendNotFound, BackendSilent, BackendUnclear, ProblemError
from slm.protocol import Explain, Explained, Explanation, Name, ShortText, Text
from slm.server.db.database import Database
from slm.server.fleet.backend import Backend
from slm.server.fleet.tracker import Fleet
from slm.server.stream.encoding import Frames
from slm.server.stream.hub import Hub
from slm.server.stream.subscriber import Subscriber

logger = logging.getLogger(__name__)

CHANNEL: Final = "slm_explain"
ANSWER_SECONDS: Final = 5.0
_PIECE: Final = 7900
"""The size limit of a PostgreSQL NOTIFY in bytes, minus a few for the piece's number."""

MAX_PIECES: Final = 100
"""The limit per message, about 800 kB; a report is bounded by the size of a backend's frame."""

MAX_ANSWERS: Final = 100
"""How many questions from other replicas may be open at once; more are ignored."""

_MAX_NAMED: Final = 5


class _Ask(BaseModel):
    """A question from another replica about a backend of the replica it names."""

    ask: Name
    replica: ShortText
    backend: Text
    agent_id: Text


class _Answer(BaseModel):
    """The answer to a question, by its id."""

    answer: Name
    report: Explanation


class _Failure(BaseModel):
    """Why there is no answer to a question, by its id."""

    failed: Name
    code: Literal["backend-silent", "backend-unclear"]
    why: ShortText

    def problem(self, backend: str) -> ProblemError:
        """Return it as the error for the caller."""
        if self.code == "backend-silent":
            return BackendSilent(f"{backend} {self.why}.")
        return BackendUnclear(f"The answer of {backend} cannot be read: {self.why}.")


_Told = Explanation | _Failure
"""The outcome of a question."""

_LEFT: Final = "closed its connection before it answered"

_TOLD: Final = TypeAdapter[_Ask | _Answer | _Failure](_Ask | _Answer | _Failure)


class Explanations:
    """The open questions."""

    def __init__(self, database: Database, fleet: Fleet, hub: Hub) -> None:
        self._database = database
        self._fleet = fleet
        self._hub = hub
        self._asked: dict[str, tuple[Subscriber | None, asyncio.Future[_Told]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pieces: list[str] = []

    async def ask(self, name: str, agent_id: str) -> Explanation:
        """Ask a connected backend, given by the exact name it is shown under, about an agent.

        Raises:
            BackendNotFound: there is none; the text suggests similar names.
            BackendSilent: it did not answer in time or disconnected; older SDKs don't know the
                question.
            BackendUnclear: its answer cannot be parsed.
            DatabaseUnavailable: it is connected to another replica, which cannot be asked now.
        """
        told = await self._ask(await self._find(name), agent_id)
        if isinstance(told, _Failure):
            raise told.problem(name)
        return told

    async def _find(self, name: str) -> Backend:
        names = {shown: each async for shown, each in self._fleet.shown() if each.connected}
        if name in names:
            return names[name]
        if not names:
            raise BackendNotFound("No backend is connected.")
        meant = [each for each in names if each.startswith(name)] or list(names)
        raise BackendNotFound(f"No connected backend has this name; connected: {_named(meant)}.")

    async def _ask(self, backend: Backend, agent_id: str) -> _Told:
        subscriber = self._fleet.subscriber(backend.id)
        question = secrets.token_hex(8)
        answer: asyncio.Future[_Told] = asyncio.get_running_loop().create_future()
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
            why = (
                f"did not answer within {ANSWER_SECONDS:g} s; it hangs, or its SDK is older than"
                " this question"
            )
            return _Failure(failed=question, code="backend-silent", why=why)
        finally:
            del self._asked[question]

    def answered(self, subscriber: Subscriber, said: Explained) -> None:
        """Take a backend's answer; ignored if it was not asked for."""
        self._settle(said.explained, subscriber, said.report)

    def unclear(self, subscriber: Subscriber, why: str, question: str | None = None) -> None:
        """Note that a backend sent something that cannot be parsed.

        Args:
            subscriber: its connection.
            why: what is wrong with it, in our own words.
            question: the question it answers; None if it may answer any.
        """
        self._fail(subscriber, "backend-unclear", why, question)

    def left(self, subscriber: Subscriber) -> None:
        """Fail the open questions of a closed connection."""
        self._fail(subscriber, "backend-silent", _LEFT)

    def _fail(
        self,
        subscriber: Subscriber,
        code: Literal["backend-silent", "backend-unclear"],
        why: str,
        question: str | None = None,
    ) -> None:
        asked = list(self._asked) if question is None else [question]
        for each in asked:
            self._settle(each, subscriber, _Failure(failed=each, code=code, why=why))

    def _settle(self, question: str, subscriber: Subscriber | None, told: _Told) -> None:
        """Close a question that was sent to this connection or to another replica."""
        asked = self._asked.get(question)
        if asked is not None and asked[0] is subscriber and not asked[1].done():
            asked[1].set_result(told)

    def hear(self, payload: str) -> None:
        """Take one piece of another replica's question or answer; the last piece completes it.

        The pieces of a message are sent in one transaction, so nothing comes between them. Anyone
        who can connect to the database can send one, so invalid pieces are ignored.
        """
        place, _, piece = payload.partition(" ")
        number, _, count = place.partition("/")
        if number == "1":
            self._pieces = []
        if number != str(len(self._pieces) + 1) or len(self._pieces) >= MAX_PIECES:
            # Anyone who can connect to the database can send endless pieces.
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
            self._settle(told.answer, None, told.report)
        elif isinstance(told, _Failure):
            self._settle(told.failed, None, told)
        elif told.replica == self._fleet.replica and len(self._tasks) < MAX_ANSWERS:
            task = asyncio.create_task(self._answer_for(told), name="slm-explain")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer_for(self, told: _Ask) -> None:
        """Ask one of our backends on behalf of another replica."""
        try:
            backend = next((b for b in self._fleet.own() if b.id == told.backend), None)
            found: _Told = _Failure(failed=told.ask, code="backend-silent", why=_LEFT)
            if backend is not None and self._fleet.subscriber(backend.id) is not None:
                found = await self._ask(backend, told.agent_id)
            if isinstance(found, _Failure):
                answer = found.model_copy(update={"failed": told.ask}).model_dump()
            else:
                answer = {"answer": told.ask, "report": found.model_dump(mode="json")}
            await self._notify(answer)
        except ProblemError as error:
            logger.debug("not now: %s", error.code)
        except Exception as error:
            # Anyone may have sent the notification, so its text is not logged.
            logger.warning("a question of another server failed with %s", type(error).__name__)

    def _send(self, subscriber: Subscriber, question: str, agent_id: str) -> None:
        text = protocol.encode(Explain(id=question, agent_id=agent_id))
        self._hub.send(subscriber, Frames((text,), subscriber.position))

    async def _notify(self, message: dict[str, Any]) -> None:
        text = json.dumps(message)  # ASCII only, so one character is one byte
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
