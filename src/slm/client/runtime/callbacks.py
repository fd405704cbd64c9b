"""What users register with a client: callbacks for changes, and validators for configs.

Plain functions run in the dispatcher's thread, coroutines in the loop that registered them; neither
can block the client, and an error in one is logged without affecting others. Knows neither cache
nor SLM.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple

from slm.client.config import ResolvedConfig
from slm.client.runtime import native
from slm.client.runtime.dispatch import callbacks
from slm.client.runtime.log import quiet_logger

_log = quiet_logger("slm.client")

OnChange = Callable[[str, ResolvedConfig | None], Awaitable[None] | None]
"""Called with the agent_id of a changed config and the agent's own config now in use.

The config is None if the agent has none: deleted, switched off, or its key is unavailable.
"""

Validator = Callable[[ResolvedConfig], str | None]
"""Returns why a config must not be used, or None."""

MAX_BEHIND: Final = 1000
"""How many changes a callback may lag behind; after that it gets only the newest per agent."""


class InlineValidator:
    """One of our own validators: fast and without I/O, so it may run in the client's thread.

    Equal ones are treated as one validator, however often they are registered.
    """

    def __call__(self, config: ResolvedConfig) -> str | None:
        """Return why the config must not be used, or None."""
        raise NotImplementedError


class Hooks:
    """The callbacks and validators of one client; they can be registered from any thread.

    Args:
        validators_changed: called with whether a validator was added (True) or removed (False).
    """

    def __init__(self, validators_changed: Callable[[bool], None]) -> None:
        self._validators_changed = validators_changed
        self._lock = native.new_rlock()
        # Replaced, never modified, so that they can be read without the lock.
        self._outlets: tuple[_Outlet, ...] = ()
        self._validators: tuple[tuple[Validator, int], ...] = ()

    @property
    def has_callbacks(self) -> bool:
        """Whether any callback is registered."""
        return bool(self._outlets)

    @property
    def has_slow_validators(self) -> bool:
        """Whether configs must be shown to a validator that may take a while."""
        return any(not isinstance(each, InlineValidator) for each, _ in self._validators)

    def on_change(self, callback: OnChange) -> Callable[[], None]:
        """Register a callback; return a function that removes it."""
        outlet = _Outlet(callback)
        self._change_outlets(lambda outlets: (*outlets, outlet))

        def unsubscribe() -> None:
            self._change_outlets(
                lambda outlets: tuple(each for each in outlets if each is not outlet)
            )
            outlet.end()

        return unsubscribe

    def _change_outlets(self, change: Callable[[tuple[_Outlet, ...]], tuple[_Outlet, ...]]) -> None:
        while True:
            before = self._outlets
            after = change(before)
            # Nothing is allocated under the lock, because the garbage collector may call in here.
            with self._lock:
                if self._outlets is before:
                    self._outlets = after
                    return

    def register_validator(self, validator: Validator) -> Callable[[], None]:
        """Register a validator, once however often it is given; return a way to remove it."""
        if self._count(validator, 1):
            self._validators_changed(True)
        registered = True

        def unregister() -> None:
            nonlocal registered
            if registered:
                registered = False
                if self._count(validator, -1):
                    self._validators_changed(False)

        return unregister

    def _count(self, validator: Validator, more: int) -> bool:
        """Count the registrations of a validator; return whether it was added or removed."""
        while True:
            before = self._validators
            counts = list(before)
            for place, (each, count) in enumerate(counts):
                if each == validator:
                    counts[place] = each, count + more
                    break
            else:
                counts.append((validator, more))
            kept = tuple(entry for entry in counts if entry[1] > 0)
            with self._lock:  # as in `_change_outlets`
                if self._validators is before:
                    self._validators = kept
                    return len(kept) != len(before)

    def tell(self, agent_id: str, config: ResolvedConfig | None) -> None:
        """Call every callback."""
        for outlet in self._outlets:
            outlet.tell(agent_id, config)

    def forget_untold(self) -> None:
        """Drop all notifications that were not delivered yet."""
        for outlet in self._outlets:
            outlet.clear()

    def start_anew(self) -> None:
        """Reset in a forked child: the parent's loops don't run here, and no lock is held."""
        self._lock = native.new_rlock()
        for outlet in self._outlets:
            outlet.start_anew()

    def refusal(self, config: ResolvedConfig) -> str | None:
        """Return why a config must not be used, according to our own validators; does not wait."""
        return self._first_reason(config, inline=True)

    def ask(
        self, configs: Sequence[ResolvedConfig], tell: Callable[[list[str | None]], None]
    ) -> None:
        """Ask the other validators about each config; calls `tell` in the dispatcher's thread."""
        callbacks.put(lambda: tell([self._first_reason(each, inline=False) for each in configs]))

    def _first_reason(self, config: ResolvedConfig, *, inline: bool) -> str | None:
        for validator, _ in self._validators:
            if isinstance(validator, InlineValidator) is not inline:
                continue
            try:
                reason: object = validator(config)
            except BaseException:
                _log.exception("a validator failed; its config is used")
                continue
            if not reason:
                continue
            if isinstance(reason, str):
                return reason
            _log.error("a validator returned neither a reason nor None; its config is used")
        return None


