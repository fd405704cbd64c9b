"""The two C programs and the C loop: compiled when first used, driven from here.

The subscriber farm and the HTTP load are in C so that their own cost is not what is measured.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.errors import Missing

SOURCES = Path(__file__).parent
BUILD = Path(__file__).parents[1] / "build"


def build(name: str, *flags: str, output: str = "") -> Path:
    """Compile `native/NAME.c` unless that is done already; return the program or library.

    Raises:
        Missing: there is no C compiler, or a library that the flags ask for is not installed.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise Missing("a C compiler (apt-get install gcc)")
    source, target = SOURCES / f"{name}.c", BUILD / (output or name)
    if target.exists() and target.stat().st_mtime > source.stat().st_mtime:
        return target
    BUILD.mkdir(exist_ok=True)
    libraries = [flag for flag in flags if flag.startswith("-l")]
    others = [flag for flag in flags if not flag.startswith("-l")]
    command = [compiler, "-O2", *others, "-o", str(target), str(source), *libraries]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise Missing(f"{name}.c does not compile here: {result.stderr.strip().splitlines()[0]}")
    return target


@functools.cache
def floor_library() -> ctypes.CDLL:
    """Return the library with `send_to_all`, the C loop that a broadcast is held against."""
    return ctypes.CDLL(str(build("floor", "-shared", "-fPIC", output="floor.so")))


@dataclass(frozen=True)
class Received:
    """When one frame arrived at all subscribers; nanoseconds of the monotonic clock.

    Attributes:
        count: how many got it.
        first: when the first did; `p50`, `p99`, `last` likewise.
        cpu_ns: what the farm itself spent meanwhile.
    """

    count: int
    first: int
    p50: int
    p99: int
    last: int
    cpu_ns: int


class Farm:
    """N WebSocket subscribers in one C process, pinned to a core.

    Args:
        port: of the server, on 127.0.0.1.
        token_file: holds the bearer token.
        capacity: the most connections there will be.
        core: the core it runs on.
        tls: whether it speaks TLS.
        acks: whether each subscriber names itself and acks each change, as the SDK does; without,
            they only listen.
    """

    def __init__(
        self,
        port: int,
        token_file: Path,
        capacity: int,
        core: int,
        *,
        tls: bool = False,
        acks: bool = False,
    ) -> None:
        if tls:
            program = build("farm", "-DWITH_TLS", "-lssl", "-lcrypto", output="farm-tls")
        else:
            program = build("farm")
        self._command = [str(program), str(port), str(capacity), str(token_file)]
        self._command += ["tls"] if tls else []
        self._command += ["ack"] if acks else []
        self._core = core
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Farm:
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=functools.partial(os.sched_setaffinity, 0, {self._core}),
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def grow(self, count: int) -> float:
        """Connect until `count` are subscribed; return how many seconds it took."""
        self._say(f"GROW {count}")
        return float((await self._hear("GROWN"))[1])

    async def expect(self) -> None:
        """Begin to wait for one change frame at every connection."""
        self._say("EXPECT")
        await self._hear("EXPECTING")

    async def received(self) -> Received:
        """Return when the expected frame arrived, once all have it."""
        return Received(*map(int, await self._hear("FRAME")))

    def _say(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    async def _hear(self, word: str) -> list[str]:
        assert self._process is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(150):
            words = (await self._process.stdout.readline()).decode().split()
        if not words or words[0] != word:
            raise RuntimeError(f"the farm said {words or 'nothing'} where {word} was expected")
        return words[1:]


@dataclass(frozen=True)
class Load:
    """What an HTTP load saw; times in milliseconds."""

    requests: int
    seconds: float
    p50: float
    p90: float
    p99: float
    max: float
    answer_bytes: int
    ok: int
    not_modified: int
    failed: int

    @property
    def per_second(self) -> float:
        """Answers a second."""
        return self.requests / self.seconds


async def http_load(
    port: int,
    token_file: Path,
    path: str,
    *,
    core: int,
    connections: int,
    seconds: float,
    rate: float = 0,
    headers: Sequence[str] = (),
    samples: Path | None = None,
) -> Load:
    """Send GETs over kept connections from one core; as fast as they are answered, or at `rate`."""
    arguments = [port, token_file, path, connections, seconds, rate, samples or "-", *headers]
    process = await asyncio.create_subprocess_exec(
        str(build("load")),
        *map(str, arguments),
        stdout=subprocess.PIPE,
        preexec_fn=functools.partial(os.sched_setaffinity, 0, {core}),
    )
    answer, _ = await asyncio.wait_for(process.communicate(), seconds + 60)
    if process.returncode:
        raise RuntimeError(f"the HTTP load on {path} ended with {process.returncode}")
    words = answer.split()
    return Load(int(words[0]), *map(float, words[1:6]), *map(int, words[6:]))  # type: ignore[arg-type]
