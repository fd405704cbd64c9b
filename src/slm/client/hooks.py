"""What a user hangs into the client: callbacks for changes, and validators of configs.

Keeps and calls them; a mistake in one is logged and harms nobody. Knows neither cache nor SLM.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable

from slm.client.config import ResolvedConfig

_log = logging.getLogger("slm.client")

OnChange = Callable[[str, ResolvedConfig | None], Awaitable[None] | None]
"""Called with the agent_id whose config was swapped, and with the agent's own config now in force;
None where it has none: deleted, switched off, or its key cannot be had."""

Validator = Callable[[ResolvedConfig], str | None]
"""Says why a config must not come into force, or None. Called in the client's loop; must be quick.
"""


class Hooks:
    """The callbacks and validators of one client.

    Args:
        validators_changed: called after a validator was added or removed.
    """

    def __init__(self, validators_changed: Callable[[], None]) -> None:
        self._validators_changed = validators_changed
        self._callbacks: list[OnChange] = []
        self._validators: list[Validator] = []
        self._tasks: set[asyncio.Future[None]] = set()

    def on_change(self, callback: OnChange) -> Callable[[], None]:
        """Keep a callback; return how to remove it."""
        self._callbacks.append(callback)

        def unsubscribe() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return unsubscribe

    def register_validator(self, validator: Validator) -> Callable[[], None]:
        """Keep a validator; return how to remove it."""
        if validator not in self._validators:
            self._validators.append(validator)
            self._validators_changed()

        def unregister() -> None:
            if validator in self._validators:
                self._validators.remove(validator)
                self._validators_changed()

        return unregister

    def tell(self, agent_id: str, config: ResolvedConfig | None) -> None:
        """Call every callback, in the event loop."""
        for callback in tuple(self._callbacks):
            try:
                result = callback(agent_id, config)
                if result is not None and inspect.isawaitable(result):
                    task = asyncio.ensure_future(result)
                    self._tasks.add(task)
                    task.add_done_callback(self._ended)
            except (Exception, asyncio.CancelledError):
                _log.exception("an on_change callback failed")

    def refusal(self, config: ResolvedConfig) -> str | None:
        """Return why a config must not come into force, by the first validator that says so."""
        for validator in tuple(self._validators):
            try:
                reason = validator(config)
            except (Exception, asyncio.CancelledError):
                _log.exception("a validator failed; its config is used")
                continue
            if reason is not None:
                return reason
        return None

    def abandon(self) -> None:
        """Forget what runs in a loop that is no more."""
        self._tasks = set()

    def _ended(self, task: asyncio.Future[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("an on_change callback failed", exc_info=error)
