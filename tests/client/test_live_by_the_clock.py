"""Live means that a message was heard within two heartbeats, by the clock, whatever stood still."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from slm import ClientStatus, SLMClient, Timings
from slm.client.cache.cache import AgentConfigCache
from slm.client.cache.freshness import NEVER
from slm.client.cache.snapshot import ReceivedAgent, ReceivedSnapshot
from slm.client.runtime import clock
from tests.support.faults.backends import TENTH
from tests.support.faults.scripted import Peer, config, scripted_slm
from tests.support.processes import create, process, until, write
from tests.support.servers import ServerProcess, eventually

__all__ = ["process"]

HELD: dict[str, Any] = {"default": (1, config("d", is_default=True)), "a": (1, config("old"))}


async def stay(peer: Peer) -> None:
    """Say nothing more, until the client goes."""
    async for _ in peer.ws:
        pass


async def once(peer: Peer) -> None:
    """A stream that is live, with heartbeats that nobody waits for here."""
    await peer.subscribed(1, heartbeat=3600)
    await stay(peer)


async def again(peer: Peer) -> None:
    """The same, resumed."""
    await peer.say(
        {
            "type": "subscribed",
            "channel": "agent_config",
            "revision": 1,
            "head": 2,
            "epoch": "scripted",
            "heartbeat": 3600,
        },
        {"type": "agent_config_changed", "agent_id": "a", "revision": 2, "config": config("new")},
        {"type": "heartbeat", "revision": 2, "behind": False},
    )
    await stay(peer)


async def test_a_question_after_a_pause_gets_the_new_value() -> None:
    """Once two heartbeats went by unheard, a question waits for a stream that is live again."""
    async with (
        scripted_slm(agents=HELD, scripts=[once, again]) as slm,
        SLMClient(slm.url, token="t", timings=Timings(**TENTH)) as client,
    ):
        assert (await client.resolve("a")).llm_model == "old"
        await asyncio.sleep(TENTH["healthy_seconds"])
        client._follower.sync.heard(clock.now())  # type: ignore[union-attr]
        assert client.peek("a") is None
        assert str(client.status) == "disconnected"
        config = await client.resolve("a")
        assert (config.llm_model, config.stale) == ("new", False)
        assert len(slm.subscriptions) == 2
        assert client.status is ClientStatus.LIVE


async def test_what_was_sent_during_a_pause_does_not_make_live() -> None:
    """A message that is read after two heartbeats of silence is left, and the stream resumed."""
    speak = asyncio.Event()

    async def late(peer: Peer) -> None:
        await peer.subscribed(1, heartbeat=3600)
        await speak.wait()
        await peer.say({"type": "heartbeat", "revision": 1, "behind": False})
        await stay(peer)

    async with (
        scripted_slm(agents=HELD, scripts=[late, again]) as slm,
        SLMClient(slm.url, token="t", timings=Timings(**TENTH)) as client,
    ):
        await eventually(lambda: client.status is ClientStatus.LIVE)
        stream = client._follower.sync._stream  # type: ignore[union-attr]
        stream._told_until = clock.now()
        speak.set()
        await eventually(lambda: len(slm.subscriptions) == 2)
        await eventually(lambda: client.revision == 2)
        assert (await client.resolve("a")).llm_model == "new"


def work_of(task: asyncio.Task[Any]) -> str:
    """Return what a task of the client keeps up, as it prints."""
    coroutine: Any = task.get_coro()
    return str(coroutine.cr_frame.f_locals.get("work"))


async def test_leaving_the_stream_in_any_way_is_not_live() -> None:
    """Whatever ends the task that hears, no answer is called live from that moment on."""
    async with (
        scripted_slm(agents=HELD, scripts=[once]) as slm,
        SLMClient(slm.url, token="t", timings=Timings(**TENTH)) as client,
    ):
        await eventually(lambda: client.status is ClientStatus.LIVE)
        sync = client._follower.sync
        assert sync is not None
        (hearing,) = (t for t in sync._tasks._running if "Stream.run" in work_of(t))
        sync.loop.call_soon_threadsafe(hearing.cancel)
        await eventually(lambda: client._cache.liveness.live_until == NEVER)
        assert client.peek("a") is None


def test_the_age_counts_from_the_last_live_moment() -> None:
    """After a pause a value is as old as what was heard last, noticed or not."""
    time_now = [0.0]
    cache = AgentConfigCache(ttl_seconds=300, clock=lambda: time_now[0])
    agents = [ReceivedAgent(agent_id="a", revision=1, llm_provider="ollama", llm_model="m")]
    cache.apply_snapshot(ReceivedSnapshot(revision=1, epoch="e", agents=agents))
    cache.liveness.set(True, until=40.0)
    held = cache.ready["a"]
    assert (cache.liveness.live, held.age, held.stale) == (True, 0.0, False)
    time_now[0] = 640.0
    assert (cache.liveness.live, held.age, held.stale) == (False, 600.0, True)
    cache.liveness.set(False)
    assert (cache.liveness.live, held.age, held.stale) == (False, 600.0, True)


def test_the_clock_goes_on_in_suspend() -> None:
    """Ages and liveness are measured with the clock that does not stop while a laptop sleeps."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        assert abs(clock.now() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 1
    assert clock.now() <= clock.now()


