"""The client's logger, which no handler of the application's can turn against the client."""

from __future__ import annotations

import contextlib
import logging
from typing import Any


class QuietLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger that loses a line rather than raise.

    A handler whose `emit` raises, such as one that sends to a log server that is away, would
    otherwise end whatever wanted to say something: the stream, or the thread of the callbacks.
    """

    def log(self, level: int, msg: object, *args: Any, **options: Any) -> None:
        """Log as `logging.Logger` does, in the name of the caller."""
        with contextlib.suppress(Exception):
            options["stacklevel"] = options.get("stacklevel", 1) + 1
            super().log(level, msg, *args, **options)


def quiet_logger(name: str) -> QuietLogger:
    """Return the logger of this name, as one that does not raise."""
    return QuietLogger(logging.getLogger(name), {})
