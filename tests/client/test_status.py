"""What `status` says from the start of a client to its end, and how a client starts."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from slm import ClientStatus, SLMClient, Step, Timings
from slm.client.sync.backoff import Backoff
from tests.support.faults.backends import TENTH
from tests.support.faults.scripted import Peer, changed, config, scripted_slm
from tests.support.gateway import Gateway
from tests.support.raw import Api
from tests.support.sdk import client_of
from tests.support.servers import InLoopServer, ServerProcess, eventually


def status_of(client: SLMClient) -> ClientStatus:
    """Return the status; by a call, since a type checker takes a property for unchanging."""
    return client.status


async def test_the_status_of_a_life(server: InLoopServer) -> None:
    """Starting, live, disconnected, live again, closed; and after closing, still an answer."""
    client = client_of(server.url, server, ttl_seconds=0.01)
    assert status_of(client) is ClientStatus.STARTING
    await client.connect()
    assert (status_of(client), client.last_error) == (ClientStatus.LIVE, None)
    await client.connect()
    await server.stop()
    await eventually(lambda: status_of(client) is ClientStatus.DISCONNECTED)
    assert client.last_error
    await server.start()
    await eventually(lambda: status_of(client) is ClientStatus.LIVE)
    assert client.last_error is None
    await client.close()
    await client.close()
    assert status_of(client) is ClientStatus.CLOSED
    config = await client.resolve("default")
    assert config.step is Step.AGENT
    await eventually(lambda: config.stale)


async def test_a_wrong_token_is_told_at_once(
    server: InLoopServer, caplog: pytest.LogCaptureFixture
) -> None:
    """connect() does not wait where waiting cannot help; the token is in no message."""
    async with asyncio.timeout(20):
        async with SLMClient(server.url, token="slm_canary", start_timeout=3600) as client:
            assert status_of(client) is ClientStatus.UNAUTHORIZED
            assert client.last_error
            assert (await client.resolve("any")).step is Step.HARDCODED
            assert "canary" not in client.last_error
    assert "canary" not in caplog.text


async def test_a_token_without_its_scope_is_told_too(gate: Gateway, server: InLoopServer) -> None:
    """A stream without the right to the snapshot is not called live."""
    gate.refuse = lambda path: 403 if path == "/api/snapshot" else None
    async with asyncio.timeout(20):
        async with client_of(gate.url, server, start_timeout=3600) as client:
            assert status_of(client) is ClientStatus.UNAUTHORIZED
            gate.refuse = lambda _: None
            await eventually(lambda: status_of(client) is ClientStatus.LIVE)


async def test_behind_is_not_live(server: InLoopServer) -> None:
    """A server that lost its database says so, and its clients no longer call themselves live."""
    go_on = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.subscribed(5)
        await peer.say({"type": "heartbeat", "revision": 5, "behind": True})
        await go_on.wait()
        await peer.live(5)

    agents = {"default": (1, config("d", is_default=True))}
    async with (
        scripted_slm(revision=5, agents=agents, scripts=[script]) as slm,
        SLMClient(slm.url, token="t", timings=Timings(**TENTH)) as client,
    ):
        await eventually(lambda: client.status is ClientStatus.BEHIND)
        assert client.peek("default") is None
        assert (await client.resolve("default")).llm_model == "d"
        go_on.set()
        await eventually(lambda: client.status is ClientStatus.LIVE)
        assert client.peek("default") is not None


async def test_two_heartbeats_of_silence_are_not_live(caplog: pytest.LogCaptureFixture) -> None:
    """A server that answers pings but says nothing any more is left, and the stream resumed."""
    silent = asyncio.Event()

    async def silence(peer: Peer) -> None:
        await peer.subscribed(5)
        await peer.say({"type": "heartbeat", "revision": 5, "behind": False})
        silent.set()
        async for _ in peer.ws:
            pass  # hears acks and answers pings until the client has gone

    async def again(peer: Peer) -> None:
        await peer.subscribed(5)
        await peer.live(5)

    agents = {"default": (1, config("d", is_default=True))}
    timings = Timings(**(TENTH | {"ping_interval_seconds": 3600.0}))
    async with (
        scripted_slm(revision=5, agents=agents, scripts=[silence, again]) as slm,
        SLMClient(slm.url, token="t", timings=timings) as client,
    ):
        await silent.wait()
        await eventually(lambda: len(slm.subscriptions) == 2)
        await eventually(lambda: client.status is ClientStatus.LIVE)
    # Its heartbeat is 0.5 s.
    assert "no frame from the SLM within 1 s" in caplog.text
    assert slm.handshakes[1] - slm.handshakes[0] >= 1.0
    assert slm.subscriptions[1]["since"] == 5


@pytest.mark.parametrize(("healthy", "resets"), [(0.001, True), (3600.0, False)])
async def test_backoff_starts_anew_after_a_healthy_connection(
    healthy: float, resets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that held for long enough is followed by the first wait, not the next one."""
    waits: list[float] = []
    delay_after = Backoff.delay_after

    def longest(self: Backoff, error: BaseException) -> float:
        self._uniform = lambda low, high: high
        waits.append(delay_after(self, error))
        return waits[-1]

    monkeypatch.setattr(Backoff, "delay_after", longest)

    async def short(peer: Peer) -> None:
        await peer.subscribed(5)
        await eventually(lambda: backend.status is ClientStatus.LIVE)
        await asyncio.sleep(0.01)  # healthy for longer than the shorter time above

    agents = {"default": (1, config("d", is_default=True))}
    timings = Timings(**(TENTH | {"backoff_initial_seconds": 0.01, "healthy_seconds": healthy}))
    async with scripted_slm(revision=5, agents=agents, scripts=[short]) as slm:
        backend = SLMClient(slm.url, token="t", timings=timings)
        async with backend:
            await eventually(lambda: len(waits) >= 4)
    assert waits[:4] == pytest.approx([0.01] * 4 if resets else [0.01, 0.02, 0.04, 0.08])


