"""The two things that may be wrong with a bench and are told of by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Missing(Exception):
    """Something that a figure needs is not installed; the figure is named as missing."""


class Malformed(Exception):
    """A kept result has not the fields that its bench writes; it must be measured anew."""


@contextlib.contextmanager
def reading(bench: str) -> Iterator[None]:
    """Name the bench whose kept result cannot be read.

    Raises:
        Malformed: a field that the bench always writes is absent, empty or of another shape.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError) as error:
        raise Malformed(
            f"the kept result of {bench} is not what the bench writes now, measure it again:"
            f" {error!r}"
        ) from error
