"""Snapshots of all agents with their keys: made once for all callers, kept sealed while valid.

A snapshot is valid while revision, epoch and key ring stay the same. Only one is made at a time and
the other callers wait; what is kept is ciphertext under a key of this process. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from slm.server.encryption.sealed import Sealer
from slm.server.security.agent_scope import View
from slm.server.security.audit import AuditEvent, Who
from slm.server.security.audit_reader import READ_ALL

KEPT_BYTES: Final = 64 * 1024 * 1024
"""The most bytes that all kept snapshots may take; the least recently used goes first."""

CHUNK_BYTES: Final = 128 * 1024
"""How many bytes of one are plain text at a time while it is made or sent."""

MAX_NAMED: Final = 500
"""The most agents that one row of the audit names; a larger snapshot has several rows."""

_SLICE: Final = 64
_PAUSE_SECONDS: Final = 0.0005


class Piece(NamedTuple):
    """One agent of a snapshot.

    Attributes:
        agent_id: the agent's id.
        json: the agent with its key.
        with_key: whether it contains a key.
        undecryptable: whether it should contain one that could not be decrypted.
    """

    agent_id: str
    json: bytes
    with_key: bool
    undecryptable: bool = False


class SnapshotHead(NamedTuple):
    """The state of the database that something was read at.

    The change id distinguishes two lines of changes that have the same numbers.
    """

    revision: int
    epoch: str
    keyring_version: int
    change_id: str | None

    def covers(self, other: SnapshotHead) -> bool:
        """Whether this is the same or a later state of the same epoch and key ring."""
        same_life = self[1:3] == other[1:3]
        return self == other or (same_life and self.revision > other.revision)


@dataclass(frozen=True, eq=False)
class SealedSnapshot:
    """The JSON answer of GET /api/snapshot, sealed.

    Attributes:
        head: the state it was read at.
        agents: how many agents it contains.
        with_key: the agents that it contains a key for.
        undecryptable: the agents with a key that could not be decrypted.
        size: the size of the JSON, in bytes.
    """

    head: SnapshotHead
    agents: int
    with_key: tuple[str, ...]
    undecryptable: frozenset[str]
    size: int
    _sealer: Sealer
    _chunks: tuple[bytes, ...]

    def chunks(self) -> Iterator[bytes]:
        """Yield the JSON in pieces; each is decrypted when it is requested."""
        for chunk in self._chunks:
            yield self._sealer.open(chunk, b"")

    @property
    def held_bytes(self) -> int:
        """Roughly how many bytes of memory it takes."""
        return self.size + sum(len(agent_id) + 64 for agent_id in self.with_key)

    def events(self, who: Who) -> list[AuditEvent]:
        """Return the audit entries for a response with it: every agent it contains a key for."""
        parts = -(-len(self.with_key) // MAX_NAMED)
        found = []
        for part in range(parts):
            named = self.with_key[part * MAX_NAMED : (part + 1) * MAX_NAMED]
            detail: dict[str, Any] = {"revision": self.head.revision, "keys": len(self.with_key)}
            detail["agents"] = named
            if parts > 1:
                detail |= {"part": part + 1, "parts": parts}
            found.append(AuditEvent(who, READ_ALL, detail=detail))
        return found


class SnapshotStore:
    """The snapshots that are kept, by view, and the one being made.

    Args:
        read: returns a view's agents with their keys and the state they were read at.
        kept_bytes: how many bytes may be kept.
    """

    def __init__(
        self,
        read: Callable[[View], Awaitable[tuple[SnapshotHead, Iterator[Piece]]]],
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._read = read
        self._kept_bytes = kept_bytes
        self._sealer = Sealer()
        self._kept: OrderedDict[View, SealedSnapshot] = OrderedDict()
        self._making = asyncio.Lock()

    @property
    def bytes_held(self) -> int:
        """How many bytes the kept snapshots take."""
        return sum(each.held_bytes for each in self._kept.values())

    def kept(self, view: View, head: SnapshotHead) -> SealedSnapshot | None:
        """Return the view's snapshot if it has exactly this state."""
        found = self._kept.get(view)
        return found if found is not None and found.head == head else None

    async def make(self, view: View, head: SnapshotHead) -> SealedSnapshot:
        """Return the view's snapshot of this state or a later one; all who wait share it.

        Raises:
            EncryptionKeyMissing: this replica does not have the active encryption key.
            DatabaseUnavailable: it cannot be read.
        """
        async with self._making:
            kept = self._kept.get(view)
            if kept is not None and kept.head.covers(head):
                self._kept.move_to_end(view)
                return kept
            read_at, agents = await self._read(view)
            # In a thread: thousands of agents take long enough to hold up the streams.
            made = await asyncio.to_thread(self._seal, read_at, agents)
            self._keep(view, made)
            return made

    def _keep(self, view: View, made: SealedSnapshot) -> None:
        self._kept.pop(view, None)
        self._kept[view] = made
        # The newest stays whatever its size, for its waiting callers; then it is the only one.
        while len(self._kept) > 1 and self.bytes_held > self._kept_bytes:
            self._kept.popitem(last=False)

    def _seal(self, head: SnapshotHead, agents: Iterator[Piece]) -> SealedSnapshot:
        with_key: list[str] = []
        undecryptable: set[str] = set()
        chunks: list[bytes] = []
        opening = {"revision": head.revision, "epoch": head.epoch, "change_id": head.change_id}
        text = json.dumps(opening, ensure_ascii=False)[:-1].encode() + b', "agents": ['
        size = count = 0
        pending = bytearray(text)
        for agent in agents:
            if count:
                pending += b", "
            pending += agent.json
            if agent.with_key:
                with_key.append(agent.agent_id)
            elif agent.undecryptable:
                undecryptable.add(agent.agent_id)
            count += 1
            if len(pending) >= CHUNK_BYTES:
                size += len(pending)
                chunks.append(self._sealer.seal(bytes(pending), b""))
                pending.clear()
            if count % _SLICE == 0:
                # Otherwise the event loop would wait for the interpreter's lock again and again.
                time.sleep(_PAUSE_SECONDS)
        pending += b"]}"
        size += len(pending)
        chunks.append(self._sealer.seal(bytes(pending), b""))
        return SealedSnapshot(
            head,
            count,
            tuple(with_key),
            frozenset(undecryptable),
            size,
            self._sealer,
            tuple(chunks),
        )
