"""What is kept of acks and told of them, against a model that keeps every ack whole."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from slm.protocol import ClientInfo, NotInForce
from slm.server.fleet.ack_log import Acked, Outcome
from slm.server.fleet.backend import Backend
from slm.server.fleet.outcome import Subject, outcome_of

AGENTS = ("a", "b", "c")
REFUSALS = st.dictionaries(
    st.sampled_from(AGENTS),
    st.builds(
        NotInForce, revision=st.integers(0, 12), reason=st.sampled_from(["no extra", "no key"])
    ),
)
ACKS = st.lists(st.tuples(st.integers(0, 2), REFUSALS), max_size=40)


def acks_of(steps: list[tuple[int, dict[str, NotInForce]]], start: float = 0.0) -> list[Acked]:
    """Return acks whose revisions rise by these steps, one a second."""
    acks: list[Acked] = []
    revision = 0
    for number, (step, refused) in enumerate(steps):
        revision += step
        acks.append(Acked(revision, start + number, refused))
    return acks


def naive(acks: list[Acked], agent_id: str, revision: int) -> Outcome:
    """Return the outcome as the contract words it: the first ack in force, else the last."""
    refused: Outcome | None = None
    for ack in acks:
        if ack.revision < revision:
            continue
        held_up = ack.not_in_force.get(agent_id)
        if held_up is None or held_up.revision < revision:
            return Outcome(True, ack.at)
        refused = Outcome(True, ack.at, held_up.reason)
    return refused or Outcome(False)


def check(backend: Backend, acks: list[Acked]) -> None:
    """Compare every receipt with the naive one."""
    for agent_id in AGENTS:
        for revision in range(14):
            subject = Subject(agent_id, False, revision, 0.0)
            assert outcome_of(backend, subject) == naive(acks, agent_id, revision)
    assert backend.not_in_force == (acks[-1].not_in_force if acks else {})


def backend_of(acks: list[Acked], replica: str = "one") -> Backend:
    """Return a backend that acked these."""
    backend = Backend("b", ClientInfo(name="b", instance="1"), "t", replica, "server")
    backend.begin(0, acks[0].at if acks else 0.0)
    for ack in acks:
        backend.acks.add(ack)
    return backend


@given(ACKS)
@settings(max_examples=60, deadline=None)
def test_receipts_are_those_of_whole_acks(steps: list[tuple[int, dict[str, NotInForce]]]) -> None:
    """Differences between acks give the same receipts as the acks themselves."""
    acks = acks_of(steps)
    check(backend_of(acks), acks)


@given(ACKS, st.lists(st.integers(0, 40), max_size=5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_another_replica_gives_the_same_receipts(
    steps: list[tuple[int, dict[str, NotInForce]]], cuts: list[int], full: bool
) -> None:
    """Told in any number of batches, differences or whole, a backend is the same elsewhere."""
    acks = acks_of(steps[:30])
    here, there = backend_of([]), backend_of([], "two")
    told: int | None = None
    done = 0
    for cut in [*sorted(cuts), len(acks)]:
        for ack in acks[done:cut]:
            here.acks.add(ack)
        done = max(done, min(cut, len(acks)))
        there.take_over(json.loads(json.dumps(here.to_json(3.0, None if full else told))), 3.0)
        told = here.acks.number
    check(there, acks)


@given(ACKS, ACKS, ACKS)
@settings(max_examples=60, deadline=None)
def test_a_backend_that_moves_between_replicas_has_one_history(
    first: list[tuple[int, dict[str, NotInForce]]],
    second: list[tuple[int, dict[str, NotInForce]]],
    third: list[tuple[int, dict[str, NotInForce]]],
) -> None:
    """What it acked at one server, at another and at the first again is one log in that order."""
    acks = acks_of([*first, *second, *third])
    one, two = len(first), len(first) + len(second)
    here, there = backend_of([*acks[:one], *acks[two:]]), backend_of(acks[one:two], "two")
    here.end(99, 1000.0)
    there.end(99, 500.0)
    for whole in (here.together_with(there), there.together_with(here)):
        check(whole, acks)


def test_what_was_lost_on_the_way_is_not_said_to_be_applied() -> None:
    """After a batch that never came, nobody is said to have applied what it may have refused."""
    refused = {"a": NotInForce(revision=2, reason="no extra")}
    acks = [Acked(1, 1.0, {}), Acked(2, 2.0, refused), Acked(3, 3.0, refused)]
    here, there = backend_of(acks[:1]), backend_of([], "two")
    there.take_over(here.to_json(0.0), 0.0)
    here.acks.add(acks[1])  # told in a batch that is lost
    here.acks.add(acks[2])
    there.take_over(here.to_json(0.0, 2), 0.0)
    subject = Subject("a", False, 2, 0.0)
    assert not outcome_of(there, subject).answered
    # All is told anew now and then.
    there.take_over(here.to_json(0.0), 0.0)
    assert outcome_of(there, subject).reason == "no extra"
