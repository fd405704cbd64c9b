"""Rate limits: token buckets by address and by token, in bounded memory.

Knows no HTTP and no token; a key is any hashable value, and the clock is monotonic.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from slm.errors import TooManyRequests


@dataclass(frozen=True)
class Rate:
    """A limit: `burst` at once, and `per_second` in the long run."""

    per_second: float
    burst: float


class TokenBuckets:
    """One token bucket for each key, at most `max_keys`; the one idle longest is forgotten.

    A forgotten bucket is a full one: under an attack from more addresses than `max_keys` the limit
    gets looser, but memory never grows.

    Args:
        rate: how much each key may do.
        max_keys: how many keys are remembered.
        clock: returns seconds that never go backwards.
    """

    def __init__(
        self, rate: Rate, *, max_keys: int = 10_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rate = rate
        self._max_keys = max_keys
        self._clock = clock
        # For each key what was left, and when; the most recently used is at the end.
        self._levels: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._levels)

    def take(self, key: Hashable) -> float:
        """Take one; return 0, or the number of seconds until there is one to take."""
        now = self._clock()
        level, since = self._levels.get(key, (self.rate.burst, now))
        level = min(self.rate.burst, level + (now - since) * self.rate.per_second)
        wait = 0.0
        if level >= 1:
            level -= 1
        else:
            wait = (1 - level) / self.rate.per_second
        self._levels[key] = (level, now)
        self._levels.move_to_end(key)
        if len(self._levels) > self._max_keys:
            self._levels.popitem(last=False)
        return wait

    def check(self, key: Hashable, what: str) -> None:
        """Take one.

        Args:
            key: who takes it.
            what: the clause that says what there was too much of.

        Raises:
            TooManyRequests: there is none to take; it says after how many seconds there will be.
        """
        wait = self.take(key)
        if wait:
            raise TooManyRequests(
                f"{what}; try again in {max(1, round(wait + 0.5))} s.", retry_after_seconds=wait
            )


class Gauge:
    """How many of something each key has now, such as open streams; keys with 0 are not stored."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._held: dict[Hashable, int] = {}

    def take(self, key: Hashable) -> bool:
        """Take one more; return whether the limit allows it."""
        held = self._held.get(key, 0)
        if self._limit is not None and held >= self._limit:
            return False
        self._held[key] = held + 1
        return True

    def release(self, key: Hashable) -> None:
        """Give one back."""
        held = self._held.pop(key, 0) - 1
        if held > 0:
            self._held[key] = held


def network_of(address: str | None) -> str:
    """Return the key of the bucket for an address: the address itself, or for IPv6 its /64.

    One machine has a whole /64 to choose its addresses from.
    """
    try:
        parsed = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.IPv6Network((parsed, 64), strict=False).network_address)
    return str(parsed)
