"""Snapshots of all agents with their keys: made once for all who ask, kept sealed while they hold.

A snapshot is good for as long as revision, epoch and key ring are what they were. One is made at a
time and the rest wait; what is kept is ciphertext under a key of this process. Knows no HTTP.
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
"""What all snapshots that are kept may take; the one used longest ago goes first."""

CHUNK_BYTES: Final = 128 * 1024
"""How much of one is plain text at a time while it is made or sent."""

MAX_NAMED: Final = 500
"""How many agents one row of the audit names; a larger snapshot has several."""

_SLICE: Final = 64
_PAUSE_SECONDS: Final = 0.0005


class Piece(NamedTuple):
    """One agent of a snapshot.

    Attributes:
        agent_id: whose it is.
        json: the agent with its key.
        with_key: whether there is one in it.
        undecryptable: whether there should be, and it cannot be opened.
    """

    agent_id: str
    json: bytes
    with_key: bool
    undecryptable: bool = False


class SnapshotHead(NamedTuple):
    """Which state of the database something is of.

    The change's id tells a line of changes from another one that has the same numbers.
    """

    revision: int
    epoch: str
    keyring_version: int
    change_id: str | None

    def covers(self, other: SnapshotHead) -> bool:
        """Whether this is the same state or a later one of the same life and key ring."""
        same_life = self[1:3] == other[1:3]
        return self == other or (same_life and self.revision > other.revision)


@dataclass(frozen=True, eq=False)
class SealedSnapshot:
    """The JSON answer of GET /api/snapshot, sealed.

    Attributes:
        head: what it was read at.
        agents: how many agents it holds.
        with_key: those whose key it holds.
        undecryptable: those whose key could not be opened.
        size: of the JSON, in bytes.
    """

    head: SnapshotHead
    agents: int
    with_key: tuple[str, ...]
    undecryptable: frozenset[str]
    size: int
    _sealer: Sealer
    _chunks: tuple[bytes, ...]

    def chunks(self) -> Iterator[bytes]:
        """Yield the JSON in pieces; each is opened when it is asked for."""
        for chunk in self._chunks:
            yield self._sealer.open(chunk, b"")

    @property
    def held_bytes(self) -> int:
        """What it takes in memory, about."""
        return self.size + sum(len(agent_id) + 64 for agent_id in self.with_key)

    def events(self, who: Who) -> list[AuditEvent]:
        """Return what the audit says of an answer with it: every agent whose key it holds."""
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
    """The snapshots that are kept, by view, and the one that is being made.

    Args:
        read: returns a view's agents with their keys and the state they were read at.
        kept_bytes: what may be kept.
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
        """What is kept takes so much."""
        return sum(each.held_bytes for each in self._kept.values())

    def kept(self, view: View, head: SnapshotHead) -> SealedSnapshot | None:
        """Return the view's snapshot if it is of this very state."""
        found = self._kept.get(view)
        return found if found is not None and found.head == head else None

    async def make(self, view: View, head: SnapshotHead) -> SealedSnapshot:
        """Return the view's snapshot of this state or a later one; all who wait share it.

        Raises:
            EncryptionKeyMissing: this replica has not the encryption key that is in use now.
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
        # The newest stays whatever its size, for those who wait for it; it is the only one then.
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
                # The event loop would otherwise wait for the interpreter's lock again and again.
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
