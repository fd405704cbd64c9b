"""Agents that were requested but don't exist on the SLM: finds the nearest name, logs once.

Pure rules over names, and one logger.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

from slm.client.runtime.log import quiet_logger

MAX_SAID: Final = 1_000
"""The maximum number of names remembered and logged: a name may come from a request."""

_MAX_NAME: Final = 64
_MAX_ASKED: Final = 256
_COMPARED: Final = 2_000
_SLACK: Final = 3

_log = quiet_logger("slm.client")


def nearest(agent_id: str, names: Iterable[str]) -> str | None:
    """Return the name that this one is most likely a misspelling of, or None.

    Compares at most 2,000 names of about the same length, those with the same first character
    first, so that a hundred thousand agents do not block the event loop.
    """
    if not 0 < len(agent_id) <= _MAX_NAME + _SLACK:
        return None
    near = [name for name in names if abs(len(name) - len(agent_id)) <= _SLACK]
    near.sort(key=lambda name: name[:1] != agent_id[:1])
    found = difflib.get_close_matches(agent_id, near[:_COMPARED], n=1, cutoff=0.7)
    return found[0] if found else None


class UnknownAgents:
    """Logs each unknown agent once, and remembers the result."""

    def __init__(self) -> None:
        self._near: dict[str, str | None] = {}

    def near(self, agent_id: str, names: Iterable[str]) -> str | None:
        """Return the nearest name; the first time an agent is requested, log that it is missing.

        Args:
            agent_id: the requested agent.
            names: the existing agents.
        """
        if agent_id in self._near:
            return self._near[agent_id]
        if len(self._near) >= MAX_SAID or len(agent_id) > _MAX_ASKED:
            return None
        near = self._near[agent_id] = nearest(agent_id, names)
        _log.warning("%s", _missing(agent_id, near))
        if len(self._near) == MAX_SAID:
            _log.warning("further agents that the SLM does not have are not named in this log")
        return near

    def sentence(self, agent_id: str, names: Iterable[str]) -> str:
        """Return a sentence about a missing agent."""
        return _missing(agent_id, self.near(agent_id, names))


def _missing(agent_id: str, near: str | None) -> str:
    said = f"the SLM has no agent {agent_id[:_MAX_NAME]!r} that this token may see"
    return said if near is None else f"{said} (did you mean {near!r}?)"
