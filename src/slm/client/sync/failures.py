"""What failed last: the resulting sentence and status, each failure logged once.

Retries nothing; watches a token or certificate that the SLM rejected until it is replaced.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

from slm.client.runtime.log import quiet_logger
from slm.client.status import ClientStatus
from slm.client.sync.backoff import status_after
from slm.client.transport.credentials import Watch
from slm.errors import SLMError

_log = quiet_logger("slm.client")

_SAID: Final = 32
_LOOKS_SECONDS: Final = 60.0
_REFUSED: Final = (ClientStatus.UNAUTHORIZED, ClientStatus.TLS_ERROR)


class Failures:
    """Belongs to one event loop.

    Args:
        files: the files of the credentials.
        spawn: runs the file watch in a task.
        replaced: called when one of them was replaced after the SLM rejected it.

    Attributes:
        last_error: what failed last; None if nothing is wrong.
        status: the resulting client status; None if other state determines it.
    """

    def __init__(
        self,
        files: tuple[Path, ...],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        replaced: Callable[[], None],
    ) -> None:
        self.last_error: str | None = None
        self.status: ClientStatus | None = None
        self._files = files
        self._spawn = spawn
        self._replaced = replaced
        self._said: set[str] = set()
        self._watching: asyncio.Task[None] | None = None

    def note(self, error: SLMError, *, connected: bool) -> bool:
        """Note a failure; return whether a side rejected the other, so that waiting is pointless.

        Args:
            error: what failed.
            connected: whether a stream is up nevertheless.
        """
        status = status_after(error)
        self.last_error = str(error)
        if self.last_error not in self._said:
            # With several addresses, failures alternate; each is logged once.
            if len(self._said) >= _SAID:
                self._said.clear()
            self._said.add(self.last_error)
            _log.warning("cannot follow the SLM now: %s", error)
        refused = status in _REFUSED
        if refused or not connected:
            self.status = status
        if refused and self._files and (self._watching is None or self._watching.done()):
            self._watching = self._spawn(self._until_replaced())
        return refused

    def clear(self) -> None:
        """Note that nothing is wrong any more."""
        if self.last_error is not None:
            _log.info("the SLM is back")
        self.last_error = self.status = None
        self._said.clear()

    async def _until_replaced(self) -> None:
        watch = Watch(self._files)
        while self.status in _REFUSED:
            if await watch.wait(_LOOKS_SECONDS):
                watch.note()
                self._replaced()
