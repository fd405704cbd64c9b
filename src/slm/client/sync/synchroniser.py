"""Keeps the cache equal to the SLM: stream, snapshots, keys, refreshes, and what `status` says.

Decides what to ask for and when; the stream hears, `http` asks, the cache holds. Knows nothing of
the chain. Runs in one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from slm.client.cache.cache import NEVER, AgentConfigCache
from slm.client.cache.keys_in_use import KeysInUse
from slm.client.runtime.log import quiet_logger
from slm.client.sync.acks import Acks
from slm.client.sync.backoff import Backoff, ClientStatus, status_after
from slm.client.sync.key_fetcher import KeyFetcher
from slm.client.sync.polling import Poller, leave_for_a_better_one
from slm.client.sync.stream import Resume, StoodStill, Stream
from slm.client.timings import Timings
from slm.client.transport.credentials import Watch
from slm.client.transport.http import Connection, EpochChanged
from slm.client.transport.site import Site
from slm.common import tracing
from slm.errors import (
    AgentInactive,
    AgentNotFound,
    KeyUndecryptable,
    SLMError,
)
from slm.protocol import (
    AgentChanged,
    AgentDeleted,
    ClientInfo,
    Explain,
    Explained,
    Explanation,
    Heartbeat,
    Resync,
    ServerMessage,
    Subscribed,
    encode,
)

_log = quiet_logger("slm.client")

_EXPLAINED_AT_ONCE: Final = 32
_REMEMBERED: Final = 10_000
_SAID: Final = 32
_LOOKS_SECONDS: Final = 60.0
_REFUSED: Final = (ClientStatus.UNAUTHORIZED, ClientStatus.TLS_ERROR)
_DEFAULT: Final = "/default"  # no agent_id: those are tried as they are, this is the alias


class Synchroniser:
    """One connection's worth of work; made in the loop it runs in, started once, closed once.

    Args:
        cache: what is kept equal.
        site: where the SLM is.
        timings: how long to wait for what.
        client: who subscribes.
        swapped: called with an agent_id once its config was swapped, left or came into force.
        became_live: called when the cache becomes live.
        in_use: which keys calls in flight hold.
        key_wait: how long an ack waits for a key that changed.
        explain: says how an agent is resolved, when the SLM asks.
    """

    def __init__(
        self,
        cache: AgentConfigCache,
        site: Site,
        timings: Timings,
        client: ClientInfo,
        swapped: Callable[[str], None],
        became_live: Callable[[], None],
        in_use: KeysInUse,
        key_wait: float,
        explain: Callable[[str], Awaitable[Explanation]],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.last_error: str | None = None
        self.closed = False
        self.settled = asyncio.Event()
        self._cache = cache
        self._timings = timings
        self._swapped = swapped
        self._became_live = became_live
        self._explain = explain
        self._connection = Connection(site, timings)
        self._stream = Stream(self._connection, self, client, timings)
        self.acks = Acks(cache, in_use, timings, key_wait, self._stream.send)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._snapshot: asyncio.Task[None] | None = None
        self._keys = KeyFetcher(
            cache, timings, self._ask_for_key, self._ask_for_all_keys, self._spawn
        )
        self._poller = Poller(
            self._connection, cache, timings, self._take_all, self._polled, self._note_refusal
        )
        self._said: set[str] = set()
        self._replacing: asyncio.Task[None] | None = None
        self._asked: dict[str, asyncio.Task[Any]] = {}
        self._waiting: set[asyncio.Future[None]] = set()
        self._not_before: dict[str, float] = {}
        self._away_until = 0.0
        self._connected = False
        self._behind = False
        self._explaining = 0
        self._heard_until = NEVER
        self._resuming = False
        # The revision that a resumed stream must reach before it counts as live; 0: it has.
        self._live_from = 0
        self._failed: ClientStatus | None = None

    # --- for the client ---

    @property
    def status(self) -> ClientStatus:
        """How things stand, from what is up and what failed last."""
        if self._cache.live:
            return ClientStatus.LIVE
        if self._poller.works:
            return ClientStatus.POLLING
        if self._cache.live_until != NEVER:
            return ClientStatus.DISCONNECTED  # nothing was heard for too long, as will be noticed
        if self._connected and self._failed is None:
            return ClientStatus.BEHIND if self._behind else ClientStatus.SYNCING
        return self._failed or ClientStatus.STARTING

    def start(self) -> None:
        """Start the stream; it goes on until `close`."""
        self._spawn(self._kept_up(self._stream.run))
        self._spawn(self._kept_up(self.acks.run))
        self._spawn(self._kept_up(self._keys.run))
        self._spawn(self._kept_up(self._poller.run))
        if self._connection.addresses.several:
            self._spawn(self._kept_up(self._look_elsewhere))
        for agent_id in self._cache.keys_awaited():
            self._keys.want(agent_id)

    async def close(self) -> None:
        """Stop everything and close every connection."""
        self.closed = True
        self._cache.set_live(False)
        self._stream.deafen()
        # Whoever waits for something gets what is known.
        self.settled.set()
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
            await asyncio.sleep(0)  # they are taken from the set by a callback
        await self._connection.close()
        self._connected = False
        self._wake()

    def judged(self) -> None:
        """Note that validators have said what they think."""
        self._wake()

    def look(self) -> None:
        """Notice, before a question is answered, that this process or its machine stood still."""
        if self._cache.live_until != NEVER and not self._cache.live:
            self._cache.set_live(False)
            self.settled.clear()
            self._stream.leave()

    async def ask(self, agent_id: str) -> None:
        """Fetch one agent into the cache; all who ask at one time share one request.

        An SLM that could not be asked, and an agent that it does not know, are not asked again for
        a few seconds. Nothing is raised: what came is in the cache, or nothing came.
        """
        generation = self._cache.generation
        await asyncio.wait({self._asking(agent_id)})
        if generation != self._cache.generation and not self._cache.synced:
            # The stream began anew meanwhile, so that the answer was of no use.
            await asyncio.wait({self._asking(agent_id)})

    async def ask_default(self) -> None:
        """Fetch which agent is the default; its key, if it has one, follows by itself."""
        await asyncio.wait({self._asking(None)})

    def refresh(self, agent_id: str) -> None:
        """Ask for an agent in the background."""
        if self._may_ask(agent_id):
            self._asking(agent_id)

    def lacks(self, agent_id: str) -> bool:
        """Say whether the SLM said within the last seconds that it has no such agent."""
        return agent_id in self._not_before

    def hurry_key(self, agent_id: str) -> None:
        """Ask for an agent's awaited key at once: a call waits for it."""
        self._keys.hurry(agent_id)

    async def wait_for_change(self, timeout: float) -> None:
        """Return when anything in the cache changed, or after the timeout."""
        future = self.loop.create_future()
        self._waiting.add(future)
        try:
            await asyncio.wait({future}, timeout=timeout)
        finally:
            self._waiting.discard(future)

    # --- what the stream tells (stream.Listener) ---

    def position(self) -> Resume | None:
        """Return where to resume: only what is complete up to a revision may be resumed."""
        cache = self._cache
        if not cache.synced or cache.epoch is None:
            return None
        since, change_id = cache.heard
        return Resume(since, cache.epoch, change_id)

    def heard(self, until: float) -> None:
        """Go on being live, where this client is."""
        if self.closed:
            return
        self._heard_until = until
        if self._cache.live_until != NEVER:
            self._cache.live_until = until

    def subscribed(self, message: Subscribed, since: int | None) -> None:
        """Go on from where we were, or begin with a snapshot; nothing between is lost."""
        self._connected = True
        self._behind = False
        self._failed = None
        self._poller.end()
        self.acks.subscribed()
        for agent_id in self._cache.keys_awaited():
            self._keys.want(agent_id)  # whom the SLM refused a key may have another token now
        if since is None:
            self._begin(message)
        elif message.epoch == self._cache.epoch and message.revision == since:
            # Live only once everything up to the head of that moment is here.
            self._live_from = message.head or 0
            self._cache.advance(since, message.change_id)
            self._reached()
        # else: a resync follows, and until then what is held may be of another life.

    def received(self, message: ServerMessage) -> None:
        """Apply what the stream says."""
        cache = self._cache
        if not self._connected or self.closed:
            return  # left over in the buffer of a stream that was given up
        if isinstance(message, AgentChanged | AgentDeleted):
            if cache.synced and message.revision > cache.revision + 1:
                # The contract excludes this; but a hole must not stay, whoever made it.
                _log.warning("the stream skipped a revision; fetching a snapshot")
                self._start_over(cache.epoch or "", message.revision, message.change_id)
            with tracing.joined("slm.apply", message.traceparent, _told_of(message)):
                cache.advance(message.revision, message.change_id)
                self._after(message.agent_id, cache.apply_change(message))
        elif isinstance(message, Heartbeat):
            cache.advance(message.revision, message.change_id)
            self._behind = message.behind
            self._update_liveness()
        elif isinstance(message, Resync):
            reason = self._connection.repeated(message.reason)
            _log.info("the SLM asks for a resync (%s)", reason)
            self._begin(message)
        elif isinstance(message, Explain) and self._explaining < _EXPLAINED_AT_ONCE:
            self._explaining += 1
            self._spawn(self._answer(message))
        if self._live_from:
            self._reached()

    async def _answer(self, question: Explain) -> None:
        """Answer the SLM's question; one that cannot be answered harms nothing."""
        try:
            report = await self._explain(question.agent_id)
            await self._stream.send(encode(Explained(explained=question.id, report=report)))
        except Exception as error:
            _log.debug("a question of the SLM was not answered (%s)", type(error).__name__)
        finally:
            self._explaining -= 1

    def left(self) -> None:
        """Note that nothing is heard any more."""
        self._connected = False
        self._update_liveness()

    def lost(self, error: SLMError) -> None:
        """Note why nothing is heard any more."""
        self.left()
        self._note_failure(error)
        if self._connection.upgrade_refused:
            self._poller.begin()
        if isinstance(error, StoodStill):
            self._resuming = True
            self.settled.clear()
        elif self._resuming:
            self._resuming = False
            self.settled.set()

    async def _look_elsewhere(self) -> None:
        await leave_for_a_better_one(
            self._connection, self._timings, self._stuck, self._stream.restart
        )

    def _stuck(self) -> str | None:
        """Say why this client is not live though its stream is up; None: it is, or has none."""
        if self._cache.live or not self._connected:
            return None
        return "is behind" if self._behind else "does not bring this client up to date"

    def _reached(self) -> None:
        """Become live once the head that `subscribed` named is reached."""
        if self._cache.synced and self._cache.revision >= self._live_from:
            self._live_from = 0
            self._all_is_well()

    def _all_is_well(self) -> None:
        if self.last_error is not None:
            _log.info("the SLM is back")
        self.last_error = self._failed = None
        self._said.clear()
        self._resuming = False
        self._away_until = 0.0
        self._not_before.clear()
        self._update_liveness()
        self.settled.set()

    def _update_liveness(self) -> None:
        reached = self._cache.revision >= self._live_from
        live = self._connected and self._cache.synced and reached and not self._behind
        became_live = live and self._cache.live_until == NEVER
        self._cache.set_live(live, self._heard_until)
        self._stream.note_caught_up(live)
        if became_live:
            self._became_live()
        self._wake()

    def _note_failure(self, error: SLMError) -> None:
        status = status_after(error)
        self.last_error = str(error)
        if self.last_error not in self._said:
            # With several addresses failures alternate; each is logged once.
            if len(self._said) >= _SAID:
                self._said.clear()
            self._said.add(self.last_error)
            _log.warning("cannot follow the SLM now: %s", error)
        if status is not ClientStatus.DISCONNECTED:
            self._failed = status
            if not self._connection.addresses.untried:
                self.settled.set()  # waiting longer would not help
            if self._replacing is None and self._connection.files:
                self._replacing = self._spawn(self._until_replaced())
                self._replacing.add_done_callback(self._replaced)
        elif not self._connected:
            self._failed = status

    def _note_refusal(self, error: SLMError) -> None:
        """Note what polling was answered, where it says more than the handshake did."""
        if status_after(error) is not ClientStatus.DISCONNECTED:
            self._note_failure(error)

    def _polled(self) -> None:
        """Note that without a stream, too, what is known is the newest."""
        self._failed = None
        self._cache.confirm()
        self._wake()
        self.settled.set()

    async def _until_replaced(self) -> None:
        """Ask anew, once a token or a certificate that the SLM refused was replaced."""
        watch = Watch(self._connection.files)
        while self._failed in _REFUSED:
            if await watch.wait(_LOOKS_SECONDS):
                watch.note()
                self._away_until = 0.0
                self._not_before.clear()
                for agent_id in self._cache.keys_awaited():
                    self._keys.want(agent_id)

    def _replaced(self, _: object) -> None:
        self._replacing = None

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
        self._snapshot = self._spawn(self._until_snapshot(min_revision))

    async def _take_all(self, min_revision: int) -> None:
        """Take a snapshot, and return once it is here or another one is under way."""
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
                self._note_failure(error)
                await watch.wait(backoff.delay_after(error))
        other_life = self._connected and self._cache.contradicts(snapshot)
        for agent_id in self._cache.apply_snapshot(snapshot):
            self._swapped(agent_id)
        for agent_id in self._cache.keys_awaited():
            self._keys.want(agent_id)
        if other_life:
            # The stream is of a replica that does not know of it yet.
            self._connected = False
            await self._stream.restart()
        elif self._connected:
            self._all_is_well()
        self.settled.set()

    # --- one agent over HTTP ---

    def _asking(self, agent_id: str | None) -> asyncio.Task[Any]:
        """Return the request under way for this agent, made if need be; None is the default."""
        name = agent_id if agent_id is not None else _DEFAULT
        task = self._asked.get(name)
        if task is None:
            task = self._asked[name] = self._spawn(
                self._ask_once(agent_id) if agent_id is not None else self._ask_default_once()
            )
            task.add_done_callback(lambda _: self._asked.pop(name, None))
        return task

    async def _ask_once(self, agent_id: str, *, for_key: bool = False) -> SLMError | None:
        """Fetch one agent and apply what came; return why nothing did."""
        if agent_id in ("", ".", "..") or not (for_key or self._may_ask(agent_id)):
            return None
        cache = self._cache
        generation, known = cache.generation, cache.known_revision(agent_id)
        failure: SLMError | None = None
        swapped = False
        try:
            agent = await self._connection.get_llm(
                agent_id, min_revision=known if known >= 0 else cache.position, epoch=cache.epoch
            )
            if generation == cache.generation:
                swapped = cache.apply_fetched(agent)
        except (AgentNotFound, AgentInactive):
            self._do_not_ask_for_a_while(agent_id)
            if generation == cache.generation:
                swapped = cache.apply_absent(agent_id, known)
        except KeyUndecryptable as error:
            self._do_not_ask_for_a_while(agent_id)
            if generation == cache.generation:
                swapped = cache.apply_key_error(agent_id, known, error.detail)
        except EpochChanged as error:
            failure = error
            self._take_other_life()
        except SLMError as error:
            failure = error
            self._could_not_ask(error)
        if failure is None and cache.live:
            self.last_error = None
        self._after(agent_id, swapped, see_to_key=not for_key)
        return failure

    async def _ask_default_once(self) -> None:
        if not self._may_ask(_DEFAULT):
            return
        generation = self._cache.generation
        try:
            agent = await self._connection.get_default(epoch=self._cache.epoch)
        except EpochChanged:
            self._take_other_life()
        except SLMError as error:
            self._could_not_ask(error)
        else:
            if generation == self._cache.generation:
                self._after(agent.agent_id, self._cache.apply_config(agent))

    def _take_other_life(self) -> None:
        """Take what is there now as a whole: positions of another epoch mean nothing."""
        if self._snapshot is None or self._snapshot.done():
            self._fetch_snapshot(0)

    def _may_ask(self, name: str) -> bool:
        now = self.loop.time()
        return now >= self._away_until and now >= self._not_before.get(name, 0.0)

    def _do_not_ask_for_a_while(self, name: str) -> None:
        if len(self._not_before) >= _REMEMBERED:
            self._not_before.clear()
        self._not_before[name] = self.loop.time() + self._timings.unknown_seconds

    def _could_not_ask(self, error: SLMError) -> None:
        self._away_until = self.loop.time() + self._timings.unknown_seconds
        self._note_failure(error)

    # --- keys that arrive after their change ---

    def _after(self, agent_id: str, swapped: bool, *, see_to_key: bool = True) -> None:
        """Tell of a swap, and see to a key that is missing now."""
        if swapped:
            self._swapped(agent_id)
        self._wake()
        known = self._cache.find(agent_id)
        if see_to_key and known is not None and known.awaits_key:
            self._keys.want(agent_id)

    async def _ask_for_key(self, agent_id: str) -> SLMError | None:
        return await self._ask_once(agent_id, for_key=True)

    async def _ask_for_all_keys(self) -> SLMError | None:
        """Fetch a snapshot for the keys in it, while the stream goes on; return why none came."""
        cache = self._cache
        generation = cache.generation
        try:
            snapshot = await self._connection.get_snapshot(min_revision=cache.position)
        except SLMError as error:
            self._could_not_ask(error)
            return error
        if generation != cache.generation:
            return None  # a snapshot for the new beginning is under way
        if cache.contradicts(snapshot):
            self._take_other_life()
            return None
        for agent_id in cache.apply_snapshot(snapshot):
            self._swapped(agent_id)
        self._wake()
        return None

    # --- tasks ---

    def _wake(self) -> None:
        self.acks.changed()
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def _kept_up(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run what must not end; a mistake of ours must not stop it for the process's life."""
        while True:
            try:
                await work()
            except Exception:
                _log.exception("a task of the client failed; starting it again")
            await asyncio.sleep(self._timings.backoff_initial_seconds)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a task of the client failed", exc_info=error)


def _told_of(message: AgentChanged | AgentDeleted) -> tracing.Attributes:
    return {"slm.agent_id": message.agent_id, "slm.revision": message.revision}
