"""One client of a process: any number of threads and loops, forks, and nothing left when closed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from slm import BlockingSLMClient, ClientStatus, SLMClient, Step, Timings
from slm.client.runtime.background import following
from tests.support.faults.backends import TENTH
from tests.support.processes import create, process, until, write
from tests.support.raw import Api
from tests.support.servers import InLoopServer, ServerProcess, eventually

__all__ = ["process"]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After each test no client follows anything, and the thread has ended."""
    yield
    gc.collect()
    until(lambda: following.loop is None)
    until(lambda: not any(each.name == "slm-client" for each in threading.enumerate()))


def make(server: ServerProcess | InLoopServer, **options: Any) -> SLMClient:
    options = {"timings": Timings(**TENTH)} | options
    return SLMClient(server.url, token=server.backend_token, **options)


def sockets() -> int:
    """Return how many sockets this process has open."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # it was that of looking
            count += str(link.readlink()).startswith("socket:")
    return count


def in_threads(count: int, work: Callable[[], Any]) -> list[Any]:
    """Run the same in so many threads at once."""
    together = threading.Barrier(count)

    def one(_: int) -> Any:
        together.wait(20)
        return work()

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))


def test_loops_that_begin_at_once(process: ServerProcess) -> None:
    """Eight threads with loops of their own start one client: one stream, each answer right."""
    create(process, "billing", llm_model="m")
    for _ in range(3):
        client = make(process)

        def ask(client: SLMClient = client) -> str:
            return asyncio.run(client.resolve("billing")).llm_model

        assert in_threads(8, ask) == ["m"] * 8
        assert len(client._follower.sync._tasks._running) <= 4  # type: ignore[union-attr]
        client.close_now()


def test_many_loops_leak_nothing(process: ServerProcess) -> None:
    """Hundreds of loops in four threads ask for an unknown agent: no socket more than one."""
    client = make(process)
    client.connect_now()
    before = sockets()

    def jobs() -> set[Step]:
        return {asyncio.run(client.resolve("nobody")).step for _ in range(50)}

    assert in_threads(4, jobs) == [{Step.DEFAULT}] * 4
    assert sockets() <= before
    client.close_now()


def test_both_forms_are_one_client(process: ServerProcess) -> None:
    """What synchronous code asks, and what loops ask, is the same value of the same stream."""
    revision = create(process, "billing", llm_model="m")
    with make(process) as client:
        until(lambda: client.revision >= revision)
        assert client.resolve_now("billing") is asyncio.run(client.resolve("billing"))
        assert client.get_agent_config_now("billing")["llm_model"] == "m"
        assert client.get_default_agent_config_now()["llm_provider"] == "ollama"
        assert client.explain_now("billing").answered_by == "agent"
    blocking = BlockingSLMClient(process.url, token=process.backend_token, timings=Timings(**TENTH))
    with blocking:
        config = blocking.resolve("billing")
        assert blocking.peek("billing") is config
        with blocking.in_use(config):
            pass
        blocking.register_validator(lambda _: None)()
        assert asyncio.run(blocking.client.resolve("billing")) is config


def test_a_loop_that_stands_still_delays_nothing(process: ServerProcess) -> None:
    """While a user's loop is blocked, changes arrive, callbacks run, other threads are served."""
    create(process, "billing", llm_model="m0")
    client = make(process)
    told = threading.Event()

    async def blocked() -> None:
        await client.connect()
        client.on_change(lambda *_: told.set())
        write(process, "PUT", "/billing", {"llm_model": "m1"})
        assert told.wait(10)  # this thread, and so its loop, does nothing else
        with ThreadPoolExecutor(1) as other:
            assert other.submit(client.resolve_now, "billing").result(10).llm_model == "m1"
        await client.close()

    asyncio.run(blocked())


def test_a_loop_in_a_thread_as_notebooks_have_it(process: ServerProcess) -> None:
    """Cells run now in the kernel's loop and now beside it; one client serves both."""
    create(process, "billing", llm_model="m0")
    kernel = asyncio.new_event_loop()
    thread = threading.Thread(target=kernel.run_forever)
    thread.start()

    def cell(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, kernel).result(10)

    client = make(process)
    for number in range(1, 6):
        revision = write(process, "PUT", "/billing", {"llm_model": f"m{number}"})
        cell(client.connect())
        until(lambda wanted=revision: client.revision >= wanted)  # type: ignore[misc]
        assert cell(client.resolve("billing")).llm_model == f"m{number}"
        assert client.resolve_now("billing").llm_model == f"m{number}"
    cell(client.close())
    kernel.call_soon_threadsafe(kernel.stop)
    thread.join()
    kernel.close()


# --- closing ---


async def test_a_cancelled_start_leaves_nothing() -> None:
    """`async with` that is cancelled while it connects: nothing goes on in the background."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = SLMClient(f"http://127.0.0.1:{silent.getsockname()[1]}", token="t")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2), client:
                raise AssertionError("it connected to nobody")
        await eventually(lambda: client.status is ClientStatus.CLOSED)
        await eventually(lambda: following.loop is None)


async def test_close_during_connect_ends_both() -> None:
    """Whoever waits for a start is not kept waiting by a close; the client is closed then."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        client = SLMClient(url, token="t", start_timeout=3600)
        connecting = asyncio.create_task(client.connect())
        asking = asyncio.create_task(client.resolve("a"))
        await eventually(lambda: client._follower.sync is not None)
        async with asyncio.timeout(10):
            await client.close()
            await connecting
            assert (await asking).step is Step.HARDCODED
        assert client.status is ClientStatus.CLOSED