class _Due(NamedTuple):
    """A change that a callback has not been called for yet, with the change's context."""

    agent_id: str
    config: ResolvedConfig | None
    context: contextvars.Context


class _Outlet:
    """One callback and its pending changes."""

    def __init__(self, callback: OnChange) -> None:
        self._callback = callback
        self._loop = _running_loop()
        self._is_coroutine = self._loop is not None and (
            inspect.iscoroutinefunction(callback)
            or inspect.iscoroutinefunction(getattr(callback, "__call__", None))  # noqa: B004
        )
        self._gone = self._ended_by_user = False
        self._tasks: set[asyncio.Future[None]] = set()
        self.start_anew(forked=False)

    def start_anew(self, *, forked: bool = True) -> None:
        self._lock = native.new_rlock()
        self._due: deque[_Due] = deque()
        self._newest: dict[str, _Due] = {}
        if forked:
            self._tasks = set()
            if self._loop is not None:
                self._drop("it was registered in the process that this one was forked from")

    def tell(self, agent_id: str, config: ResolvedConfig | None) -> None:
        """Queue a change and make sure that the callback is called."""
        if self._gone:
            return
        due = _Due(agent_id, config, contextvars.copy_context())
        with self._lock:
            if self._ended_by_user:
                return  # the caller had started before
            # Each agent's changes stay in order, since an agent once merged stays in the backlog.
            merges = bool(self._newest) or len(self._due) >= MAX_BEHIND
            replaced = merges and self._newest.pop(agent_id, None) is not None
            if merges:
                self._newest[agent_id] = due
            else:
                self._due.append(due)
        if replaced:
            return
        if self._is_coroutine:
            self._in_loop(self._begin_next)
        else:
            callbacks.put(self._call_next)

    def end(self) -> None:
        """Deliver nothing from now on."""
        with self._lock:
            self._ended_by_user = True
        self.clear()

    def clear(self) -> None:
        """Forget the pending changes."""
        with self._lock:
            self._due.clear()
            self._newest.clear()

    def _next(self) -> _Due | None:
        with self._lock:
            if self._due:
                return self._due.popleft()
            for agent_id in self._newest:
                return self._newest.pop(agent_id, None)
            return None

    def _called(self) -> tuple[_Due | None, Awaitable[None] | None]:
        """Call it with the next change; return that change and what remains to be awaited."""
        due = self._next()
        if due is None:
            return None, None
        try:
            result = due.context.run(self._callback, due.agent_id, due.config)
        except BaseException:
            _log.exception("an on_change callback failed")
            return due, None
        return due, result if result is not None and inspect.isawaitable(result) else None

    # --- plain functions, in the dispatcher's thread ---

    def _call_next(self) -> None:
        due, result = self._called()
        if due is None or result is None:
            return
        if self._loop is None:
            asyncio.run(self._awaited(result))
        elif not self._in_loop(lambda: self._begin(result, due.context)) and inspect.iscoroutine(
            result
        ):
            result.close()

    # --- coroutines, in the loop that registered them ---

    def _in_loop(self, call: Callable[[], None]) -> bool:
        try:
            if self._gone or self._loop is None:
                return False
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            self._drop("the event loop that registered it has ended")
            return False
        return True

    def _begin_next(self) -> None:
        if len(self._tasks) >= MAX_BEHIND:
            return  # the one that ends continues
        due, result = self._called()
        if due is not None and result is not None:
            self._begin(result, due.context)

    def _begin(self, result: Awaitable[None], context: contextvars.Context) -> None:
        task = asyncio.get_running_loop().create_task(self._awaited(result), context=context)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Future[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # the only possible exception is a cancellation
        if self._is_coroutine and (self._due or self._newest):
            self._begin_next()

    async def _awaited(self, result: Awaitable[None]) -> None:
        try:
            await result
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            _log.exception("an on_change callback failed")
        except BaseException as error:
            if isinstance(error, GeneratorExit):
                raise
            _log.exception("an on_change callback failed")

    def _drop(self, why: str) -> None:
        if not self._gone:
            self._gone = True
            _log.warning("an on_change callback hears no more changes: %s", why)
        self.clear()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
