"""Committed changes as WebSocket frames, encoded once for all clients with the same view.

Pure functions; know no connection (docs/protocol.md section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from slm import protocol
from slm.protocol import AgentChanged, AgentDeleted, Heartbeat
from slm.server.agents.changes import CommittedChange
from slm.server.security.agent_scope import EVERYTHING, View
from slm.server.transport.ws_frames import text_frames

MAX_WRITE_BYTES: Final = 64 * 1024
"""Frames of a burst are joined into writes of at most this size, so a burst evicts nobody."""


@dataclass(frozen=True)
class Frames:
    """Messages in order, encoded once for everyone.

    Attributes:
        texts: one message each.
        head: the revision a subscriber has reached after the last message.
        head_id: the change id of `head`; ignored if `head` moves no subscriber.
    """

    texts: tuple[str, ...]
    head: int
    head_id: str = ""

    @cached_property
    def encoded(self) -> bytes:
        """The WebSocket frames, concatenated."""
        return text_frames(self.texts)


def encode_change(
    change: CommittedChange, view: View = EVERYTHING, *, hidden_today: bool = False
) -> str:
    """Return a change's frame as text: the llm_* fields and flags, never a key.

    A change outside the view becomes a heartbeat with its revision. If the change moves an agent
    out of the view, the frame reports it as deleted (docs/protocol.md section 4, point 8).

    Args:
        change: the change.
        view: what the token sees.
        hidden_today: in a replay, whether the view can no longer see the agent. Then nothing about
            it is sent except that it left the view, so that a client that has it drops it.
    """
    agent, change_id = change.agent, change.change_id or None
    message: AgentChanged | AgentDeleted | Heartbeat
    seen_before = view.sees(agent.agent_id, change.was_default)
    seen_after = not change.deletes and view.sees(agent.agent_id, agent.is_default)
    if not (seen_before or seen_after):
        message = Heartbeat(revision=change.revision, change_id=change_id)
    elif not seen_after:
        message = AgentDeleted(
            agent_id=agent.agent_id,
            revision=change.revision,
            change_id=change_id,
            traceparent=change.traceparent,
        )
    elif hidden_today:
        message = Heartbeat(revision=change.revision, change_id=change_id)
    else:
        message = AgentChanged(
            type="agent_created" if change.type == "agent_created" else "agent_config_changed",
            agent_id=agent.agent_id,
            revision=change.revision,
            change_id=change_id,
            config=agent,
            traceparent=change.traceparent,
        )
    return protocol.encode(message)


def in_writes(
    changes: Iterable[CommittedChange],
    view: View = EVERYTHING,
    hides: Callable[[View, str], bool] = lambda _view, _agent_id: False,
) -> Iterator[Frames]:
    """Encode the changes and join them into writes of at most `MAX_WRITE_BYTES`, in order.

    Args:
        changes: the changes to replay.
        view: what the token sees.
        hides: whether a view cannot see the agent with this agent_id today.
    """
    texts: list[str] = []
    size = 0
    last: CommittedChange | None = None
    for change in changes:
        hidden = hides(view, change.agent.agent_id)
        text = encode_change(change, view, hidden_today=hidden)
        if last is not None and size + len(text) > MAX_WRITE_BYTES:
            yield Frames(tuple(texts), last.revision, last.change_id)
            texts, size = [], 0
        texts.append(text)
        size += len(text)
        last = change
    if last is not None:
        yield Frames(tuple(texts), last.revision, last.change_id)


class Heartbeats:
    """One round of heartbeats; most streams share one position, which is encoded once.

    Args:
        behind: whether this server may be behind the database.
    """

    def __init__(self, *, behind: bool) -> None:
        self._behind = behind
        self._encoded: dict[tuple[int, str], Frames] = {}

    def at(self, revision: int, change_id: str) -> Frames:
        """Return the heartbeat for a stream that was sent everything up to this position."""
        frames = self._encoded.get((revision, change_id))
        if frames is None:
            beat = Heartbeat(revision=revision, behind=self._behind, change_id=change_id or None)
            frames = Frames((protocol.encode(beat),), revision)
            self._encoded[revision, change_id] = frames
        return frames
