"""Follows the SLM for one client: starts and ends what keeps its cache up to date, and answers.

Everything here runs in the background thread's loop unless it says otherwise; `client` hands over.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from slm.client.cache.cache import AgentConfigCache
from slm.client.cache.keys_in_use import KeysInUse
from slm.client.cache.restoring import contents_of, restore
from slm.client.cache.snapshot_file import Saver
from slm.client.config import ResolvedConfig
from slm.client.options import ClientOptions
from slm.client.resolution.chain import Chain
from slm.client.resolution.explain import explained
from slm.client.runtime import background
from slm.client.runtime.callbacks import Hooks
from slm.client.runtime.dispatch import callbacks
from slm.client.runtime.log import quiet_logger
from slm.client.status import ClientStatus
from slm.client.sync.acks import Acks
from slm.client.sync.judging import Judging
from slm.client.sync.stream import Stream
from slm.client.sync.synchroniser import Synchroniser
from slm.client.timings import Timings
from slm.client.transport.http import Connection
from slm.protocol import ClientInfo, Explanation, storable

_log = quiet_logger("slm.client")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a client was made with, checked."""

    options: ClientOptions
    strict: bool
    start_timeout: float
    key_wait: float
    timings: Timings


class Follower:
    """One client's following, from its connecting to its closing, and again.

    Args:
        settings: what the client was made with.
        cache: what it fills; everything else reads.

    Attributes:
        closed: whether it was closed, and not connected since.
        sync: what follows the SLM now, or None.
        hooks: what the user hangs in.
        in_use: which keys calls in flight hold.
    """

    def __init__(self, settings: Settings, cache: AgentConfigCache) -> None:
        self._settings = settings
        self._cache = cache
        self.closed = False
        self.sync: Synchroniser | None = None
        self.hooks = Hooks(self._validators_changed)
        self.in_use = KeysInUse()
        self._chain = Chain(cache, settings.key_wait, strict=settings.strict)
        self._instance = uuid.uuid4().hex[:12]
        self._holder = background.new_holder()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._saver: Saver | None = None
        self._closing: asyncio.Task[None] | None = None
        self._judging = Judging(cache, self.hooks, self._judged)
        _followers.add(self)

    # --- from any thread ---

    @property
    def status(self) -> ClientStatus:
        """How this client stands to its SLM."""
        if self.closed:
            return ClientStatus.CLOSED
        sync = self.sync
        return sync.status if sync is not None else ClientStatus.STARTING

    @property
    def last_error(self) -> str | None:
        """What failed last; None while all is well."""
        sync = self.sync
        return sync.last_error if sync is not None else None

    def answer_in_place(self, agent_id: str | None) -> ResolvedConfig:
        """Answer from what is known, and ask nobody; for a client that is closed."""
        return self._chain.answer_in_place(agent_id)

    def hear_no_more(self) -> None:
        """Note that the client is to be closed: what is still to be read changes nothing."""
        self.closed = True
        sync = self.sync
        if sync is not None:
            sync.closed = True

    def key_use_changed(self) -> None:
        """Note that a key which is no longer the present one is held, or no longer held."""
        sync = self.sync
        if sync is not None:
            sync.acks.changed_elsewhere()

    def drop(self) -> None:
        """Close without waiting, after whoever made the client let go of it.

        Not where somebody wants to hear of changes: that is what it is still there for. May be
        called in the middle of anything, by the garbage collector.
        """
        loop = self._loop
        if loop is not None and not self.hooks.has_callbacks:
            with contextlib.suppress(RuntimeError):  # it has ended
                loop.call_soon_threadsafe(lambda: loop.create_task(self.close()))

    def abandon(self) -> None:
        """Start anew in a forked child: nothing of the parent's thread is here."""
        if self.sync is not None:
            _abandoned.append(self.sync)
        self.sync = self._saver = self._closing = self._loop = None
        self._judging.forget()
        self.hooks.start_anew()
        self.in_use.start_anew()
        self._instance = uuid.uuid4().hex[:12]
        self._cache.distrust()

    def _validators_changed(self, added: bool) -> None:
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                loop.call_soon_threadsafe(self._judging.judge_anew, added)

    # --- life ---

    async def connect(self) -> None:
        """Start following, and wait up to `start_timeout` until the SLM's state is here."""
        while self._closing is not None:
            await asyncio.wait({self._closing})
        self.closed = False
        sync = self._started()
        seconds = self._settings.start_timeout
        try:
            async with asyncio.timeout(seconds):
                await sync.settled.wait()
        except TimeoutError:
            sync.settled.set()  # long enough for all who wait
            _log.warning(
                "the SLM at %s did not answer within %g s: %s; trying on in the background",
                self._settings.options.site,
                seconds,
                sync.last_error or "no answer yet",
            )

    async def close(self) -> None:
        """Stop following; what a caller waits for is answered from what is known."""
        self.closed = True
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        # In a task of its own: a caller who waits no longer leaves nothing half closed.
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            self._cache.liveness.set(False)
            self.hooks.forget_untold()
            sync, self.sync = self.sync, None
            saver, self._saver = self._saver, None
            if sync is not None:
                await sync.close()
            self.hooks.forget_untold()
            if saver is not None:
                await saver.close()
        except Exception:
            _log.exception("the client did not close as it should")
        finally:
            self._closing = None
            self._judging.forget()
            held, self._loop = self._loop is not None, None
            if held:
                callbacks.leave()
                background.following.let_go(self._holder)

    def _started(self) -> Synchroniser:
        """Return what follows the SLM, started if it is not yet."""
        if self.sync is not None:
            return self.sync
        settings = self._settings
        if self._loop is None:
            self._loop = background.following.hold(self._holder)
            callbacks.enter()
        if settings.options.file is not None:
            if self._cache.position.epoch is None:
                loaded = settings.options.file.load()
                if loaded is not None:
                    restore(self._cache, loaded)
            interval = settings.timings.save_interval_seconds
            self._saver = Saver(settings.options.file, interval, lambda: contents_of(self._cache))
        self._judging.judge_later(dict(self._cache.unsettled()))
        connection = Connection(settings.options.site, settings.timings)
        stream = Stream(connection, self._info(), settings.timings)
        acks = Acks(self._cache, self.in_use, settings.timings, settings.key_wait, stream.send)
        sync = self.sync = Synchroniser(
            self._cache, connection, stream, acks, settings.timings, self
        )
        settings.options.log_decisions()
        sync.start()
        return sync

    # --- answers ---

    async def answer(self, agent_id: str | None, *, judged: bool = True) -> ResolvedConfig:
        """Answer for an agent, None standing for the default one; connect first if need be.

        Args:
            agent_id: the agent.
            judged: whether to wait for a validator that is to say what it thinks.
        """
        if self.sync is not None:
            self.sync.notice_pause()
        if not self.closed and (self.sync is None or not self.sync.settled.is_set()):
            await self.connect()
        return await self._chain.answer(agent_id, self.sync, judged=judged)

    async def explained(self, agent_id: str, *, judged: bool = True) -> Explanation:
        """Say how an agent is resolved now."""
        answer: ResolvedConfig | Exception
        try:
            answer = await self.answer(agent_id, judged=judged)
        except Exception as problem:
            # Whatever it is, it is what a caller who resolves this agent gets.
            answer = problem
        return explained(self._cache, agent_id, answer, self.status, self.last_error)

    def _judged(self, take: Callable[[], list[str]]) -> None:
        """Have verdicts come into force, unless the client was closed meanwhile."""
        if self.closed:
            return  # they are asked again if it is connected again
        for agent_id in take():
            self.swapped(agent_id)
        if self.sync is not None:
            self.sync.wake()

    # --- what is told (synchroniser.Owner) ---

    def swapped(self, agent_id: str) -> None:
        """Tell the callbacks of an agent whose config was swapped, left or came into force."""
        if self.closed:
            return
        if self._saver is not None:
            self._saver.soon()
        known = self._cache.find(agent_id)
        self.hooks.tell(agent_id, known.in_force if known is not None else None)

    def became_live(self) -> None:
        """Have the snapshot file written soon."""
        if self._saver is not None:
            self._saver.soon()

    # --- who follows, and the file ---

    def _info(self) -> ClientInfo:
        # Imported here: it loads email, csv and zipfile, for which a backend's start would wait.
        from importlib.metadata import version

        host = socket.gethostname()
        return ClientInfo(
            name=storable(self._settings.options.name or host, 128),
            instance=self._instance,
            version=version("autobot-slm"),
            host=storable(host, 255),
            pid=os.getpid(),
            plain_http=self._settings.options.insecure or None,
        )


_followers: weakref.WeakSet[Follower] = weakref.WeakSet()
_abandoned: list[Synchroniser] = []


def _after_fork_in_child() -> None:
    for follower in list(_followers):
        follower.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
