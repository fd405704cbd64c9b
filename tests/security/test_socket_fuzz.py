"""Thousands of messages of a grammar of WebSocket frames and HTTP heads, beside honest clients.

The peers are bare sockets; some read nothing, some never leave. Meanwhile three backends follow
changes that are made all the time: each must arrive, and the server must be as small as before.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
import socket
import struct
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings

from slm import SLMClient
from tests.support.grammar import TOKEN, Conversation, conversations
from tests.support.servers import ServerProcess, eventually

MESSAGES_EACH = 10
HONEST = 3
LATE_SECONDS = 10.0
"""A change that takes longer is late; what is usual is recorded."""

GROWS_AT_MOST_MIB = 120
STAY = 20
"""How many peers stay connected without a word at most."""

EVERYTHING_ODD = list(HealthCheck)


class Honest(threading.Thread):
    """A server, three backends on the SDK and a writer, in a loop of their own."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(name="honest", daemon=True)
        self.server = ServerProcess(data_dir)
        self.began = threading.Event()
        self.done = threading.Event()
        self.failure: BaseException | None = None
        self.seconds: list[float] = []

    def run(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:
            self.failure = error
        finally:
            self.began.set()

    async def _run(self) -> None:
        async with self.server as server, contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(SLMClient(server.url, token=server.backend_token))
                for _ in range(HONEST)
            ]
            session = await stack.enter_async_context(aiohttp.ClientSession())
            self.began.set()
            turn = 0
            while not self.done.is_set():
                turn += 1
                began = time.monotonic()
                async with session.put(
                    f"{server.url}/api/agents/default",
                    json={"llm_model": f"m{turn}"},
                    headers={"Authorization": f"Bearer {server.admin_token}"},
                ) as written:
                    revision = (await written.json())["revision"]
                for client in clients:
                    await eventually(partial(_has, client, revision), LATE_SECONDS, 0.002)
                self.seconds.append(time.monotonic() - began)
                await asyncio.sleep(0.02)

    # --- for the fuzzer's own thread ---

    def check(self) -> None:
        """Fail when a change was late."""
        if self.failure is not None:
            raise AssertionError("an honest client was left behind") from self.failure

    def memory_mib(self) -> float:
        """How much the server has resident."""
        status = Path(f"/proc/{self.server.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", status)
        assert found is not None
        return int(found[1]) / 1024

    def descriptors(self) -> int:
        """How many descriptors the server has."""
        return len(list(Path(f"/proc/{self.server.process.pid}/fd").iterdir()))

    def metric(self, name: str) -> float:
        """What `/metrics` says."""
        with urllib.request.urlopen(f"{self.server.url}/metrics", timeout=10) as answer:
            found = re.search(rf"^{name} (\S+)$", answer.read().decode(), re.MULTILINE)
        assert found is not None
        return float(found[1])


def _has(client: SLMClient, revision: int) -> bool:
    return client.revision >= revision


@contextlib.contextmanager
def honest_site(data_dir: Path) -> Iterator[Honest]:
    """Run the honest side for as long as the block lasts."""
    honest = Honest(data_dir)
    honest.start()
    try:
        assert honest.began.wait(60)
        honest.check()
        yield honest
    finally:
        honest.done.set()
        honest.join(30)
    honest.check()


class Peers:
    """Plays conversations; those who stay are closed when there are too many."""

    def __init__(self, url: str, token: str) -> None:
        host, _, port = url.partition("://")[2].partition(":")
        self._address = (host, int(port))
        self._token = token.encode()
        self._staying: deque[socket.socket] = deque()
        self.messages = 0

    def play(self, conversation: Conversation) -> None:
        """Be one peer; whatever the server does to it is right."""
        peer = socket.create_connection(self._address, timeout=10)
        with contextlib.suppress(OSError):
            if conversation.upgrades:
                self._upgrade(peer)
            self._send(peer, conversation)
        self.messages += len(conversation.messages)
        self._leave(peer, conversation.leaves)

    def _upgrade(self, peer: socket.socket) -> None:
        key = base64.b64encode(os.urandom(16))
        peer.sendall(
            b"GET /ws HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + key + b"\r\n"
            b"Authorization: Bearer " + self._token + b"\r\n\r\n"
        )
        received = b""
        while b"\r\n\r\n" not in received:
            received += (piece := peer.recv(4096))
            assert piece, "the handshake was not answered"
        assert received.startswith(b"HTTP/1.1 101 ")

    def _send(self, peer: socket.socket, conversation: Conversation) -> None:
        # One that is read slowly must not hold the test up.
        peer.settimeout(0.05)
        messages = [each.replace(TOKEN, self._token) for each in conversation.messages]
        for message in [b"".join(messages)] if conversation.in_one else messages:
            peer.sendall(message)
            if conversation.reads:
                peer.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while peer.recv(65536):
                        pass
                peer.settimeout(0.05)

    def _leave(self, peer: socket.socket, how: str) -> None:
        if how == "stay":
            self._staying.append(peer)
            if len(self._staying) > STAY:
                self._staying.popleft().close()
            return
        if how == "half":
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_WR)
            self._leave(peer, "stay")
            return
        if how == "reset":
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()

    def close(self) -> None:
        """All leave."""
        while self._staying:
            self._staying.popleft().close()


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition in this thread; return whether it came true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def fuzz(
    data_dir: Path,
    record_property: Callable[[str, object], None],
    messages: int,
    derandomize: bool = False,
) -> None:
    """Play so many messages, and look at what is left."""
    with honest_site(data_dir) as honest:
        peers = Peers(honest.server.url, honest.server.backend_token)
        assert until(lambda: len(honest.seconds) >= 10, 30)
        descriptors, tasks = honest.descriptors(), honest.metric("slm_tasks")
        memory = honest.memory_mib()
        most = memory

        @settings(
            max_examples=messages // MESSAGES_EACH,
            deadline=None,
            database=None,
            suppress_health_check=EVERYTHING_ODD,
            derandomize=derandomize,
        )
        @given(conversations(MESSAGES_EACH))
        def converse(conversation: Conversation) -> None:
            nonlocal most
            peers.play(conversation)
            most = max(most, honest.memory_mib())
            honest.check()
            assert most - memory < GROWS_AT_MOST_MIB

        converse()
        assert peers.messages >= messages
        peers.close()
        assert until(lambda: honest.metric("slm_connections") == HONEST, 30)
        assert until(lambda: honest.descriptors() <= descriptors + 2, 30)
        assert until(lambda: honest.metric("slm_tasks") <= tasks + 2, 30)
        assert until(lambda: honest.metric("slm_buffered_bytes") == 0, 30)
        assert honest.metric("slm_request_failures_total") == 0
        record_property("messages", peers.messages)
        record_property("mib_at_most", round(most - memory))
        record_property("slowest_change_s", round(max(honest.seconds), 2))
        log = honest.server.log
    assert "Traceback" not in log, log[-5000:]
    assert " ERROR " not in log, log[-5000:]


def test_whatever_peers_send_the_others_are_served_in_time(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """1,000 odd messages: memory, tasks and descriptors are bounded, and no change is late."""
    fuzz(tmp_path / "data", record_property, 1000, derandomize=True)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_ten_thousand_messages(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The same with ten thousand, others each time."""
    fuzz(tmp_path / "data", record_property, 10_000)
