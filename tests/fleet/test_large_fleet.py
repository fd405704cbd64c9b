"""A fleet of any size is shown and waited for a few backends at a time."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.protocol import Ack, ClientInfo
from slm.server.db.database import Database
from slm.server.fleet import names as backend_names
from slm.server.fleet.backend import Backend
from slm.server.fleet.elsewhere import Lapse
from slm.server.fleet.explain import Explanations
from slm.server.fleet.outcome import Subject, receipt_of
from slm.server.fleet.tracker import KEEP_GONE_SECONDS, Fleet
from slm.server.stream.subscriber import Subscriber
from slm.server.tasks import slices

MANY = 1500
OWN = 300
SUBJECT = Subject("a", True, 2, 0.0)


def subscriber(name: str, instance: str | None, token_id: int = 1) -> Subscriber:
    """Return a connection of a backend, without a socket."""
    made = Subscriber(None, token_id=token_id)  # type: ignore[arg-type]
    made.client = ClientInfo(name=name, instance=instance)
    return made


def fleet_of(names: list[tuple[str, str | None, int]], replica: str = "here") -> Fleet:
    """Return a fleet of connected backends that have acked revision 1."""
    fleet = Fleet(replica, "server", lambda token_id: f"t{token_id}", clock=lambda: 100.0)
    fleet.moved(1, restarted=True)
    for name, instance, token_id in names:
        made = subscriber(name, instance, token_id)
        fleet.joined(made)
        fleet.acked(made, Ack(ack=1))
    fleet.moved(2)
    return fleet


def lapsed_fleet(own: int = OWN, told: int = MANY) -> Fleet:
    """Return a fleet of its own backends and of those that a replica told whose lease lapsed."""
    fleet = fleet_of([("b", str(number), 1) for number in range(own)])
    there = fleet_of([("b", str(number), 2) for number in range(told)], "there")
    for backend in there.own():
        fleet.merge("there", backend.id, backend.to_json(0.0), 0.0)
    fleet.keep_replicas({"there"})
    fleet.keep_replicas((), {"there": Lapse(2, 90.0)})
    return fleet


@contextlib.asynccontextmanager
async def turns_counted(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[[], int]]:
    """Give the most backends that a turn of the loop looked at; a look takes 1 ms of a slice."""
    clock: Iterator[float] = (number / 1000 for number in range(1 << 30))
    monkeypatch.setattr(slices, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    turn = 0
    looked_at: Counter[int] = Counter()
    whole = Fleet._whole

    def counted(fleet: Fleet, key: str) -> Backend | None:
        looked_at[turn] += 1
        return whole(fleet, key)

    async def turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(Fleet, "_whole", counted)
    counting = asyncio.create_task(turns())
    try:
        yield lambda: max(looked_at.values(), default=0)
    finally:
        counting.cancel()


def _find(fleet: Fleet) -> Awaitable[Any]:
    explanations = Explanations(Database("sqlite://"), fleet, None)  # type: ignore[arg-type]
    return explanations._find("b/0")


def _forget(fleet: Fleet) -> Awaitable[Any]:
    fleet._clock = lambda: 100.0 + KEEP_GONE_SECONDS
    return fleet.forget_long_gone()


WALKS: dict[str, Callable[[Fleet], Awaitable[Any]]] = {
    "the fleet view": lambda fleet: fleet.described(),
    "a receipt": lambda fleet: receipt_of(SUBJECT, fleet.shown()),
    "a receipt that waits": lambda fleet: fleet.wait(SUBJECT, 0.3),
    "a question to one of them": _find,
    "forgetting who is gone": _forget,
}


@pytest.mark.parametrize("what", WALKS)
async def test_one_turn_of_the_loop_looks_at_a_few(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is asked of thousands of backends, other requests are served in between."""
    fleet = lapsed_fleet()
    if what == "a receipt that waits":
        for backend in fleet.own():
            backend.acks.add(backend.acks.last._replace(revision=2))  # type: ignore[union-attr]
    async with turns_counted(monkeypatch) as most:
        await WALKS[what](fleet)
    assert 0 < most() <= 20


async def test_what_comes_of_slices_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The view has every backend once, by name, and a receipt everyone who is expected."""
    fleet = lapsed_fleet()
    told = json.loads(await fleet.described())
    names = [each["backend"] for each in told]
    assert names == sorted(set(names))
    assert names == [fleet.name_of(backend) for backend in fleet.backends()]
    assert Counter(each["state"] for each in told) == {"live": OWN, "gone": MANY}
    receipt = await receipt_of(SUBJECT, fleet.shown())
    assert receipt["pending"] == names
    fleet._clock = lambda: 100.0 + 2 * KEEP_GONE_SECONDS
    fleet.forget_replica("there")
    assert len(json.loads(await fleet.described())) == OWN


async def test_backends_come_and_go_while_they_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view that is being made when the fleet changes shows nobody twice and breaks on nobody."""
    fleet = lapsed_fleet(30, 60)
    joined = []

    async def churn() -> None:
        for number in range(1, 300):
            made = subscriber("c", str(number))
            fleet.joined(made)
            joined.append(made)
            if number == 20:
                fleet.forget_replica("there")
            if number > 5:
                fleet.left(joined[number - 5])
            await asyncio.sleep(0)

    clock: Iterator[float] = (float(number) for number in range(1 << 30))
    monkeypatch.setattr(slices, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    churning = asyncio.create_task(churn())
    for _ in range(5):
        names = [each["backend"] for each in json.loads(await fleet.described())]
        assert len(names) == len(set(names)) >= 30
    churning.cancel()
    assert fleet.unreadable == 0


async def test_who_answers_while_all_are_looked_at_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An ack that comes in the middle of the first look counts."""
    fleet = Fleet("here", "server", lambda token_id: "t", clock=lambda: 100.0)
    fleet.moved(1, restarted=True)
    made = [subscriber("b", str(number)) for number in range(50)]
    for each in made:
        fleet.joined(each)
        fleet.acked(each, Ack(ack=1))
    fleet.moved(2)
    clock: Iterator[float] = (float(number) for number in range(1 << 30))
    monkeypatch.setattr(slices, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    waiting = asyncio.create_task(fleet.wait(SUBJECT, 0.3))
    for each in made:
        await asyncio.sleep(0)
        fleet.acked(each, Ack(ack=2))
    await asyncio.wait_for(waiting, 10)
    assert len((await receipt_of(SUBJECT, fleet.shown()))["applied"]) == 50


NAMES = st.lists(
    st.tuples(st.sampled_from(["b", "b #2", "c (token t2)"]), st.none(), st.integers(1, 3)),
    max_size=12,
)


@given(NAMES)
@settings(max_examples=50, deadline=None)
def test_no_two_names_are_alike(named: list[tuple[str, str | None, int]]) -> None:
    """However backends call themselves, each is shown under a name of its own."""
    fleet = fleet_of(named)
    names = slices.at_once(backend_names.names_of(fleet.own())).shown
    assert names.keys() == {backend.id for backend in fleet.own()}
    assert list(names.values()) == sorted(set(names.values()))


def test_a_name_that_thousands_share_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding the next free number does not begin at the first again for each of them."""
    tried = 0
    numbered = backend_names._numbered

    def counted(prefix: str) -> Iterator[str]:
        nonlocal tried
        for each in numbered(prefix):
            tried += 1
            yield each

    monkeypatch.setattr(backend_names, "_numbered", counted)
    fleet = fleet_of([("b", None, 1)] * 2000)
    assert len(slices.at_once(backend_names.names_of(fleet.own())).shown) == 2000
    assert tried == 2000