def test_close_strands_no_thread() -> None:
    """A thread that waits for an SLM which says nothing gets its answer when another one closes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        client = BlockingSLMClient(url, token="t", start_timeout=3600)
        with ThreadPoolExecutor(2) as threads:
            waiting = [threads.submit(client.resolve, "a") for _ in range(2)]
            until(lambda: client.client._follower.sync is not None)
            client.close()
            assert [each.result(10).step for each in waiting] == [Step.HARDCODED] * 2


async def test_connecting_and_closing_in_any_order(server: InLoopServer) -> None:
    """Twice, at once, cancelled half way, in another loop: the last call says how it ends."""
    client = make(server)
    for _ in range(3):
        await asyncio.gather(client.connect(), client.connect(), client.close(), client.connect())
        await eventually(lambda: client.status is ClientStatus.LIVE)
        closing = asyncio.create_task(client.close())
        await asyncio.sleep(0)
        closing.cancel()
        with contextlib.suppress(asyncio.CancelledError):  # or it was quicker
            await closing
        await asyncio.to_thread(client.close_now)
        assert str(client.status) == "closed"
        await asyncio.to_thread(asyncio.run, client.connect())
        assert str(client.status) == "live"
        await asyncio.to_thread(asyncio.run, client.close())
        await eventually(lambda: not server.running.services.hub.subscribers())


async def test_a_client_that_nobody_holds_is_closed(server: InLoopServer) -> None:
    """Forgotten without `close`, it leaves the SLM; one that has a callback goes on."""
    client = make(server)
    await client.connect()
    hub = server.running.services.hub
    assert len(hub.subscribers()) == 1
    del client
    gc.collect()
    await eventually(lambda: not hub.subscribers())


async def test_a_hundred_lives_leak_nothing(server: InLoopServer, admin: Api) -> None:
    """Opened and closed again and again, in this loop and in others: no socket, no thread more."""
    async with make(server):
        pass
    before = sockets()
    for _ in range(15):
        async with make(server) as client:
            await client.resolve("default")
        await asyncio.to_thread(one_life, server)
    await eventually(lambda: sockets() <= before)
    assert threading.active_count() < 20


def one_life(server: InLoopServer) -> None:
    with make(server) as client:
        assert client.resolve_now("default").step is Step.AGENT


# --- forks ---

FORKED = """
import asyncio, json, multiprocessing, os, sys, time
from slm import SLMClient, Timings

url, token, timings = sys.argv[1], sys.argv[2], Timings(**json.loads(sys.argv[3]))
client = SLMClient(url, token=token, timings=timings)

def waits_for(model):
    deadline = time.monotonic() + 20
    while client.resolve_now("billing").llm_model != model:
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)
    config = asyncio.run(client.resolve("billing"))
    return config.llm_model, config.stale, client.status.value, os.getpid()

if __name__ == "__main__":
    client.connect_now()  # as gunicorn --preload has it: before the workers are made
    with multiprocessing.get_context("fork").Pool(4) as workers:
        for model in ("m0", "m1", "m2"):
            line = sys.stdin.readline()
            found = workers.map(waits_for, [model] * 8, chunksize=1)
            print(json.dumps([found, waits_for(model)]), flush=True)
    client.close_now()
    print(json.dumps("closed"), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_workers_forked_from_one_that_is_connected(process: ServerProcess) -> None:
    """Each worker follows the SLM by itself and is live; so does the parent."""
    create(process, "billing", llm_model="m0")
    arguments = [process.url, process.backend_token, json.dumps(TENTH)]
    workers = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", FORKED, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert workers.stdin is not None
    assert workers.stdout is not None
    try:
        for model in ("m0", "m1", "m2"):
            write(process, "PUT", "/billing", {"llm_model": model})
            workers.stdin.write("\n")
            workers.stdin.flush()
            found, parent = json.loads(workers.stdout.readline())
            for seen in [*found, parent]:
                assert seen[:3] == [model, False, "live"]
        assert json.loads(workers.stdout.readline()) == "closed"
        assert workers.wait(20) == 0
    finally:
        workers.kill()
        workers.wait()


# --- the long form ---


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ten_thousand_changes_and_reads(process: ServerProcess) -> None:
    """Four threads with loops of their own and a job per `asyncio.run`: nothing old, no growth."""
    create(process, "billing", llm_max_tokens=1)
    client = make(process)
    written = [0]
    stop = threading.Event()
    wrong: list[Any] = []
    reads = [0] * 5

    def check(config: Any, at_least: int, place: int) -> None:
        reads[place] += 1
        # A change that was heard of before the question is in the answer.
        if not config.stale and config.revision < at_least:
            wrong.append((config.revision, at_least))

    async def loop_of_its_own(place: int) -> None:
        while not stop.is_set():
            heard = client.revision
            check(await client.resolve("billing"), min(heard, written[0]), place)
            await asyncio.sleep(0)

    def jobs() -> None:
        while not stop.is_set():
            heard = client.revision
            check(asyncio.run(client.resolve("billing")), min(heard, written[0]), 4)

    client.connect_now()
    before, threads_before = sockets(), threading.active_count()
    threads = [
        threading.Thread(target=lambda n=n: asyncio.run(loop_of_its_own(n))) for n in range(4)
    ]
    threads.append(threading.Thread(target=jobs))
    for each in threads:
        each.start()
    try:
        for number in range(10_000):
            revision = write(process, "PUT", "/billing", {"llm_max_tokens": 2 + number % 1000})
            until(lambda wanted=revision: client.revision >= wanted)  # type: ignore[misc]
            written[0] = revision
    finally:
        stop.set()
        for each in threads:
            each.join()
    assert wrong == []
    assert min(reads) > 1000
    until(lambda: sockets() <= before + 1)
    until(lambda: threading.active_count() <= threads_before)
    client.close_now()
