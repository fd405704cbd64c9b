"""How old cached data is: whether every change has been received, and when it was confirmed.

Knows no configuration, and no clock except the monotonic one it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from slm.client.timings import check_seconds

NEVER: Final = -math.inf
"""The `live_until` of a cache that is not live."""


class Liveness:
    """Whether a cache is live, and what that means for the age of its values.

    Args:
        ttl_seconds: how long a value is current without contact with the SLM.
        max_stale_seconds: how long after that it may still be served as stale; None for no limit.
        clock: monotonic seconds.

    Attributes:
        live_until: the time, by `clock`, up to which every change is considered received; each
            message from the SLM extends it. A read after this time is not live, whatever the state
            of the stream.
    """

    def __init__(
        self, ttl_seconds: float, max_stale_seconds: float | None, clock: Callable[[], float]
    ) -> None:
        self.ttl_seconds = check_seconds("ttl_seconds", ttl_seconds)
        if max_stale_seconds is not None:
            check_seconds("max_stale_seconds", max_stale_seconds)
        self.max_stale_seconds = max_stale_seconds
        self.clock = clock
        self.live_until = NEVER
        self._all_confirmed_at: float | None = None

    @property
    def live(self) -> bool:
        """Whether every change up to now would have been received."""
        return self.clock() < self.live_until

    def set(self, live: bool, until: float = math.inf) -> None:
        """Note that every change is received, valid `until` then, or that this has ended."""
        if live:
            self.live_until = until
        elif self.live_until != NEVER:
            self._all_confirmed_at = min(self.clock(), self.live_until)
            self.live_until = NEVER

    def confirm(self) -> None:
        """Note that everything known is current at this moment."""
        self._all_confirmed_at = self.clock()

    def expired(self, age: float) -> bool:
        """Return whether a value is too old to be served even as stale (`max_stale_seconds`)."""
        limit = self.max_stale_seconds
        return limit is not None and age > self.ttl_seconds + limit

    def age_of(self, confirmed_at: float, *, from_file: bool) -> tuple[float, bool]:
        """Return the age and staleness of a value that has not been superseded."""
        if self.live:
            return 0.0, False
        never = self._all_confirmed_at is None and self.live_until == NEVER
        # It was confirmed for as long as it was live, even if the end was not noticed.
        age = self.clock() - max(
            confirmed_at, self._all_confirmed_at or confirmed_at, self.live_until
        )
        return age, age > self.ttl_seconds or (from_file and never)


class Freshness:
    """When one value was last known to be current; used by `ResolvedConfig`."""

    __slots__ = ("_liveness", "confirmed_at", "from_file", "superseded_at")

    def __init__(self, liveness: Liveness, confirmed_at: float) -> None:
        self._liveness = liveness
        self.confirmed_at = confirmed_at
        self.from_file = False
        self.superseded_at: float | None = None

    def __deepcopy__(self, memo: object) -> Freshness:
        return self  # a copy would stay live when its client is not

    def __call__(self) -> tuple[float, bool]:
        """Return the age in seconds, and whether the value is stale."""
        if self.superseded_at is not None:
            return self._liveness.clock() - self.superseded_at, True
        return self._liveness.age_of(self.confirmed_at, from_file=self.from_file)

    def confirm(self, now: float) -> None:
        """Note that the value is current."""
        self.confirmed_at, self.superseded_at = now, None

    def supersede(self, now: float) -> None:
        """Note that there is a newer value."""
        if self.superseded_at is None:
            self.superseded_at = now
