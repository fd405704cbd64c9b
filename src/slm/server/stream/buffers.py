"""Buffers: the bytes waiting for slow readers and slow writers, and their limits.

Knows only who holds how much; the hub decides how to evict (docs/protocol.md section 4, point 6).
"""

from __future__ import annotations

from collections.abc import Callable

from slm.server.stream.subscriber import Subscriber


class Buffers:
    """Tracks how much memory each subscriber holds.

    Args:
        each_bytes: a subscriber with more than this waiting is closed (1013).
        total_bytes: if all together exceed this, the largest are cut.
        evict: called for each evicted subscriber; returns False if it is already gone.

    Attributes:
        held: waiting bytes by subscriber when last measured, including those that are closing.
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
        """Return how many bytes are waiting for each subscriber now."""
        for subscriber in list(self.held):
            self.measure(subscriber)
        return list(self.held.values())

    def note(self, subscriber: Subscriber, unsent_bytes: int) -> None:
        """Record waiting bytes, in either direction, that did not come from a hub write."""
        self.account(subscriber, unsent_bytes)
        self.keep_to_total()

    def account(self, subscriber: Subscriber, unsent_bytes: int) -> bool:
        """Record waiting bytes; return whether the subscriber is still connected."""
        self.measure(subscriber)
        if unsent_bytes <= self._each_bytes:
            return True
        if self._evict(subscriber):
            subscriber.sink.end(1013, "too slow")
        return False

    def measure(self, subscriber: Subscriber) -> None:
        """Measure one subscriber's waiting bytes."""
        waiting = subscriber.sink.waiting_bytes()
        self._sum += waiting - self.held.pop(subscriber, 0)
        if waiting:
            self.held[subscriber] = waiting

    def keep_to_total(self) -> None:
        """Cut the largest until the total is within its limit."""
        if self._sum <= self._total_bytes:
            return
        self.sizes()
        for subscriber in sorted(self.held, key=self.held.__getitem__, reverse=True):
            if self._sum <= self._total_bytes:
                return
            self._sum -= self.held.pop(subscriber)
            self._evict(subscriber)
            subscriber.sink.abort()
