"""Long reads beside the writers; a SQLite file is this server's alone, as long as it is there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, text

from slm.errors import DatabaseUnavailable, OutcomeUnknown, Overloaded, StartupError
from slm.server.db.database import LONG_READERS, LONG_READS
from slm.server.db.errors import DatabaseHeld
from tests.server.test_database import execute, opened
from tests.support.raw import Api
from tests.support.servers import InLoopServer, eventually

FOR_EVER = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
    " SELECT max(i) FROM n",
    "postgresql": "SELECT pg_sleep(60)",
}


class Blocked:
    """A read that has begun and goes on when it is told to."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, connection: Connection) -> list[int]:
        query = text("SELECT count(*) FROM t")
        counts = [connection.execute(query).scalar_one()]
        self.begun.set()
        self.go_on.wait(10)
        return [*counts, connection.execute(query).scalar_one()]


async def test_no_writer_waits_for_a_long_read(database_url: str) -> None:
    """Writes go on beside it, and it sees one moment of the database."""
    async with opened(database_url) as database:
        await database.run(execute("CREATE TABLE t (a INTEGER)"))
        reads = [Blocked() for _ in range(LONG_READERS)]
        tasks = [asyncio.create_task(database.read_long(read)) for read in reads]
        for read in reads:
            await asyncio.to_thread(read.begun.wait, 10)
        for _ in range(20):
            await database.run(execute("INSERT INTO t VALUES (1)"))
        for read in reads:
            read.go_on.set()
        assert await asyncio.gather(*tasks) == [[0, 0]] * LONG_READERS
        assert await database.read_long(execute("SELECT count(*) FROM t")) == [(20,)]


async def test_a_long_read_is_interrupted_at_its_time(database_url: str) -> None:
    """What takes too long is ended in the database too, and its connection is of use again."""
    async with opened(database_url) as database:
        for _ in range(LONG_READERS + 1):
            began = time.monotonic()
            with pytest.raises(DatabaseUnavailable, match="in time"):
                await database.read_long(execute(FOR_EVER[database.dialect]), seconds=0.1)
            assert time.monotonic() - began < 2
        assert await database.read_long(execute("SELECT 1"), seconds=5) == [(1,)]
        if database.dialect == "postgresql":
            query = "SELECT count(*) FROM pg_stat_activity WHERE query = :q AND state = 'active'"
            busy = execute(query, q=FOR_EVER["postgresql"])

            async def ended() -> bool:
                return bool(await database.read(busy) == [(0,)])

            await eventually(ended)


async def test_a_transaction_that_takes_too_long_is_interrupted(database_url: str) -> None:
    """Not a long read alone: after its time the thread is free again, and nothing was changed."""
    async with opened(database_url) as database:
        await database.run(execute("CREATE TABLE t (a INTEGER)"))
        database.answer_within(0.2)

        def work(connection: Connection) -> None:
            connection.execute(text("INSERT INTO t VALUES (1)"))
            connection.execute(text(FOR_EVER[database.dialect]))

        with pytest.raises(DatabaseUnavailable, match="in time"):
            await database.run(work)
        database.answer_within(5)
        assert await database.run(execute("SELECT count(*) FROM t")) == [(0,)]


async def test_long_reads_are_bounded(database_url: str) -> None:
    """Too many at once are refused, and so is one whose turn does not come in time."""
    async with opened(database_url) as database:
        await database.run(execute("CREATE TABLE t (a INTEGER)"))
        reads = [Blocked() for _ in range(LONG_READERS)]
        tasks = [asyncio.create_task(database.read_long(read)) for read in reads]
        for read in reads:
            await asyncio.to_thread(read.begun.wait, 10)
        with pytest.raises(Overloaded):
            await database.read_long(execute("SELECT 1"), seconds=0.05)
        more = LONG_READS - LONG_READERS
        waiting = execute("SELECT 1")
        tasks += [asyncio.create_task(database.read_long(waiting)) for _ in range(more)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await database.read_long(execute("SELECT 1"))
        for task in tasks[LONG_READERS:]:
            task.cancel()
        for read in reads:
            read.go_on.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await database.read_long(execute("SELECT 1")) == [(1,)]


async def test_a_long_read_cannot_write(database_url: str) -> None:
    """Its connection is for reading alone."""
    async with opened(database_url) as database:
        await database.run(execute("CREATE TABLE t (a INTEGER)"))
        with pytest.raises(DatabaseUnavailable):
            await database.read_long(execute("INSERT INTO t VALUES (1)"))
        assert await database.read(execute("SELECT * FROM t")) == []


# --- a SQLite file is this process's alone ---


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'test.db'}"


