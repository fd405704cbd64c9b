"""Real SLM servers for tests: in this loop or as a child, on port 0, at a tenth of the time.

Every timing is a setting; nothing here waits for a while, `eventually` waits for a condition.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar, overload

from slm.server.serve import SLMServer
from slm.server.settings import Settings
from tests.support.forked import Forked, forked

T = TypeVar("T")

TENTH: dict[str, Any] = {
    "heartbeat_seconds": 2.0,
    "ping_interval_seconds": 2.0,
    "ping_timeout_seconds": 2.0,
    "behind_after_seconds": 0.5,
    "poll_interval_seconds": 0.1,
    "min_revision_wait_seconds": 0.2,
    "header_timeout_seconds": 1.0,
    "shutdown_seconds": 0.3,
    "testing": True,
}
"""The timings of a server under test: a tenth of the defaults."""


@overload
async def eventually(
    condition: Callable[[], Awaitable[T]], timeout: float = 10.0, every: float = 0.01
) -> T: ...
@overload
async def eventually(
    condition: Callable[[], T], timeout: float = 10.0, every: float = 0.01
) -> T: ...
async def eventually(
    condition: Callable[[], Any], timeout: float = 10.0, every: float = 0.01
) -> Any:
    """Wait until `condition` (plain or async) answers something true, and return that.

    Args:
        condition: asked again and again; an exception from it is not caught.
        timeout: seconds after which the test fails.
        every: seconds between two questions.

    Raises:
        AssertionError: it did not become true in time.
    """
    deadline = time.monotonic() + timeout
    while True:
        answer = condition()
        value: Any = await answer if inspect.isawaitable(answer) else answer
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {inspect.getsource(condition).strip()}")
        await asyncio.sleep(every)


def reads_keys(path: str) -> bool:
    """Say whether a GET of this path needs the scope key:read, which admin.token does not have."""
    return path.partition("?")[0].endswith(("/llm", "/api/snapshot"))


def read_token(data_dir: Path, name: str) -> str:
    """Return the token that the server wrote into `NAME.token` of its data directory."""
    return (data_dir / f"{name}.token").read_text().strip()


class InLoopServer:
    """A whole SLM server in the test's own loop; `stop` and `start` keep its port and its data.

    Attributes:
        data_dir: where its database, keys and tokens are.
        url: `http://127.0.0.1:PORT` of the last start.
    """

    def __init__(self, data_dir: Path, **settings: Any) -> None:
        self.data_dir = data_dir
        self.url = ""
        self._settings: dict[str, Any] = {"port": 0} | TENTH | settings | {"data_dir": data_dir}
        self._server: SLMServer | None = None

    @property
    def admin_token(self) -> str:
        """A token of every scope but key:read."""
        return read_token(self.data_dir, "admin")

    @property
    def backend_token(self) -> str:
        """A token of the scopes config:read and key:read."""
        return read_token(self.data_dir, "backend")

    @property
    def running(self) -> SLMServer:
        """The server itself, for tests that look inside (feed, hub, database)."""
        assert self._server is not None, "the server is stopped"
        return self._server

    async def start(self, **settings: Any) -> None:
        """Start, or start again on the same port with the same data.

        Args:
            **settings: what is to differ from now on; None takes the default again.
        """
        assert self._server is None, "the server is running already"
        self._settings = _without_none(self._settings | settings)
        server = SLMServer(Settings(**self._settings))
        self.url = await server.start()
        self._settings["port"] = int(self.url.rpartition(":")[2])
        self._server = server

    async def stop(self) -> None:
        """Stop in the orderly way, as SIGTERM does."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop()


@contextlib.asynccontextmanager
async def running_server(data_dir: Path, **settings: Any) -> AsyncIterator[InLoopServer]:
    """Run a server in this loop for as long as the block lasts.

    Args:
        data_dir: its data directory; made, migrated and seeded when empty.
        **settings: fields of `Settings` that differ from the tests' own.
    """
    server = InLoopServer(data_dir, **settings)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


class ServerProcess:
    """`slm serve` as a process of its own, to be killed, stopped and started again.

    Attributes:
        data_dir: where its database, keys and tokens are.
        log_path: everything that it ever printed, over all its lives.
        url: the address of the last start.
    """

    _READY = re.compile(r"^SLM ready at (https?://\S+)$", re.MULTILINE)

    def __init__(
        self, data_dir: Path, *, env: dict[str, str] | None = None, **settings: Any
    ) -> None:
        self.data_dir = data_dir
        self.url = ""
        self.log_path = data_dir.parent / f"{data_dir.name}.log"
        self._port = 0
        self._settings = TENTH | settings
        self._env = env or {}
        self._process: Forked | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What it was started with."""
        return dict(self._settings)

    admin_token = property(lambda self: read_token(self.data_dir, "admin"))
    backend_token = property(lambda self: read_token(self.data_dir, "backend"))

    @property
    def process(self) -> Forked:
        """The child process of the last start."""
        assert self._process is not None, "the server was never started"
        return self._process

    @property
    def log(self) -> str:
        """What it printed so far, over all its lives."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    async def start(self, timeout: float = 30.0, **settings: Any) -> None:
        """Start and wait for its ready line; after the first start, on the same port.

        Args:
            timeout: seconds after which the test fails.
            **settings: what is to differ from now on; None takes the default again.

        Raises:
            AssertionError: it ended instead; the message has what it printed.
        """
        self._settings = _without_none(self._settings | settings)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLM_")}
        given = {f"SLM_{name.upper()}": _env_text(v) for name, v in self._settings.items()}
        arguments = ["serve", "--port", str(self._port), "--data", str(self.data_dir)]
        before = len(self.log)
        self._process = self._spawn(arguments, inherited | given | self._env)

        def ready() -> re.Match[str] | None:
            assert self.process.poll() is None, f"the server ended: {self.log[before:]}"
            return self._READY.search(self.log, before)

        match = await eventually(ready, timeout)
        assert match is not None
        self.url = match[1]
        self._port = int(self.url.rpartition(":")[2])

    def _spawn(self, arguments: list[str], environment: dict[str, str]) -> Any:
        """Start the process; a subclass may do it in another way."""
        log = str(self.log_path)
        return forked(arguments, environment, stdout=log, stderr=log)

    def kill(self) -> None:
        """End it as a power cut does (SIGKILL)."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, such as SIGSTOP and SIGCONT."""
        self.process.send_signal(number)

    async def terminate(self, timeout: float = 15.0) -> int:
        """End it in the orderly way (SIGTERM) and return its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        return await self.wait(timeout)

    async def wait(self, timeout: float = 15.0) -> int:
        """Wait until it has ended by itself and return its exit code."""
        await eventually(lambda: self.process.poll() is not None, timeout)
        return self.process.wait()

    async def __aenter__(self) -> ServerProcess:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.kill()


def _without_none(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _env_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
