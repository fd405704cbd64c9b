"""Reads figures out of a kept result by their path, and writes them as text.

Knows no bench and no target.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.harness.stats import Figure, figure

Data = dict[str, Any]
"""What one bench measured."""


def at(data: Any, path: str) -> Any:
    """Return what lies at a path such as `per_size/100/change_ms`.

    In a list of repeats, the next step is taken in each of them.

    Raises:
        LookupError: a step is absent, or the list at the end is empty.
    """
    for step in path.split("/") if path else ():
        data = [repeat[step] for repeat in data] if isinstance(data, list) else data[step]
    if data in ([], {}):
        raise KeyError(path)
    return data


def values(data: Any, path: str) -> list[float]:
    """Return the value of each repeat; of the candidates at a step `*`, the highest median's."""
    before, wildcard, after = path.partition("/*/")
    if wildcard:
        every = [values(each, after) for each in at(data, before).values()]
        return max(every, key=statistics.median)
    found: list[float] = at(data, path)
    return found


def show(taken: list[float], unit: str = "") -> str:
    """Return the median with the lowest and highest of the repeats, unless all are the same."""
    value: Figure = figure(taken)
    low, high = number(value.low), number(value.high)
    text = f"**{number(value.median)}**{unit}"
    return text if low == high else f"{text} ({low} to {high})"


def number(value: float) -> str:
    """Return a number in three digits, or without decimals if it has more before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(head: list[str], lines: list[list[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *lines))
