"""The subscription: connect, subscribe from the current position, receive, and never give up.

Knows the WebSocket; the listener interprets the messages.
"""

from __future__ import annotations

import asyncio
import math
from typing import NamedTuple, Protocol

import aiohttp

from slm.client.runtime.clock import now
from slm.client.runtime.log import quiet_logger
from slm.client.sync.backoff import Backoff
from slm.client.timings import Timings
from slm.client.transport.answers import UpgradeFailed
from slm.client.transport.credentials import Watch
from slm.client.transport.http import Connection
from slm.client.transport.keepalive import Silence
from slm.client.transport.websocket import DirectWebSocket
from slm.errors import ProtocolError, SLMError, SLMUnavailable
from slm.protocol import (
    ClientInfo,
    Error,
    ServerMessage,
    Subscribe,
    Subscribed,
    encode,
    parse_server_message,
)

_log = quiet_logger("slm.client")


class Resume(NamedTuple):
    """Where to resume: a revision, its epoch, and its change id if known."""

    since: int
    epoch: str
    change_id: str | None


class Listener(Protocol):
    """Receives what arrives on the stream, in order."""

    def position(self) -> Resume | None:
        """Return the position to resume after; None to start from now."""

    def heard(self, until: float) -> None:
        """Called for each message: the SLM is reachable, which is valid `until` then."""

    def subscribed(self, message: Subscribed, since: int | None) -> None:
        """Called when the stream starts; `since` is the requested position."""

    def received(self, message: ServerMessage) -> None:
        """Called for each later message."""

    def left(self) -> None:
        """Called when the connection ends in any way: nothing is received from now on."""

    def lost(self, error: SLMError) -> None:
        """Called with the reason when there is no stream; the next attempt follows on its own."""


class StoodStill(SLMUnavailable):
    """Nothing arrived for too long, because this process or its machine was suspended."""


