"""One backend as the fleet knows it: when it listened, what it acked, which keys it holds.

Values and rules only; knows no connection, no database and no clock (docs/protocol.md section 4).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictBool, TypeAdapter

from slm.protocol import ClientInfo, Integer, NotInForce, Reason, Revision, ShortText, Text
from slm.server.fleet.ack_log import NOTHING, Acked, AckLog
from slm.server.security.agent_scope import EVERYTHING, View

SHARED_ACKS: Final = 32
"""How many of a backend's last acks are reported to other replicas."""

MAX_KEYS_BYTES: Final = 1024 * 1024
"""The memory limit for the list of keys that one backend holds; the rest is dropped."""

_MAX_STRETCHES: Final = 20
_KEY_BYTES: Final = 120
_LAST_SECOND: Final = 253_402_300_000.0
"""In the year 9999; later times are rejected."""


@dataclass
class Stretch:
    """One connection: the stream's head when it subscribed and when it ended."""

    first: int
    last: int | None = None
    ended_at: float | None = None


@dataclass
class Backend:
    """One backend process, across its reconnects, as one replica knows it.

    Attributes:
        id: stays the same across reconnects if the backend names its instance.
        client: how it identifies itself.
        token: the name of its token.
        replica: the lease of the server that it is, or was, connected to.
        server: that server's name, for people.
        view: what its token may see.
        plain_http: whether its last connection came over the network without TLS.
        since: when it connected or disconnected, in seconds since 1970.
        known_since: when it first connected; the first to use a name keeps it.
        stretches: its connections, the newest last.
        acks: what it reported as received.
        keys: agents whose held key differs from that of its last ack, with the key's revision.
        keys_partial: whether it named more keys than are kept.
        heard: how many acks its server has reported, if that is another server.
        in_step: whether everything its server reported is here, so that differences can be added.
    """

    id: str
    client: ClientInfo
    token: str
    replica: str
    server: str
    view: View = EVERYTHING
    plain_http: bool = False
    since: float = 0.0
    known_since: float = math.inf
    stretches: list[Stretch] = field(default_factory=list)
    acks: AckLog = field(default_factory=AckLog)
    keys: Mapping[str, int | None] = field(default_factory=dict)
    keys_partial: bool = False
    heard: int = 0
    in_step: bool = True

    @property
    def name(self) -> str:
        """Its own name and instance, or else its token's name; not always unique."""
        named = [part for part in (self.client.name, self.client.instance) if part]
        return "/".join(named) or self.token + "#" + self.id.rpartition("#")[2].rstrip('"]')

    @property
    def connected(self) -> bool:
        """Whether it is connected now."""
        return bool(self.stretches) and self.stretches[-1].last is None

    @property
    def applied(self) -> int | None:
        """The highest revision it acked; None if it never acked."""
        return self.acks.revision

    @property
    def not_in_force(self) -> Mapping[str, NotInForce]:
        """What its last ack reported as not applied, by agent."""
        last = self.acks.last
        return NOTHING if last is None else last.not_in_force

    @property
    def bytes(self) -> int:
        """Approximate memory use of what it reported."""
        return self.acks.bytes + _KEY_BYTES * len(self.keys)

    def begin(self, head: int, now: float) -> None:
        """Note that it subscribed."""
        self.end(head, now)
        if len(self.stretches) == _MAX_STRETCHES:
            # A backend that keeps reconnecting is still expected where it first connected.
            first, second, *later = self.stretches
            self.stretches = [Stretch(first.first, second.last, second.ended_at), *later]
        self.stretches = [*self.stretches, Stretch(head)]
        self.since = now
        self.known_since = min(self.known_since, now)

    def end(self, head: int, now: float) -> None:
        """Note that its connection has ended, if it has one."""
        if self.connected:
            self.stretches[-1].last = head
            self.stretches[-1].ended_at = now
            self.since = now

    def hold(self, keys: Mapping[str, int | None]) -> None:
        """Record which keys it reports to hold, up to the limit."""
        self.keys_partial = False
        size = 0
        for agent_id in keys:
            size += _KEY_BYTES + sys.getsizeof(agent_id)
            if size > MAX_KEYS_BYTES:
                self.keys_partial = True
                most = MAX_KEYS_BYTES // (2 * _KEY_BYTES)
                keys = dict(list(keys.items())[:most])
                break
        self.keys = keys

    def gone_with(self, head: int, at: float) -> Backend:
        """Return a copy for a lapsed lease of its server: disconnected since then or earlier.

        Args:
            head: how far that server's stream had come.
            at: when the lease ran out.
        """
        if not self.connected:
            return self
        *earlier, last = self.stretches
        return replace(self, stretches=[*earlier, Stretch(last.first, head, at)], since=at)

    def was_there(self, revision: int, committed_at: float) -> bool:
        """Whether it was connected when `revision` was committed, so that a receipt expects it."""
        return any(
            each.first < revision
            and (
                each.last is None
                or each.last >= revision
                # It disconnected between the commit and the push.
                or (each.ended_at is not None and each.ended_at >= committed_at)
            )
            for each in self.stretches
        )

    def together_with(self, other: Backend) -> Backend:
        """Merge what two replicas know about this backend."""
        newer = max(self, other, key=lambda each: (each.connected, each.since))
        older = other if newer is self else self
        said_last = max(self, other, key=lambda each: each.acks.last_at)
        # Ignore what a replica reports from a connection that has been replaced by another.
        until = newer.since if newer.connected else math.inf
        return replace(
            newer,
            known_since=min(self.known_since, other.known_since),
            stretches=[*older.stretches, *newer.stretches],
            acks=newer.acks.merged_with(older.acks, until),
            keys=said_last.keys,
            keys_partial=said_last.keys_partial,
        )

    def to_json(self, offset_seconds: float, told: int | None = None) -> dict[str, Any]:
        """Return it as JSON for other replicas.

        Args:
            offset_seconds: what to add to our times to get the database's.
            told: how many acks they already know; None if they may know nothing.
        """
        acks = self.acks
        oldest = max(acks.number - SHARED_ACKS, acks.number - len(acks))
        after = told is not None and oldest < told < acks.number
        if told is not None:
            oldest = max(oldest, told)
        said = list(acks.told(oldest, after=after)) if oldest < acks.number else []
        return {
            "client": self.client.model_dump(exclude_none=True),
            "token": self.token,
            "server": self.server,
            "view": self.view.to_text(),
            "plain_http": self.plain_http,
            "since": self.since + offset_seconds,
            "known_since": self.known_since + offset_seconds,
            "stretches": [
                [s.first, s.last, None if s.ended_at is None else s.ended_at + offset_seconds]
                for s in self.stretches
            ],
            "acks": [
                [a.revision, round(a.at + offset_seconds, 6), *([c] if c else [])] for a, c in said
            ],
            "after": after,
            "partial": acks.partial or any(a.partial for a, _ in said),
            "acked": acks.number,
            "keys": dict(self.keys),
            "keys_partial": self.keys_partial,
        }

    def take_over(self, data: Mapping[str, Any] | Told, offset_seconds: float) -> None:
        """Apply a report of its replica; acks that are already here stay."""
        told = data if isinstance(data, Told) else Told.of(data)
        self.client, self.token, self.server = told.client, told.token, told.server
        self.view, self.plain_http = View.from_text(told.view), told.plain_http
        self.since = told.since - offset_seconds
        known_since = told.since if told.known_since is None else told.known_since
        self.known_since = known_since - offset_seconds
        self.stretches = [
            Stretch(first, last, None if ended is None else ended - offset_seconds)
            for first, last, ended in told.stretches
        ]
        self.keys, self.keys_partial = told.keys, told.keys_partial
        self._take_acks(told, offset_seconds)

    def _take_acks(self, told: Told, offset_seconds: float) -> None:
        missed = told.acked - self.heard
        if missed < 0 or (not told.after and not self.in_step):
            # Its server started a new log, or repeats all of it after something was lost.
            self.acks.clear()
            self.in_step, missed = True, told.acked
        whole = missed >= len(told.acks)
        lost = missed > len(told.acks)
        if lost and told.after:
            self.in_step = False
        for place, (revision, at, *changes) in enumerate(
            told.acks if whole else told.acks[len(told.acks) - missed :]
        ):
            first = place == 0
            ack = Acked(
                revision,
                at - offset_seconds,
                NOTHING,
                after_gap=first and lost,
                partial=told.partial or not self.in_step,
            )
            anew = first and whole and not told.after
            self.acks.add_difference(ack, changes[0] if changes else {}, anew=anew)
        self.heard = told.acked


