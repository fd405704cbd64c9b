"""SIGTERM and Ctrl-C while the server is still starting: it ends, whatever it waits for."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from tests.support.postgres import connect
from tests.support.servers import ServerProcess, eventually
from tests.support.store import KEY

ENDS_WITHIN_SECONDS = 8.0
"""On a machine that is busy with other tests; alone it is at most two."""


async def ends(server: ServerProcess, until: Callable[[], Awaitable[object]]) -> None:
    """Start, wait until it waits, tell it to end, and look at how it does."""
    starting = asyncio.create_task(server.start(timeout=60))
    try:
        await until()
        assert server.process.poll() is None, server.log
        told_at = time.monotonic()
        server.send_signal(signal.SIGTERM)
        code = await server.wait(ENDS_WITHIN_SECONDS * 3)
        assert time.monotonic() - told_at < ENDS_WITHIN_SECONDS
        assert code == 0
        assert "Traceback" not in server.log
    finally:
        server.kill()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)


async def test_while_another_server_migrates(postgres_url: str, tmp_path: Path) -> None:
    """A start that waits for another server's migration lock ends at SIGTERM."""
    server = ServerProcess(
        tmp_path / "data", database_url=postgres_url, encryption_keys=KEY, log_level="info"
    )
    with connect(postgres_url) as other:
        other.execute("SELECT pg_advisory_lock(%s)", (0x514D0001,))

        def waits() -> bool:
            query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            row = other.execute(query).fetchone()
            return row == (1,)

        await ends(server, lambda: eventually(waits, timeout=30))


@contextlib.asynccontextmanager
async def silent() -> AsyncIterator[tuple[int, asyncio.Event]]:
    """A port where somebody accepts and never says a word."""
    connected = asyncio.Event()

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        with contextlib.suppress(OSError):
            await reader.read()
        writer.close()

    listener = await asyncio.start_server(hear, "127.0.0.1", 0)
    try:
        yield listener.sockets[0].getsockname()[1], connected
    finally:
        listener.close()


async def test_while_the_database_is_silent(tmp_path: Path) -> None:
    """A network that swallows everything does not hold it."""
    async with silent() as (port, connected):
        url = f"postgresql://slm@127.0.0.1:{port}/slm"
        server = ServerProcess(tmp_path / "data", database_url=url, encryption_keys=KEY)
        await ends(server, connected.wait)


async def test_while_the_key_command_runs(tmp_path: Path) -> None:
    """A command that never comes back and hears no signal does not hold it."""
    begun = tmp_path / "begun"
    script = tmp_path / "command.py"
    script.write_text(
        "import pathlib, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(begun)!r}).touch()\ntime.sleep(20)\n"
    )
    command = f"{sys.executable} {script}"
    server = ServerProcess(tmp_path / "data", encryption_key_command=command)
    await ends(server, lambda: eventually(begun.exists, timeout=30))