def outside(path: Path, *statements: str) -> str:
    """Run statements in another process, as the sqlite3 shell does; return what it says."""
    script = "import sqlite3, sys\nc = sqlite3.connect(sys.argv[1], timeout=0.1)\n"
    script += "for s in sys.argv[2:]: print(c.execute(s).fetchall())"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), *statements], capture_output=True, text=True
    )
    return (done.stdout + done.stderr).strip().splitlines()[-1]


@pytest.mark.parametrize("shared", [True, False])
async def test_no_other_process_reads_or_writes_the_file(
    sqlite_url: str, tmp_path: Path, shared: bool
) -> None:
    """Also while nothing is under way, after long reads and on a disk without shared memory."""
    path = tmp_path / "test.db"
    if not shared:
        # Stands for a file system that has none.
        (tmp_path / "test.db-shm").mkdir()
    async with opened(sqlite_url) as database:
        await database.run(execute("CREATE TABLE t (a INTEGER)"))
        assert await database.read_long(execute("SELECT * FROM t")) == []
        for statement in ("SELECT * FROM t", "INSERT INTO t VALUES (1)", "PRAGMA journal_mode=OFF"):
            said = await asyncio.to_thread(outside, path, statement)
            assert "locked" in said, (statement, said)
        exclusive = ("PRAGMA locking_mode=EXCLUSIVE", "SELECT * FROM t")
        assert "locked" in await asyncio.to_thread(outside, path, *exclusive)
        await database.run(execute("INSERT INTO t VALUES (2)"))
    assert outside(path, "SELECT * FROM t") == "[(2,)]"


async def test_a_reader_from_outside_keeps_the_server_from_starting(
    sqlite_url: str, tmp_path: Path
) -> None:
    """A shell that is in a read when the server starts is another process too."""
    path = tmp_path / "test.db"
    async with opened(sqlite_url) as database:
        await database.run(execute("CREATE TABLE t (a INTEGER)"))
    script = (
        "import sqlite3, sys\nc = sqlite3.connect(sys.argv[1])\nc.execute('BEGIN')\n"
        "c.execute('SELECT * FROM t').fetchall()\nprint('reads', flush=True)\nsys.stdin.read()"
    )
    shell = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script, str(path)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert shell.stdout is not None
    assert await shell.stdout.readline() == b"reads\n"
    with pytest.raises(DatabaseHeld):
        async with opened(sqlite_url):
            pass
    await shell.communicate(b"")
    async with opened(sqlite_url) as database:
        assert await database.run(execute("SELECT * FROM t")) == []


async def test_two_openers_of_one_process_are_two(sqlite_url: str) -> None:
    """The second is refused, and does not take the first one's lock away."""
    async with opened(sqlite_url) as database:
        path = database.path
        assert path is not None
        for _ in range(2):
            with pytest.raises(StartupError, match="Another process holds"):
                async with opened(sqlite_url):
                    pass
        assert "locked" in await asyncio.to_thread(outside, path, "SELECT 1 FROM sqlite_master")


# --- and it is still there ---


def remove(folder: Path) -> None:
    for path in folder.glob("slm.db*"):
        path.unlink()


def rename(folder: Path) -> None:
    (folder / "slm.db").rename(folder / "elsewhere.db")


def replace(folder: Path) -> None:
    copy = folder / "copy.db"
    copy.write_bytes((folder / "slm.db").read_bytes())
    copy.replace(folder / "slm.db")


def remove_wal(folder: Path) -> None:
    (folder / "slm.db-wal").unlink()


def replace_wal(folder: Path) -> None:
    (folder / "wal").write_bytes(b"")
    (folder / "wal").replace(folder / "slm.db-wal")


