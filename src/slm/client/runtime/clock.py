"""The clock of liveness and of ages: monotonic, and going on while the machine sleeps.

Linux stops `time.monotonic` in suspend, so that a laptop that slept for a night would hold its
configurations to be live. Read on the hot path; see docs/decisions/0043.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Final


def _best() -> Callable[[], float]:
    # macOS counts sleep in CLOCK_MONOTONIC, and not in what time.monotonic reads.
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
"""Seconds since some moment; never goes back, and stops for nothing."""
