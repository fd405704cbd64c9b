"""Answers the SLM's questions about how an agent is resolved here, a few at a time.

An unanswerable question has no other effect. Knows neither the chain nor the stream.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from slm.client.runtime.log import quiet_logger
from slm.protocol import Explain, Explained, Explanation, encode

_log = quiet_logger("slm.client")

_AT_ONCE: Final = 32


class Questions:
    """Belongs to one stream.

    Args:
        explain: explains how an agent is resolved.
        send: sends a message.
        spawn: runs an answer in a task.

    Attributes:
        under_way: how many are being answered; above a limit, new questions are ignored.
    """

    def __init__(
        self,
        explain: Callable[[str], Awaitable[Explanation]],
        send: Callable[[str], Awaitable[object]],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._explain = explain
        self._send = send
        self._spawn = spawn
        self.under_way = 0

    def answer(self, question: Explain) -> None:
        """Answer in the background."""
        if self.under_way < _AT_ONCE:
            self.under_way += 1
            self._spawn(self._answer(question))

    async def _answer(self, question: Explain) -> None:
        try:
            report = await self._explain(question.agent_id)
            await self._send(encode(Explained(explained=question.id, report=report)))
        except Exception as error:
            _log.debug("a question of the SLM was not answered (%s)", type(error).__name__)
        finally:
            self.under_way -= 1
