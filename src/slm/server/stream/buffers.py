"""Buffers: the bytes that wait for slow readers and slow writers, and the limits that they have.

Knows who holds how much; what being evicted means is the hub's business (docs/protocol.md section
4, point 6).
"""

from __future__ import annotations

from collections.abc import Callable

from slm.server.stream.subscriber import Subscriber


class Buffers:
    """Who holds memory here.

    Args:
        each_bytes: a subscriber with more than this waiting is closed (1013).
        total_bytes: beyond this for all together, the largest are cut.
        evict: told of each whose stream is over; returns False for one that is gone already.

    Attributes:
        held: by subscriber, how many bytes when last looked at; those that are closing too.
    """

    def __init__(
        self, each_bytes: int, total_bytes: int, evict: Callable[[Subscriber], bool]
    ) -> None:
        self.held: dict[Subscriber, int] = {}
        self._each_bytes = each_bytes
        self._total_bytes = total_bytes
        self._evict = evict
        self._sum = 0

    def sizes(self) -> list[int]:
        """Return how many bytes wait for each of them now."""
        for subscriber in list(self.held):
            self.measure(subscriber)
        return list(self.held.values())

    def note(self, subscriber: Subscriber, unsent_bytes: int) -> None:
        """Account for bytes that wait for a peer, or from it, and that the hub did not send."""
        self.account(subscriber, unsent_bytes)
        self.keep_to_total()

    def account(self, subscriber: Subscriber, unsent_bytes: int) -> bool:
        """Note what waits; return whether the subscriber is still there."""
        self.measure(subscriber)
        if unsent_bytes <= self._each_bytes:
            return True
        if self._evict(subscriber):
            subscriber.sink.end(1013, "too slow")
        return False

    def measure(self, subscriber: Subscriber) -> None:
        """Look at what waits for one."""
        waiting = subscriber.sink.waiting_bytes()
        self._sum += waiting - self.held.pop(subscriber, 0)
        if waiting:
            self.held[subscriber] = waiting

    def keep_to_total(self) -> None:
        """Cut the largest while all together hold more than the total."""
        if self._sum <= self._total_bytes:
            return
        self.sizes()
        for subscriber in sorted(self.held, key=self.held.__getitem__, reverse=True):
            if self._sum <= self._total_bytes:
                return
            self._sum -= self.held.pop(subscriber)
            self._evict(subscriber)
            subscriber.sink.abort()
