"""The one error that a bench may end in and still be told of."""

from __future__ import annotations


class Missing(Exception):
    """Something that a figure needs is not installed; the figure is named as missing."""
