"""The feed against a real database: what others commit, what goes wrong, and how it comes back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import Connection, delete, update

from slm.server.agents.changes import CommittedChange
from slm.server.agents.schemas import AgentCreate, AgentUpdate
from slm.server.db.tables import CHANGES, STATE
from slm.server.lifecycle.startup import prepare
from slm.server.security.agent_scope import EVERYTHING, View
from slm.server.security.audit import Who
from slm.server.services import Services, make_services
from slm.server.settings import Settings
from slm.server.stream import change_reader as news
from slm.server.stream import hub, outbox
from slm.server.stream.encoding import Frames, encode_change
from tests.support.faults.network import TEXT, FrameReader
from tests.support.servers import TENTH, eventually


@pytest.fixture
async def services(tmp_path: Path) -> AsyncIterator[Services]:
    """The parts of a server, without its HTTP; the feed runs."""
    settings = Settings(data_dir=tmp_path, **TENTH)
    prepared = await prepare(settings)
    parts = make_services(settings, prepared)
    await parts.feed.start()
    yield parts
    await parts.feed.stop()
    await parts.hub.stop()
    await prepared.database.close()


class Listener:
    """A subscriber's sink that keeps what it was sent."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def push(self, frames: Frames) -> int:
        self.texts.extend(text for text in frames.texts if '"heartbeat"' not in text[:20])
        return 0

    def waiting_bytes(self) -> int:
        return 0

    async def drained(self) -> None:
        pass

    def end(self, code: int, reason: str) -> None:
        self.texts.append(f"closed {code}")

    def abort(self) -> None:
        self.texts.append("aborted")


class Writes(Listener):
    """A listener that keeps each write of changes too, as the bytes that go on the wire."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def push(self, frames: Frames) -> int:
        if '"heartbeat"' not in frames.texts[0][:20]:
            self.writes.append(frames.encoded)
        return super().push(frames)


L = TypeVar("L", bound=Listener)


def listen(services: Services) -> Listener:
    """Join the live stream at its head."""
    return join(services, Listener())


def join(services: Services, listener: L, view: View = EVERYTHING) -> L:
    """Join the live stream at its head with a listener of one's own."""
    subscriber = services.hub.attach(listener, view)
    services.hub.begin(subscriber, services.hub.head, services.hub.epoch)
    assert services.hub.join(subscriber)
    return listener


def change_state(**values: Any) -> Callable[[Connection], None]:
    """Write into the state row as no server does."""

    def work(connection: Connection) -> None:
        connection.execute(update(STATE).values(**values))

    return work


async def create(services: Services, agent_id: str) -> int:
    """Commit an agent through the registry, and wake nobody."""
    agent = AgentCreate(agent_id=agent_id, name="n", llm_provider="ollama", llm_model="m")
    return (await services.registry.create(agent, who=Who("test"))).revision


async def test_the_poll_finds_what_nobody_told_of(services: Services) -> None:
    """A commit without a wake-up, as another replica's whose NOTIFY was lost, is found anyway."""
    revision = await create(services, "a")
    await eventually(lambda: services.feed.position == revision)
    assert services.catalog.get("a") is not None


async def test_passed_waits_for_the_catalog(services: Services) -> None:
    """`passed` is true once the catalog has the revision, and false when it does not come."""
    revision = await create(services, "a")
    assert await services.feed.passed(revision, timeout=10)
    assert services.catalog.revision == revision
    assert not await services.feed.passed(revision + 1, timeout=0.05)


async def test_the_feed_goes_on_after_an_outage(services: Services) -> None:
    """Without its database it says so and keeps trying; afterwards it has all that was missed."""
    listener = listen(services)
    await create(services, "before")
    await eventually(lambda: services.feed.position == 2)
    await services.database.close()
    await eventually(lambda: not services.feed.current)
    assert services.feed.running
    assert not await services.feed.settled(99)
    await services.database.open()
    await eventually(lambda: services.feed.current)
    await create(services, "after")
    await eventually(lambda: services.feed.position == 3)
    await eventually(lambda: len(listener.texts) == 3)
    assert ['"agent_created"' in text for text in listener.texts] == [False, True, True]


