"""Follows the SLM for one client: starts and stops what updates its cache, and resolves.

Everything runs in the background thread's loop unless stated otherwise; `client` delegates here.
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
    """The checked options of a client."""

    options: ClientOptions
    strict: bool
    start_timeout: float
    key_wait: float
    timings: Timings


class Follower:
    """Follows the SLM for one client, from connecting to closing, repeatedly.

    Args:
        settings: the client's options.
        cache: filled by this; everything else only reads it.

    Attributes:
        closed: whether it was closed and not connected again.
        sync: what follows the SLM now, or None.
        hooks: the user's callbacks and validators.
        in_use: the keys used by calls in progress.
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
        """How this client is connected."""
        if self.closed:
            return ClientStatus.CLOSED
        sync = self.sync
        return sync.status if sync is not None else ClientStatus.STARTING

    @property
    def last_error(self) -> str | None:
        """What failed last; None if nothing is wrong."""
        sync = self.sync
        return sync.last_error if sync is not None else None

    def answer_in_place(self, agent_id: str | None) -> ResolvedConfig:
        """Resolve from what is known, without fetching; for a closed client."""
        return self._chain.answer_in_place(agent_id)

    def hear_no_more(self) -> None:
        """Note that the client is about to close: messages still to be read have no effect."""
        self.closed = True
        sync = self.sync
        if sync is not None:
            sync.closed = True

    def key_use_changed(self) -> None:
        """Note that an outdated key came into or went out of use."""
        sync = self.sync
        if sync is not None:
            sync.acks.changed_elsewhere()

    def drop(self) -> None:
        """Close without waiting, after the client object was garbage-collected.

        Does nothing while callbacks are registered: the client still exists for them. May be called
        at any point, by the garbage collector.
        """
        loop = self._loop
        if loop is not None and not self.hooks.has_callbacks:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(lambda: loop.create_task(self.close()))

    def abandon(self) -> None:
        """Reset in a forked child, which has nothing of the parent's thread."""
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
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._judging.judge_anew, added)

    # --- start and stop ---

    async def connect(self) -> None:
        """Start following, and wait up to `start_timeout` until the SLM's state has arrived."""
        while self._closing is not None:
            await asyncio.wait({self._closing})
        self.closed = False
        sync = self._started()
        seconds = self._settings.start_timeout
        try:
            async with asyncio.timeout(seconds):
                await sync.settled.wait()
        except TimeoutError:
            sync.settled.set()  # long enough for everyone who waits
            _log.warning(
                "the SLM at %s did not answer within %g s: %s; trying on in the background",
                self._settings.options.site,
                seconds,
                sync.last_error or "no answer yet",
            )

    async def close(self) -> None:
        """Stop following; pending questions are answered from what is known."""
        self.closed = True
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        # In its own task: a caller that stops waiting must not leave it half closed.
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
        """Return what follows the SLM, starting it if needed."""
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

    # --- resolving ---

    async def answer(self, agent_id: str | None, *, judged: bool = True) -> ResolvedConfig:
        """Resolve an agent, or the default agent for None; connect first if needed.

        Args:
            agent_id: the agent.
            judged: whether to wait for a pending verdict of a validator.
        """
        if self.sync is not None:
            self.sync.notice_pause()
        if not self.closed and (self.sync is None or not self.sync.settled.is_set()):
            await self.connect()
        return await self._chain.answer(agent_id, self.sync, judged=judged)

    async def explained(self, agent_id: str, *, judged: bool = True) -> Explanation:
        """Explain how an agent is resolved now."""
        answer: ResolvedConfig | Exception
        try:
            answer = await self.answer(agent_id, judged=judged)
        except Exception as problem:
            # Whatever the exception, a caller who resolves this agent gets it too.
            answer = problem
        return explained(self._cache, agent_id, answer, self.status, self.last_error)

    def _judged(self, take: Callable[[], list[str]]) -> None:
        """Apply verdicts, unless the client was closed meanwhile."""
        if self.closed:
            return  # they are requested again if it reconnects
        for agent_id in take():
            self.swapped(agent_id)
        if self.sync is not None:
            self.sync.wake()

    # --- notifications (synchroniser.Owner) ---

    def swapped(self, agent_id: str) -> None:
        """Call the callbacks for an agent after its config was swapped, removed or enabled."""
        if self.closed:
            return
        if self._saver is not None:
            self._saver.soon()
        known = self._cache.find(agent_id)
        self.hooks.tell(agent_id, known.in_force if known is not None else None)

    def became_live(self) -> None:
        """Save the snapshot file soon."""
        if self._saver is not None:
            self._saver.soon()

    # --- following, and the file ---

    def _info(self) -> ClientInfo:
        # Imported here: it loads email, csv and zipfile, which would slow a backend's start.
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
