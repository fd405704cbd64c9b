"""The client's logger, protected from exceptions in the application's log handlers."""

from __future__ import annotations

import contextlib
import logging
from typing import Any


class QuietLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger that drops a line rather than raise.

    Otherwise a handler that raises in `emit`, such as one for an unreachable log server, would end
    whatever is logging: the stream, or the callback thread.
    """

    def log(self, level: int, msg: object, *args: Any, **options: Any) -> None:
        """Log as `logging.Logger` does, with the caller's location."""
        with contextlib.suppress(Exception):
            options["stacklevel"] = options.get("stacklevel", 1) + 1
            super().log(level, msg, *args, **options)


def quiet_logger(name: str) -> QuietLogger:
    """Return the logger with this name, wrapped so that it does not raise."""
    return QuietLogger(logging.getLogger(name), {})
