"""Committed changes as WebSocket frames, encoded once for everyone who may see the same.

Pure: knows no connection (docs/protocol.md section 4).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from slm import protocol
from slm.protocol import AgentChanged, AgentDeleted, Heartbeat
from slm.server.catalog import CommittedChange
from slm.server.view import EVERYTHING, View
from slm.server.websocket import text_frames

MAX_WRITE_BYTES: Final = 64 * 1024
"""Frames of a burst are joined into one write up to this, so that a burst evicts nobody."""


@dataclass(frozen=True)
class Frames:
    """Messages in order, encoded once for everyone.

    Attributes:
        texts: one message each.
        head: the revision that a subscriber has reached with the last one.
    """

    texts: tuple[str, ...]
    head: int

    @cached_property
    def encoded(self) -> bytes:
        """The WebSocket frames, one after the other."""
        return text_frames(self.texts)


def encode_change(
    change: CommittedChange, view: View = EVERYTHING, *, hidden_today: bool = False
) -> str:
    """Return the frame's text for a change: the llm_* fields and flags, never a key.

    A change outside the view is a heartbeat that names its revision, and an agent that leaves the
    view by it is deleted (docs/protocol.md section 4, point 8).

    Args:
        change: the change.
        view: what the token sees.
        hidden_today: of a replay, whether the view does not see the agent any more. Then nothing
            of it is told, but that it left: a client that had it until then must drop it.
    """
    agent = change.agent
    message: AgentChanged | AgentDeleted | Heartbeat
    seen_before = view.sees(agent.agent_id, change.was_default)
    seen_after = not change.deletes and view.sees(agent.agent_id, agent.is_default)
    if not (seen_before or seen_after):
        message = Heartbeat(revision=change.revision)
    elif not seen_after:
        message = AgentDeleted(
            agent_id=agent.agent_id, revision=change.revision, traceparent=change.traceparent
        )
    elif hidden_today:
        message = Heartbeat(revision=change.revision)
    else:
        message = AgentChanged(
            type="agent_created" if change.type == "agent_created" else "agent_config_changed",
            agent_id=agent.agent_id,
            revision=change.revision,
            config=agent,
            traceparent=change.traceparent,
        )
    return protocol.encode(message)


def in_writes(encoded: Iterable[tuple[int, str]]) -> Iterator[Frames]:
    """Join (revision, text) pairs into writes of at most `MAX_WRITE_BYTES`, in order."""
    texts: list[str] = []
    size = head = 0
    for revision, text in encoded:
        if texts and size + len(text) > MAX_WRITE_BYTES:
            yield Frames(tuple(texts), head)
            texts, size = [], 0
        texts.append(text)
        size += len(text)
        head = revision
    if texts:
        yield Frames(tuple(texts), head)
