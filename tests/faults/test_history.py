"""The history checker is itself checked: right histories pass, each kind of wrong is found."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.faults.history import (
    Connection,
    Frame,
    disagreements,
    final_position,
    untold_losses,
    violations,
)

pytestmark = pytest.mark.history(streams=False)

EPOCH = "e1"


def subscribed(revision: int, epoch: str = EPOCH) -> Frame:
    return {
        "type": "subscribed",
        "channel": "agent_config",
        "revision": revision,
        "epoch": epoch,
        "heartbeat": 2,
    }


def changed(revision: int, model: str | None = None) -> Frame:
    return {
        "type": "agent_config_changed",
        "agent_id": "a",
        "revision": revision,
        "config": {"llm_model": model or f"m{revision}"},
    }


def heartbeat(revision: int) -> Frame:
    return {"type": "heartbeat", "revision": revision, "behind": False}


def resync(revision: int, epoch: str = EPOCH, reason: str = "compacted") -> Frame:
    return {"type": "resync", "revision": revision, "epoch": epoch, "reason": reason}


def connection(*frames: Frame, since: int | None = None, epoch: str = EPOCH) -> Connection:
    return Connection("c", since, None if since is None else epoch, list(frames))


def test_a_right_history_passes() -> None:
    """Start at the head, changes, heartbeats, a cut, a resume, an unknown type: all in order."""
    first = connection(subscribed(4), heartbeat(4), changed(5), changed(6), heartbeat(6))
    second = connection(subscribed(6), changed(7), {"type": "news"}, heartbeat(7), since=6)
    assert violations([first, second]) == []
    assert final_position([first, second]) == (EPOCH, 7)


def test_a_connection_cut_before_its_first_frame_says_nothing() -> None:
    """A handshake that was cut is no violation, and does not hide what came before it."""
    first = connection(subscribed(4), changed(5))
    assert violations([first, connection(since=5), connection(subscribed(5), since=5)]) == []
    assert final_position([first, connection(since=5)]) == (EPOCH, 5)


def test_an_expected_resync_passes() -> None:
    """A resync that the test expects moves the position, and what follows starts after it."""
    first = connection(subscribed(4), changed(5))
    second = connection(subscribed(9), resync(9), changed(10), since=5)
    assert violations([first, second], resyncs=["compacted"]) == []
    third = connection(subscribed(2, "e2"), resync(2, "e2", "epoch"), changed(3), since=10)
    assert violations([first, second, third], resyncs=["compacted", "epoch"]) == []
    assert final_position([first, second, third]) == ("e2", 3)


def test_a_limited_token_is_told_by_heartbeats() -> None:
    """Under point 8 a heartbeat passes revisions over; without a limit the same is a violation."""
    frames = [subscribed(4), changed(5), heartbeat(7), changed(8)]
    assert violations([Connection("c", frames=frames, limited=True)]) == []
    assert violations([Connection("c", frames=frames)]) != []


@pytest.mark.parametrize(
    ("frames", "since", "says"),
    [
        ([subscribed(4), changed(6)], None, "5 to 5 are missing"),
        ([subscribed(4), changed(5), changed(5)], None, "5 comes after 5"),
        ([subscribed(4), changed(5), changed(6), changed(5)], None, "5 comes after 6"),
        ([subscribed(4), heartbeat(5)], None, "names 5, sent is 4"),
        ([subscribed(4), heartbeat(5), changed(5)], None, "names 5, sent is 4"),
        ([subscribed(4), changed(5), heartbeat(5), heartbeat(4)], None, "falls from 5 to 4"),
        ([subscribed(4)], 3, "asked for what follows 3, it starts at 4"),
        ([subscribed(4, "e2")], 4, "the epoch changed without a resync"),
        ([subscribed(9), resync(9)], 3, "unexpected resync: compacted"),
        ([subscribed(9), resync(8)], 3, "different positions"),
        ([subscribed(9), changed(10), resync(8)], None, "goes back to 8"),
        ([changed(5)], None, "not subscribed"),
        ([subscribed(4), subscribed(4)], None, "a second time"),
        ([subscribed(4), {"type": None}], None, "no frame of the contract"),
        ([subscribed(4), heartbeat(4) | {"revision": "4"}], None, "no frame of the contract"),
        (
            [subscribed(4), changed(5) | {"config": {"llm_api_key": None}}],
            None,
            "no frame of the contract",
        ),
    ],
)
def test_each_kind_of_wrong_is_found(frames: list[Frame], since: int | None, says: str) -> None:
    """Gaps, doubles, disorder, heartbeats ahead, silent holes and unexpected resyncs are named."""
    assert says in "\n".join(violations([connection(*frames, since=since)]))


def test_a_hole_between_two_connections_is_found() -> None:
    """Resuming later than one's position is the client's hole; falling back is the server's."""
    first = connection(subscribed(4), changed(5), changed(6))
    assert violations([first, connection(subscribed(4))]) == [
        "c frame 0: the revision fell from 6 to 4"
    ]
    skipped = connection(subscribed(7), since=7)
    assert violations([first, skipped]) == [
        "c frame 0: asked for what follows 7, but was told up to 6"
    ]
    skipped.snapshots = True
    assert violations([first, skipped]) == []


