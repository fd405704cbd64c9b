"""The log of a backend's acks against a plain list of them."""

from __future__ import annotations

import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from slm.protocol import NotInForce
from slm.server.fleet.ack_log import RECEIPT_REVISIONS, Acked, AckLog

REFUSALS: tuple[dict[str, NotInForce], ...] = (
    {},
    {"a": NotInForce(revision=1, reason="anthropic is not approved here")},
    {"a": NotInForce(revision=2, reason="the key did not come")},
)
STRETCHES = st.lists(
    st.tuples(st.integers(1, 700), st.sampled_from(REFUSALS), st.booleans()), max_size=6
)


def acks_of(stretches: list[tuple[int, dict[str, NotInForce], bool]]) -> list[Acked]:
    """Return acks of the revisions 1, 2, …: so many with these refusals, the first after a gap."""
    acks: list[Acked] = []
    for count, refused, after_gap in stretches:
        for place in range(count):
            revision = len(acks) + 1
            acks.append(Acked(revision, revision / 8, refused, after_gap and place == 0))
    return acks


@settings(deadline=None)
@given(STRETCHES)
def test_the_last_thousand_acks_are_kept_as_they_came(
    stretches: list[tuple[int, dict[str, NotInForce], bool]],
) -> None:
    """Of each of the last 1,000 acks it is known when it came and what it refused."""
    acks, log = acks_of(stretches), AckLog()
    for ack in acks:
        log.add(ack)
    kept = list(log)
    assert len(kept) >= min(len(acks), RECEIPT_REVISIONS)
    expected = acks[len(acks) - len(kept) :]
    if len(kept) < len(acks):
        # What came before it is not known any more.
        expected[0] = expected[0]._replace(after_gap=True)
    assert kept == expected
    assert log.last == (expected[-1] if expected else None)
    assert log.count == len(acks)
    log.clear()
    assert (list(log), log.last) == ([], None)


@settings(deadline=None)
@given(STRETCHES.filter(bool))
def test_another_epoch_begins_the_log_anew(
    stretches: list[tuple[int, dict[str, NotInForce], bool]],
) -> None:
    """Once a backend acks a lower revision, what it acked before counts for nothing."""
    anew, alone = AckLog(), AckLog()
    anew.add(Acked(10_000, 0.5, REFUSALS[1], after_gap=True))
    for ack in acks_of(stretches):
        anew.add(ack)
        alone.add(ack)
    assert list(anew) == list(alone)


def test_a_thousand_acks_take_little_memory() -> None:
    """A backend that acked every one of the last 1,000 changes costs some 17 KiB for it."""
    tracemalloc.start()
    try:
        log = AckLog()
        for revision in range(5_000):
            log.add(Acked(revision, revision / 8, {}))
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(log) >= RECEIPT_REVISIONS
    assert size < 20 * 1024
