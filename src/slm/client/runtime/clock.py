"""The clock for liveness and ages: monotonic, and running while the machine sleeps.

Linux stops `time.monotonic` during suspend, so a laptop that slept for a night would consider its
configurations live. Read on the hot path; see docs/decisions/0043.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Final


def _best() -> Callable[[], float]:
    # macOS counts sleep in CLOCK_MONOTONIC, but not in what time.monotonic reads.
    name = "CLOCK_MONOTONIC" if sys.platform == "darwin" else "CLOCK_BOOTTIME"
    clock: int | None = getattr(time, name, None)
    if clock is None:
        return time.monotonic
    read = functools.partial(time.clock_gettime, clock)
    try:
        read()
    except OSError:
        return time.monotonic
    return read


now: Final = _best()
"""Seconds since an arbitrary moment; never goes back and never stops."""
