"""BlockingSLMClient: synchronous code, many threads, and a fork in the middle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from slm import BlockingSLMClient, ClientStatus, Step, Timings
from tests.support.faults.backends import TENTH
from tests.support.processes import create, process, until, write
from tests.support.servers import ServerProcess

server = process


def make(server: ServerProcess, **options: Any) -> BlockingSLMClient:
    return BlockingSLMClient(
        server.url, token=server.backend_token, timings=Timings(**TENTH), **options
    )


def test_it_is_the_same_client_without_await(server: ServerProcess) -> None:
    """connect, resolve, get_agent_config, on_change, status and close, all in plain code."""
    told: list[str] = []
    with make(server) as client:
        assert client.status == "live"
        client.on_change(lambda agent_id, _: told.append(agent_id))
        revision = create(server, "billing", llm_model="m1")
        until(lambda: client.revision >= revision)
        assert client.resolve("billing").revision == revision
        assert client.get_agent_config("billing")["llm_model"] == "m1"
        assert client.resolve("unknown").step is Step.DEFAULT
        assert client.get_default_agent_config()["llm_model"] == "mistral:7b-instruct"
        assert client.last_error is None
        assert told == ["billing"]
    assert client.status is ClientStatus.CLOSED
    client.close()
    assert client.resolve("billing").llm_model == "m1"


def test_any_number_of_threads_may_ask(server: ServerProcess) -> None:
    """Sixteen threads, the first questions at once, changes meanwhile: each answer is whole."""
    client = make(server)
    create(server, "billing", llm_model="m0", llm_temperature=0.0)

    def ask(_: int) -> tuple[str, float | None]:
        config = client.resolve("billing")
        return config.llm_model, config.llm_temperature

    with ThreadPoolExecutor(16) as threads:
        found = set(threads.map(ask, range(64)))
        for n in range(1, 20):
            body = {"llm_model": f"m{n}", "llm_temperature": n / 10}
            revision = write(server, "PUT", "/billing", body)
            found |= set(threads.map(ask, range(64)))
        until(lambda: client.revision >= revision)
        found |= set(threads.map(ask, range(64)))
    assert found <= {(f"m{n}", n / 10) for n in range(20)}
    assert ("m19", 1.9) in found
    client.close()


FORKING = """
import asyncio, json, os, sys, time
from slm import BlockingSLMClient, SLMClient, Timings

url, token, timings = sys.argv[1], sys.argv[2], Timings(**json.loads(sys.argv[3]))
blocking = BlockingSLMClient(url, token=token, timings=timings)
blocking.connect()
held = SLMClient(url, token=token, timings=timings)
loop = asyncio.new_event_loop()
loop.run_until_complete(held.connect())

def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)

def say(**what):
    os.write(1, (json.dumps(what) + "\\n").encode())

child = os.fork()
me = "child" if child == 0 else "parent"
if child == 0:
    # What the parent knew is there before anything was asked for.
    say(who=me, kept=blocking.client._cache.find("default") is not None, live=str(blocking.status))
say(who=me, model=blocking.resolve("default").llm_model)
sys.stdin.readline() if child else os.read(int(sys.argv[4]), 1)
until(lambda: blocking.resolve("default").llm_model == "after-the-fork")
say(who=me, followed=blocking.status.value, error=blocking.last_error)

async def again():
    config = await held.resolve("default")
    while config.llm_model != "after-the-fork":
        await asyncio.sleep(0.01)
        config = await held.resolve("default")
    status = held.status.value
    await held.close()
    return status

if child == 0:
    say(who=me, asynchronous=asyncio.run(again()))
    blocking.close()
    os._exit(0)
os.waitpid(child, 0)
say(who=me, asynchronous=loop.run_until_complete(again()))
say(who=me, after=blocking.status.value)
blocking.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_right_after_a_fork_both_go_on(server: ServerProcess, tmp_path: Path) -> None:
    """Parent and child each follow the SLM; the child with a thread and a stream of its own."""
    script = tmp_path / "forking.py"
    script.write_text(textwrap.dedent(FORKING))
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [
            sys.executable,
            "-W",
            "ignore",
            str(script),
            server.url,
            server.backend_token,
            json.dumps(TENTH),
            str(reader),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[reader],
    )
    assert process.stdout is not None
    said: list[dict[str, Any]] = [json.loads(process.stdout.readline()) for _ in range(3)]
    write(server, "PUT", "/default", {"llm_model": "after-the-fork"})
    os.write(writer, b"x")
    out, errors = process.communicate(b"\n", timeout=60)
    assert process.returncode == 0, errors.decode()
    said += [json.loads(line) for line in out.splitlines()]
    os.close(reader)
    os.close(writer)

    def of(who: str) -> dict[str, Any]:
        return {k: v for each in said if each["who"] == who for k, v in each.items() if k != "who"}

    assert of("child") == {
        "kept": True,
        "live": "starting",
        "model": "mistral:7b-instruct",
        "followed": "live",
        "error": None,
        "asynchronous": "live",
    }
    assert of("parent") == {
        "model": "mistral:7b-instruct",
        "followed": "live",
        "error": None,
        "asynchronous": "live",
        "after": "live",
    }
