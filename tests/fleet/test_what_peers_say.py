"""Whatever a backend says, it costs nobody else the fleet view, a receipt or an answer."""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.errors import ProtocolError
from slm.protocol import MAX_NAMED, Ack, ClientInfo, NotInForce, parse_client_message
from slm.schemas import Agent
from slm.server.fleet.ack_log import MAX_LOG_BYTES
from slm.server.fleet.ack_queue import MAX_WAITING, AckQueue, Waiting
from slm.server.fleet.outcome import Subject, outcome_of
from slm.server.fleet.tracker import Fleet
from slm.server.security.agent_scope import View
from slm.server.stream.subscriber import Subscriber
from tests.support.raw import Api
from tests.support.servers import InLoopServer, eventually

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "messages.json").read_text())["client"]
BAD_TEXTS = ("\x00", "a\x00b", "\ud800", "a\udfffb", "x" * 70_000)
BAD_NUMBERS = (2**63, -(2**63) - 1, 10**400, float("nan"), float("inf"), "9" * 4301)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Yield where texts and numbers stand in a message: as values, and as the keys of objects."""
    if isinstance(value, dict):
        for key, each in value.items():
            if path and path[-1] in ("not_in_force", "keys"):
                yield (*path, key), "key"
            yield from places(each, (*path, key))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from places(each, (*path, number))
    elif isinstance(value, str) and path != ("subscribe",):
        yield path, "text"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, "number"


PLACES = [
    pytest.param(name, path, kind, id=f"{name}-{'.'.join(map(str, path))}-{kind}")
    for name, message in GOLDEN.items()
    for path, kind in places(message)
]


@pytest.mark.parametrize(("name", "path", "kind"), PLACES)
def test_what_cannot_be_stored_is_refused_wherever_it_stands(
    name: str, path: tuple[Any, ...], kind: str
) -> None:
    """NUL, a lone surrogate, an endless text or number: each is an error, and not the end."""
    bad_numbers = BAD_NUMBERS[2:] if path[-1] == "age_seconds" else BAD_NUMBERS
    for bad in bad_numbers if kind == "number" else BAD_TEXTS:
        message = copy.deepcopy(GOLDEN[name])
        at = message
        for step in path[:-1]:
            at = at[step]
        if kind == "key":
            at[bad] = at.pop(path[-1])
        else:
            at[path[-1]] = f"#{bad}#" if isinstance(bad, str) and kind == "number" else bad
        text = json.dumps(message).replace('"#', "").replace('#"', "")
        with pytest.raises(ProtocolError):
            parse_client_message(text)


@pytest.mark.parametrize(
    ("client", "then"),
    [
        ({"name": "b\x00d"}, []),
        ({"name": "b", "pid": 10**400}, []),
        ({"name": "b"}, ['{"ack": 2, "keys": {"\\ud800": 1}}']),
        (
            {"name": "b"},
            ['{"ack": 2, "not_in_force": {"a": {"revision": 2, "reason": "\\u0000"}}}'],
        ),
        ({"name": "b"}, ['{"ack": 1e400}', '{"ack": NaN}', '{"ack": 9' + "9" * 5000 + "}"]),
    ],
    ids=["NUL", "pid", "key", "reason", "numbers"],
)
async def test_a_peer_that_says_it_hurts_itself_alone(
    admin: Api, backend: Api, client: dict[str, Any], then: list[str]
) -> None:
    """It is answered with `error`; the fleet view, a receipt and its own stream go on."""
    await admin.create("a")
    async with backend.stream() as honest, backend.socket() as bad:
        await honest.send(ack=(await honest.frame())["revision"])
        await bad.ws.send_str(json.dumps({"subscribe": "agent_config", "client": client}))
        for text in then:
            assert (await bad.frame())["type"] in ("subscribed", "error")
            await bad.ws.send_str(text)
        while (frame := await bad.frame())["type"] != "error":
            assert frame["type"] == "subscribed"
        changing = asyncio.create_task(
            admin.call("PUT", "/api/agents/a?wait=30s", json={"llm_model": "n"})
        )
        await honest.send(ack=(await honest.next())["revision"])
        receipt = (await changing).json["receipt"]
        assert (len(receipt["applied"]), receipt["pending"]) == (1, [])
        assert (await admin.get("/api/fleet")).status == 200


async def test_a_backend_that_cannot_be_described_is_left_out(
    server: InLoopServer, admin: Api, backend: Api, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is wrong with one, all others are shown; it is counted, and logged once."""
    async with backend.stream(client={"name": "good"}), backend.stream(client={"name": "odd"}):
        fleet = server.running.services.fleet
        await eventually(lambda: len(fleet.backends()) == 2)
        [odd] = [each for each in fleet.own() if each.client.name == "odd"]
        odd.since = 1e300
        for _ in range(2):
            told = (await admin.get("/api/fleet")).json["backends"]
            assert [each["name"] for each in told] == ["good"]
    assert fleet.unreadable == 2
    assert len([r for r in caplog.records if "cannot be described" in r.message]) == 1


# --- memory ---


@functools.cache
def agent(agent_id: str) -> Agent | None:
    """Return an agent where the name begins with `a`."""
    if not agent_id.startswith("a"):
        return None
    return cast(Agent, SimpleNamespace(agent_id=agent_id, is_default=False))


def fleet_of(view: View, count: int = 1, **options: Any) -> tuple[Fleet, list[Subscriber]]:
    """Return a fleet of so many backends whose token sees what `view` says."""
    fleet = Fleet("r", "s", lambda token_id: "t", agent=agent, **options)
    fleet.moved(1, restarted=True)
    subscribers = []
    for number in range(count):
        subscriber = Subscriber(None, view, 1)  # type: ignore[arg-type]
        subscriber.client = ClientInfo(name="b", instance=str(number))
        fleet.joined(subscriber)
        subscribers.append(subscriber)
    return fleet, subscribers


