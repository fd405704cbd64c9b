"""Keeps the cache in sync with the SLM: stream messages, snapshots, and the client's status.

The stream receives, the fetchers request, the cache stores. Knows no socket and nothing about the
chain. Runs in one event loop.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Protocol

from slm.client.cache.cache import AgentConfigCache
from slm.client.cache.freshness import NEVER
from slm.client.runtime.log import quiet_logger
from slm.client.runtime.tasks import Tasks
from slm.client.status import ClientStatus
from slm.client.sync.acks import Acks
from slm.client.sync.agent_fetcher import AgentFetcher
from slm.client.sync.backoff import Backoff, status_after
from slm.client.sync.failures import Failures
from slm.client.sync.key_fetcher import KeyFetcher
from slm.client.sync.polling import Poller, leave_for_a_better_one
from slm.client.sync.questions import Questions
from slm.client.sync.stream import Resume, StoodStill, Stream
from slm.client.timings import Timings
from slm.client.transport.credentials import Watch
from slm.client.transport.http import Connection
from slm.common import tracing
from slm.errors import SLMError
from slm.protocol import (
    AgentChanged,
    AgentDeleted,
    Explain,
    Explanation,
    Heartbeat,
    Resync,
    ServerMessage,
    Subscribed,
)

_log = quiet_logger("slm.client")


class Owner(Protocol):
    """The owner of the cache: the follower."""

    def swapped(self, agent_id: str) -> None:
        """Called when an agent's config was swapped, removed or enabled."""

    def became_live(self) -> None:
        """Called when the cache became live."""

    async def explained(self, agent_id: str) -> Explanation:
        """Explain how an agent is resolved, when the SLM asks."""


