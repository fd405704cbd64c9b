"""When a failed call is tried again, and after how long.

Knows neither providers nor clocks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from slm.common.retries import longest_pause
from slm.errors import LLMError, LLMStreamBroken


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrySettings:
    """How failed calls are tried again, always within the call's own deadline.

    Attributes:
        max_retries: how often a call is tried again.
        backoff_seconds: the longest first pause; it doubles with each retry.
        backoff_max_seconds: the longest pause.
    """

    max_retries: int = 2
    backoff_seconds: float = 0.5
    backoff_max_seconds: float = 8.0

    def pause(self, error: LLMError, tries: int, seconds_left: float) -> float | None:
        """Return how long to wait before the next try, or None to give up.

        Full jitter, so that those who failed together do not come back together; where the
        provider said when to come back (Retry-After), not before that.

        Args:
            error: what the last try ended with, before anything of an answer came.
            tries: how many there were.
            seconds_left: until the call's deadline; a pause that passes it is not worth taking.
        """
        if tries > self.max_retries:
            return None
        if not (error.retryable or isinstance(error, LLMStreamBroken)):
            return None
        longest = longest_pause(tries - 1, self.backoff_seconds, self.backoff_max_seconds)
        wait = (error.retry_after_seconds or 0.0) + random.uniform(0, longest)  # noqa: S311 # nosec B311
        return wait if wait < seconds_left else None