async def test_changes_that_are_gone_are_loaded_over(services: Services) -> None:
    """Cut off while the others compacted, it loads everything anew and says `resync`."""
    listener = listen(services)
    await services.feed.stop()
    for agent_id in ("a", "b", "c"):
        await create(services, agent_id)

    def compact(connection: Connection) -> None:
        connection.execute(delete(CHANGES).where(CHANGES.c.revision <= 3))
        connection.execute(update(STATE).values(floor=3))

    await services.database.run(compact)
    services.feed.follow()
    await eventually(lambda: services.feed.position == 4)
    assert [agent.agent_id for agent in services.catalog.agents()] == ["default", "a", "b", "c"]
    await eventually(lambda: len(listener.texts) == 2)
    assert '"resync"' in listener.texts[1]
    assert '"compacted"' in listener.texts[1]


async def test_a_hole_in_the_changes_is_never_passed_over(services: Services) -> None:
    """A row that is missing or cannot be read is no reason to skip it in silence."""
    listener = listen(services)
    await services.feed.stop()
    for agent_id in ("a", "b", "c"):
        await create(services, agent_id)

    def spoil(connection: Connection) -> None:
        connection.execute(update(CHANGES).where(CHANGES.c.revision == 3).values(agent="{}"))

    await services.database.run(spoil)
    services.feed.follow()
    await eventually(lambda: services.feed.position == 4)
    await eventually(lambda: len(listener.texts) == 2)
    assert '"resync"' in listener.texts[1]


