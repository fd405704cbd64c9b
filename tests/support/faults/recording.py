"""Records every WebSocket stream of a fault test and judges them all when the test is over.

No test asks for it: `conftest.py` puts it round each one. What aiohttp's client hears is recorded
where it is heard, the SDK's streams and TLS included; a proxy adds what passes it, and a site what
its database holds. Knows of the messages what `history` knows.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import aiohttp
import pytest

from slm.client.transport.websocket import DirectWebSocket, Take
from tests.support.faults.history import Connection, Frame, disagreements, violations

Committed = dict[tuple[str, int], Frame]


class Recording:
    """Every stream of one test, and the databases behind them."""

    def __init__(self) -> None:
        self.heard: dict[str, list[Connection]] = {}
        self.passed: dict[str, list[Connection]] = {}
        self.databases: dict[int, Callable[[], Committed]] = {}
        self._frames: dict[str | bytes, Frame] = {}
        self._open: dict[aiohttp.ClientWebSocketResponse, Connection] = {}

    def frame(self, text: str | bytes) -> Frame:
        """Return what a text frame says: one and the same object however many streams hear it.

        What is no JSON object becomes a frame of no type, which the checker calls a violation.
        """
        found = self._frames.get(text)
        if found is None:
            found = self._frames[text] = parsed(text)
        return found

    def sent(self, ws: aiohttp.ClientWebSocketResponse, text: str) -> None:
        """Hear what a client says; its subscription is where a stream begins."""
        if '"subscribe"' in text:
            self._open[ws] = begun(self.heard, json.loads(text))

    def received(self, ws: aiohttp.ClientWebSocketResponse, message: aiohttp.WSMessage) -> None:
        """Hear what a client heard."""
        if message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
            self.told(ws, message.data)

    def told(self, ws: aiohttp.ClientWebSocketResponse, text: str | bytes) -> None:
        """Hear one message that a client heard."""
        if ws in self._open:
            self._open[ws].frames.append(self.frame(text))

    def verdict(
        self, *, resyncs: Iterable[str] = (), committed: bool = True, faults: str | None = None
    ) -> list[str]:
        """Return what is wrong; the arguments are those of the marker `history`.

        Args:
            resyncs: the reasons for which a resync is in order in this test.
            committed: whether the databases still hold every change that was ever sent.
            faults: where the frames are the fault, a pattern of what the checker is to find in
                what was heard; finding nothing of the kind is wrong too.
        """
        truth: Committed | None = None
        if committed and self.databases:
            truth = {
                at: frame for there in self.databases.values() for at, frame in there().items()
            }
        everything = [*self.heard.values(), *self.passed.values()]
        if not any(connection.frames for history in everything for connection in history):
            return ["no stream was recorded"]

        def wrong(histories: Iterable[list[Connection]]) -> list[str]:
            return [
                what
                for history in histories
                for what in violations(history, resyncs=resyncs, committed=truth)
            ]

        heard = wrong(self.heard.values())
        heard += disagreements(everything)
        if faults is not None:
            meant = [what for what in heard if re.search(faults, what)]
            heard = [what for what in heard if what not in meant]
            if not meant:
                heard.append(f"nothing of what was to be found is there: {faults}")
        return wrong(self.passed.values()) + heard


def parsed(text: str | bytes) -> Frame:
    """Return what one frame says; a frame of no type where that is no JSON object."""
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(text)
        if isinstance(said, dict):
            return said
    return {"type": None, "said": text[:40]}


def begun(streams: dict[str, list[Connection]], ask: dict[str, Any]) -> Connection:
    """Begin a connection in the history of whoever subscribes, told apart by its instance."""
    client = ask.get("client", {})
    who = client.get("instance", f"nobody-{len(streams)}")
    history = streams.setdefault(who, [])
    connection = Connection(
        f"{client.get('name', 'client')} {who} connection {len(history)}",
        ask.get("since"),
        ask.get("epoch"),
        # The subscriber that knows the contract alone resumes after the last frame it got.
        snapshots=client.get("name") != "subscriber",
    )
    history.append(connection)
    return connection


now = Recording()
"""The recording of the test that runs now; nobody asks for that of any other moment."""


@contextlib.contextmanager
def recorded() -> Iterator[Recording]:
    """Record every stream of the block."""
    global now
    kind = aiohttp.ClientWebSocketResponse
    send, receive, hear_directly = kind.send_str, kind.receive, DirectWebSocket.hear
    recording = now = Recording()

    async def send_str(
        ws: aiohttp.ClientWebSocketResponse, data: str, compress: int | None = None
    ) -> None:
        recording.sent(ws, data)
        await send(ws, data, compress)

    async def received(
        ws: aiohttp.ClientWebSocketResponse, timeout: float | None = None
    ) -> aiohttp.WSMessage:
        message = await receive(ws, timeout)
        recording.received(ws, message)
        return message

    def hear(ws: DirectWebSocket, take: Take) -> None:
        def taken(text: str) -> None:
            take(text)
            recording.told(ws, text)  # what could not be taken comes by `receive`

        hear_directly(ws, taken)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DirectWebSocket, "hear", hear)
        patch.setattr(kind, "send_str", send_str)
        patch.setattr(kind, "receive", received)
        try:
            yield recording
        finally:
            now = Recording()
