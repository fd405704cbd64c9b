"""AckQueue: acks wait until a broadcast is written, and never take more than half of the loop.

Knows a message's text and whose it is, and not what it says. Each ack is the full state, so of a
peer that sends faster than it is heard the ones in between may be thrown away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from slm.server.tasks.slices import SLICE_SECONDS

logger = logging.getLogger(__name__)

MAX_WAITING: Final = 32
"""How many acks of one peer may wait."""

MAX_WAITING_BYTES: Final = 1024 * 1024
"""How many bytes of one peer may wait; a single ack may be larger."""

MAX_WAITING_BYTES_OF_ALL: Final = 64 * 1024 * 1024
"""How many bytes of all peers may wait; beyond it acks are read at once, and peers wait."""

_BEFORE_YIELD_SECONDS: Final = 0.001


class Waiting(NamedTuple):
    """An ack that is not read yet.

    Attributes:
        text: the message.
        at: when it came, seconds since 1970.
        missed: how many right before it were thrown away.
    """

    text: str
    at: float
    missed: int = 0


class Peer(Protocol):
    """Whose acks they are."""

    def take_ack(self, ack: Waiting) -> None:
        """Read one."""


class AckQueue:
    """Takes acks in the order of each peer, one peer after the other.

    Args:
        is_busy: whether a broadcast is being written.
        clock: seconds since 1970.

    Attributes:
        thrown_away: how many were not read, since a newer one of the same peer was there.
    """

    def __init__(
        self,
        is_busy: Callable[[], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.thrown_away = 0
        self._is_busy = is_busy
        self._clock = clock
        self._waiting: dict[Peer, deque[Waiting]] = {}
        self._bytes: dict[Peer, int] = {}
        self._bytes_of_all = 0
        self._handle: asyncio.Handle | None = None

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, peer: Peer, text: str) -> None:
        """Take a message in, to be read soon."""
        ack = Waiting(text, self._clock())
        mine = self._waiting.setdefault(peer, deque())
        size = self._bytes.get(peer, 0)
        while mine and (len(mine) >= MAX_WAITING or size + len(text) > MAX_WAITING_BYTES):
            # The newest of those that wait: what came first says when a change was taken.
            gone = mine.pop()
            self._count(peer, -len(gone.text))
            size -= len(gone.text)
            self.thrown_away += 1
            ack = ack._replace(missed=ack.missed + gone.missed + 1)
        mine.append(ack)
        self._count(peer, len(text))
        if self._bytes_of_all > MAX_WAITING_BYTES_OF_ALL:
            self.finish(peer)
        elif self._handle is None:
            self._handle = asyncio.get_running_loop().call_soon(self._work)

    def finish(self, peer: Peer) -> None:
        """Read all of one peer now: it is gone, or there is no more room."""
        for ack in self._waiting.pop(peer, ()):
            _take(peer, ack)
        self._bytes_of_all -= self._bytes.pop(peer, 0)

    def written(self) -> None:
        """Go on: a broadcast is written."""
        if self._waiting and self._handle is None:
            self._handle = asyncio.get_running_loop().call_soon(self._work)

    def _work(self) -> None:
        self._handle = None
        if self._is_busy():
            return  # `written` comes.
        began = time.monotonic()
        took = 0.0
        while self._waiting and took < SLICE_SECONDS:
            peer = next(iter(self._waiting))
            mine = self._waiting.pop(peer)
            ack = mine.popleft()
            self._count(peer, -len(ack.text))
            if mine:
                self._waiting[peer] = mine  # the last in turn
            else:
                self._bytes.pop(peer, None)
            _take(peer, ack)
            took = time.monotonic() - began
        if self._waiting:
            # Everyone else gets the loop for as long as this took.
            pause = took if took > _BEFORE_YIELD_SECONDS else 0.0
            self._handle = asyncio.get_running_loop().call_later(pause, self._work)

    def _count(self, peer: Peer, size: int) -> None:
        self._bytes[peer] = self._bytes.get(peer, 0) + size
        self._bytes_of_all += size


def _take(peer: Peer, ack: Waiting) -> None:
    try:
        peer.take_ack(ack)
    except Exception as error:
        # One ack must not keep all others from being read.
        logger.error("reading an ack failed with %s", type(error).__name__)