def test_what_was_never_committed_is_found() -> None:
    """A frame that the database does not hold, or holds differently, is a violation."""
    committed = {(EPOCH, 5): changed(5), (EPOCH, 6): changed(6)}
    assert violations([connection(subscribed(4), changed(5))], committed=committed) == []
    wrong = violations(
        [connection(subscribed(4), changed(5, "x"), changed(6), changed(7))], committed=committed
    )
    assert ["is not what was committed" in wrong[0], "never committed" in wrong[1]] == [True, True]


def test_two_subscribers_that_saw_different_things_are_found() -> None:
    """The same revision of the same epoch is the same frame for everyone."""
    one = [connection(subscribed(4), changed(5))]
    other = [connection(subscribed(4), changed(5, "x"))]
    elsewhere = [connection(subscribed(4, "e2"), changed(5, "x"))]
    assert disagreements([one, one, elsewhere]) == []
    assert disagreements([one, other]) == ["c: revision 5 is not what others saw"]


@st.composite
def right_histories(draw: st.DrawFn) -> list[Connection]:
    """A subscriber with some connections, cut anywhere, resumed where it was."""
    position = draw(st.integers(0, 20))
    found = []
    since: int | None = None
    for number in range(draw(st.integers(1, 4))):
        frames = [subscribed(position)]
        for _ in range(draw(st.integers(0, 6))):
            if draw(st.booleans()):
                position += 1
                frames.append(changed(position))
            else:
                frames.append(heartbeat(position))
        found.append(Connection(f"c{number}", since, EPOCH, frames))
        since = position
    return found


@given(right_histories())
def test_every_right_history_passes(history: list[Connection]) -> None:
    """Whatever is cut and resumed in order is no violation."""
    assert violations(history) == []
    assert disagreements([history]) == []


@given(right_histories(), st.data())
def test_every_change_dropped_doubled_or_swapped_is_found(
    history: list[Connection], data: Any
) -> None:
    """Drop, double or swap any change that others follow, and the checker says so."""
    places = [
        (c, n)
        for c, each in enumerate(history)
        for n, frame in enumerate(each.frames)
        if frame["type"] == "agent_config_changed"
    ]
    last = places[-1:]
    if not places:
        return
    kind = data.draw(st.sampled_from(["drop", "double", "swap"]))
    c, n = data.draw(st.sampled_from(places))
    broken = copy.deepcopy(history)
    frames = broken[c].frames
    if kind == "double":
        frames.insert(n, copy.deepcopy(frames[n]))
    elif [(c, n)] == last and c == len(history) - 1 and kind == "drop":
        # At the very end only a heartbeat after it tells it from a change that is yet to come.
        frames[n] = heartbeat(frames[n]["revision"])
    elif kind == "drop":
        del frames[n]
    else:
        following = [m for m in range(n + 1, len(frames)) if frames[m]["type"] != "heartbeat"]
        if not following:
            return
        frames[n], frames[following[0]] = frames[following[0]], frames[n]
    assert violations(broken) != []


def test_a_position_is_one_change() -> None:
    """A change, a heartbeat and a start that name one revision name one change id."""
    right = connection(
        subscribed(4) | {"change_id": "i4", "head": 5},
        changed(5) | {"change_id": "i5"},
        heartbeat(5) | {"change_id": "i5"},
        since=4,
    )
    right.change_id = "i4"
    assert violations([right]) == []
    right.change_id = "another"
    assert "starts after another change" in violations([right])[0]
    right.change_id = None
    right.frames[2]["change_id"] = "another"
    assert "names another change as 5" in violations([right])[0]
    right.frames[1:] = [resync(4) | {"change_id": "another"}]
    assert "different positions" in violations([right], resyncs=["compacted"])[0]
    right.frames[0]["head"] = 3
    assert "the head 3 is before the start at 4" in violations([right], resyncs=["compacted"])[0]


def test_a_loss_that_no_resync_followed_is_found() -> None:
    """What was shown and is in the database no more must be taken back, on whichever connection."""
    shown = connection(subscribed(4), changed(5) | {"change_id": "lost"})
    survived = {4: "i4", 5: "new"}
    assert "revision 5 was lost" in untold_losses([shown], survived)[0]
    assert untold_losses([shown], survived, floor=5) == []
    assert untold_losses([shown], {5: "lost"}) == []
    again = connection(subscribed(4, "b"), resync(4, "b"), since=5)
    assert untold_losses([shown, again], survived) == []
    assert untold_losses([again, shown], survived) != []