class Stream:
    """Keeps one subscription running until its task is cancelled."""

    _listener: Listener

    def __init__(self, connection: Connection, client: ClientInfo, timings: Timings) -> None:
        self._connection = connection
        self._client = client
        self._timings = timings
        self._watch = Watch(connection.files)
        self._left_for: SLMError | None = None
        self._ws: DirectWebSocket | None = None
        self._silence: Silence | None = None
        self._told_until = 0.0
        self._stood_still = False
        self._subscribed_at: float | None = None
        self._caught_up_at: float | None = None
        self._healthy = False

    async def run(self, listener: Listener) -> None:
        """Connect, and reconnect with backoff, forever; pass what arrives to the listener."""
        self._listener = listener
        backoff = Backoff(self._timings)
        while True:
            self._subscribed_at = self._caught_up_at = None
            self._healthy = False
            self._watch.note()
            address = self._connection.addresses.current
            failure: SLMError
            try:
                failure = await self._live_once()
            except SLMError as error:
                failure = error
            except Exception:
                # One of our own errors must not end the stream for the life of the process.
                _log.exception("the stream failed; connecting again")
                failure = SLMUnavailable("the stream failed on our side; the log has more")
            self._connection.streaming = False
            elsewhere = self._connection.addresses.leave(address)
            self._listener.lost(failure)
            self.note_caught_up(False)
            if self._healthy:
                backoff.reset()
                if isinstance(failure, StoodStill):
                    continue  # a call may wait for it, and no one else was suspended
            seconds = backoff.delay_elsewhere() if elsewhere else backoff.delay_after(failure)
            # A rejected token or certificate is retried as soon as its file is replaced.
            await self._watch.wait(seconds)

    def note_caught_up(self, caught_up: bool) -> None:
        """Note whether the client is caught up; a connection that stays so is healthy."""
        now, since = asyncio.get_running_loop().time(), self._caught_up_at
        if since is not None and now - since >= self._timings.healthy_seconds:
            self._healthy = True
        if not caught_up:
            self._caught_up_at = None
        elif since is None:
            self._caught_up_at = now

    async def send(self, text: str) -> bool:
        """Send a message; return whether there is a subscription to send it on."""
        ws = self._ws
        if ws is None or ws.closed or self._subscribed_at is None:
            return False
        try:
            await ws.send_str(text)
        except (aiohttp.ClientError, OSError):
            return False  # the reader notices, and learns the reason
        return True

    def deafen(self) -> None:
        """Stop receiving on this connection at once; closing it takes a few turns of the loop."""
        if self._ws is not None:
            self._ws.deafen()

    def leave(self) -> None:
        """Abandon the connection: this process was suspended, and what it missed is unknown."""
        self._stood_still = True
        self.deafen()
        if self._silence is not None:
            self._silence.give_up()

    async def restart(self, why: SLMError | None = None) -> None:
        """Close the connection so that the next one starts from the listener's position."""
        if self._ws is not None:
            self._left_for = why
            await self._ws.close()

    async def _live_once(self) -> SLMError:
        """Keep one connection until it ends, and return why it ended."""
        position = self._listener.position()
        since, epoch, change_id = position if position is not None else (None, None, None)
        self._left_for = None
        ws = self._ws = await self._connection.open_stream()
        try:
            subscribe = Subscribe(
                subscribe="agent_config",
                since=since,
                epoch=epoch,
                change_id=change_id,
                client=self._client,
            )
            await ws.send_str(encode(subscribe))
            return await self._hear(ws, since)
        except (aiohttp.ClientError, OSError) as error:
            return SLMUnavailable(f"the stream broke: {type(error).__name__}")
        finally:
            self._ws = None
            self._listener.left()
            await ws.close()

    async def _hear(self, ws: DirectWebSocket, since: int | None) -> SLMError:
        timings = self._timings
        silence = Silence(ws, timings.ping_interval_seconds, timings.request_timeout_seconds)
        clock = asyncio.get_running_loop().time
        window = 0.0

        def take(text: str) -> None:
            nonlocal window
            silence.told_at = silence.heard_at = clock()
            told_at = now()
            if self._stood_still or (window and told_at >= self._told_until):
                # This was sent while nothing was listening, and may be incomplete.
                self._stood_still = True
                raise StoodStill("nothing was heard for too long: this process stood still")
            message = parse_server_message(text)
            self._told_until = told_at + window
            if window:
                self._listener.heard(self._told_until)
            if self._subscribed_at is None:
                heartbeat = self._heartbeat(message)
                window = 2 * heartbeat
                self._told_until = told_at + window
                self._listener.heard(self._told_until)
                self._begin(message, since)
                silence.allow(window)
            elif isinstance(message, Error):
                code = self._connection.repeated(message.code)
                _log.warning("the SLM did not understand us: %s", code)
            elif message is not None:
                self._listener.received(message)

        self._silence, self._stood_still = silence, False
        try:
            async with silence.limited():
                ws.hear(take)
                while True:
                    frame = await ws.receive()
                    silence.heard_at = clock()
                    if frame.type is aiohttp.WSMsgType.TEXT:
                        take(frame.data)
                    elif frame.type is aiohttp.WSMsgType.PING:
                        await ws.pong(frame.data)
                    elif frame.type is not aiohttp.WSMsgType.PONG:
                        return self._left_for or self._ending(frame.type, ws.close_code)
        except TimeoutError:
            if self._stood_still:
                return StoodStill("nothing was heard for too long: this process stood still")
            return self._swallowed(f"no frame from the SLM within {silence.seconds:g} s")
        finally:
            self._silence = None
            ws.deafen()

    def _heartbeat(self, message: ServerMessage | None) -> float:
        """Return the interval from the first message, or raise what is wrong with it."""
        if isinstance(message, Error):
            code = self._connection.repeated(message.code)
            raise ProtocolError(f"the SLM refused the subscription: {code}")
        if not isinstance(message, Subscribed):
            raise ProtocolError("the SLM's first message is not 'subscribed'")
        if not math.isfinite(message.heartbeat) or message.heartbeat <= 0:
            raise ProtocolError("the SLM names a heartbeat that is no interval")
        return message.heartbeat

    def _begin(self, message: ServerMessage | None, since: int | None) -> None:
        """Process the first message, which `_heartbeat` has checked."""
        assert isinstance(message, Subscribed)  # noqa: S101 - for the type checker
        self._subscribed_at = asyncio.get_running_loop().time()
        self._connection.streaming = True
        self._connection.addresses.arrived()
        self._listener.subscribed(message, since)

    def _ending(self, kind: aiohttp.WSMsgType, code: int | None) -> SLMError:
        if kind is aiohttp.WSMsgType.BINARY:
            return ProtocolError("the SLM sent a binary frame")
        if code in (None, aiohttp.WSCloseCode.ABNORMAL_CLOSURE):
            return self._swallowed("the stream was cut")
        return SLMUnavailable(f"the stream ended (close code {code})")

    def _swallowed(self, what: str) -> SLMError:
        """Return the error for a silent end; right at the start, it suggests a proxy."""
        if self._subscribed_at is not None:
            return SLMUnavailable(what)
        self._connection.upgrade_refused = True
        return UpgradeFailed(f"the WebSocket was opened, but nothing came through it: {what}")