def rename_folder(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


LOSSES: list[Callable[[Path], None]] = [
    *(remove, rename, replace, remove_wal, replace_wal, rename_folder)
]


@pytest.mark.parametrize("lose", LOSSES)
async def test_a_file_that_is_not_there_takes_no_write(
    server: InLoopServer,
    admin: Api,
    caplog: pytest.LogCaptureFixture,
    lose: Callable[[Path], None],
) -> None:
    """Removed, renamed or replaced under the server: 503, /readyz red, and the log says what."""
    assert (await admin.put("default", llm_model="m1")).status == 200
    services = server.running.services
    data_dir = server.data_dir
    lose(data_dir)
    for answer in (
        await admin.put("default", llm_model="m2"),
        await admin.get("/api/snapshot"),
        await admin.get("/api/agents/default/history"),
    ):
        assert (answer.status, answer.code) == (503, "database-unavailable")
        assert "removed or replaced" in answer.json["detail"]

    async def is_red() -> bool:
        answer = await admin.get("/readyz")
        return answer.status == 503 and answer.json["database"] is False

    await eventually(is_red)
    assert (await admin.get("/api/agents/default")).json["llm_model"] == "m1"
    assert services.feed.position == 2
    told = [r for r in caplog.records if "removed or replaced under the server" in r.getMessage()]
    assert len(told) == 1


def cut(folder: Path) -> None:
    os.truncate(folder / "slm.db", 0)


def cut_wal(folder: Path) -> None:
    os.truncate(folder / "slm.db-wal", 0)


def copy_over(folder: Path) -> None:
    with contextlib.closing(sqlite3.connect(folder / "other.db")) as other:
        other.execute("CREATE TABLE agents (agent_id TEXT)")
    shutil.copyfile(folder / "other.db", folder / "slm.db")


@pytest.mark.parametrize("spoil", [cut, cut_wal, copy_over])
async def test_a_file_that_was_overwritten_or_cut_takes_no_write(
    server: InLoopServer,
    admin: Api,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], None],
) -> None:
    """Another program writes into the file: SQLite would go on in its cache and lose it all."""
    assert (await admin.put("default", llm_model="m1")).status == 200
    spoil(server.data_dir)
    for answer in (await admin.put("default", llm_model="m2"), await admin.get("/api/snapshot")):
        assert (answer.status, answer.code) == (503, "database-unavailable")
        assert "overwritten or cut" in answer.json["detail"]

    async def is_red() -> bool:
        return (await admin.get("/readyz")).status == 503

    await eventually(is_red)
    assert (await admin.get("/api/agents/default")).json["llm_model"] == "m1"
    told = [r for r in caplog.records if "Nothing is written any more" in r.getMessage()]
    assert len(told) == 1


async def test_a_file_that_was_put_back_goes_on(server: InLoopServer, admin: Api) -> None:
    """The same file under its name again: the server writes on without a restart."""
    assert (await admin.put("default", llm_model="m1")).status == 200
    moved = server.data_dir.with_name("moved")
    server.data_dir.rename(moved)
    assert (await admin.put("default", llm_model="m2")).status == 503
    moved.rename(server.data_dir)
    assert (await admin.put("default", llm_model="m3")).status == 200

    async def is_green() -> bool:
        return (await admin.get("/readyz")).status == 200

    await eventually(is_green)
    await server.stop()
    await server.start()
    assert (await admin.get("/api/agents/default")).json["llm_model"] == "m3"


async def test_a_file_removed_in_a_write_is_an_unknown_outcome(
    sqlite_url: str, tmp_path: Path
) -> None:
    """A write committed to a removed file is answered as an unknown outcome."""
    async with opened(sqlite_url) as database:
        await database.run(execute("CREATE TABLE t (a INTEGER)"))

        def work(connection: Connection) -> None:
            connection.execute(text("INSERT INTO t VALUES (1)"))
            (tmp_path / "test.db").unlink()

        told: list[Any] = []
        with pytest.raises(OutcomeUnknown, match="removed or replaced"):
            await database.run(work, committed=told.append)
        assert told == []


async def test_what_was_removed_can_still_be_copied(sqlite_url: str, tmp_path: Path) -> None:
    """The open file holds everything until the server stops."""
    async with opened(sqlite_url) as database:
        await database.run(execute("CREATE TABLE t (a INTEGER)"))
        await database.run(execute("INSERT INTO t VALUES (7)"))
        for path in (tmp_path / f"test.db{suffix}" for suffix in ("", "-wal", "-shm")):
            path.unlink()
        (tmp_path / "copy.db").touch()
        await database.copy_into(tmp_path / "copy.db")
    assert sqlite3.connect(tmp_path / "copy.db").execute("SELECT a FROM t").fetchall() == [(7,)]
