"""Subscriber: one connection's stream, the sink of its frames, and who observes it.

Holds only; the hub decides what is sent, and a sink how it gets there.
"""

from __future__ import annotations

from typing import Protocol

from slm.protocol import ClientInfo
from slm.server.security.agent_scope import EVERYTHING, View
from slm.server.stream.encoding import Frames


class Sink(Protocol):
    """Where a subscriber's frames go; the order of `push` is the order on the wire."""

    def push(self, frames: Frames) -> int:
        """Write without waiting; return how many bytes wait for the peer, -1 once it is closed."""

    def waiting_bytes(self) -> int:
        """Return how many bytes wait for the peer to read, or of what it sends for the rest."""

    async def drained(self) -> None:
        """Wait until the peer has read most of it, or is gone."""

    def end(self, code: int, reason: str) -> None:
        """Close with a WebSocket close code; a peer that does not answer is cut."""

    def abort(self) -> None:
        """Cut the connection now and throw away what waits."""


class Subscriber:
    """One connection's stream.

    Attributes:
        sink: where its frames go.
        position: the last revision it was sent, or started at.
        epoch: the epoch of that position; empty before it subscribed.
        change_id: which change that position is.
        live: whether the hub's broadcast includes it.
        view: what its token may see.
        token_id: whose token it is; None where no token opened it.
        client: who it says it is.
        plain_http: whether it came over the network without TLS.
    """

    # A broadcast visits thousands; each line of memory less is seen in its time.
    __slots__ = (
        *("change_id", "client", "epoch", "live", "plain_http", "position", "sink", "token_id"),
        "view",
    )

    def __init__(self, sink: Sink, view: View = EVERYTHING, token_id: int | None = None) -> None:
        self.sink = sink
        self.view = view
        self.token_id = token_id
        self.position = 0
        self.epoch = ""
        self.change_id = ""
        self.live = False
        self.client: ClientInfo | None = None
        self.plain_http = False


class Observer(Protocol):
    """Who is told of streams and of the head: the fleet."""

    def moved(self, head: int, *, restarted: bool = False) -> None:
        """Hear the head that the stream has reached; `restarted`: in another epoch."""

    def joined(self, subscriber: Subscriber) -> None:
        """Hear that `subscribed` goes out to this connection."""

    def left(self, subscriber: Subscriber) -> None:
        """Hear that a connection is gone, subscribed or not."""
