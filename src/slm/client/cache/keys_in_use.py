"""Which API keys calls in progress use: a call keeps its key from start to end.

Only counts; safe from any thread, and cheap enough for every call.
"""

from __future__ import annotations

from collections.abc import Callable

from slm.client.config import ResolvedConfig
from slm.client.runtime import native


class KeysInUse:
    """How many calls use each key, by agent and key revision."""

    def __init__(self) -> None:
        self._lock = native.new_rlock()
        self._counts: dict[tuple[str, int], int] = {}

    def oldest(self) -> dict[str, int]:
        """Return each agent's oldest key that is in use."""
        with self._lock:
            held = sorted(self._counts, reverse=True)
        return dict(held)

    def add(self, agent_id: str, api_key_revision: int, calls: int) -> None:
        """Add `calls` users of a key; negative to remove them."""
        key = (agent_id, api_key_revision)
        with self._lock:
            count = self._counts.get(key, 0) + calls
            if count > 0:
                self._counts[key] = count
            else:
                self._counts.pop(key, None)

    def start_anew(self) -> None:
        """Forget everything in a forked child, which does not have its parent's calls."""
        self._lock = native.new_rlock()
        self._counts = {}


class InUse:
    """Marks a config's key as in use during a `with` block.

    Args:
        keys: where uses are counted.
        config: the config of the call.
        changed: called if the key was not the agent's current one when the call started or ended.
        current: returns the revision of an agent's current key.
    """

    __slots__ = ("_agent_id", "_changed", "_current", "_key_revision", "_keys")

    def __init__(
        self,
        keys: KeysInUse,
        config: ResolvedConfig,
        current: Callable[[str], int | None],
        changed: Callable[[], None],
    ) -> None:
        self._keys = keys
        self._agent_id = config.source_agent_id
        self._key_revision = config.api_key_revision
        self._current = current
        self._changed = changed

    def __enter__(self) -> None:
        self._count(1)

    def __exit__(self, *exc: object) -> None:
        self._count(-1)

    def _count(self, calls: int) -> None:
        agent_id, revision = self._agent_id, self._key_revision
        if agent_id is None or revision is None:
            return
        self._keys.add(agent_id, revision, calls)
        if self._current(agent_id) != revision:
            self._changed()
