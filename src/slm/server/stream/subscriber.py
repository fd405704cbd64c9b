"""Subscriber: one connection's stream, the sink for its frames, and the observer.

Holds state only; the hub decides what is sent, and a sink delivers it.
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
        """Return how many bytes wait for the peer to read, or were received and await the rest."""

    async def drained(self) -> None:
        """Wait until the peer has read most of what was written, or is gone."""

    def end(self, code: int, reason: str) -> None:
        """Close with a WebSocket close code; cut a peer that does not answer."""

    def abort(self) -> None:
        """Cut the connection now and discard what is waiting."""


class Subscriber:
    """One connection's stream.

    Attributes:
        sink: where its frames go.
        position: the last revision it was sent, or started from.
        epoch: the epoch of that position; empty before it subscribed.
        change_id: the change id of that position.
        live: whether the hub's broadcast includes it.
        view: what its token may see.
        token_id: the id of its token; None if it was opened without a token.
        client: how the client identifies itself.
        plain_http: whether it connected over the network without TLS.
    """

    # A broadcast visits thousands of these; each saved cache line shortens it measurably.
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
    """Notified about streams and the head; implemented by the fleet."""

    def moved(self, head: int, *, restarted: bool = False) -> None:
        """Handle a new head of the stream; `restarted`: it is in another epoch."""

    def joined(self, subscriber: Subscriber) -> None:
        """Handle a connection that is being sent `subscribed`."""

    def left(self, subscriber: Subscriber) -> None:
        """Handle a closed connection, whether it subscribed or not."""
