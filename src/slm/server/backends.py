"""One backend as the fleet knows it: when it listened, what it acked, how it took a change.

Values and rules only; knows no connection, no database and no clock (docs/protocol.md section 4).
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, Final, NamedTuple

from slm.protocol import ClientInfo, NotInForce
from slm.server.view import EVERYTHING, View

RECEIPT_REVISIONS: Final = 1000
"""A receipt can be asked for this many revisions back."""

SHARED_ACKS: Final = 32
"""So many of a backend's last acks other replicas are told."""

_SPARE: Final = 64
"""So many acks more may be kept, so that not every one moves them all."""

_MAX_STRETCHES: Final = 20
_NOTHING: Final[Mapping[str, NotInForce]] = {}


class Acked(NamedTuple):
    """One ack.

    Attributes:
        revision: up to where everything was received.
        at: when it came, seconds since 1970.
        not_in_force: what of it is not in use.
        after_gap: whether acks right before it are not known here: then what it says may have been
            so for longer.
    """

    revision: int
    at: float
    not_in_force: Mapping[str, NotInForce]
    after_gap: bool = False


class AckLog:
    """The last acks of a backend, by revision; sixteen bytes each, since there are many.

    Attributes:
        count: how many there ever were.
    """

    __slots__ = ("_dropped", "_gaps", "_refusals", "_revisions", "_times", "count")

    def __init__(self) -> None:
        self.count = 0
        self._revisions = array("q")
        self._times = array("d")
        # What few acks have is kept apart, by the number of the ack; the first here has this one.
        self._dropped = 0
        self._gaps: list[int] = []
        # From which ack on this was refused, until the next.
        self._refusals: list[tuple[int, Mapping[str, NotInForce]]] = []

    def __len__(self) -> int:
        return len(self._revisions)

    def __iter__(self) -> Iterator[Acked]:
        return map(self._at, range(len(self)))

    @property
    def last(self) -> Acked | None:
        """The newest ack."""
        return self._at(len(self) - 1) if self._revisions else None

    def add(self, ack: Acked) -> None:
        """Take in an ack that is newer in time than all before it."""
        if self._revisions and ack.revision < self._revisions[-1]:
            # Another epoch moved it back: what it acked of the old one means nothing now.
            self.clear()
        self.count += 1
        number = self._dropped + len(self)
        if ack.after_gap:
            self._gaps.append(number)
        if ack.not_in_force != (self._refusals[-1][1] if self._refusals else _NOTHING):
            self._refusals.append((number, ack.not_in_force))
        self._revisions.append(ack.revision)
        self._times.append(ack.at)
        if len(self) >= RECEIPT_REVISIONS + _SPARE:
            self._drop(_SPARE)
            if self._gaps[:1] != [self._dropped]:
                self._gaps.insert(0, self._dropped)

    def clear(self) -> None:
        """Forget what was acked; the count goes on."""
        self._drop(len(self))
        self._refusals.clear()

    def newest(self, count: int) -> AckLog:
        """Return a log of the newest ones alone, which nobody changes."""
        log = AckLog()
        log.count, log._dropped = self.count, self._dropped
        log._revisions, log._times = self._revisions[:], self._times[:]
        log._gaps, log._refusals = self._gaps[:], self._refusals[:]
        log._drop(max(0, len(self) - count))
        return log

    def since(self, revision: int) -> Iterator[Acked]:
        """Yield the acks of `revision` and later ones, the oldest first."""
        return map(self._at, range(bisect_left(self._revisions, revision), len(self)))

    def _at(self, index: int) -> Acked:
        number = self._dropped + index
        return Acked(
            self._revisions[index],
            self._times[index],
            self._refused_at(number),
            number in self._gaps,
        )

    def _refused_at(self, number: int) -> Mapping[str, NotInForce]:
        place = bisect_right(self._refusals, number, key=itemgetter(0))
        return self._refusals[place - 1][1] if place else _NOTHING

    def _drop(self, gone: int) -> None:
        """Forget the oldest."""
        del self._revisions[:gone], self._times[:gone]
        self._dropped += gone
        held = self._refused_at(self._dropped)
        later = [each for each in self._refusals if each[0] > self._dropped]
        self._refusals = [(self._dropped, held), *later] if held or later else []
        self._gaps = [number for number in self._gaps if number >= self._dropped]


@dataclass
class Stretch:
    """One connection: the head of the stream when it subscribed, and when it had ended."""

    first: int
    last: int | None = None
    ended_at: float | None = None