def identity(token: str, client: ClientInfo, otherwise: str) -> str:
    """Return a backend's id, stable across reconnects and rotations of a token with the same name.

    Args:
        token: the token's name.
        client: how the backend identifies itself.
        otherwise: distinguishes it from others if it names no instance.
    """
    if client.instance:
        return _id(token, client.name or "", client.instance)
    return _id(token, otherwise)


def _id(*parts: str) -> str:
    # Not joined with a separator, because a name may contain any character.
    return json.dumps(parts, ensure_ascii=False)


_SharedAck = (
    tuple[Integer, FiniteFloat]
    | tuple[Integer, FiniteFloat, dict[Text, tuple[Annotated[Integer, Field(ge=-1)], Reason]]]
)


class Told(BaseModel):
    """What another replica reports about a backend: the schema of a row, with limits."""

    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    client: ClientInfo
    token: ShortText
    server: ShortText
    view: Annotated[str, Field(max_length=64 * 1024)] | None
    since: Annotated[FiniteFloat, Field(ge=0, le=_LAST_SECOND)]
    known_since: Annotated[FiniteFloat, Field(ge=0, le=_LAST_SECOND)] | None = None
    plain_http: StrictBool = False
    stretches: Annotated[
        list[tuple[Integer, Integer | None, FiniteFloat | None]], Field(max_length=_MAX_STRETCHES)
    ]
    acks: Annotated[list[_SharedAck], Field(max_length=SHARED_ACKS)]
    after: StrictBool = False
    partial: StrictBool = False
    acked: Revision
    keys: dict[Text, Revision | None]
    keys_partial: StrictBool = False

    @classmethod
    def of(cls, data: Any) -> Told:
        """Parse a row.

        Raises:
            ValidationError: the row does not have this shape.
        """
        return _TOLD.validate_python(data)


_TOLD: Final = TypeAdapter(Told)


def cut_down(backends: Iterable[Backend], most_bytes: int) -> int:
    """Drop reported data until all of it fits into the limit; return the remaining size in bytes.

    Starts with the backends that reported most: history first, then state, held keys last.
    """
    largest = sorted(backends, key=lambda each: each.bytes, reverse=True)
    size = sum(each.bytes for each in largest)
    for forget in (AckLog.forget_older, AckLog.forget_refusals):
        for backend in largest:
            if size <= most_bytes:
                return size
            before = backend.bytes
            forget(backend.acks)
            size += backend.bytes - before
    for backend in largest:
        if size <= most_bytes:
            break
        size -= backend.bytes
        backend.keys, backend.keys_partial = {}, True
        size += backend.bytes
    return size
