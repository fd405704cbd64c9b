"""Classifies failures: whether to retry soon or in minutes, and the resulting status.

The only place that classifies failures; knows no socket and does not wait.
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
    """Return whether retrying soon may help.

    A rejected token or scope does not fix itself within seconds, so those are retried every few
    minutes (docs/protocol.md section 5). The client never gives up.
    """
    return not (isinstance(error, ProblemError) and error.status in (401, 403))


def status_after(error: BaseException) -> ClientStatus:
    """Return the status after this failure."""
    if not is_retryable(error):
        return ClientStatus.UNAUTHORIZED
    return ClientStatus.TLS_ERROR if isinstance(error, TLSError) else ClientStatus.DISCONNECTED


class Backoff:
    """How long to wait before the next attempt: full jitter, doubling, and any server request.

    While nothing listens at the address, waits stay short, so that the server is found soon after
    it starts.
    """

    def __init__(
        self, timings: Timings, uniform: Callable[[float, float], float] = random.uniform
    ) -> None:
        self._timings = timings
        self._uniform = uniform
        self._failures = 0

    def reset(self) -> None:
        """Start over, because the last connection was healthy."""
        self._failures = 0

    def delay_elsewhere(self) -> float:
        """Return the seconds to wait before trying another address that has not failed yet."""
        return self._uniform(0, self._timings.backoff_initial_seconds)

    def delay_after(self, error: BaseException) -> float:
        """Return the seconds to wait after this failure.

        Args:
            error: what failed; a `ProblemError` may say how long to wait.
        """
        timings = self._timings
        if not is_retryable(error):
            return timings.refused_retry_seconds * self._uniform(0.75, 1.25)
        limit = timings.backoff_max_seconds
        if isinstance(error, NobodyListens):
            limit = min(limit, timings.nobody_max_seconds)
        longest = longest_pause(self._failures, timings.backoff_initial_seconds, limit)
        if longest < limit:
            # A long outage does not count against a server that comes back.
            self._failures += 1
        asked = error.retry_after_seconds if isinstance(error, ProblemError) else None
        return min(asked or 0.0, timings.retry_after_max_seconds) + self._uniform(0, longest)