@dataclass
class Backend:
    """One backend process, across its reconnects, as one replica knows it.

    Attributes:
        id: the same across reconnects where the backend names its instance.
        client: who it says it is.
        token: the name of its token.
        replica: the lease of the server that it is, or was, connected to.
        server: that server's name, for people.
        view: what its token may see.
        since: when it came or went, seconds since 1970.
        stretches: its connections, the newest last.
        acks: what it said it received.
        keys: agents whose held key is not that of its last ack, with the key's revision.
    """

    id: str
    client: ClientInfo
    token: str
    replica: str
    server: str
    view: View = EVERYTHING
    since: float = 0.0
    stretches: list[Stretch] = field(default_factory=list)
    acks: AckLog = field(default_factory=AckLog)
    keys: Mapping[str, int | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What to call it: its name and instance as it gave them, else its token's name."""
        named = [part for part in (self.client.name, self.client.instance) if part]
        return "/".join(named) or f"{self.token}#{self.id.rpartition('#')[2]}"

    @property
    def connected(self) -> bool:
        """Whether it listens now."""
        return bool(self.stretches) and self.stretches[-1].last is None

    @property
    def applied(self) -> int | None:
        """The highest revision it acked; None as long as it never did."""
        last = self.acks.last
        return None if last is None else last.revision

    @property
    def not_in_force(self) -> Mapping[str, NotInForce]:
        """What it last said is not in force, by agent."""
        last = self.acks.last
        return _NOTHING if last is None else last.not_in_force

    def begin(self, head: int, now: float) -> None:
        """Note that it subscribed."""
        self.end(head, now)
        if len(self.stretches) == _MAX_STRETCHES:
            # Who comes and goes is still expected where it was first.
            first, second, *later = self.stretches
            self.stretches = [Stretch(first.first, second.last, second.ended_at), *later]
        self.stretches = [*self.stretches, Stretch(head)]
        self.since = now

    def end(self, head: int, now: float) -> None:
        """Note that its connection is gone, if it has one."""
        if self.connected:
            self.stretches[-1].last = head
            self.stretches[-1].ended_at = now
            self.since = now

    def was_there(self, revision: int, committed_at: float) -> bool:
        """Whether it listened when `revision` was committed: then a receipt expects it."""
        return any(
            each.first < revision
            and (
                each.last is None
                or each.last >= revision
                # Gone between the commit and the push.
                or (each.ended_at is not None and each.ended_at >= committed_at)
            )
            for each in self.stretches
        )

    def together_with(self, other: Backend) -> Backend:
        """Return one backend out of what two replicas know of it."""
        newer = max(self, other, key=lambda each: (each.connected, each.since))
        whole = Backend(
            **{name: getattr(newer, name) for name in ("id", "client", "token", "replica")},
            server=newer.server,
            view=newer.view,
            since=newer.since,
            keys=max(self, other, key=_last_ack_at).keys,
        )
        older = other if newer is self else self
        whole.stretches = [*older.stretches, *newer.stretches]
        # What a replica hears from a connection that has been given up for another is no news.
        until = newer.since if newer.connected else math.inf
        acks = [*newer.acks, *(each for each in older.acks if each.at < until)]
        for ack in sorted(acks, key=lambda each: each.at):
            whole.acks.add(ack)
        return whole

    def told(self) -> Backend:
        """Return a copy for other replicas, to be written while further acks come in."""
        return replace(self, acks=self.acks.newest(SHARED_ACKS))

    def to_json(self, offset_seconds: float) -> dict[str, Any]:
        """Return it for other replicas; `offset_seconds` makes our times the database's."""
        return {
            "client": self.client.model_dump(exclude_none=True),
            "token": self.token,
            "server": self.server,
            "view": self.view.to_text(),
            "since": self.since + offset_seconds,
            "stretches": [
                [s.first, s.last, None if s.ended_at is None else s.ended_at + offset_seconds]
                for s in self.stretches
            ],
            "acks": [
                [a.revision, a.at + offset_seconds]
                + ([{k: [v.revision, v.reason] for k, v in a.not_in_force.items()}])
                * bool(a.not_in_force)
                for a in self.acks
            ],
            "acked": self.acks.count,
            "keys": dict(self.keys),
        }

    def take_over(self, data: Mapping[str, Any], offset_seconds: float) -> None:
        """Take in what its replica tells of it; acks that are here already stay."""
        self.client = ClientInfo.model_validate(data["client"])
        self.token, self.server = data["token"], data["server"]
        self.view = View.from_text(data["view"])
        self.since = data["since"] - offset_seconds
        self.stretches = [
            Stretch(first, last, None if ended is None else ended - offset_seconds)
            for first, last, ended in data["stretches"]
        ]
        self.keys = data["keys"]
        acks = [
            Acked(
                revision,
                at - offset_seconds,
                {k: NotInForce(revision=r, reason=t) for k, (r, t) in refused[0].items()}
                if refused
                else _NOTHING,
            )
            for revision, at, *refused in data["acks"]
        ]
        missed = data["acked"] - self.acks.count
        if missed < 0:
            # Its server started its log anew.
            self.acks.clear()
            missed = data["acked"]
        if missed > len(acks):
            acks[:1] = [ack._replace(after_gap=True) for ack in acks[:1]]
        for ack in acks[max(0, len(acks) - missed) :]:
            self.acks.add(ack)
        self.acks.count = data["acked"]


def _last_ack_at(backend: Backend) -> float:
    last = backend.acks.last
    return 0.0 if last is None else last.at


class Subject(NamedTuple):
    """What a receipt is about.

    Attributes:
        agent_id: the agent that was changed.
        is_default: whether it is, or was, the default: then everyone may see it.
        revision: that of the change.
        committed_at: seconds since 1970.
        changed: False where the write altered nothing: then whoever is connected now is expected.
    """

    agent_id: str
    is_default: bool
    revision: int
    committed_at: float
    changed: bool = True


class Outcome(NamedTuple):
    """How a backend took a change.

    Attributes:
        answered: whether it did so at all.
        at: when, where that is known.
        reason: why it refused; None where it applied the change.
    """

    answered: bool
    at: float | None = None
    reason: str | None = None


def outcome_of(backend: Backend, subject: Subject) -> Outcome:
    """Return how `backend` took the change: the first ack that has it in force, else the last."""
    refused: Outcome | None = None
    for ack in backend.acks.since(subject.revision):
        held_up = ack.not_in_force.get(subject.agent_id)
        if held_up is None or held_up.revision < subject.revision:
            return Outcome(True, None if ack.after_gap else ack.at)
        refused = Outcome(True, ack.at, held_up.reason)
    return refused or Outcome(False)
