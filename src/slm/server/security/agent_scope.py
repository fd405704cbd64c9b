"""What a token can see and write: everything, or the agents that match its patterns.

Pure rules over literal agent_ids; knows no database and no HTTP (docs/protocol.md section 4,
point 8, and `slm tokens create --agents`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

MAX_PATTERNS: Final = 64
MAX_PATTERN_LENGTH: Final = 128


@dataclass(frozen=True)
class View:
    """The agents that a token is limited to, fixed for the token's lifetime.

    Attributes:
        patterns: agent_ids in which `*` stands for any text and nothing else is special; None means
            no limit.
    """

    patterns: tuple[str, ...] | None = None

    @property
    def is_limited(self) -> bool:
        """Whether there is anything that it does not see."""
        return self.patterns is not None

    def covers(self, agent_id: str) -> bool:
        """Return whether the patterns match this agent, so that it may be written."""
        return self.patterns is None or any(matches(p, agent_id) for p in self.patterns)

    def sees(self, agent_id: str, is_default: bool) -> bool:
        """Return whether this agent may be read: the default agent always may."""
        return is_default or self.covers(agent_id)

    def to_text(self) -> str | None:
        """Return it in its stored form."""
        return None if self.patterns is None else json.dumps(self.patterns)

    @classmethod
    def from_text(cls, text: str | None) -> View:
        """Return the stored view; one that cannot be read sees only the default agent."""
        if text is None:
            return EVERYTHING
        try:
            patterns = json.loads(text)
        except (ValueError, RecursionError):
            patterns = None
        if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
            return cls(())
        return cls(tuple(patterns))


EVERYTHING: Final = View()
"""The view of a token with no limit."""


def matches(pattern: str, agent_id: str) -> bool:
    """Return whether `agent_id` matches `pattern`, in which `*` is any text, even none.

    Not fnmatch: its `[` and `?` may occur in an adopted id. Takes linear time: each part between
    two asterisks is matched at the first place where it fits.
    """
    first, *others = pattern.split("*")
    if not others:
        return agent_id == pattern
    *middle, last = others
    if not agent_id.startswith(first):
        return False
    position = len(first)
    for part in middle:
        found = agent_id.find(part, position)
        if found < 0:
            return False
        position = found + len(part)
    return len(agent_id) - position >= len(last) and agent_id.endswith(last)


def parse_patterns(texts: list[str]) -> View:
    """Return the view for patterns given by a user.

    Raises:
        ValueError: there are none, too many, or one can match nothing; the text says which.
    """
    if not texts or len(texts) > MAX_PATTERNS:
        raise ValueError(f"must be 1 to {MAX_PATTERNS} patterns")
    for text in texts:
        if not 0 < len(text) <= MAX_PATTERN_LENGTH or not text.isprintable() or "," in text:
            raise ValueError(
                f"each pattern is 1 to {MAX_PATTERN_LENGTH} printable characters without a comma"
            )
    return View(tuple(dict.fromkeys(texts)))
