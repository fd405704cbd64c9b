"""What a failure means: try again soon or in minutes, and what the status then says.

The one place that classifies failures; knows no socket and waits for nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from slm.client.status import ClientStatus
from slm.client.timings import Timings
from slm.client.transport.answers import NobodyListens
from slm.common.retries import longest_pause
from slm.errors import ProblemError, TLSError


def is_retryable(error: BaseException) -> bool:
    """Say whether trying again soon may help.

    A refused token or scope does not mend itself within seconds: these are tried every few minutes
    (docs/protocol.md section 5). Nothing is ever given up.
    """
    return not (isinstance(error, ProblemError) and error.status in (401, 403))


def status_after(error: BaseException) -> ClientStatus:
    """Return what the status is once this failed."""
    if not is_retryable(error):
        return ClientStatus.UNAUTHORIZED
    return ClientStatus.TLS_ERROR if isinstance(error, TLSError) else ClientStatus.DISCONNECTED


class Backoff:
    """How long to wait before the next try: full jitter, doubling, and what the server asked for.

    While nobody listens at all the waits stay short, so that a server is found soon once it is up.
    """

    def __init__(
        self, timings: Timings, uniform: Callable[[float, float], float] = random.uniform
    ) -> None:
        self._timings = timings
        self._uniform = uniform
        self._failures = 0

    def reset(self) -> None:
        """Start anew: the last connection was healthy."""
        self._failures = 0

    def delay_elsewhere(self) -> float:
        """Return the seconds to wait before another address is tried, which has not failed yet."""
        return self._uniform(0, self._timings.backoff_initial_seconds)

    def delay_after(self, error: BaseException) -> float:
        """Return the seconds to wait after this failure.

        Args:
            error: what failed; a `ProblemError` may say how long to stay away.
        """
        timings = self._timings
        if not is_retryable(error):
            return timings.refused_retry_seconds * self._uniform(0.75, 1.25)
        limit = timings.backoff_max_seconds
        if isinstance(error, NobodyListens):
            limit = min(limit, timings.nobody_max_seconds)
        longest = longest_pause(self._failures, timings.backoff_initial_seconds, limit)
        if longest < limit:
            # A long absence does not count against the server that comes back.
            self._failures += 1
        asked = error.retry_after_seconds if isinstance(error, ProblemError) else None
        return min(asked or 0.0, timings.retry_after_max_seconds) + self._uniform(0, longest)
