"""A PostgreSQL primary with a streaming standby, to be lost and promoted as in a real failover.

Replication is asynchronous and passes a proxy, so that a test decides which commits the standby
never hears of.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL

from tests.support.faults.network import Passage, Proxy
from tests.support.postgres import (
    connect,
    free_port,
    other_user,
    programs,
    reachable,
    run,
    wait_until_ready,
)


class Wire(Proxy):
    """A proxy that passes bytes on unread; its target may change."""

    def _seen(self, passage: Passage, data: bytes, direction: str) -> bytes:
        return data


class Node:
    """One PostgreSQL server with a data directory of its own."""

    def __init__(self, folder: Path, binaries: Path, user: int | None) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.port = free_port()
        self._binaries = binaries
        self._user = user
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database: str = "postgres") -> URL:
        """Return the URL of a database on this server, past every proxy."""
        return URL.create("postgresql+psycopg", "postgres", None, "127.0.0.1", self.port, database)

    def run(self, program: str, *arguments: str | Path) -> None:
        """Run one of PostgreSQL's programs as the server's user."""
        run([self._binaries / program, *arguments], self.folder, self._user)

    def start(self) -> None:
        """Start and wait until it answers."""
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "max_connections": 100,
            "fsync": "off",
            "wal_level": "replica",
            "hot_standby": "on",
            # A stalled replication connection must not end by itself.
            "wal_sender_timeout": 0,
            "wal_receiver_timeout": 0,
        }
        command = [str(self._binaries / "postgres"), "-D", str(self.data)]
        command += [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        log = self.folder / "log"
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                command, cwd=self.folder, user=self._user, stdin=subprocess.DEVNULL,
                stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        wait_until_ready(self._process, self.url(), log)

    def kill(self) -> None:
        """End every one of its processes at once, as a power cut does."""
        process, self._process = self._process, None
        if process is not None:
            # Its children lead sessions of their own; the postmaster's end ends them.
            process.send_signal(signal.SIGKILL)
            process.wait(30)

    def stop(self) -> None:
        """End it for good; nobody needs what it holds."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGQUIT)
            process.wait(30)

    def ask(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Return the rows of one statement."""
        with connect(self.url(database)) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description is not None else []


class Pair:
    """A primary and its standby, and the address that clients use for whichever is in charge.

    Attributes:
        primary: takes the writes until `fail_over`.
        standby: takes them afterwards.
        front: the address of the database; leads to the primary, then to the standby.
        replication: what the write-ahead log passes on its way to the standby.
        database: the name of the database.
    """

    def __init__(self, primary: Node, standby: Node, front: Wire, replication: Wire) -> None:
        self.primary = primary
        self.standby = standby
        self.front = front
        self.replication = replication
        self.database = f"slm_{secrets.token_hex(4)}"

    @property
    def url(self) -> str:
        """The database's URL by way of `front`."""
        url = self.primary.url(self.database).set(port=self.front.port)
        return url.render_as_string(hide_password=False)

    def revision(self, node: Node) -> int:
        """Return the last revision that this server holds."""
        [(revision,)] = node.ask("SELECT revision FROM state", self.database)
        return int(revision)

    def hold_replication(self) -> None:
        """From now on the standby hears of no commit, and nobody notices."""
        self.replication.stall()

    async def fail_over(self) -> None:
        """Kill the primary, promote the standby, and lead the clients to it."""
        await asyncio.to_thread(self.primary.kill)
        await self.replication.close()
        self.front.target = ("127.0.0.1", self.standby.port)
        self.front.cut()
        await asyncio.to_thread(self.standby.ask, "SELECT pg_promote(true, 30)")


@contextlib.asynccontextmanager
async def primary_and_standby() -> AsyncIterator[Pair]:
    """Run a primary with an empty database, its streaming standby and the two proxies."""
    with tempfile.TemporaryDirectory(prefix="slm-pair-", ignore_cleanup_errors=True) as name:
        root, user = Path(name), other_user()
        folders = [root / "primary", root / "standby"]
        for folder in (root, *folders):
            folder.mkdir(exist_ok=True)
            if user is not None:
                os.chown(folder, user, -1)
        binaries = reachable(programs(), root, user)
        primary, standby = (Node(folder, binaries, user) for folder in folders)
        async with contextlib.AsyncExitStack() as stack:
            front = Wire("127.0.0.1", primary.port)
            replication = Wire("127.0.0.1", primary.port)
            for proxy in (front, replication):
                await proxy.open()
                stack.push_async_callback(proxy.close)
            stack.callback(primary.stop)
            stack.callback(standby.stop)
            pair = Pair(primary, standby, front, replication)
            await asyncio.to_thread(_build, pair)
            yield pair


def _build(pair: Pair) -> None:
    primary, standby = pair.primary, pair.standby
    primary.run(
        "initdb", "-D", primary.data, "-U", "postgres", "-A", "trust", "--no-sync",
        "--locale=C.UTF-8", "-E", "UTF8",
    )  # fmt: skip
    primary.start()
    primary.ask(f'CREATE DATABASE "{pair.database}"')
    source = f"host=127.0.0.1 port={pair.replication.port} user=postgres"
    standby.run(
        "pg_basebackup", "-D", standby.data, "-d", source, "-R", "-X", "stream",
        "--checkpoint=fast", "--no-sync",
    )  # fmt: skip
    standby.start()
