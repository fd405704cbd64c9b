"""When a failed call is retried, and after how long.

Knows neither providers nor clocks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from slm.common.retries import longest_pause
from slm.errors import LLMError, LLMStreamBroken


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrySettings:
    """How failed calls are retried, always within the call's own deadline.

    Attributes:
        max_retries: the maximum number of retries.
        backoff_seconds: the maximum first pause; it doubles with each retry.
        backoff_max_seconds: the maximum pause.
    """

    max_retries: int = 2
    backoff_seconds: float = 0.5
    backoff_max_seconds: float = 8.0

    def pause(self, error: LLMError, tries: int, seconds_left: float) -> float | None:
        """Return how long to wait before the next attempt, or None to give up.

        Uses full jitter, so that calls that failed together are not retried together, and waits at
        least as long as the provider asks (Retry-After).

        Args:
            error: what the last attempt ended with, before any part of an answer arrived.
            tries: the number of attempts so far.
            seconds_left: the time until the call's deadline; no retry if the pause exceeds it.
        """
        if tries > self.max_retries:
            return None
        if not (error.retryable or isinstance(error, LLMStreamBroken)):
            return None
        longest = longest_pause(tries - 1, self.backoff_seconds, self.backoff_max_seconds)
        wait = (error.retry_after_seconds or 0.0) + random.uniform(0, longest)  # noqa: S311 # nosec B311
        return wait if wait < seconds_left else None
