"""When to try again, and what the status says: one classification for every failure."""

from __future__ import annotations

import pytest

from slm.client.status import ClientStatus
from slm.client.sync.backoff import Backoff, is_retryable, status_after
from slm.client.timings import Timings
from slm.client.transport.answers import NobodyListens
from slm.errors import (
    BadRequest,
    ConfigurationError,
    Forbidden,
    InternalError,
    ProtocolError,
    SLMError,
    SLMUnavailable,
    TLSError,
    TlsRequired,
    TooManyRequests,
    Unauthorized,
    Unavailable,
)


def longest(low: float, high: float) -> float:
    return high


@pytest.mark.parametrize(
    "error",
    [
        BadRequest(),
        TooManyRequests(),
        InternalError(),
        Unavailable(),
        SLMUnavailable(""),
        ProtocolError(""),
        TLSError(""),
    ],
)
def test_most_failures_are_tried_again_with_backoff(error: SLMError) -> None:
    """Doubling from half a second to thirty, for whatever may mend itself."""
    assert is_retryable(error)
    backoff = Backoff(Timings(), longest)
    assert [backoff.delay_after(error) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    backoff.reset()
    assert backoff.delay_after(error) == 0.5


def test_where_nobody_listens_the_waits_stay_short() -> None:
    """A restart is noticed within four seconds, and is not held against the server afterwards."""
    backoff = Backoff(Timings(), longest)
    refused = NobodyListens("")
    assert status_after(refused) is ClientStatus.DISCONNECTED
    assert [backoff.delay_after(refused) for _ in range(20)] == [0.5, 1, 2] + [4] * 17
    assert [backoff.delay_after(Unavailable()) for _ in range(4)] == [4, 8, 16, 30]
    # It may only make the waits shorter.
    assert Backoff(Timings(backoff_max_seconds=0.1), longest).delay_after(refused) == 0.1


@pytest.mark.parametrize("error", [Unauthorized(), Forbidden(), TlsRequired()])
def test_a_refused_token_is_tried_every_few_minutes(error: SLMError) -> None:
    """401 and 403 are neither hammered nor given up."""
    backoff = Backoff(Timings())
    assert status_after(error) is ClientStatus.UNAUTHORIZED
    for _ in range(50):
        assert 120 <= backoff.delay_after(error) <= 300


def test_the_wait_is_drawn_from_nothing_to_the_longest() -> None:
    """Full jitter: the lower end is 0, so that a thousand backends spread."""
    seen: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        seen.append((low, high))
        return low

    assert Backoff(Timings(), uniform).delay_after(SLMUnavailable("")) == 0
    assert seen == [(0, 0.5)]


def test_retry_after_is_honoured_but_not_for_ever() -> None:
    """What the server asked for is added to the jitter, up to a limit."""
    backoff = Backoff(Timings(), longest)
    assert backoff.delay_after(Unavailable(retry_after_seconds=7)) == 7.5
    assert backoff.delay_after(TooManyRequests(retry_after_seconds=10**9)) == 601


def test_the_status_tells_tls_from_other_failures() -> None:
    """A refused certificate is not told as "no SLM"."""
    assert status_after(TLSError("")) is ClientStatus.TLS_ERROR
    assert status_after(SLMUnavailable("")) is ClientStatus.DISCONNECTED


def test_a_timing_that_makes_no_sense_is_named() -> None:
    """A wait of 0 would be a storm."""
    with pytest.raises(ConfigurationError, match="backoff_initial_seconds"):
        Timings(backoff_initial_seconds=0)