class Synchroniser:
    """The work for one connection; created in its event loop, started once, closed once.

    Args:
        cache: what is kept in sync.
        connection: sends requests to the SLM; closed with this.
        stream: receives from the SLM.
        acks: report what was received.
        timings: all durations.
        owner: the owner of the cache.

    Attributes:
        fetcher: fetches what is not known.
        closed: whether it was closed.
        settled: set once waiting for the SLM's state is pointless.
    """

    def __init__(
        self,
        cache: AgentConfigCache,
        connection: Connection,
        stream: Stream,
        acks: Acks,
        timings: Timings,
        owner: Owner,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.closed = False
        self.settled = asyncio.Event()
        self._cache = cache
        self._position = cache.position
        self._timings = timings
        self._owner = owner
        self._swapped = owner.swapped
        self._connection = connection
        self._stream = stream
        self.acks = acks
        self._tasks = Tasks(timings.backoff_initial_seconds)
        self._questions = Questions(owner.explained, stream.send, self._tasks.spawn)
        fetcher = self.fetcher = AgentFetcher(connection, cache, timings, self._tasks.spawn, self)
        self._failures = Failures(connection.files, self._tasks.spawn, self._replaced)
        self._snapshot: asyncio.Task[None] | None = None
        self._keys = KeyFetcher(
            cache, timings, fetcher.fetch_key, fetcher.fetch_all_keys, self._tasks.spawn
        )
        self._poller = Poller(
            self._connection, cache, timings, self._take_all, self._polled, self._note_refusal
        )
        self._waiting: set[asyncio.Future[None]] = set()
        self._connected = False
        self._behind = False
        self._heard_until = NEVER
        self._resuming = False
        # The revision that a resumed stream must reach to be live; 0 once it has.
        self._live_from = 0

    # --- for the client ---

    @property
    def status(self) -> ClientStatus:
        """The status, based on what is up and what failed last."""
        if self._cache.liveness.live:
            return ClientStatus.LIVE
        if self._poller.works:
            return ClientStatus.POLLING
        if self._cache.liveness.live_until != NEVER:
            return ClientStatus.DISCONNECTED  # nothing arrived for too long, as will be noticed
        if self._connected and self._failures.status is None:
            return ClientStatus.BEHIND if self._behind else ClientStatus.SYNCING
        return self._failures.status or ClientStatus.STARTING

    @property
    def last_error(self) -> str | None:
        """What failed last; None if nothing is wrong."""
        return self._failures.last_error

    def start(self) -> None:
        """Start the stream; it runs until `close`."""
        tasks = self._tasks
        tasks.keep_up(functools.partial(self._stream.run, self))
        tasks.keep_up(self.acks.run)
        tasks.keep_up(self._keys.run)
        tasks.keep_up(self._poller.run)
        if self._connection.addresses.several:
            restart = self._stream.restart
            tasks.keep_up(
                functools.partial(
                    leave_for_a_better_one, self._connection, self._timings, self._stuck, restart
                )
            )
        self._want_keys()

    async def close(self) -> None:
        """Stop everything and close every connection."""
        self.closed = True
        self._cache.liveness.set(False)
        self._stream.deafen()
        # Release all waiters with what is known.
        self.settled.set()
        await self._tasks.close()
        await self._connection.close()
        self._connected = False
        self.wake()

    def notice_pause(self) -> None:
        """Check, before answering a question, whether this process or its machine was suspended."""
        if self._cache.liveness.live_until != NEVER and not self._cache.liveness.live:
            self._cache.liveness.set(False)
            self.settled.clear()
            self._stream.leave()

    def hurry_key(self, agent_id: str) -> None:
        """Request an agent's missing key at once, because a call is waiting for it."""
        self._keys.hurry(agent_id)

    async def wait_for_change(self, timeout: float) -> None:
        """Return when anything in the cache changed, or after the timeout."""
        future = self.loop.create_future()
        self._waiting.add(future)
        try:
            await asyncio.wait({future}, timeout=timeout)
        finally:
            self._waiting.discard(future)

    def wake(self) -> None:
        """Make everyone who waits for a change check again, and have it acked."""
        self.acks.changed()
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    # --- events of the stream (stream.Listener) ---

    def position(self) -> Resume | None:
        """Return where to resume; only possible if everything up to a revision is here."""
        position = self._position
        if not position.synced or position.epoch is None:
            return None
        since, change_id = position.heard
        return Resume(since, position.epoch, change_id)

    def heard(self, until: float) -> None:
        """Extend the live state, if this client is live."""
        if self.closed:
            return
        self._heard_until = until
        if self._cache.liveness.live_until != NEVER:
            self._cache.liveness.live_until = until

    def subscribed(self, message: Subscribed, since: int | None) -> None:
        """Continue from the last position, or start with a snapshot; nothing in between is lost."""
        self._connected = True
        self._behind = False
        self._failures.status = None
        self._poller.end()
        self.acks.subscribed()
        self._want_keys()  # whoever was refused a key may have another token now
        if since is None:
            self._begin(message)
        elif message.epoch == self._position.epoch and message.revision == since:
            # Live only once everything up to the head at that moment is here.
            self._live_from = message.head or 0
            self._position.advance(since, message.change_id)
            self._reached()
        # else: a resync follows, and until then the cache may belong to another epoch.

    def received(self, message: ServerMessage) -> None:
        """Apply a message from the stream."""
        position = self._position
        if not self._connected or self.closed:
            return  # left in the buffer of an abandoned stream
        if isinstance(message, AgentChanged | AgentDeleted):
            if position.synced and message.revision > position.revision + 1:
                # The protocol excludes this, but a gap must never remain, whatever caused it.
                _log.warning("the stream skipped a revision; fetching a snapshot")
                self._start_over(position.epoch or "", message.revision, message.change_id)
            about: tracing.Attributes = {
                "slm.agent_id": message.agent_id,
                "slm.revision": message.revision,
            }
            with tracing.joined("slm.apply", message.traceparent, about):
                position.advance(message.revision, message.change_id)
                self.fetched(message.agent_id, self._cache.apply_change(message))
        elif isinstance(message, Heartbeat):
            position.advance(message.revision, message.change_id)
            self._behind = message.behind
            self._update_liveness()
        elif isinstance(message, Resync):
            reason = self._connection.repeated(message.reason)
            _log.info("the SLM asks for a resync (%s)", reason)
            self._begin(message)
        elif isinstance(message, Explain):
            self._questions.answer(message)
        if self._live_from:
            self._reached()

    def left(self) -> None:
        """Note that nothing is received any more."""
        self._connected = False
        self._update_liveness()

    def lost(self, error: SLMError) -> None:
        """Note why nothing is received any more."""
        self.left()
        self.not_answered(error)
        if self._connection.upgrade_refused and not self._connection.addresses.untried:
            self._poller.begin()  # no address lets a stream through
        if isinstance(error, StoodStill):
            self._resuming = True
            self.settled.clear()
        elif self._resuming:
            self._resuming = False
            self.settled.set()

    def _stuck(self) -> str | None:
        """Return why this client is not live with its stream up; None if it is or has none."""
        if self._cache.liveness.live or not self._connected:
            return None
        return "is behind" if self._behind else "does not bring this client up to date"

    def _reached(self) -> None:
        """Become live once the head named in `subscribed` is reached."""
        if self._position.synced and self._position.revision >= self._live_from:
            self._live_from = 0
            self._all_is_well()

    def _all_is_well(self) -> None:
        self._failures.clear()
        self._resuming = False
        self.fetcher.ask_again()
        self._update_liveness()
        self.settled.set()

    def _update_liveness(self) -> None:
        reached = self._position.revision >= self._live_from
        live = self._connected and self._position.synced and reached and not self._behind
        became_live = live and self._cache.liveness.live_until == NEVER
        self._cache.liveness.set(live, self._heard_until)
        self._stream.note_caught_up(live)
        if became_live:
            self._owner.became_live()
        self.wake()

    def _note_refusal(self, error: SLMError) -> None:
        """Note the response to polling if it says more than the handshake did."""
        if status_after(error) is not ClientStatus.DISCONNECTED:
            self.not_answered(error)

    def _polled(self) -> None:
        """Note that even without a stream the cache is up to date."""
        self._failures.status = None
        self._cache.liveness.confirm()
        self.wake()
        self.settled.set()

    def _replaced(self) -> None:
        """Retry once a token or certificate that the SLM rejected was replaced."""
        self.fetcher.ask_again()
        self._want_keys()

    # --- snapshots ---

    def _begin(self, message: Subscribed | Resync) -> None:
        self._start_over(message.epoch, message.revision, message.change_id)

    def _start_over(self, epoch: str, revision: int, change_id: str | None) -> None:
        self._live_from = 0
        self._cache.begin(epoch, revision, change_id)
        self._update_liveness()
        self._fetch_snapshot(revision)

    def _fetch_snapshot(self, min_revision: int) -> None:
        if self._snapshot is not None:
            self._snapshot.cancel()
        self._snapshot = self._tasks.spawn(self._until_snapshot(min_revision))

    async def _take_all(self, min_revision: int) -> None:
        """Fetch a snapshot; return once it is applied or another one is in progress."""
        self._fetch_snapshot(min_revision)
        if self._snapshot is not None:
            await asyncio.wait({self._snapshot})

    async def _until_snapshot(self, min_revision: int) -> None:
        backoff, watch = Backoff(self._timings), Watch(self._connection.files)
        while True:
            watch.note()
            try:
                snapshot = await self._connection.get_snapshot(min_revision=min_revision)
                break
            except SLMError as error:
                self.not_answered(error)
                await watch.wait(backoff.delay_after(error))
        other_life = self._connected and self._position.contradicts(snapshot)
        for agent_id in self._cache.apply_snapshot(snapshot):
            self._swapped(agent_id)
        self._want_keys()
        if other_life:
            # The stream is from a replica that does not have this revision yet.
            self._connected = False
            await self._stream.restart()
        elif self._connected:
            self._all_is_well()
        self.settled.set()

    # --- results of requests (agent_fetcher.Recipient) ---

    def fetched(self, agent_id: str, swapped: bool, *, for_key: bool = False) -> None:
        """Report a swap, and fetch a key that is now missing."""
        if swapped:
            self._swapped(agent_id)
        self.wake()
        known = self._cache.find(agent_id)
        if known is not None and known.awaits_key and not for_key:
            self._keys.want(agent_id)

    def snapshot_applied(self, swapped: list[str]) -> None:
        """Report the agents whose config a snapshot swapped."""
        for agent_id in swapped:
            self._swapped(agent_id)
        self.wake()

    def answered(self) -> None:
        """Note that the SLM answered."""
        if self._cache.liveness.live:
            self._failures.last_error = None

    def not_answered(self, error: SLMError) -> None:
        """Note what failed, and whether waiting longer would help."""
        refused = self._failures.note(error, connected=self._connected)
        if refused and not self._connection.addresses.untried:
            self.settled.set()

    def other_epoch(self) -> None:
        """Reload everything: positions of another epoch are meaningless."""
        if self._snapshot is None or self._snapshot.done():
            self._fetch_snapshot(0)

    def _want_keys(self) -> None:
        for agent_id in self._cache.keys_awaited():
            self._keys.want(agent_id)
