"""The acks of one backend: when each arrived and what it refused, stored as differences, bounded.

Values and rules only; knows no connection, no database and no clock (docs/protocol.md section 4).
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Final, NamedTuple

from slm.protocol import NotInForce

RECEIPT_REVISIONS: Final = 1000
"""Receipts are available for this many past revisions."""

MAX_LOG_BYTES: Final = 1024 * 1024
"""The memory limit for one backend's acks; at the limit the older half is dropped."""

MAX_STATE_BYTES: Final = MAX_LOG_BYTES // 2
"""The memory limit for one ack's refusals; more are dropped, and the ack is marked partial."""

_SPARE: Final = 64
"""How many acks over the limit are kept before dropping the oldest, so not every ack shifts all."""

_ACK_BYTES: Final = 16
_SPAN_BYTES: Final = 160
_AGENT_BYTES: Final = 240
_IN_FORCE: Final = -1
NOTHING: Final[Mapping[str, NotInForce]] = {}

Span = tuple[int, int, str]
"""The ack from which it applies, the refused revision (-1: none), and the reason."""

Changes = dict[str, tuple[int, str]]
"""By agent: the revision refused from here on (-1: none), and the reason."""

_number_of = itemgetter(0)


class Acked(NamedTuple):
    """One ack.

    Attributes:
        revision: everything up to here was received.
        at: when it arrived, in seconds since 1970.
        not_in_force: agents whose change is not in use.
        after_gap: whether the acks right before it are missing here; its content may then have been
            true for longer.
        partial: whether it refused more than is kept; an agent it does not name may be one of
            those.
    """

    revision: int
    at: float
    not_in_force: Mapping[str, NotInForce]
    after_gap: bool = False
    partial: bool = False


class Outcome(NamedTuple):
    """How a backend handled a change.

    Attributes:
        answered: whether it answered at all.
        at: when it answered, if known.
        reason: why it refused; None if it applied the change.
    """

    answered: bool
    at: float | None = None
    reason: str | None = None


