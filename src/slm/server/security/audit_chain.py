"""The audit's chain: what a row contains, and the hash that binds it to the previous row.

Pure rules over values; knows no database, so that exported files are checked by the same rules.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from slm.server.strict_json import whole_number

GENESIS: Final = "0" * 64
"""Stands for the hash before the first row."""


@dataclass(frozen=True)
class ChainEntry:
    """One row of the audit, as it was read."""

    seq: int
    at: str
    actor: str
    action: str
    agent_id: str | None
    address: str | None
    detail: str
    hash: str

    def hash_after(self, before: str) -> str:
        """Return the hash that this row must have after a row with the hash `before`."""
        told = (self.seq, self.at, self.actor, self.action, self.agent_id, self.address)
        text = json.dumps([before, *told, self.detail], ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def wrong_after(self, seq: int, before: str) -> str:
        """Return why this is not the row that follows `seq`; empty if it is."""
        if self.seq != seq + 1:
            return "a row is missing"
        try:
            whole = self.hash_after(before) == self.hash
        except TypeError:
            # SQLite stores bytes even in a text column.
            whole = False
        return "" if whole else "the row was altered"


class Link(NamedTuple):
    """A place in the chain: a row's number and its hash."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"


START: Final = Link(0, GENESIS)


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Attributes:
        rows: how many rows the chain has up to its head, or up to where it breaks.
        head: `seq:hash` of the last row; noted elsewhere, it proves later that nothing before it
            was altered.
        broken_at: the first row that is not as it was written; None if all are.
        reason: why; empty if nothing is wrong.
        cut: `seq:hash` of the last row that was exported and removed; None if none was.
    """

    rows: int
    head: str
    broken_at: int | None = None
    reason: str = ""
    cut: str | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing was altered."""
        return self.broken_at is None


_OTHER_HEAD: Final = "the chain was rewritten: it does not have the noted head"


class Walk:
    """Follows the chain row by row and stops at the first one that is wrong.

    Args:
        start: the link before the first row.
        noted: a link that the chain must contain, if it gets that far.
    """

    def __init__(self, start: Link, noted: Link | None = None) -> None:
        self.start = start
        self.at = start
        self.reason = ""
        self._noted = noted
        if noted is not None and noted.seq == start.seq and noted != start:
            self.reason = _OTHER_HEAD

    def go(self, entries: Iterable[ChainEntry]) -> bool:
        """Check these rows; return whether all are right so far."""
        if self.reason:
            return False
        for entry in entries:
            reason = entry.wrong_after(*self.at)
            noted = self._noted
            if not reason and noted and noted.seq == entry.seq and noted.hash != entry.hash:
                reason = _OTHER_HEAD
            if reason:
                self.reason = reason
                return False
            self.at = Link(entry.seq, entry.hash)
        return True

    def verdict(self, broken_at: int | None = None, reason: str = "") -> Verdict:
        """Return the result; without arguments, the chain ends after the last correct row."""
        if self.reason:
            broken_at, reason = self.at.seq + 1, self.reason
        cut = None if self.start == START else str(self.start)
        return Verdict(self.at.seq - self.start.seq, str(self.at), broken_at, reason, cut)


def parse_link(text: str) -> Link | None:
    """Return the link in `seq:hash`; None if the text is not one."""
    number, _, digest = text.partition(":")
    seq = whole_number(number)
    return None if seq is None else Link(seq, digest)
