"""Figures from repeats: a median with its spread, quantiles, ratios taken repeat by repeat.

Knows no bench. A figure is never one number: machines are noisy, so what is kept is every repeat's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """The median over the repeats, and the lowest and highest of them."""

    median: float
    low: float
    high: float
    repeats: int


def figure(values: Sequence[float]) -> Figure:
    """Return the figure of one value a repeat."""
    return Figure(statistics.median(values), min(values), max(values), len(values))


def quantile(values: Sequence[float], fraction: float) -> float:
    """Return the quantile by linear interpolation between its two neighbours.

    Type 7 of Hyndman and Fan, numpy's default: of an even number, a half is the mean of the middle
    two, as it is in `figure`.
    """
    ordered = sorted(values)
    place = (len(ordered) - 1) * fraction
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def curve(values: Sequence[float], points: int = 100) -> list[float]:
    """Return `points` + 1 quantiles from the lowest to the highest, for a cumulative plot."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return [round(ordered[round(last * k / points)], 5) for k in range(points + 1)]


def ratios(values: Sequence[float], references: Sequence[float]) -> list[float]:
    """Return each repeat's value as a multiple of the same repeat's reference.

    Noise that lasts longer than a repeat hits both and goes out; it would stay in a ratio of two
    medians.
    """
    return [value / reference for value, reference in zip(values, references, strict=True)]
