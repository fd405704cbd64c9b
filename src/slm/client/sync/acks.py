"""Acks: reports to the SLM what was received, what of it is not in use, and which keys are held.

Sends the full state each time: at once in an idle process, after its callbacks in a busy one, and
at most once per interval, which grows with the amount to report. Only reads the cache; the stream
delivers the messages (docs/protocol.md section 4).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

from slm.client.cache.cache import AgentConfigCache
from slm.client.cache.entry import KnownAgent
from slm.client.cache.keys_in_use import KeysInUse
from slm.client.runtime.idle import Quiet
from slm.client.timings import Timings
from slm.protocol import MAX_REASON, Ack, NotInForce, encode, storable

AFTER_SECONDS: Final = 0.001
"""How soon after a change an idle process acks it."""

KEY_DID_NOT_COME: Final = "the key did not come"
NOT_JUDGED: Final = "a validator has not answered"
_MAX_NAMED: Final = 5000
"""How many agents fit into an ack of 1 MiB."""

_NAMED_AN_INTERVAL: Final = 16
_MAX_INTERVALS: Final = 10


class Acks:
    """What one client reports about itself; belongs to one event loop.

    Args:
        cache: what the client holds.
        in_use: the keys used by calls in progress.
        timings: how long a busy process may delay an ack, and the shortest time between two.
        key_wait: how long an ack waits for a changed key.
        send: sends a message; returns whether there was a stream to send it on.
    """

    def __init__(
        self,
        cache: AgentConfigCache,
        in_use: KeysInUse,
        timings: Timings,
        key_wait: float,
        send: Callable[[str], Awaitable[bool]],
    ) -> None:
        self._cache = cache
        self._in_use = in_use
        self._delay_seconds = timings.ack_delay_seconds
        self._interval_seconds = timings.ack_interval_seconds
        self._key_wait = key_wait
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._due = asyncio.Event()
        self._quiet = Quiet.of_running_loop()
        self._noted = False
        self._soon: asyncio.TimerHandle | None = None
        self._again: asyncio.TimerHandle | None = None
        self._sent_at = float("-inf")
        self._last: Ack | None = None
        self._synced_epoch: str | None = None
        self._passed = 0
        self._named = 0
        self._awaited: dict[str, tuple[int, float]] = {}

    def subscribed(self) -> None:
        """Start over: nothing was reported on this connection yet."""
        self._last = None
        self._due.set()

    def changed(self) -> None:
        """Note a possible change; it is reported once the loop has nothing else to do."""
        # Callbacks come first: their thread runs once this one waits.
        free_at = max(self._sent_at + self._interval(), self._loop.time() + AFTER_SECONDS)
        if self._noted:
            if self._soon is None or free_at >= self._soon.when():
                return
            self._soon.cancel()
        self._noted = True
        self._soon = self._loop.call_at(free_at, self._when_quiet)

    def _interval(self) -> float:
        """Return the current minimum time between two acks.

        Reporting two hundred agents with missing keys costs both sides two hundred times as much as
        reporting one. Once all keys have arrived, that is reported without delay.
        """
        if self._named == 0 or next(self._cache.unsettled(), None) is None:
            return self._interval_seconds
        return self._interval_seconds * min(1 + self._named / _NAMED_AN_INTERVAL, _MAX_INTERVALS)

    def _when_quiet(self) -> None:
        self._soon = None
        self._quiet.then(self._due.set, self._delay_seconds)

    def changed_elsewhere(self) -> None:
        """Do what `changed` does, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self.changed)

    async def run(self) -> None:
        """Send acks until cancelled."""
        while True:
            await self._due.wait()
            self._due.clear()
            self._noted = False
            if self._soon is not None:
                self._soon.cancel()
                self._soon = None
            ack = self._state()
            if ack != self._last and await self._send(encode(ack)):
                self._last, self._sent_at = ack, self._loop.time()

    def _state(self) -> Ack:
        """Return the current state to report."""
        cache = self._cache
        revision = self._received()
        unsettled = dict(cache.unsettled())
        not_in_force: dict[str, NotInForce] = {}
        keys: dict[str, int | None] = {}
        again_at: float | None = None
        self._awaited = {i: held for i, held in self._awaited.items() if i in unsettled}
        for agent_id, known in unsettled.items():
            reason = known.not_in_force
            if reason is None:
                first, since = self._awaited.setdefault(
                    agent_id, (known.revision, known.pending_since)
                )
                left = since + self._key_wait - cache.clock()
                if left > 0:
                    # Not past a pending swap, but never back behind what was acked already.
                    revision = min(revision, max(first - 1, self._passed))
                    again_at = left if again_at is None else min(again_at, left)
                else:
                    reason = NOT_JUDGED if known.unjudged else KEY_DID_NOT_COME
            if reason is not None and len(not_in_force) < _MAX_NAMED:
                not_in_force[agent_id] = NotInForce(
                    revision=known.revision, reason=storable(reason, MAX_REASON)
                )
            _note_held_key(keys, agent_id, known)
        for agent_id, held in self._in_use.oldest().items():
            if held != cache.key_revision(agent_id):
                keys[agent_id] = min(held, keys.get(agent_id) or held)
        self._look_again_in(again_at)
        self._passed = revision
        self._named = len(unsettled)
        return Ack(ack=revision, not_in_force=not_in_force, keys=keys)

    def _received(self) -> int:
        """Return the revision up to which all is here; nothing if the epoch is not the SLM's."""
        cache = self._cache
        if cache.position.synced:
            self._synced_epoch = cache.position.epoch
        if cache.position.epoch != self._synced_epoch or self._synced_epoch is None:
            self._passed = 0
            return 0
        return cache.position.revision

    def _look_again_in(self, seconds: float | None) -> None:
        if self._again is not None:
            self._again.cancel()
        self._again = None if seconds is None else self._loop.call_later(seconds, self.changed)


def _note_held_key(keys: dict[str, int | None], agent_id: str, known: KnownAgent) -> None:
    newest = known.newest
    if newest is None or newest.api_key_revision is None:
        return
    held = None if known.config is None else known.config.api_key_revision
    if held != newest.api_key_revision:
        keys[agent_id] = held