def refusing(ack: int, names: Iterator[str] | list[str], reason: str) -> Ack:
    """Return an ack that refuses the newest of these agents."""
    return Ack(ack=ack, not_in_force={n: NotInForce(revision=ack, reason=reason) for n in names})


def test_acks_take_no_more_memory_than_the_bound() -> None:
    """A backend that refuses hundreds of agents, anew each time, costs a megabyte and some."""
    fleet, [one] = fleet_of(View())
    names = [f"a{n}" for n in range(400)]
    assert all(map(agent, names))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(1, 30):
            fleet.acked(one, refusing(number, names, f"reason {number} " + "x" * 30))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 2 * MAX_LOG_BYTES
    [backend] = fleet.own()
    assert MAX_LOG_BYTES / 4 < backend.bytes <= MAX_LOG_BYTES
    # What is still here is right, and what is not is not made up.
    assert outcome_of(backend, Subject("a7", False, 29, 0.0)).reason is not None
    assert outcome_of(backend, Subject("a7", False, 1, 0.0)) in (
        (True, None, None),
        outcome_of(backend, Subject("a7", False, 29, 0.0)),
    )


def test_an_ack_that_refuses_too_much_is_not_taken_for_an_applied_one() -> None:
    """Beyond the bound of one ack nobody is said to have applied what it may have refused."""
    fleet, [one] = fleet_of(View())
    names = [f"a{n:06}" for n in range(MAX_NAMED)]
    fleet.acked(one, refusing(5, names, "x" * 1000))
    [backend] = fleet.own()
    assert backend.bytes <= MAX_LOG_BYTES
    assert fleet.describe(backend)["truncated"]
    assert outcome_of(backend, Subject(names[0], False, 5, 0.0)).reason is not None
    assert not outcome_of(backend, Subject(names[-1], False, 5, 0.0)).answered
    fleet.acked(one, Ack(ack=6))
    assert outcome_of(backend, Subject(names[-1], False, 5, 0.0)).answered
    assert not fleet.describe(backend)["truncated"]


def test_names_that_a_token_does_not_see_are_not_kept() -> None:
    """Of agents outside the view, or that there are not, nothing is kept."""
    fleet, [one] = fleet_of(View(("a1",)))
    names = ["a1", "a2", *(f"{n:x}" for n in range(5000))]
    said = refusing(3, [n for n in names if not n.startswith("a") or n in ("a1", "a2")], "no")
    fleet.acked(one, said.model_copy(update={"keys": dict.fromkeys(names, 1)}))
    [backend] = fleet.own()
    assert list(backend.not_in_force) == ["a1"]
    assert backend.keys == {"a1": 1}
    assert backend.bytes < 2000


def test_all_backends_together_have_a_bound() -> None:
    """Past the bound of all the largest are cut down, and the newest state goes last."""
    fleet, subscribers = fleet_of(View(), 40, max_ack_bytes=2 * MAX_LOG_BYTES)
    names = [f"a{n}" for n in range(100)]
    for number in range(1, 15):
        ack = refusing(number, names, f"reason {number}")
        for subscriber in subscribers:
            fleet.acked(subscriber, ack)
    held = sum(backend.bytes for backend in fleet.own())
    assert held == fleet.ack_bytes <= 2 * MAX_LOG_BYTES
    for backend in fleet.own():
        outcome = outcome_of(backend, Subject("a7", False, 14, 0.0))
        assert outcome.reason is not None or not outcome.answered


# --- a flood ---


class Peer:
    """Notes what is read of it."""

    def __init__(self) -> None:
        self.heard: list[Waiting] = []

    def take_ack(self, ack: Waiting) -> None:
        """Read one."""
        self.heard.append(ack)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=200))
def test_of_a_flood_the_first_and_the_last_are_read(order: list[int]) -> None:
    """Of each peer the order stays, the last ack is read, and what is left out is counted."""

    async def flood() -> None:
        peers = [Peer(), Peer(), Peer()]
        busy = True
        queue = AckQueue(lambda: busy)
        for number, which in enumerate(order):
            queue.put(peers[which], str(number))
            await asyncio.sleep(0)
        assert not any(peer.heard for peer in peers)
        busy = False
        queue.written()
        await eventually(lambda: not len(queue), every=0)
        for which, peer in enumerate(peers):
            sent = [str(number) for number, each in enumerate(order) if each == which]
            read = [ack.text for ack in peer.heard]
            assert read[: MAX_WAITING - 1] == sent[: MAX_WAITING - 1]
            assert read[-1:] == sent[-1:]
            assert len(read) + sum(ack.missed for ack in peer.heard) == len(sent)

    asyncio.run(flood())


async def test_a_flood_of_acks_leaves_the_loop_to_others(admin: Api, backend: Api) -> None:
    """While one peer sends hundreds of acks, a read is answered as soon as ever."""
    await admin.create("a")
    async with backend.stream(client={"name": "flood", "instance": "1"}) as flood:
        await flood.frame()
        text = json.dumps({"ack": 1, "keys": {f"{n:x}": 1 for n in range(200)}})

        async def send() -> None:
            for _ in range(900):
                await flood.ws.send_str(text)

        sending = asyncio.create_task(send())
        loop = asyncio.get_running_loop()
        worst = 0.0
        while not sending.done():
            began = loop.time()
            await admin.get("/healthz")
            worst = max(worst, loop.time() - began)
        await sending
        await eventually(lambda: admin.server.running.services.fleet.own()[0].acks.count == 900)
        assert worst < 1.0