def test_one_asyncio_run_after_another(process: ServerProcess) -> None:
    """A client of the module's, a job per `asyncio.run`: each job sees the changes before it."""
    create(process, "billing", llm_model="m0")
    client = SLMClient(process.url, token=process.backend_token, timings=Timings(**TENTH))

    def job() -> tuple[str, bool, int]:
        config = asyncio.run(client.resolve("billing"))
        return config.llm_model, config.stale, client.revision

    try:
        assert job()[0] == "m0"
        for number in range(1, 6):
            revision = write(process, "PUT", "/billing", {"llm_model": f"m{number}"})
            until(lambda wanted=revision: client.revision >= wanted)  # type: ignore[misc]
            assert job() == (f"m{number}", False, revision)
        process.kill()
        until(lambda: client.status is not ClientStatus.LIVE)
        assert client.peek("billing") is None
        assert asyncio.run(client.resolve("billing")).llm_model == "m5"
    finally:
        client.close_now()


FROZEN = """
import json, sys
from slm import SLMClient, Timings
client = SLMClient(sys.argv[1], token=sys.argv[2], timings=Timings(**json.loads(sys.argv[3])))
for line in sys.stdin:
    config = client.resolve_now("billing")
    print(json.dumps([config.llm_model, config.stale, client.status.value]), flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no such signal here")
def test_a_frozen_process_calls_no_old_value_live(tmp_path: Path) -> None:
    """Stopped for longer than two heartbeats, as a Lambda or a laptop is: no old value is live."""
    server = ServerProcess(tmp_path / "data", heartbeat_seconds=0.5)
    asyncio.run(server.start())
    create(server, "billing", llm_model="m0")
    arguments = [server.url, server.backend_token, json.dumps(TENTH)]
    process = subprocess.Popen(
        [sys.executable, "-c", FROZEN, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def ask() -> None:
        assert process.stdin is not None
        process.stdin.write("?\n")
        process.stdin.flush()

    def asked() -> list[Any]:
        assert process.stdout is not None
        ask()
        return list(json.loads(process.stdout.readline()))

    try:
        assert asked() == ["m0", False, "live"]
        for number in range(1, 4):
            # Healthy for a while, so that it may come back at once.
            until(lambda: asked()[2] == "live")
            time.sleep(0.3)
            process.send_signal(signal.SIGSTOP)
            write(server, "PUT", "/billing", {"llm_model": f"m{number}"})
            time.sleep(1.2)  # more than two heartbeats
            ask()  # lies there when it goes on
            process.send_signal(signal.SIGCONT)
            model, stale, status = json.loads(process.stdout.readline())
            # On a busy machine it may still be on its way back, and then says so.
            assert model == f"m{number}" or (status != "live" and not stale)
            new = [f"m{number}", False, "live"]
            until(lambda new=new: asked() == new)  # type: ignore[misc]
    finally:
        process.kill()
        process.wait()
        server.kill()
