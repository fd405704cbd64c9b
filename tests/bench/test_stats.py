"""The statistics that the bench's figures are made with (`benchmarks/harness/stats.py`)."""

from __future__ import annotations

import pytest
from benchmarks.harness import stats


@pytest.mark.parametrize(
    ("values", "fraction", "expected"),
    [
        (range(1, 15), 0.5, 7.5),
        (range(1, 16), 0.5, 8),
        (range(1, 201), 0.99, 198.01),
        ([3, 1, 2], 0, 1),
        ([3, 1, 2], 1, 3),
        ([7], 0.99, 7),
    ],
)
def test_a_quantile_lies_where_numpy_puts_it(
    values: list[float], fraction: float, expected: float
) -> None:
    """A half of an even number lies between the middle two; the ends are the extremes."""
    assert stats.quantile(values, fraction) == pytest.approx(expected)


def test_a_half_is_the_median() -> None:
    """Quantiles within a repeat and the figure over the repeats agree on what the middle is."""
    values = [5.0, 1.0, 4.0, 2.0]
    assert stats.quantile(values, 0.5) == stats.figure(values).median
