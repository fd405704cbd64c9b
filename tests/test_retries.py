"""When to try again: pauses that double, and every form of Retry-After."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest

from slm.common.retries import longest_pause, retry_after_seconds

YEAR = 365 * 86400.0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.4"}, 0.4),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "-5"}, 0.0),
        ({"retry-after": "1e400"}, YEAR),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_seconds_are_taken_as_they_are(headers: dict[str, str], seconds: float | None) -> None:
    """Whole or not, in milliseconds where that is said too; never less than none."""
    assert retry_after_seconds(headers) == seconds


def test_a_date_counts_from_the_answers_own_date() -> None:
    """Both are of the server's clock, so ours may be a day off; without its Date ours counts."""
    now = time.time()
    asked = {"retry-after": formatdate(now - 86400 + 12, usegmt=True)}
    assert retry_after_seconds(asked | {"date": formatdate(now - 86400, usegmt=True)}) == 12
    assert retry_after_seconds(asked) == 0
    ahead = {"retry-after": formatdate(now + 60, usegmt=True)}
    assert retry_after_seconds(ahead) == pytest.approx(60, abs=10)
    assert retry_after_seconds(ahead | {"date": "yesterday"}) == pytest.approx(60, abs=10)


def test_pauses_double_up_to_their_limit() -> None:
    """However many failures there were, no pause is longer than the limit."""
    assert [longest_pause(failures, 0.5, 3.0) for failures in (0, 1, 2, 3, 9999)] == [
        *(0.5, 1.0, 2.0),
        *(3.0, 3.0),
    ]
