"""A server in a process of its own, as the benches use it: start, ask its side door, stop."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from benchmarks.harness import seed
from slm.server.settings import Settings


class BenchServer:
    """The server on a database of N agents, in a temporary folder.

    Args:
        agents: how many agents there are.
        keys: whether each has an API key.
        core: the core it is kept on; None: any.
        before_start: given the settings, makes more of the database before the server opens it.
        settings: fields of the server's settings that differ from the defaults.
    """

    def __init__(
        self,
        *,
        agents: int = 10,
        keys: bool = False,
        core: int | None = None,
        before_start: Callable[[Settings], Awaitable[None]] | None = None,
        **settings: Any,
    ) -> None:
        self._agents = agents
        self._keys = keys
        self._core = core
        self._before_start = before_start
        self._settings = settings
        self._folder = tempfile.TemporaryDirectory(prefix="slm-bench-")
        self.data_dir = Path(self._folder.name) / "data"
        self.url = ""
        self._process: asyncio.subprocess.Process | None = None
        self._session: aiohttp.ClientSession | None = None

    @property
    def port(self) -> int:
        """Where it listens on 127.0.0.1."""
        return int(self.url.rpartition(":")[2])

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def admin_token(self) -> Path:
        """The file of a token of every scope but key:read."""
        return self.data_dir / "admin.token"

    @property
    def backend_token(self) -> Path:
        """The file of a token for reading, keys included."""
        return self.data_dir / "backend.token"

    async def __aenter__(self) -> BenchServer:
        key = await asyncio.to_thread(
            seed.make_database, self.data_dir, self._agents, keys=self._keys
        )
        if self._before_start is not None:
            given: dict[str, Any] = {"data_dir": self.data_dir, "encryption_keys": key}
            await self._before_start(Settings(**given, **self._settings))
        door = Path(self._folder.name) / "door"
        arguments = [str(self.data_dir), str(door), json.dumps(self._settings)]
        pin = self._core is not None and functools.partial(os.sched_setaffinity, 0, {self._core})
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "benchmarks.harness.server_process",
            *arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=pin or None,
            env=os.environ | {"SLM_ENCRYPTION_KEYS": key},
        )
        assert self._process.stdout is not None
        async with asyncio.timeout(180):
            words = (await self._process.stdout.readline()).decode().split()
        if words[:1] != ["READY"]:
            raise RuntimeError("the server did not start")
        self.url = words[1]
        self._reader, self._writer = await asyncio.open_unix_connection(door, limit=2**26)
        token = self.admin_token.read_text().strip()
        self._session = aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"})
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()
        if self._process is not None and self._process.returncode is None:
            # Nothing is to be kept, and closing 10,000 streams in order takes seconds.
            self._process.kill()
            await self._process.wait()
        self._folder.cleanup()

    async def ask(self, what: str) -> Any:
        """Ask the side door: memory, acks, commits, cpu, floor, naive."""
        self._writer.write(what.encode() + b"\n")
        async with asyncio.timeout(120):
            return json.loads(await self._reader.readline())

    async def etag(self, path: str) -> str:
        """Return the entity tag of a path's answer."""
        assert self._session is not None
        async with self._session.get(self.url + path) as answer:
            answer.raise_for_status()
            return answer.headers["ETag"]

    async def put(self, agent_id: str, **fields: Any) -> int:
        """Change an agent over HTTP; return the revision of the change."""
        assert self._session is not None
        url = f"{self.url}/api/agents/{agent_id}"
        async with self._session.put(url, json=fields, ssl=False) as answer:
            if answer.status != 200:
                raise RuntimeError(f"PUT answered {answer.status}")
            return int(answer.headers["SLM-Revision"])

    async def commit_times(self) -> dict[int, int]:
        """Return when each write since the last call was committed, in ns."""
        return {int(revision): when for revision, when in (await self.ask("commits")).items()}

    async def live(self, count: int) -> None:
        """Wait until `count` streams are live."""
        for _ in range(600):
            if (await self.ask("memory"))["live"] >= count:
                return
            await asyncio.sleep(0.05)
        raise RuntimeError("the subscribers are not all live")

    async def acked(self, count: int) -> None:
        """Wait until `count` streams have acked the newest change."""
        for _ in range(3000):
            if (await self.ask("acks"))["acked"] >= count:
                return
            await asyncio.sleep(0.01)
        raise RuntimeError("the acks did not come")
