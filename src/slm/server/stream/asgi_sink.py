"""The way to a subscriber's socket through ASGI, where its transport is out of reach.

Knows no revision and no agent; the hub decides what is sent (docs/protocol.md section 4, point 6).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from starlette.websockets import WebSocket

from slm.server.stream.encoding import Frames


class ASGISink:
    """Sends each message through ASGI, for servers whose transport is out of reach.

    Costs a task and twice the time a frame, so it is what is left where the extension is missing.
    """

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self._texts: deque[str] = deque()
        self._waiting = 0
        self._close: tuple[int, str] | None = None
        self._closed = False
        self._more = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._task = asyncio.create_task(self._send(), name="slm-asgi-sink")

    def push(self, frames: Frames) -> int:
        """Queue without waiting."""
        if self._closed or self._close is not None:
            return -1
        self._texts.extend(frames.texts)
        self._waiting += sum(map(len, frames.texts))
        self._empty.clear()
        self._more.set()
        return self._waiting

    def waiting_bytes(self) -> int:
        """Return how much is queued; what the ASGI server holds is not known."""
        return self._waiting

    async def drained(self) -> None:
        """Wait until the queue is empty."""
        await self._empty.wait()

    def end(self, code: int, reason: str) -> None:
        """Close after what is queued; the ASGI server sees to a peer that does not answer."""
        self._close = self._close or (code, reason)
        self._more.set()

    def abort(self) -> None:
        """Throw the queue away and close."""
        self._texts.clear()
        self._finish()
        self._task.cancel()
        # ASGI has no way to cut a connection; this is the nearest, and may never be answered.
        self._task = asyncio.create_task(self._give_up(), name="slm-asgi-sink-abort")

    async def _give_up(self) -> None:
        with contextlib.suppress(Exception):
            await self._websocket.close(1013, "too slow")

    def _finish(self) -> None:
        self._closed = True
        self._waiting = 0
        self._empty.set()

    async def _send(self) -> None:
        # Whatever the server raises here means that the peer is gone.
        with contextlib.suppress(Exception):
            while True:
                while self._texts:
                    text = self._texts.popleft()
                    await self._websocket.send_text(text)
                    self._waiting -= len(text)
                if not self._texts:
                    self._empty.set()
                if self._close is not None:
                    await self._websocket.close(*self._close)
                    break
                self._more.clear()
                await self._more.wait()
        self._finish()
