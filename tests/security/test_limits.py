"""Token buckets: how often somebody may fail to log in, or write."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm.errors import TooManyRequests
from slm.server.security.rate_limits import Gauge, Rate, TokenBuckets, network_of


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(steps=st.lists(st.tuples(st.floats(0, 2), st.integers(0, 30)), max_size=40))
def test_no_more_than_the_burst_and_the_rate_whatever_the_rhythm(
    steps: list[tuple[float, int]],
) -> None:
    """From the start up to any moment at most burst + rate x seconds are let through."""
    clock = Clock()
    buckets = TokenBuckets(Rate(10, 50), clock=clock)
    allowed = 0
    for pause, attempts in steps:
        clock.now += pause
        allowed += sum(buckets.take("a") == 0 for _ in range(attempts))
        assert allowed <= 50 + 10 * (clock.now - 1000) + 1e-6


def test_after_the_burst_it_says_when_and_keeps_its_word() -> None:
    """The fifty-first is refused with a time, and at that time there is one more."""
    clock = Clock()
    buckets = TokenBuckets(Rate(10, 50), clock=clock)
    assert [buckets.take("a") for _ in range(50)] == [0] * 50
    with pytest.raises(TooManyRequests) as refused:
        buckets.check("a", "Too many failed logins")
    assert refused.value.retry_after_seconds == pytest.approx(0.1)
    assert buckets.take("b") == 0, "nobody else is affected"
    clock.now += 0.1001
    assert buckets.take("a") == 0


def test_memory_is_bounded_however_many_come() -> None:
    """A hundred thousand addresses take the room of ten thousand; the one at work stays known."""
    buckets = TokenBuckets(Rate(10, 5), max_keys=10_000)
    tracemalloc.start()
    for number in range(100_000):
        buckets.take(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
        buckets.take("attacker")
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(buckets) == 10_000
    assert size < 5_000_000
    assert buckets.take("attacker") > 0


def test_addresses_that_one_machine_can_choose_from_are_one() -> None:
    """An IPv6 /64 is one peer, an IPv4 address written as IPv6 is that IPv4 address."""
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:2")
    assert network_of("2001:db8::1") != network_of("2001:db8:0:1::1")
    assert network_of("::ffff:192.0.2.1") == network_of("192.0.2.1")
    assert network_of("192.0.2.1") != network_of("192.0.2.2")
    assert network_of("fe80::1%eth0") == network_of("fe80::2")
    assert network_of(None) == network_of("nonsense")


def test_a_cap_counts_what_is_open_now() -> None:
    """A cap of two allows a third when one of the two is given back."""
    streams = Gauge(2)
    assert streams.take(7)
    assert streams.take(7)
    assert not streams.take(7)
    assert streams.take(8)
    streams.release(7)
    assert streams.take(7)
    assert all(Gauge(None).take(7) for _ in range(100))