async def test_a_hole_in_the_stream_is_mended_by_a_snapshot() -> None:
    """A revision that was skipped against the contract does not stay unknown."""
    agents = {"default": (1, config("d", is_default=True)), "a": (5, config("old"))}

    async def script(peer: Peer) -> None:
        await peer.subscribed(5)
        await eventually(lambda: slm.snapshots == 1)
        slm.agents = {"default": agents["default"], "a": (6, config("new"))}
        slm.revision = 7
        await peer.say(changed("b", 7, "m"))
        await peer.live(7)

    async with (
        scripted_slm(revision=5, agents=agents, scripts=[script]) as slm,
        SLMClient(slm.url, token="t", timings=Timings(**TENTH)) as client,
    ):
        await eventually(lambda: client.revision == 7)
        assert (await client.resolve("a")).llm_model == "new"
        assert slm.snapshots == 2


async def test_connect_returns_before_a_silent_slm_answers() -> None:
    """An address that takes connections and says nothing costs start_timeout, not for ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        timings = Timings(request_timeout_seconds=3600)
        async with asyncio.timeout(20):
            async with SLMClient(url, token="t", start_timeout=0.2, timings=timings) as client:
                assert client.status is ClientStatus.STARTING


async def test_a_question_connects_by_itself(server: InLoopServer, admin: Api) -> None:
    """Who forgets connect() gets the SLM's answer, not the hardcoded one."""
    client = client_of(server.url, server)
    found = await asyncio.gather(*(client.resolve("default") for _ in range(10)))
    assert {config.step for config in found} == {Step.AGENT}
    await client.close()


async def test_another_threads_loop_may_ask(server: InLoopServer, client: SLMClient) -> None:
    """Questions, connecting and closing are the same in a loop of another thread."""
    results: list[Any] = []

    async def ask() -> None:
        results.append((await client.resolve("default")).step)
        results.append((await client.resolve("unknown")).step)
        await client.connect()
        results.append(status_of(client))
        await client.close()
        results.append(status_of(client))

    thread = threading.Thread(target=asyncio.run, args=(ask(),))
    thread.start()
    await asyncio.to_thread(thread.join)
    assert results == [Step.AGENT, Step.DEFAULT, ClientStatus.LIVE, ClientStatus.CLOSED]
    assert status_of(client) is ClientStatus.CLOSED


def test_a_second_loop_may_connect_after_the_first_has_ended(tmp_path: Path) -> None:
    """One asyncio.run after another, as scripts and tests do, works with one client."""
    server = ServerProcess(tmp_path / "data")
    asyncio.run(server.start())
    client = SLMClient(server.url, token=server.backend_token, timings=Timings(**TENTH))
    try:
        for _ in range(2):
            assert asyncio.run(client.resolve("default")).step is Step.AGENT
    finally:
        server.kill()
