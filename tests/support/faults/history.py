"""Says what is wrong with a recorded history of frames: the law of docs/protocol.md section 4.

Pure: it is given what was asked and what came, and knows no server, no socket and no clock. A fault
test passes only when this finds nothing, whatever the final state looks like.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

CHANGES: Final = frozenset({"agent_config_changed", "agent_created", "agent_deleted"})

Frame = dict[str, Any]

_SHAPES: Final[Mapping[str, Mapping[str, type | tuple[type, ...]]]] = {
    "subscribed": {"revision": int, "epoch": str, "heartbeat": (int, float)},
    "agent_config_changed": {"agent_id": str, "revision": int, "config": dict},
    "agent_created": {"agent_id": str, "revision": int, "config": dict},
    "agent_deleted": {"agent_id": str, "revision": int},
    "resync": {"revision": int, "epoch": str, "reason": str},
    "heartbeat": {"revision": int, "behind": bool},
    "error": {"code": str},
}
"""By type, what a frame must have; more is allowed, and so is a type that is not here."""


@dataclass
class Connection:
    """One connection of one subscriber: what it asked for and every frame it got, in order.

    Attributes:
        name: how a violation names it.
        since: the revision it asked to resume after; None for "from now on".
        epoch: the epoch that `since` belongs to.
        frames: the parsed frames.
        limited: whether its token sees some agents only (section 4, point 8).
        snapshots: whether it may resume from a snapshot newer than the last frame it got.
        change_id: which change `since` was; None where it said only the number.
    """

    name: str = "connection"
    since: int | None = None
    epoch: str | None = None
    frames: list[Frame] = field(default_factory=list)
    limited: bool = False
    snapshots: bool = False
    change_id: str | None = None


def violations(
    connections: Sequence[Connection],
    *,
    resyncs: Iterable[str] = (),
    committed: Mapping[tuple[str, int], Frame] | None = None,
) -> list[str]:
    """Return what breaks the contract in the history of one subscriber; empty when nothing does.

    Each frame is of its type's shape and without a key; ordered and unique (each change is the one
    after the last), no gaps between resyncs, resumable (`since` is answered from there or by a
    resync that was to be expected), a heartbeat never ahead, no revision that falls within an
    epoch, and nothing that was not committed. Each position is one change, whichever frame names
    it, and a resync right after `subscribed` names the same one.

    Args:
        connections: every connection of the subscriber, oldest first.
        resyncs: the reasons for which a resync is in order in this test; any other is a violation.
        committed: by epoch and revision, the change frame that the database stands for; None where
            the test does not know. A change it does not name was never committed.
    """
    found: list[str] = []
    allowed = frozenset(resyncs)
    last: _Position | None = None
    for connection in connections:
        checker = _Checker(connection, allowed, committed, last)
        found += checker.run()
        last = checker.position or last
    return found


def disagreements(histories: Iterable[Sequence[Connection]]) -> list[str]:
    """Return the revisions that two subscribers, or one subscriber twice, saw as different things.

    Only connections that see everything are compared: a limited one may see a deletion where the
    others see a change.
    """
    seen: dict[tuple[str, int], Frame] = {}
    found = []
    for connections in histories:
        for connection in connections:
            if connection.limited:
                continue
            for epoch, frame in _changes(connection):
                key = epoch, frame["revision"]
                if seen.setdefault(key, frame) != frame:
                    found.append(f"{connection.name}: revision {key[1]} is not what others saw")
    return found


def final_position(connections: Sequence[Connection]) -> tuple[str, int] | None:
    """Return epoch and revision up to which the subscriber was told everything."""
    last: _Position | None = None
    for connection in connections:
        checker = _Checker(connection, frozenset(), None, None)
        checker.run()
        last = checker.position or last
    return None if last is None else (last.epoch, last.revision)


def untold_losses(
    connections: Sequence[Connection], survived: Mapping[int, str], *, floor: int = 0
) -> list[str]:
    """Return the changes that one subscriber was shown, that are lost, and that no resync followed.

    Args:
        connections: every connection of the subscriber, oldest first.
        survived: by revision, the change id of what the database holds in the end.
        floor: what is compacted away up to here is not known to be lost.
    """
    lost: list[str] = []
    for connection in connections:
        for frame in filter(_is_of_its_type, connection.frames):
            revision = frame.get("revision", 0)
            if frame.get("type") == "resync":
                lost.clear()
            elif (
                frame.get("type") in CHANGES
                and revision > floor
                and survived.get(revision) != frame.get("change_id")
            ):
                lost.append(f"{connection.name}: revision {revision} was lost, and no resync")
    return lost


@dataclass
class _Position:
    epoch: str
    revision: int
    change_id: str | None = None


class _Checker:
    """Walks one connection, keeping the position that its frames add up to."""

    def __init__(
        self,
        connection: Connection,
        allowed: frozenset[str],
        committed: Mapping[tuple[str, int], Frame] | None,
        before: _Position | None,
    ) -> None:
        self.connection = connection
        self.allowed = allowed
        self.committed = committed
        self.before = before
        self.position: _Position | None = None
        self.heartbeat = -1
        self.found: list[str] = []

    def run(self) -> list[str]:
        frames = self.connection.frames
        if not frames:
            return []
        if frames[0].get("type") != "subscribed" or not _is_of_its_type(frames[0]):
            self.wrong(0, f"the first frame is {frames[0].get('type')!r}, not subscribed")
            return self.found
        self.subscribed(frames)
        for number, frame in enumerate(frames[1:], start=1):
            kind = frame.get("type")
            if not _is_of_its_type(frame):
                self.wrong(number, "this is no frame of the contract")
            elif kind in CHANGES:
                self.change(number, frame)
            elif kind == "heartbeat":
                self.beat(number, frame)
            elif kind == "resync":
                self.resync(number, frame)
            elif kind == "subscribed":
                self.wrong(number, "subscribed comes a second time")
        return self.found

    def subscribed(self, frames: Sequence[Frame]) -> None:
        first = frames[0]
        here = self.position = _Position(first["epoch"], first["revision"], first.get("change_id"))
        if first.get("head", here.revision) < here.revision:
            self.wrong(0, f"the head {first['head']} is before the start at {here.revision}")
        asked = self.connection.since
        second = frames[1] if len(frames) > 1 else {}
        resync = second.get("type") == "resync" and _is_of_its_type(second)
        if resync:
            named = _Position(second["epoch"], second["revision"], second.get("change_id"))
            if named != here:
                self.wrong(1, "subscribed and the resync after it name different positions")
        elif asked is not None and self.connection.epoch != here.epoch:
            self.wrong(0, "the epoch changed without a resync")
        elif asked is not None and here.revision != asked:
            self.wrong(0, f"asked for what follows {asked}, it starts at {here.revision}")
        elif (
            None not in (asked, self.connection.change_id, here.change_id)
            and self.connection.change_id != here.change_id
        ):
            self.wrong(0, f"asked for what follows {asked}, it starts after another change")
        before = self.before
        if before is None or before.epoch != here.epoch:
            return
        if asked is None or resync:
            if here.revision < before.revision:
                self.wrong(0, f"the revision fell from {before.revision} to {here.revision}")
        elif asked > before.revision and not self.connection.snapshots:
            self.wrong(0, f"asked for what follows {asked}, but was told up to {before.revision}")

    def change(self, number: int, frame: Frame) -> None:
        assert self.position is not None
        revision = frame["revision"]
        expected = self.position.revision + 1
        if revision <= self.position.revision:
            self.wrong(number, f"revision {revision} comes after {self.position.revision}")
        elif revision > expected:
            self.wrong(number, f"revisions {expected} to {revision - 1} are missing")
        if self.committed is not None:
            truth = self.committed.get((self.position.epoch, revision))
            if truth is None:
                self.wrong(number, f"revision {revision} was never committed")
            elif truth != frame and not self.connection.limited:
                self.wrong(number, f"revision {revision} is not what was committed")
        if revision > self.position.revision:
            self.position.revision = revision
            self.position.change_id = frame.get("change_id")

    def beat(self, number: int, frame: Frame) -> None:
        assert self.position is not None
        revision = frame["revision"]
        if revision < self.heartbeat:
            self.wrong(number, f"a heartbeat falls from {self.heartbeat} to {revision}")
        if revision > self.position.revision:
            if self.connection.limited:
                self.position.revision = revision
                self.position.change_id = frame.get("change_id")
            else:
                self.wrong(
                    number, f"a heartbeat names {revision}, sent is {self.position.revision}"
                )
        elif (
            revision == self.position.revision and frame.get("change_id") != self.position.change_id
        ):
            self.wrong(number, f"a heartbeat names another change as {revision}")
        self.heartbeat = max(self.heartbeat, revision)

    def resync(self, number: int, frame: Frame) -> None:
        assert self.position is not None
        if frame["reason"] not in self.allowed:
            self.wrong(number, f"an unexpected resync: {frame['reason']}")
        same = frame["epoch"] == self.position.epoch
        if same and frame["revision"] < self.position.revision:
            self.wrong(number, f"a resync goes back to {frame['revision']} in the same epoch")
        self.position = _Position(frame["epoch"], frame["revision"], frame.get("change_id"))
        self.heartbeat = -1

    def wrong(self, number: int, what: str) -> None:
        self.found.append(f"{self.connection.name} frame {number}: {what}")


def _is_of_its_type(frame: Frame) -> bool:
    kind = frame.get("type")
    if not isinstance(kind, str):
        return False
    shape = _SHAPES.get(kind, {})
    return all(isinstance(frame.get(name), kinds) for name, kinds in shape.items()) and not (
        "config" in shape and "llm_api_key" in frame["config"]
    )


def _changes(connection: Connection) -> Iterable[tuple[str, Frame]]:
    epoch = ""
    for frame in connection.frames:
        if not _is_of_its_type(frame):
            continue
        if frame.get("type") in ("subscribed", "resync"):
            epoch = frame["epoch"]
        elif frame.get("type") in CHANGES:
            yield epoch, frame
