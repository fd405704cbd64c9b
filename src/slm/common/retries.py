"""When to retry: how pauses grow, and what a response's Retry-After asks for.

Does not wait, and knows no error.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

_MAX_SECONDS: Final = 365 * 86400.0


def longest_pause(failures: int, first: float, limit: float) -> float:
    """Return the maximum pause after this many failures: it doubles, up to the limit.

    The caller waits a random part of it (full jitter, as in "Exponential Backoff And Jitter" of the
    AWS Architecture Blog, 2015), so that clients that failed together do not retry together.
    """
    return min(limit, first * 2.0 ** min(failures, 30))


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Return how long a response asks the client to wait (RFC 9110 section 10.2.3).

    A date is relative to the response's own Date header, since our clock may differ. None if
    nothing valid is given; at most a year.

    Args:
        headers: the response's headers, with case-insensitive names.
    """
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        seconds = _number(headers.get(name, "")) / unit
        if not math.isnan(seconds):
            return min(max(0.0, seconds), _MAX_SECONDS)
    until = _timestamp(headers.get("retry-after", ""))
    if until is None:
        return None
    now = _timestamp(headers.get("date", ""))
    return min(max(0.0, until - (time.time() if now is None else now)), _MAX_SECONDS)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _timestamp(date: str) -> float | None:
    try:
        when = parsedate_to_datetime(date)
        return (when if when.tzinfo is not None else when.replace(tzinfo=UTC)).timestamp()
    except Exception:  # usually ValueError; years and time zones overflow in several ways
        return None
