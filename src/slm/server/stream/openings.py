"""Limits how many streams are being opened at once and shares the slots between tokens.

Knows no socket; a slot can be held by any hashable value (docs/decisions/0026-accepting-pauses.md).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Final

from slm.errors import Overloaded

SILENT_SECONDS: Final = 1.0
"""How long an accepted peer keeps its slot without subscribing."""

WAIT_SECONDS: Final = 5.0
"""How long a handshake waits for a slot before it is answered with 503."""


class Openings:
    """Slots for streams that are being opened.

    One token holds at most half of the slots, so it cannot lock the others out; its further
    handshakes wait, and tokens take turns. If a token's accepted streams never subscribe, its
    further handshakes don't wait: they are told to retry later.

    Args:
        limit: how many streams may be opening at once.
        seconds: how long the rest of the opening may take once a peer has subscribed.
    """

    def __init__(self, limit: int, seconds: float) -> None:
        self.seconds = seconds
        self.silent_seconds = min(SILENT_SECONDS, seconds)
        self._on_free: Callable[[], None] = lambda: None
        self._limit = limit
        self._share = (limit + 1) // 2
        self._held: dict[Hashable, int] = {}
        self._total = 0
        # In order of their turns; a key without waiters has no queue.
        self._waiting: OrderedDict[Hashable, deque[asyncio.Future[None]]] = OrderedDict()
        self._silent: dict[Hashable, int] = {}

    @property
    def is_busy(self) -> bool:
        """Whether a handshake would have to wait."""
        return bool(self._waiting) or self._total >= self._limit

    def __len__(self) -> int:
        return self._total

    def when_free(self, call: Callable[[], None]) -> None:
        """Call this from now on whenever a slot is released and nobody is waiting for it."""
        self._on_free = call

    async def place(self, key: Hashable) -> Opening:
        """Take a slot, at once or when this key's turn comes.

        Raises:
            Overloaded: too many are waiting already, or no slot became free in time.
        """
        if key in self._waiting or not self._may_take(key):
            await self._turn(key)
        else:
            self._take(key)
        return Opening(self, key)

    def give_back(self, key: Hashable, *, was_silent: bool) -> None:
        """Release a slot.

        Args:
            key: the holder.
            was_silent: whether the stream failed to become live.
        """
        silent = self._silent.pop(key, 0) + (1 if was_silent else -1)
        if silent > 0:
            self._silent[key] = min(silent, self._limit)
        self._total -= 1
        held = self._held.pop(key) - 1
        if held:
            self._held[key] = held
        self._pass_on()
        if not self.is_busy:
            self._on_free()

    def _may_take(self, key: Hashable) -> bool:
        return self._total < self._limit and self._held.get(key, 0) < self._share

    def _take(self, key: Hashable) -> None:
        self._total += 1
        self._held[key] = self._held.get(key, 0) + 1

    async def _turn(self, key: Hashable) -> None:
        queue = self._waiting.get(key, ())
        if len(queue) >= self._limit or self._silent.get(key, 0) >= self._share:
            raise Overloaded("Too many streams are being opened at once.")
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(turn)
        try:
            async with asyncio.timeout(min(WAIT_SECONDS, self.seconds)):
                await turn
        except TimeoutError:
            if not _was_given(turn):
                raise Overloaded("Too many streams are being opened at once.") from None
        except BaseException:
            if _was_given(turn):
                self.give_back(key, was_silent=False)
            raise
        finally:
            self._forget(key, turn)

    def _forget(self, key: Hashable, turn: asyncio.Future[None]) -> None:
        queue = self._waiting.get(key)
        if queue is not None:
            if turn in queue:
                queue.remove(turn)
            if not queue:
                del self._waiting[key]

    def _pass_on(self) -> None:
        """Give free slots to those waiting, one per key in turn."""
        skipped = 0
        while skipped < len(self._waiting) and self._total < self._limit:
            key, queue = next(iter(self._waiting.items()))
            self._waiting.move_to_end(key)
            turn = queue[0]
            if self._held.get(key, 0) >= self._share:
                skipped += 1
                continue
            skipped = 0
            self._forget(key, turn)
            if not turn.done():
                self._take(key)
                turn.set_result(None)


class Opening:
    """One stream's slot, released when the stream is live or after a timeout."""

    __slots__ = ("_key", "_openings", "_timer")

    def __init__(self, openings: Openings, key: Hashable) -> None:
        self._openings: Openings | None = openings
        self._key = key
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(openings.silent_seconds, self._is_late)

    def subscribed(self) -> None:
        """Note that the peer has subscribed; the rest is up to the server."""
        openings = self._openings
        if openings is not None:
            self._timer.cancel()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(openings.seconds, self._is_late)

    def end(self, *, was_silent: bool = False) -> None:
        """Release the slot; only the first call has an effect."""
        self._timer.cancel()
        openings, self._openings = self._openings, None
        if openings is not None:
            openings.give_back(self._key, was_silent=was_silent)

    def _is_late(self) -> None:
        self.end(was_silent=True)


def _was_given(turn: asyncio.Future[None]) -> bool:
    return turn.done() and not turn.cancelled()
