"""Everyone who listens: bounded buffers, and one encoded frame written to each connection.

Fed by the feed alone, with what is committed. Knows no database and no HTTP; how bytes reach a peer
is the business of a `Sink` (docs/protocol.md section 4).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from slm import protocol
from slm.common import tracing
from slm.protocol import ClientInfo, Heartbeat, Resync, Subscribed
from slm.server.agents.changes import CommittedChange, Position
from slm.server.security.agent_scope import EVERYTHING, View
from slm.server.settings import Settings
from slm.server.stream.encoding import MAX_WRITE_BYTES, Frames, encode_change
from slm.server.tasks.condition import Pulse
from slm.server.tasks.supervisor import Supervisor

logger = logging.getLogger(__name__)

ResyncReason = Literal["compacted", "epoch", "ahead", "forked", "far-behind"]

ONE_TURN: Final = 1000
"""A broadcast to no more than these is one turn of the loop, some ten milliseconds."""

YIELD_EVERY: Final = 200
"""In a larger one everyone else in the loop has a turn after so many writes.

An answer to a GET needs two or three of them, and a write takes some 15 microseconds.
"""


class Sink(Protocol):
    """Where a subscriber's frames go; the order of `push` is the order on the wire."""

    def push(self, frames: Frames) -> int:
        """Write without waiting; return how many bytes wait for the peer, -1 once it is closed."""

    def waiting_bytes(self) -> int:
        """Return how many bytes wait for the peer to read, or of what it sends for the rest."""

    async def drained(self) -> None:
        """Wait until the peer has read most of it, or is gone."""

    def end(self, code: int, reason: str) -> None:
        """Close with a WebSocket close code; a peer that does not answer is cut."""

    def abort(self) -> None:
        """Cut the connection now and throw away what waits."""


class Observer(Protocol):
    """Who is told of streams and of the head: the fleet."""

    def moved(self, head: int, *, restarted: bool = False) -> None:
        """Hear the head that the stream has reached; `restarted`: in another epoch."""

    def joined(self, subscriber: Subscriber) -> None:
        """Hear that `subscribed` goes out to this connection."""

    def left(self, subscriber: Subscriber) -> None:
        """Hear that a connection is gone, subscribed or not."""


class Subscriber:
    """One connection's stream.

    Attributes:
        sink: where its frames go.
        position: the last revision it was sent, or started at.
        epoch: the epoch of that position; empty before it subscribed.
        change_id: which change that position is.
        live: whether the hub's broadcast includes it.
        view: what its token may see.
        token_id: whose token it is; None where no token opened it.
        client: who it says it is.
        plain_http: whether it came over the network without TLS.
    """

    # A broadcast visits thousands; each line of memory less is seen in its time.
    __slots__ = (
        *("change_id", "client", "epoch", "live", "plain_http", "position", "sink", "token_id"),
        "view",
    )

    def __init__(self, sink: Sink, view: View = EVERYTHING, token_id: int | None = None) -> None:
        self.sink = sink
        self.view = view
        self.token_id = token_id
        self.position = 0
        self.epoch = ""
        self.change_id = ""
        self.live = False
        self.client: ClientInfo | None = None
        self.plain_http = False


@dataclass(frozen=True)
class _Restart:
    """In the queue of frames: from here on another epoch counts, or a hole was found."""

    epoch: str
    revision: int
    reason: ResyncReason
    change_id: str


@dataclass
class HubCounts:
    """What `/metrics` tells of the hub."""

    changes: int = 0
    frames: int = 0
    evicted: int = 0
    resyncs: int = 0
    replays: int = 0