async def test_too_far_behind_it_loads_everything(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a limit it does not read the changes one by one."""
    monkeypatch.setattr(news, "MAX_CATCH_UP", 3)
    listener = listen(services)
    await services.feed.stop()
    for number in range(5):
        await create(services, f"a{number}")
    services.feed.follow()
    await eventually(lambda: services.feed.position == 6)
    await eventually(lambda: len(listener.texts) == 2)
    assert '"resync"' in listener.texts[1]
    assert len(services.catalog) == 6


async def test_a_burst_goes_out_whole_and_in_order(services: Services) -> None:
    """Hundreds of changes at once are more than one write, and still each is there once."""
    listener = listen(services)
    await services.feed.stop()
    filler = {"filler": "x" * 3000}
    for number in range(100):
        update_ = AgentUpdate(llm_model=f"m{number}", llm_options=filler)
        await services.registry.update("default", update_, who=Who("test"))
    services.feed.follow()
    await eventually(lambda: len(listener.texts) == 101)
    assert [f'"m{number}"' in listener.texts[number + 1] for number in range(100)] == [True] * 100


@pytest.fixture
def encodes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, View]]:
    """Which revision was encoded for which view, each time the hub did it."""
    done: list[tuple[int, View]] = []

    def counting(change: CommittedChange, view: View = EVERYTHING) -> str:
        done.append((change.revision, view))
        return encode_change(change, view)

    for module in (outbox, hub):
        monkeypatch.setattr(module, "encode_change", counting)
    return done


def changes_ahead(services: Services, count: int) -> list[CommittedChange]:
    """Return the changes that could come next, as the feed would hand them over."""
    agent = services.catalog.agents()[0]
    first = services.hub.head + 1
    return [
        CommittedChange(
            revision, "agent_config_changed", agent.model_copy(update={"revision": revision}), True
        )
        for revision in range(first, first + count)
    ]


async def test_a_burst_is_one_encode_a_change_and_one_write_a_connection(
    services: Services, encodes: list[tuple[int, View]]
) -> None:
    """Changes that come together reach each listener by one write, each in a frame of its own."""
    everyone = [join(services, Writes()) for _ in range(20)]
    limited = [join(services, Writes(), View(("billing-*",))) for _ in range(10)]
    for listener in everyone + limited:
        listener.writes.clear()
    burst = changes_ahead(services, 5)
    for change in burst:
        services.hub.outbox.publish([change])
    assert await services.hub.reached(burst[-1].revision, services.hub.epoch, 10)

    revisions = [change.revision for change in burst]
    assert [revision for revision, view in encodes if view == EVERYTHING] == revisions
    # Those of one view share what was encoded for it.
    assert [revision for revision, view in encodes if view != EVERYTHING] == revisions
    for listener in everyone + limited:
        assert len(listener.writes) == 1
        frames = list(FrameReader().feed(listener.writes[0]))
        # 0x81: a text message that is whole.
        assert [frame.raw[0] for frame in frames] == [0x80 | TEXT] * 5
        assert [json.loads(frame.payload)["revision"] for frame in frames] == revisions
    assert len({listener.writes[0] for listener in everyone}) == 1


async def test_changes_that_come_during_a_broadcast_wait_for_one_write(
    services: Services, encodes: list[tuple[int, View]]
) -> None:
    """What is committed while one change is being written goes out together, right after it."""
    first, *rest = changes_ahead(services, 5)

    class Busy(Writes):
        def push(self, frames: Frames) -> int:
            if frames.head == first.revision:
                for change in rest:
                    services.hub.outbox.publish([change])
            return super().push(frames)

    listeners = [join(services, Writes()), join(services, Busy()), join(services, Writes())]
    for listener in listeners:
        listener.writes.clear()
    services.hub.outbox.publish([first])
    assert await services.hub.reached(rest[-1].revision, services.hub.epoch, 10)
    assert [revision for revision, _ in encodes] == [c.revision for c in [first, *rest]]
    for listener in listeners:
        frames = [list(FrameReader().feed(write)) for write in listener.writes]
        assert [len(each) for each in frames] == [1, 4]


async def test_other_changes_of_numbers_that_were_sent_are_no_repetition(
    services: Services,
) -> None:
    """What comes again is left out; another change of that number sends everyone to a snapshot."""
    listener = listen(services)
    first, second = changes_ahead(services, 2)
    for _ in range(2):
        services.hub.outbox.publish([first, second])
        assert await services.hub.reached(second.revision, services.hub.epoch, 10)

    def told() -> list[dict[str, Any]]:
        return [json.loads(text) for text in listener.texts[1:]]

    assert [frame["revision"] for frame in told()] == [first.revision, second.revision]
    services.hub.outbox.publish([replace(first, change_id="another")])
    await eventually(lambda: len(told()) == 3)
    resync = told()[2]
    assert (resync["type"], resync["reason"]) == ("resync", "forked")
    assert (resync["revision"], resync["change_id"]) == (first.revision, "another")
    services.hub.outbox.publish([replace(second, change_id="newer")])
    await eventually(lambda: len(told()) == 4)
    assert (told()[3]["revision"], told()[3]["change_id"]) == (second.revision, "newer")


async def test_one_broken_connection_leaves_the_others_live(services: Services) -> None:
    """A connection that fails when it is written to is cut; everyone else hears on."""

    class Broken(Listener):
        def push(self, frames: Frames) -> int:
            if '"subscribed"' in frames.texts[0]:
                return super().push(frames)
            raise OSError("broken")

    broken, good = Broken(), listen(services)
    subscriber = services.hub.attach(broken)
    services.hub.begin(subscriber, services.hub.head, services.hub.epoch)
    services.hub.join(subscriber)
    await create(services, "a")
    await eventually(lambda: len(good.texts) == 2)
    assert broken.texts[-1] == "aborted"
    assert not subscriber.live


async def test_a_broadcast_that_fails_sends_everyone_to_resume(services: Services) -> None:
    """Nobody may stay live with a hole: all streams end with 1011, and the next one works."""

    class BrokenView(View):
        def sees(self, agent_id: str, is_default: bool) -> bool:
            raise RuntimeError("broken")

    listeners = [listen(services) for _ in range(3)]
    subscriber = services.hub.attach(Listener(), BrokenView(()))
    services.hub.begin(subscriber, services.hub.head, services.hub.epoch)
    services.hub.join(subscriber)
    await create(services, "a")
    await eventually(lambda: [each.texts[-1] for each in listeners] == ["closed 1011"] * 3)
    assert services.hub.live_count() == 0
    assert services.hub.running
    again = listen(services)
    await create(services, "b")
    await eventually(lambda: len(again.texts) == 2)


async def test_a_new_epoch_is_followed(services: Services) -> None:
    """Another epoch in the state row loads everything and moves the catalog to it."""
    await services.database.run(change_state(epoch="cafe"))
    await eventually(lambda: services.feed.epoch == "cafe")
    assert services.hub.epoch == "cafe" or await services.hub.reached(1, "cafe", 10)


async def test_a_fallen_revision_is_given_a_new_epoch_once(services: Services) -> None:
    """The feed that sees the revision fall writes a new epoch; everyone after it finds that one."""
    old = services.feed.epoch
    await create(services, "a")
    await eventually(lambda: services.feed.position == 2)

    def fall(connection: Connection) -> None:
        connection.execute(delete(CHANGES).where(CHANGES.c.revision > 1))
        connection.execute(update(STATE).values(revision=1))

    await services.database.run(fall)
    await eventually(lambda: services.feed.epoch != old)
    horizon = await services.feed.horizon()
    assert (horizon.revision, horizon.epoch) == (1, services.feed.epoch)
    assert services.feed.position == 1
