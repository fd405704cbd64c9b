"""AckQueue: holds acks until a broadcast is written; reading them takes at most half of the loop.

Knows each message's text and peer, not its content. Each ack is the full state, so if a peer sends
acks faster than they are read, the ones in between may be discarded.
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
"""How many bytes of one peer's acks may wait; a single ack may be larger."""

MAX_WAITING_BYTES_OF_ALL: Final = 64 * 1024 * 1024
"""How many bytes of all peers may wait; above it, acks are read at once and peers wait."""

_BEFORE_YIELD_SECONDS: Final = 0.001


class Waiting(NamedTuple):
    """An ack that has not been read yet.

    Attributes:
        text: the message.
        at: when it arrived, in seconds since 1970.
        missed: how many acks right before it were discarded.
    """

    text: str
    at: float
    missed: int = 0


class Peer(Protocol):
    """The sender of acks."""

    def take_ack(self, ack: Waiting) -> None:
        """Process one ack."""


class AckQueue:
    """Processes acks in order for each peer, taking one peer after the other.

    Args:
        is_busy: whether a broadcast is being written.
        clock: seconds since 1970.

    Attributes:
        thrown_away: how many were not read because the same peer had sent a newer one.
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
        """Queue a message to be read soon."""
        ack = Waiting(text, self._clock())
        mine = self._waiting.setdefault(peer, deque())
        size = self._bytes.get(peer, 0)
        while mine and (len(mine) >= MAX_WAITING or size + len(text) > MAX_WAITING_BYTES):
            # Discard the newest waiting ack: the earliest one says when a change was applied.
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
        """Read all of one peer's acks now, because it is gone or the queue is full."""
        for ack in self._waiting.pop(peer, ()):
            _take(peer, ack)
        self._bytes_of_all -= self._bytes.pop(peer, 0)

    def written(self) -> None:
        """Continue after a broadcast has been written."""
        if self._waiting and self._handle is None:
            self._handle = asyncio.get_running_loop().call_soon(self._work)

    def _work(self) -> None:
        self._handle = None
        if self._is_busy():
            return  # `written` continues.
        began = time.monotonic()
        took = 0.0
        while self._waiting and took < SLICE_SECONDS:
            peer = next(iter(self._waiting))
            mine = self._waiting.pop(peer)
            ack = mine.popleft()
            self._count(peer, -len(ack.text))
            if mine:
                self._waiting[peer] = mine  # back of the queue
            else:
                self._bytes.pop(peer, None)
            _take(peer, ack)
            took = time.monotonic() - began
        if self._waiting:
            # Give other tasks the loop for as long as this took.
            pause = took if took > _BEFORE_YIELD_SECONDS else 0.0
            self._handle = asyncio.get_running_loop().call_later(pause, self._work)

    def _count(self, peer: Peer, size: int) -> None:
        self._bytes[peer] = self._bytes.get(peer, 0) + size
        self._bytes_of_all += size


def _take(peer: Peer, ack: Waiting) -> None:
    try:
        peer.take_ack(ack)
    except Exception as error:
        # One bad ack must not keep the others from being read.
        logger.error("reading an ack failed with %s", type(error).__name__)