class AckLog:
    """The last acks of a backend, by revision; sixteen bytes each, since there are many.

    Attributes:
        number: the number of the next ack, counted from the very first.
        missed: how many further acks arrived but were not read.
        bytes: approximate memory use.
    """

    __slots__ = ("_gaps", "_partial", "_revisions", "_spans", "_times", "bytes", "missed", "number")

    def __init__(self) -> None:
        self.number = 0
        self.missed = 0
        self.bytes = 0
        self._revisions = array("q")
        self._times = array("d")
        # Values that few acks have are stored separately, by ack number.
        self._gaps: set[int] = set()
        self._partial: list[tuple[int, bool]] = []
        self._spans: dict[str, list[Span]] = {}

    def __len__(self) -> int:
        return len(self._revisions)

    def __iter__(self) -> Iterator[Acked]:
        return map(self._at, range(self._first, self.number))

    @property
    def count(self) -> int:
        """How many acks there have been in total."""
        return self.number + self.missed

    @property
    def last(self) -> Acked | None:
        """The newest ack."""
        return self._at(self.number - 1) if self._revisions else None

    @property
    def revision(self) -> int | None:
        """The revision of the newest ack."""
        return self._revisions[-1] if self._revisions else None

    @property
    def last_at(self) -> float:
        """When the newest ack arrived; 0 if there is none."""
        return self._times[-1] if self._times else 0.0

    @property
    def partial(self) -> bool:
        """Whether the newest ack refused more than is kept."""
        return bool(self._partial) and self._partial[-1][1]

    # --- adding ---

    def add(self, ack: Acked) -> None:
        """Add an ack that is newer than all before it."""
        refused, partial = _bounded(ack.not_in_force)
        self._append(ack.revision, ack.at, after_gap=ack.after_gap)
        self._refuse(refused, self.number - 1)
        self._note_partial(partial or ack.partial, self.number - 1)
        self._keep_to_bounds()

    def add_difference(self, ack: Acked, changes: Changes, *, anew: bool = False) -> None:
        """Add an ack by its difference from the previous one, or from none if `anew`.

        Args:
            ack: without its refusals.
            changes: how its refusals differ.
            anew: earlier refusals are withdrawn unless they are among the changes.
        """
        self._append(ack.revision, ack.at, after_gap=ack.after_gap)
        number = self.number - 1
        if anew:
            self._refuse(changes, number)
        else:
            for agent_id, (revision, reason) in changes.items():
                self._begin_span(agent_id, (number, revision, reason))
        self._note_partial(ack.partial, number)
        self._keep_to_bounds()

    def clear(self) -> None:
        """Forget what was acked; the numbering continues."""
        del self._revisions[:], self._times[:]
        self._gaps.clear()
        self._partial.clear()
        self._spans.clear()
        self.bytes = 0

    def forget_older(self, keep: int = 1) -> None:
        """Drop all but the newest acks, and forget any gap before them."""
        gone = len(self) - keep
        if gone > 0:
            self._drop(gone)
            self._gaps.add(self._first)

    def forget_refusals(self) -> None:
        """Drop the refusals too; what may have been refused is then not reported as applied."""
        if self._revisions:
            self.forget_older()
            self._spans.clear()
            self._partial = [(self._first, True)]
            self.bytes = _ACK_BYTES

    def merged_with(self, other: AckLog, until: float) -> AckLog:
        """Return one log of this one and of the other's acks before a time, ordered by time.

        The result must not be modified: if the other has nothing to add, it is this log itself.
        """
        end = other._first + bisect_left(other._times, until)
        if end == other._first:
            return self
        log = AckLog()
        mine, its = self._first, other._first
        while mine < self.number and its < end:
            # Copy whole runs: a backend stays on one server for a while, then on another.
            at, its_at = self._times[mine - self._first], other._times[its - other._first]
            if at <= its_at:
                stop = self._first + bisect_right(self._times, its_at, mine - self._first)
                self._copy_into(log, mine, stop)
                mine = stop
            else:
                stop = other._first + bisect_right(other._times, at, its - other._first)
                stop = min(stop, end)
                other._copy_into(log, its, stop)
                its = stop
        self._copy_into(log, mine, self.number)
        other._copy_into(log, its, end)
        return log

    # --- queries ---

    def outcome(self, agent_id: str, revision: int) -> Outcome:
        """Return how a change was handled, from the first ack that applied it, or else the last."""
        number = self._first + bisect_left(self._revisions, revision)
        refused: Outcome | None = None
        spans = self._spans.get(agent_id, ())
        while number < self.number:
            place = bisect_right(spans, number, key=_number_of)
            _, refused_revision, reason = spans[place - 1] if place else (0, _IN_FORCE, "")
            until = spans[place][0] if place < len(spans) else self.number
            if refused_revision >= revision:
                refused = Outcome(True, self._times[until - 1 - self._first], reason)
            else:
                whole = self._first_whole(number)
                if whole < until:
                    exact = whole == number and number not in self._gaps
                    return Outcome(True, self._times[whole - self._first] if exact else None)
            number = until
        return refused or Outcome(False)

    def told(self, number: int, *, after: bool) -> Iterator[tuple[Acked, Changes]]:
        """Yield each ack from this number on, without its refusals, and how those differ.

        Args:
            number: the number of the first ack, which must be in the log.
            after: describe the first by its difference from the one before; otherwise in full.
        """
        changes: dict[int, Changes] = {}
        before = self._state_at(number - 1) if after else {}
        state = self._state_at(number)
        changes[number] = {a: told for a, told in state.items() if before.get(a) != told}
        changes[number] |= {a: (_IN_FORCE, "") for a in before if a not in state}
        for agent_id, spans in self._spans.items():
            for span in spans[bisect_right(spans, number, key=_number_of) :]:
                changes.setdefault(span[0], {})[agent_id] = span[1:]
        for each in range(number, self.number):
            index = each - self._first
            revision, at = self._revisions[index], self._times[index]
            ack = Acked(revision, at, NOTHING, each in self._gaps, self._partial_at(each))
            yield ack, changes.get(each, {})

    # --- internals ---

    @property
    def _first(self) -> int:
        """The number of the oldest ack in the log."""
        return self.number - len(self._revisions)

    def _at(self, number: int) -> Acked:
        index = number - self._first
        state = self._state_at(number)
        return Acked(
            self._revisions[index],
            self._times[index],
            {a: NotInForce(revision=r, reason=t) for a, (r, t) in state.items()}
            if state
            else NOTHING,
            number in self._gaps,
            self._partial_at(number),
        )

    def _state_at(self, number: int) -> dict[str, tuple[int, str]]:
        state = {}
        for agent_id, spans in self._spans.items():
            place = bisect_right(spans, number, key=_number_of)
            if place and spans[place - 1][1] != _IN_FORCE:
                state[agent_id] = spans[place - 1][1:]
        return state

    def _partial_at(self, number: int) -> bool:
        place = bisect_right(self._partial, number, key=_number_of)
        return bool(place) and self._partial[place - 1][1]

    def _first_whole(self, number: int) -> int:
        """Return the first ack from here on with all its refusals kept."""
        if self._partial_at(number):
            later = self._partial[bisect_right(self._partial, number, key=_number_of) :]
            return next((each for each, partial in later if not partial), self.number)
        return number

    def _append(self, revision: int, at: float, *, after_gap: bool) -> None:
        if self._revisions and revision < self._revisions[-1]:
            # A new epoch moved the revision back, so acks of the old epoch are meaningless.
            self.clear()
        if after_gap:
            self._gaps.add(self.number)
        # Setting the clock back must not reorder the acks.
        self._times.append(max(at, self.last_at))
        self._revisions.append(revision)
        self.number += 1
        self.bytes += _ACK_BYTES

    def _refuse(self, refused: Mapping[str, tuple[int, str]], number: int) -> None:
        """Record the differences from the previous ack."""
        if not refused and not self._spans:
            return
        for agent_id, spans in self._spans.items():
            if spans[-1][1] != _IN_FORCE and agent_id not in refused:
                spans.append((number, _IN_FORCE, ""))
                self.bytes += _SPAN_BYTES
        for agent_id, (revision, reason) in refused.items():
            self._begin_span(agent_id, (number, revision, reason))

    def _begin_span(self, agent_id: str, span: Span) -> None:
        number, revision, reason = span
        spans = self._spans.get(agent_id)
        if spans is None:
            if revision == _IN_FORCE:
                return
            spans = self._spans[agent_id] = []
            self.bytes += _AGENT_BYTES + sys.getsizeof(agent_id)
        elif spans[-1][1:] == (revision, reason):
            return
        elif spans[-1][0] == number:
            self.bytes -= _span_bytes(spans.pop())
        # Many acks share a few reasons.
        spans.append((number, revision, sys.intern(reason)))
        self.bytes += _span_bytes(span)

    def _note_partial(self, partial: bool, number: int) -> None:
        if partial != self.partial:
            self._partial.append((number, partial))

    def _keep_to_bounds(self) -> None:
        if len(self) >= RECEIPT_REVISIONS + _SPARE:
            self.forget_older(RECEIPT_REVISIONS)
        while self.bytes > MAX_LOG_BYTES and len(self) > 1:
            self.forget_older(len(self) // 2)

    def _drop(self, gone: int) -> None:
        """Drop the oldest acks."""
        del self._revisions[:gone], self._times[:gone]
        first = self._first
        if self._gaps:
            self._gaps = {number for number in self._gaps if number >= first}
        if self._partial:
            later = [each for each in self._partial if each[0] > first]
            self._partial = [(first, self._partial_at(first)), *later]
        self.bytes = _ACK_BYTES * len(self)
        for agent_id, spans in [*self._spans.items()] if self._spans else ():
            place = bisect_right(spans, first, key=_number_of)
            if place:
                held = spans[place - 1]
                spans[:place] = [(first, held[1], held[2])] if held[1] != _IN_FORCE else []
            if not spans:
                del self._spans[agent_id]
                continue
            self.bytes += _AGENT_BYTES + sys.getsizeof(agent_id) + sum(map(_span_bytes, spans))

    def _copy_into(self, log: AckLog, start: int, stop: int) -> None:
        """Add the acks with these numbers to a log whose acks are all older."""
        if start >= stop:
            return
        first, end = start - self._first, stop - self._first
        if log._revisions and self._revisions[first] < log._revisions[-1]:
            log.clear()
        shift = log.number - start
        log._revisions.extend(self._revisions[first:end])
        log._times.extend(self._times[first:end])
        log.number += stop - start
        log.bytes += _ACK_BYTES * (stop - start)
        log._gaps.update(each + shift for each in self._gaps if start <= each < stop)
        log._note_partial(self._partial_at(start), start + shift)
        for number, partial in self._partial:
            if start < number < stop:
                log._note_partial(partial, number + shift)
        log._refuse(self._state_at(start), start + shift)
        for agent_id, spans in self._spans.items():
            for number, revision, reason in spans:
                if start < number < stop:
                    log._begin_span(agent_id, (number + shift, revision, reason))
        log._keep_to_bounds()


def _bounded(refused: Mapping[str, NotInForce]) -> tuple[dict[str, tuple[int, str]], bool]:
    """Return the part of an ack's refusals to keep, and whether any were dropped."""
    kept: dict[str, tuple[int, str]] = {}
    size = 0
    for agent_id, held_up in refused.items():
        size += _AGENT_BYTES + _SPAN_BYTES
        size += sys.getsizeof(agent_id) + sys.getsizeof(held_up.reason)
        if size > MAX_STATE_BYTES:
            return kept, True
        kept[agent_id] = (held_up.revision, held_up.reason)
    return kept, False


def _span_bytes(span: Span) -> int:
    return _SPAN_BYTES + (sys.getsizeof(span[2]) if span[2] else 0)