class Hub:
    """All connections, and the one task that writes the committed changes to the live ones.

    A live subscriber has been sent everything up to `head`. Frames wait in one queue for all, so a
    slow broadcast never holds up the feed, and a burst becomes one write a connection.

    Args:
        settings: what the operator set.
        observer: the fleet.
        supervisor: whose tasks the hub's are.
        on_pushed: told how long after its commit a change was written to every live stream.
        on_written: told when a broadcast is written.

    Attributes:
        head: the last revision that was taken out of the queue; whoever reached it can join.
        epoch: the epoch that `head` belongs to.
        head_id: which change `head` is.
        is_behind: asked for each heartbeat; set by the feed.
        counts: for `/metrics`.
        committed_at: when the changes that wait here were committed, where this server did it.
    """

    def __init__(
        self,
        settings: Settings,
        observer: Observer,
        supervisor: Supervisor | None = None,
        *,
        on_pushed: Callable[[float], None] = lambda seconds: None,
        on_written: Callable[[], None] = lambda: None,
    ) -> None:
        self._observer = observer
        self.head = 0
        self.epoch = ""
        self.head_id = ""
        # The last revision that was put into the queue, and which changes the last ones were.
        self._queued_head = 0
        self._queued_ids: dict[int, str] = {}
        self._queued_epoch = ""
        self.is_behind: Callable[[], bool] = lambda: False
        self.counts = HubCounts()
        self.committed_at: dict[int, float] = {}
        self._on_pushed = on_pushed
        self._on_written = on_written
        self.heartbeat_seconds = settings.heartbeat_seconds
        self._buffer_bytes = settings.buffer_bytes
        self._buffer_total_bytes = settings.buffer_total_bytes
        self._connections: set[Subscriber] = set()
        # In the order of joining, which is nearly that of memory.
        self._live: dict[Subscriber, None] = {}
        # Who holds memory here, those that are closing too, as it was when last looked at.
        self._waiting: dict[Subscriber, int] = {}
        self._waiting_bytes = 0
        self._queue: deque[tuple[CommittedChange, str] | _Restart] = deque()
        self._queued = asyncio.Event()
        self._beat = asyncio.Event()
        self._moved = Pulse()
        self._closing = False
        self._broadcasting = False
        supervisor = supervisor or Supervisor()
        self._tasks = [
            supervisor.task("broadcast", self._broadcast),
            supervisor.task("heartbeats", self._heartbeats),
        ]

    # --- its life ---

    def start(self, revision: int, epoch: str, change_id: str = "") -> None:
        """Begin at the catalog's revision."""
        self.head, self.epoch, self.head_id = revision, epoch, change_id
        self._queued_head, self._queued_epoch = revision, epoch
        self._observer.moved(revision, restarted=True)
        for task in self._tasks:
            task.start()

    async def stop(self) -> None:
        """Stop sending; connections that are left are cut."""
        for task in self._tasks:
            await task.stop()
        for subscriber in list(self._connections):
            subscriber.sink.abort()

    @property
    def running(self) -> bool:
        """Whether both tasks are at work."""
        return all(task.running for task in self._tasks)

    async def close_streams(self, seconds: float) -> None:
        """Close every connection with 1012, spread over `seconds`: not all return at once."""
        self._closing = True
        subscribers = list(self._connections)
        pause = seconds / len(subscribers) if subscribers else 0
        loop = asyncio.get_running_loop()
        due = loop.time()
        for subscriber in subscribers:
            self._leave(subscriber)
            subscriber.sink.end(1012, "restarting")
            due += pause
            await asyncio.sleep(max(0.0, due - loop.time()))

    # --- connections ---

    def attach(
        self, sink: Sink, view: View = EVERYTHING, token_id: int | None = None
    ) -> Subscriber:
        """Take a connection in; it hears nothing before it subscribes.

        Args:
            sink: where its frames go.
            view: what its token may see.
            token_id: whose token it is.
        """
        subscriber = Subscriber(sink, view, token_id)
        self._connections.add(subscriber)
        if self._closing:
            sink.end(1012, "restarting")
        return subscriber

    def detach(self, subscriber: Subscriber) -> None:
        """Forget a connection that is gone."""
        self._connections.discard(subscriber)
        self._leave(subscriber)
        self._measure(subscriber)
        self._observer.left(subscriber)

    def subscribers(self) -> list[Subscriber]:
        """Return everyone who is connected, for the fleet view and `/metrics`."""
        return list(self._connections)

    def live_count(self) -> int:
        """Return how many streams are live."""
        return len(self._live)

    def buffered_bytes(self) -> int:
        """Return how many bytes wait for slow readers and slow writers."""
        return sum(self.buffers())

    def buffers(self) -> list[int]:
        """Return how many bytes wait for each of them."""
        for subscriber in list(self._waiting):
            self._measure(subscriber)
        return list(self._waiting.values())

    # --- the way into the live stream ---

    def begin(
        self, subscriber: Subscriber, revision: int, epoch: str, change_id: str | None = None
    ) -> None:
        """Say `subscribed`: what follows starts after `revision`.

        Args:
            subscriber: the connection.
            revision: the position that it stands at.
            epoch: of the position.
            change_id: which change is there; None: that of the head.
        """
        subscriber.position, subscriber.epoch = revision, epoch
        subscriber.change_id = self.head_id if change_id is None else change_id
        self._observer.joined(subscriber)
        message = Subscribed(
            revision=revision,
            epoch=epoch,
            heartbeat=self.heartbeat_seconds,
            head=max(self.head, revision),
            change_id=subscriber.change_id or None,
        )
        self.send(subscriber, Frames((protocol.encode(message),), revision))

    def is_at(self, revision: int, epoch: str, change_id: str | None) -> bool:
        """Whether the head is this very position; without an id, of this number and epoch."""
        here = (revision, epoch) == (self.head, self.epoch)
        return here and change_id in (None, self.head_id)

    def join(self, subscriber: Subscriber) -> bool:
        """Make the subscriber live if it has everything up to the head; one step of the loop."""
        if not self.is_at(subscriber.position, subscriber.epoch, subscriber.change_id):
            return False
        if subscriber in self._connections and not self._closing:
            subscriber.live = True
            self._live[subscriber] = None
        return True

    def resync(self, subscriber: Subscriber, reason: ResyncReason) -> None:
        """Tell one subscriber to take a snapshot, and make it live from the head on."""
        if not subscriber.epoch:
            self.begin(subscriber, self.head, self.epoch)
        self._move_to_head(subscriber)
        self._send_resync(subscriber, reason)
        self.join(subscriber)

    def _move_to_head(self, subscriber: Subscriber) -> None:
        subscriber.position, subscriber.epoch = self.head, self.epoch
        subscriber.change_id = self.head_id

    async def reached(self, revision: int, epoch: str, timeout: float) -> bool:
        """Wait until the stream is at `revision` of `epoch`; return whether it is in time."""
        return await self._moved.until(
            lambda: self.epoch == epoch and self.head >= revision, timeout
        )

    async def can_go_on(self, at: Position, timeout: float) -> bool:
        """Wait until the stream is at a position or beyond it, or gets another epoch.

        Return whether it is in time.
        """
        before = self.epoch
        return await self._moved.until(
            lambda: (
                self.is_at(*at)
                or (self.epoch == at.epoch and self.head > at.revision)
                or self.epoch != before
            ),
            timeout,
        )

    def send(self, subscriber: Subscriber, frames: Frames) -> bool:
        """Write to one subscriber and move its position; return whether it is still there.

        A reader that leaves more than its buffer waiting is closed with 1013: it costs only itself.
        """
        try:
            waiting = subscriber.sink.push(frames)
        except Exception as error:
            # One broken connection must not end the broadcast to all others.
            logger.error("writing to a connection failed with %s", type(error).__name__)
            subscriber.sink.abort()
            waiting = -1
        if waiting < 0:
            self._leave(subscriber)
            return False
        if subscriber.position != frames.head:
            subscriber.position, subscriber.change_id = frames.head, frames.head_id
        self.counts.frames += len(frames.texts)
        if not waiting and (not self._waiting or subscriber not in self._waiting):
            return True
        return self._account(subscriber, waiting)

    def note_waiting(self, subscriber: Subscriber, unsent_bytes: int) -> None:
        """Account for bytes that wait for a peer, or from it, and that the hub did not send."""
        self._account(subscriber, unsent_bytes)
        self._keep_to_total()

    def _account(self, subscriber: Subscriber, unsent_bytes: int) -> bool:
        """Note what waits; return whether the subscriber is still there."""
        self._measure(subscriber)
        if unsent_bytes <= self._buffer_bytes:
            return True
        if subscriber in self._connections:
            self.counts.evicted += 1
            self._leave(subscriber)
            subscriber.sink.end(1013, "too slow")
        return False

    def _measure(self, subscriber: Subscriber) -> None:
        waiting = subscriber.sink.waiting_bytes()
        self._waiting_bytes += waiting - self._waiting.pop(subscriber, 0)
        if waiting:
            self._waiting[subscriber] = waiting

    # --- from the feed ---

    def publish(self, changes: Iterable[CommittedChange]) -> None:
        """Queue committed changes, in order, all or none; each is encoded once, here.

        What is in the queue already is left out: a feed that failed after this comes again. Where
        it has other changes of these numbers then, as after a failover, everyone takes a snapshot.
        """
        changes = list(changes)
        if not changes:
            return
        # A feed begins where it has passed all before on.
        known = {r: i for r, i in self._queued_ids.items() if r >= changes[0].revision}
        self._queued_ids = known | {change.revision: change.change_id for change in changes}
        if any(self._queued_ids[revision] != known[revision] for revision in known):
            head = changes[-1]
            self.restart(self._queued_epoch, head.revision, "forked", head.change_id)
            return
        encoded = [
            (change, encode_change(change))
            for change in changes
            if change.revision > self._queued_head
        ]
        if not encoded:
            return
        self._queue.extend(encoded)
        self._queued_head = encoded[-1][0].revision
        self.counts.changes += len(encoded)
        self._queued.set()

    def restart(self, epoch: str, revision: int, reason: ResyncReason, change_id: str = "") -> None:
        """Send everyone to a snapshot: another epoch counts, or changes are missing."""
        self.committed_at.clear()
        self._queue.append(_Restart(epoch, revision, reason, change_id))
        self._queued_head, self._queued_epoch = revision, epoch
        self._queued_ids.clear()
        self._queued.set()

    def beat_now(self) -> None:
        """Send a heartbeat at once: `behind` has changed."""
        self._beat.set()

    # --- the two tasks ---

    async def _broadcast(self) -> None:
        if self._broadcasting:
            # The task was ended in the middle of one and started again.
            self._send_everyone_back()
        while True:
            while self._queue:
                self._broadcasting = True
                try:
                    await self._broadcast_next()
                except Exception as error:
                    logger.error("a broadcast failed with %s", type(error).__name__)
                    self._send_everyone_back()
                self._broadcasting = False
                self._on_written()
                self._moved.fire()
                await asyncio.sleep(0)
            self._queued.clear()
            await self._queued.wait()

    @property
    def is_writing(self) -> bool:
        """Whether changes are on their way to the live streams."""
        return self._broadcasting

    def _send_everyone_back(self) -> None:
        """Close the live streams, which resume without a gap: it is unknown who has the change."""
        self._broadcasting = False
        self._on_written()
        for subscriber in list(self._live):
            self._leave(subscriber)
            subscriber.sink.end(1011, "internal error")

    async def _broadcast_next(self) -> None:
        if isinstance(self._queue[0], _Restart):
            await self._broadcast_restart(self._take_restart())
        else:
            await self._broadcast_frames(*self._take_frames())

    def _take_restart(self) -> _Restart:
        item = self._queue.popleft()
        assert isinstance(item, _Restart)  # noqa: S101 - for the type checker
        return item

    def _take_frames(self) -> tuple[Frames, list[CommittedChange]]:
        texts: list[str] = []
        changes: list[CommittedChange] = []
        size = 0
        while self._queue:
            item = self._queue[0]
            if isinstance(item, _Restart) or (texts and size + len(item[1]) > MAX_WRITE_BYTES):
                break
            self._queue.popleft()
            changes.append(item[0])
            texts.append(item[1])
            size += len(item[1])
        return Frames(tuple(texts), changes[-1].revision, changes[-1].change_id), changes

    async def _broadcast_frames(self, frames: Frames, changes: Sequence[CommittedChange]) -> None:
        # Before the first write: whoever joins from here on must already have these.
        self.head, self.head_id = frames.head, frames.head_id
        self._observer.moved(frames.head)
        # One encoding for each view that there is.
        limited: dict[View, Frames] = {}
        pushing = tracing.begin_joined("slm.push", changes[-1].traceparent)
        async for some in _in_turns(self._live):
            for subscriber in some:
                if subscriber.live:
                    view, seen = subscriber.view, frames
                    if view is not EVERYTHING:
                        if view not in limited:
                            texts = tuple(encode_change(change, view) for change in changes)
                            limited[view] = Frames(texts, frames.head, frames.head_id)
                        seen = limited[view]
                    self.send(subscriber, seen)
            self._keep_to_total()
        tracing.end(pushing, {"slm.revision": frames.head, "slm.subscribers": len(self._live)})
        self._tell_pushed(changes)

    def _tell_pushed(self, changes: Sequence[CommittedChange]) -> None:
        now = asyncio.get_running_loop().time()
        for change in changes:
            committed_at = self.committed_at.pop(change.revision, None)
            if committed_at is not None:
                self._on_pushed(now - committed_at)

    async def _broadcast_restart(self, restart: _Restart) -> None:
        self._observer.moved(restart.revision, restarted=restart.epoch != self.epoch)
        self.head, self.epoch = restart.revision, restart.epoch
        self.head_id = restart.change_id
        behind = self.is_behind()
        encoded: dict[tuple[int, str], Frames] = {}
        async for some in _in_turns(self._live):
            for subscriber in some:
                if subscriber.live:
                    # Right after `subscribed` a resync would be taken for the answer to `since`.
                    self.send(subscriber, self._heartbeat(subscriber, behind, encoded))
                    self._move_to_head(subscriber)
                    self._send_resync(subscriber, restart.reason)

    def _send_resync(self, subscriber: Subscriber, reason: ResyncReason) -> None:
        self.counts.resyncs += 1
        message = Resync(
            revision=subscriber.position,
            epoch=subscriber.epoch,
            reason=reason,
            change_id=subscriber.change_id or None,
        )
        self.send(subscriber, Frames((protocol.encode(message),), subscriber.position))

    async def _heartbeats(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self.heartbeat_seconds):
                    await self._beat.wait()
            except TimeoutError:
                pass
            self._beat.clear()
            behind = self.is_behind()
            # Nearly all are at one position; each position is encoded once.
            encoded: dict[tuple[int, str], Frames] = {}
            async for some in _in_turns(self._connections):
                for subscriber in some:
                    # During a replay too: the position is what this connection was sent.
                    if subscriber.epoch:
                        self.send(subscriber, self._heartbeat(subscriber, behind, encoded))
                self._keep_to_total()

    @staticmethod
    def _heartbeat(
        subscriber: Subscriber, behind: bool, encoded: dict[tuple[int, str], Frames]
    ) -> Frames:
        position = subscriber.position, subscriber.change_id
        frames = encoded.get(position)
        if frames is None:
            revision, change_id = position
            beat = Heartbeat(revision=revision, behind=behind, change_id=change_id or None)
            frames = encoded[position] = Frames((protocol.encode(beat),), revision)
        return frames

    # --- limits ---

    def expel(self, subscriber: Subscriber, reason: str, code: int = 1008) -> None:
        """Close a stream whose token is not valid any more, or cannot be checked."""
        self._leave(subscriber)
        subscriber.sink.end(code, reason)

    def _leave(self, subscriber: Subscriber) -> None:
        subscriber.live = False
        self._live.pop(subscriber, None)

    def _keep_to_total(self) -> None:
        """Cut the largest buffers while all together hold more than the total."""
        if self._waiting_bytes <= self._buffer_total_bytes:
            return
        self.buffers()
        for subscriber in sorted(self._waiting, key=self._waiting.__getitem__, reverse=True):
            if self._waiting_bytes <= self._buffer_total_bytes:
                return
            self._waiting_bytes -= self._waiting.pop(subscriber)
            if subscriber in self._connections:
                self.counts.evicted += 1
                self._leave(subscriber)
            subscriber.sink.abort()


async def _in_turns(subscribers: Collection[Subscriber]) -> AsyncIterator[list[Subscriber]]:
    """Yield those who are there now, all or some at a time, and between them to the loop."""
    everyone = list(subscribers)
    at_a_time = YIELD_EVERY if len(everyone) > ONE_TURN else ONE_TURN
    for start in range(0, len(everyone), at_a_time):
        if start:
            await asyncio.sleep(0)
        yield everyone[start : start + at_a_time]
