"""The hub: all subscribers, and the task that writes committed changes to each connection.

Its outbox holds what is to be written, its buffers track what slow readers have not read. Knows no
database and no request; a `Sink` delivers the bytes (docs/protocol.md section 4).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from slm import protocol
from slm.common import tracing
from slm.protocol import Resync, Subscribed
from slm.server.agents.changes import CommittedChange, Position
from slm.server.security.agent_scope import EVERYTHING, View
from slm.server.settings import Settings
from slm.server.stream.buffers import Buffers
from slm.server.stream.encoding import Frames, Heartbeats, encode_change
from slm.server.stream.outbox import Outbox, Restart, ResyncReason
from slm.server.stream.subscriber import Observer, Sink, Subscriber
from slm.server.tasks.condition import Pulse
from slm.server.tasks.supervisor import Supervisor

logger = logging.getLogger(__name__)

ONE_TURN: Final = 1000
"""A broadcast to up to this many streams takes one turn of the loop, about ten milliseconds."""

YIELD_EVERY: Final = 200
"""In larger broadcasts, the event loop runs other tasks after this many writes.

Answering a GET takes two or three such turns; one write takes about 15 microseconds.
"""


@dataclass
class HubCounts:
    """What `/metrics` reports about the hub."""

    frames: int = 0
    evicted: int = 0
    resyncs: int = 0
    replays: int = 0


class Hub:
    """All connections, and the one task that writes committed changes to the live ones.

    A live subscriber has been sent everything up to `head`. A burst of changes becomes one write
    per connection.

    Args:
        on_pushed: called with how long after its commit a change was written to every live stream.
        on_written: called when a broadcast has been written.

    Attributes:
        outbox: what is to be broadcast.
        buffers: what slow readers have not read yet, and the limits.
        head: the last revision taken from the outbox; a subscriber at the head can join.
        epoch: the epoch of `head`.
        head_id: the change id of `head`.
        is_behind: called for each heartbeat; set by the feed.
        counts: for `/metrics`.
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
        self.outbox = Outbox()
        self.head, self.epoch, self.head_id = 0, "", ""
        self.is_behind: Callable[[], bool] = lambda: False
        self.counts = HubCounts()
        self._on_pushed, self._on_written = on_pushed, on_written
        self.heartbeat_seconds = settings.heartbeat_seconds
        self.buffers = Buffers(settings.buffer_bytes, settings.buffer_total_bytes, self._evict)
        # Checked after each write to each stream.
        self._held = self.buffers.held
        self._connections: set[Subscriber] = set()
        # In join order, which is close to memory order.
        self._live: dict[Subscriber, None] = {}
        self._beat = asyncio.Event()
        self._moved = Pulse()
        self._closing = False
        self._broadcasting = False
        supervisor = supervisor or Supervisor()
        self._tasks = [
            supervisor.task("broadcast", self._broadcast),
            supervisor.task("heartbeats", self._heartbeats),
        ]

    # --- start and stop ---

    def start(self, revision: int, epoch: str, change_id: str = "") -> None:
        """Start at the catalog's revision."""
        self.head, self.epoch, self.head_id = revision, epoch, change_id
        self.outbox.start(revision, epoch)
        self._observer.moved(revision, restarted=True)
        for task in self._tasks:
            task.start()

    async def stop(self) -> None:
        """Stop sending; remaining connections are cut."""
        for task in self._tasks:
            await task.stop()
        for subscriber in list(self._connections):
            subscriber.sink.abort()

    @property
    def running(self) -> bool:
        """Whether both tasks are running."""
        return all(task.running for task in self._tasks)

    async def close_streams(self, seconds: float) -> None:
        """Close all connections with 1012, over `seconds` so that not all return at once."""
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
        """Register a connection; it is sent nothing until it subscribes.

        Args:
            sink: where its frames go.
            view: what its token may see.
            token_id: the id of its token.
        """
        subscriber = Subscriber(sink, view, token_id)
        self._connections.add(subscriber)
        if self._closing:
            sink.end(1012, "restarting")
        return subscriber

    def detach(self, subscriber: Subscriber) -> None:
        """Remove a closed connection."""
        self._connections.discard(subscriber)
        self._leave(subscriber)
        self.buffers.measure(subscriber)
        self._observer.left(subscriber)

    def subscribers(self) -> list[Subscriber]:
        """Return all connected subscribers, for the fleet view and `/metrics`."""
        return list(self._connections)

    def live_count(self) -> int:
        """Return how many streams are live."""
        return len(self._live)

    # --- joining the live stream ---

    def begin(
        self, subscriber: Subscriber, revision: int, epoch: str, change_id: str | None = None
    ) -> None:
        """Send `subscribed`: what follows starts after `revision`.

        Args:
            subscriber: the connection.
            revision: the position it starts from.
            epoch: the epoch of that position.
            change_id: the change id of that position; None for the head's.
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
        """Whether the head is exactly this position; without an id, compares revision and epoch."""
        here = (revision, epoch) == (self.head, self.epoch)
        return here and change_id in (None, self.head_id)

    def join(self, subscriber: Subscriber) -> bool:
        """Make the subscriber live if it is at the head; takes one step of the event loop."""
        if not self.is_at(subscriber.position, subscriber.epoch, subscriber.change_id):
            return False
        if subscriber in self._connections and not self._closing:
            subscriber.live = True
            self._live[subscriber] = None
        return True

    def resync(self, subscriber: Subscriber, reason: ResyncReason) -> None:
        """Tell one subscriber to fetch a snapshot, and make it live from the head."""
        if not subscriber.epoch:
            self.begin(subscriber, self.head, self.epoch)
        self._move_to_head(subscriber)
        self._send_resync(subscriber, reason)
        self.join(subscriber)

    def _move_to_head(self, subscriber: Subscriber) -> None:
        subscriber.position, subscriber.epoch = self.head, self.epoch
        subscriber.change_id = self.head_id

    async def reached(self, revision: int, epoch: str, timeout: float) -> bool:
        """Wait until the stream reaches `revision` of `epoch`; return whether it does in time."""
        return await self._moved.until(
            lambda: self.epoch == epoch and self.head >= revision, timeout
        )

    async def can_go_on(self, at: Position, timeout: float) -> bool:
        """Wait until the stream is at or past a position, or has another epoch.

        Returns whether that happens in time.
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
        """Write to one subscriber and advance its position; return whether it is still connected.

        A reader that leaves more than its buffer unread is closed with 1013; others are not
        affected.
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
        if not waiting and (not self._held or subscriber not in self._held):
            return True
        return self.buffers.account(subscriber, waiting)

    def beat_now(self) -> None:
        """Send a heartbeat now, because `behind` has changed."""
        self._beat.set()

    # --- the two tasks ---

    async def _broadcast(self) -> None:
        if self._broadcasting:
            # The task was ended in the middle of a broadcast and restarted.
            self._send_everyone_back()
        while True:
            while self.outbox:
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
            self.outbox.filled.clear()
            await self.outbox.filled.wait()

    @property
    def is_writing(self) -> bool:
        """Whether changes are being written to the live streams."""
        return self._broadcasting

    def _send_everyone_back(self) -> None:
        """Close the live streams: which have the change is unknown. They resume without a gap."""
        self._broadcasting = False
        self._on_written()
        for subscriber in list(self._live):
            self._leave(subscriber)
            subscriber.sink.end(1011, "internal error")

    async def _broadcast_next(self) -> None:
        item = self.outbox.take()
        if isinstance(item, Restart):
            await self._broadcast_restart(item)
        else:
            await self._broadcast_frames(*item)

    async def _broadcast_frames(self, frames: Frames, changes: Sequence[CommittedChange]) -> None:
        # Before the first write: anyone who joins from now on must already have these changes.
        self.head, self.head_id = frames.head, frames.head_id
        self._observer.moved(frames.head)
        # Encode once for each distinct view.
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
            self.buffers.keep_to_total()
        tracing.end(pushing, {"slm.revision": frames.head, "slm.subscribers": len(self._live)})
        now = asyncio.get_running_loop().time()
        for seconds in self.outbox.seconds_since_commit(changes, now):
            self._on_pushed(seconds)

    async def _broadcast_restart(self, restart: Restart) -> None:
        self._observer.moved(restart.revision, restarted=restart.epoch != self.epoch)
        self.head, self.epoch = restart.revision, restart.epoch
        self.head_id = restart.change_id
        beats = Heartbeats(behind=self.is_behind())
        async for some in _in_turns(self._live):
            for subscriber in some:
                if subscriber.live:
                    # Directly after `subscribed`, a resync would be taken for the answer to
                    # `since`.
                    self.send(subscriber, beats.at(subscriber.position, subscriber.change_id))
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
            beats = Heartbeats(behind=self.is_behind())
            async for some in _in_turns(self._connections):
                for subscriber in some:
                    # Also during a replay: the position is what this connection has been sent.
                    if subscriber.epoch:
                        self.send(subscriber, beats.at(subscriber.position, subscriber.change_id))
                self.buffers.keep_to_total()

    # --- limits ---

    def expel(self, subscriber: Subscriber, reason: str, code: int = 1008) -> None:
        """Close a stream whose token is no longer valid or cannot be checked."""
        self._leave(subscriber)
        subscriber.sink.end(code, reason)

    def _leave(self, subscriber: Subscriber) -> None:
        subscriber.live = False
        self._live.pop(subscriber, None)

    def _evict(self, subscriber: Subscriber) -> bool:
        """Stop sending to a slow reader; return whether it was still connected."""
        if subscriber not in self._connections:
            return False
        self.counts.evicted += 1
        self._leave(subscriber)
        return True


async def _in_turns(subscribers: Collection[Subscriber]) -> AsyncIterator[list[Subscriber]]:
    """Yield the current subscribers, all at once or in groups, yielding to the loop in between."""
    everyone = list(subscribers)
    at_a_time = YIELD_EVERY if len(everyone) > ONE_TURN else ONE_TURN
    for start in range(0, len(everyone), at_a_time):
        if start:
            await asyncio.sleep(0)
        yield everyone[start : start + at_a_time]
