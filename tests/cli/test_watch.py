"""`slm watch`: every change as it is pushed, none missed."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from tests.end_to_end.test_live_change import Operator
from tests.support.command import CANARY, environment
from tests.support.servers import ServerProcess, running_server


@asynccontextmanager
async def watching(data: Path, *arguments: str) -> AsyncIterator[Process]:
    """Run `slm watch` for the length of the block, from the moment on that it is watching."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "slm", "watch", *arguments),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        env=environment(data),
    )
    try:
        assert process.stderr is not None
        async with asyncio.timeout(30):
            line = await process.stderr.readline()
        assert line.startswith(b"watching http://127.0.0.1:"), line
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def line_of(process: Process) -> str:
    """Return the next line that it prints."""
    assert process.stdout is not None
    async with asyncio.timeout(30):
        return (await process.stdout.readline()).decode().rstrip("\n")


async def test_lines_for_people(tmp_path: Path) -> None:
    """Created, changed as old → new, a key set, deleted: one line each, in order, no key."""
    async with running_server(tmp_path) as server, aiohttp.ClientSession() as http:
        (tmp_path / "server.url").write_text(server.url)
        operator = Operator(http, server)
        async with watching(tmp_path, "--count", "5") as process:
            await operator.create("a", llm_provider="openai", llm_model="m1")
            await operator.set("a", llm_model="m2", llm_temperature=0.2)
            await operator.set("a", llm_api_key=CANARY)
            await operator.set("a", llm_provider="anthropic")
            await operator.send("DELETE", "/a")
            lines = [await line_of(process) for _ in range(5)]
            async with asyncio.timeout(30):
                rest, errors = await process.communicate()
        assert process.returncode == 0
        assert (rest, errors) == (b"", b"")
        told = [line.split(maxsplit=3) for line in lines]
        assert [(kind, rest) for _, _, kind, rest in told] == [
            ("created", "a  openai/m1"),
            ("changed", "a  model m1 → m2, temperature – → 0.2"),
            ("changed", "a  API key set"),
            ("changed", "a  provider openai → anthropic, API key cleared"),
            ("deleted", "a"),
        ]
        revisions = [int(revision) for _, revision, _, _ in told]
        assert revisions == list(range(revisions[0], revisions[0] + 5))
        assert CANARY not in "".join(lines)


async def test_json_lines_for_scripts(tmp_path: Path) -> None:
    """With --json each line is the frame, the time and what changed; AGENT leaves others out."""
    async with running_server(tmp_path) as server, aiohttp.ClientSession() as http:
        (tmp_path / "server.url").write_text(server.url)
        operator = Operator(http, server)
        async with watching(tmp_path, "b", "--json", "--count", "2") as process:
            await operator.create("a", llm_provider="openai", llm_model="m1")
            await operator.create("b", llm_provider="openai", llm_model="m1")
            await operator.set("a", llm_model="m2")
            revision = await operator.set("b", llm_model="m2")
            created, changed = (
                json.loads(await line_of(process)),
                json.loads(await line_of(process)),
            )
            await process.wait()
        assert created["type"] == "agent_created"
        assert created["agent_id"] == changed["agent_id"] == "b"
        assert changed["type"] == "agent_config_changed"
        assert changed["revision"] == revision
        assert changed["changed"] == {"llm_model": ["m1", "m2"]}
        assert changed["config"]["llm_model"] == "m2"
        assert "time" in changed


async def test_nothing_is_missed_while_the_server_is_away(tmp_path: Path) -> None:
    """Killed and started again, with changes before the watcher is back: it shows them all."""
    async with (
        ServerProcess(tmp_path / "data") as server,
        aiohttp.ClientSession() as http,
        watching(tmp_path / "data", "--json") as process,
    ):
        operator = Operator(http, server)
        first = await operator.create("a", llm_provider="openai", llm_model="m0")
        assert json.loads(await line_of(process))["revision"] == first
        server.kill()
        assert process.stderr is not None
        async with asyncio.timeout(30):
            assert b"trying again" in await process.stderr.readline()
        await server.start()
        for n in range(1, 6):
            await operator.set("a", llm_model=f"m{n}")
        told = [json.loads(await line_of(process)) for _ in range(5)]
    assert [each["revision"] for each in told] == list(range(first + 1, first + 6))
    assert told[0]["changed"] == {"llm_model": ["m0", "m1"]}


async def test_an_interrupt_ends_with_130(tmp_path: Path) -> None:
    """Ctrl-C ends a command that waits with 130, and it says nothing more."""
    async with running_server(tmp_path) as server:
        (tmp_path / "server.url").write_text(server.url)
        async with watching(tmp_path) as process:
            process.send_signal(signal.SIGINT)
            async with asyncio.timeout(30):
                rest = await process.communicate()
            assert (process.returncode, rest) == (130, (b"", b""))
